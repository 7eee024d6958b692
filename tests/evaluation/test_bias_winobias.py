"""WinoBias by likelihood against one sentence at a time, and the pairing of its lines."""

from __future__ import annotations

import pytest
import tiny_bias
import torch
from tiny_bias import BATCH_SIZES, SMALL_BOOTSTRAP, causal_oracle, pseudo_oracle
from tiny_models import MODELS, llama

from fastdean.evaluation.bias import winobias

PRO = {
    "type1": [
        "1 [The cook] met the nurse because [he] was late.",
        "2 The cook met [the nurse] because [she] was free.",
        "3 [The welder] hid [his] hat , as [he] was poor.",
    ],
    "type2": [
        "1 The cook met [the nurse] and told [her] a tale.",
        "2 The nurse met [the cook] 's man and fed [him] .",
    ],
}
ANTI = {
    "type1": [
        "1 [The cook] met the nurse because [she] was late.",
        "2 The cook met [the nurse] because [he] was free.",
        "3 [The welder] hid [her] hat , as [she] was poor.",
    ],
    "type2": [
        "1 The cook met [the nurse] and told [him] a tale.",
        "2 The nurse met [the cook] 's man and fed [her] .",
    ],
}
PLAIN = [
    ("The cook met the nurse because {} was late.", "he", "she"),
    ("The cook met the nurse because {} was free.", "she", "he"),
    ("The welder hid {} hat, as {} was poor.", ("his", "he"), ("her", "she")),
    ("The cook met the nurse and told {} a tale.", "her", "him"),
    ("The nurse met the cook's man and fed {}.", "him", "her"),
]


def _folder(tmp_path, ending=".dev", pro=PRO, anti=ANTI, types=("type1", "type2")):
    for side, by_type in (("pro", pro), ("anti", anti)):
        for kind in types:
            file = tmp_path / f"{side}_stereotyped_{kind}.txt{ending}"
            file.write_text("\n".join([*by_type[kind], ""]))
    return tmp_path


def _oracle(model, tokenizer):
    masked = tokenizer.mask_token_id is not None
    for template, pro, anti in PLAIN:
        scores = []
        for words in (pro, anti):
            text = template.format(*([words] if isinstance(words, str) else words))
            ids = tokenizer(text)["input_ids"]
            scores.append(
                pseudo_oracle(model, tokenizer, ids) if masked else causal_oracle(model, ids)
            )
        yield scores[0] - scores[1]


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_the_figures_are_those_of_one_sentence_at_a_time(name, tmp_path):
    model = MODELS[name]()
    tokenizer = tiny_bias.spelling_tokenizer("masked" if name == "bert" else "causal")
    expected = torch.tensor(list(_oracle(model, tokenizer)), dtype=torch.float64)
    found = winobias(model, tokenizer, _folder(tmp_path), **SMALL_BOOTSTRAP)
    assert found.difference.value == pytest.approx(float(expected.mean()), abs=1e-4)
    assert found.share.value == pytest.approx(100.0 * float((expected > 0).double().mean()))
    by_type = found.difference.by_category
    assert by_type["type1"].mean == pytest.approx(float(expected[:3].mean()), abs=1e-4)
    assert by_type["type2"].mean == pytest.approx(float(expected[3:].mean()), abs=1e-4)
    male = expected[[0, 2]].mean()
    assert by_type["type1, male pronoun"].mean == pytest.approx(float(male), abs=1e-4)
    assert (by_type["type1"].n, by_type["type2, female pronoun"].n) == (3, 1)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_the_batch_size_changes_nothing_and_the_model_is_left_alone(name, tmp_path):
    model = MODELS[name]().train()
    tokenizer = tiny_bias.spelling_tokenizer("masked" if name == "bert" else "causal")
    folder = _folder(tmp_path)
    found = [
        winobias(model, tokenizer, folder, tokens_per_batch=size, **SMALL_BOOTSTRAP)
        for size in BATCH_SIZES
    ]
    assert len({result.share.value for result in found}) == 1
    differences = [result.difference.value for result in found]
    assert differences == pytest.approx([differences[0]] * 3, abs=1e-5)
    assert all(module.training for module in model.modules())
    assert tiny_bias.hooks(model) == 0


def test_folder_rows_and_hub_give_the_same(tmp_path, monkeypatch):
    import datasets

    model, tokenizer = llama(), tiny_bias.spelling_tokenizer("causal")
    expected = winobias(model, tokenizer, str(_folder(tmp_path)), **SMALL_BOOTSTRAP)
    rows = [
        {"pro": pro, "anti": anti, "type": kind}
        for kind in PRO
        for pro, anti in zip(PRO[kind], ANTI[kind], strict=True)
    ]
    assert winobias(model, tokenizer, rows, **SMALL_BOOTSTRAP) == expected

    def load_dataset(path, name=None, *, split=None, revision=None):
        kind, side = name.split("_")
        assert (path, split) == ("uclanlp/wino_bias", "validation")
        lines = {"pro": PRO, "anti": ANTI}[side][kind]
        bare = [line[2:].replace("[", "").replace("]", "") for line in lines]
        tokens = [line.replace(".", " . ").split() for line in bare]
        return datasets.Dataset.from_dict({"tokens": tokens})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert winobias(model, tokenizer, "uclanlp/wino_bias", **SMALL_BOOTSTRAP) == expected


@pytest.mark.parametrize(
    "line",
    [
        "2 The cook met [the nurse] because [he] was not free.",
        "2 The cook met [the nurse] because [it] was free.",
        "2 The cook met [the nurse] because [she] was free.",
        "2 The cook met [the man] because [he] was free.",
    ],
    ids=["a word more", "no pronoun of a gender", "the same sentence", "another word"],
)
def test_a_pair_that_differs_in_more_than_gender_is_refused_or_left_out(line, tmp_path):
    anti = {**ANTI, "type1": [ANTI["type1"][0], line, ANTI["type1"][2]]}
    folder = _folder(tmp_path, anti=anti)
    model, tokenizer = llama(), tiny_bias.spelling_tokenizer("causal")
    with pytest.raises(ValueError, match="line 2 of type1 must be one sentence with pronouns"):
        winobias(model, tokenizer, folder, **SMALL_BOOTSTRAP)
    found = winobias(model, tokenizer, folder, mismatched="leave_out", **SMALL_BOOTSTRAP)
    assert (found.share.n, found.share.figures["left_out"]) == (4, 1)


def test_files_of_unequal_length_are_refused(tmp_path):
    folder = _folder(tmp_path, anti={**ANTI, "type2": ANTI["type2"][:1]})
    with pytest.raises(ValueError, match="as many pro- as anti-.* of type2, got 2 and 1"):
        winobias(llama(), tiny_bias.spelling_tokenizer("causal"), folder, **SMALL_BOOTSTRAP)


def test_a_missing_file_is_named(tmp_path):
    model, tokenizer = llama(), tiny_bias.spelling_tokenizer("causal")
    with pytest.raises(ValueError, match="with files like pro_stereotyped_type1.txt.dev, got none"):
        winobias(model, tokenizer, tmp_path, **SMALL_BOOTSTRAP)
    _folder(tmp_path)
    (tmp_path / "anti_stereotyped_type1.txt.dev").unlink()
    with pytest.raises(ValueError, match="of type1, got only pro_stereotyped_type1.txt.dev in"):
        winobias(model, tokenizer, tmp_path, **SMALL_BOOTSTRAP)


def test_one_type_alone_is_enough(tmp_path):
    folder = _folder(tmp_path, ending=".test", types=("type2",))
    model, tokenizer = llama(), tiny_bias.spelling_tokenizer("causal")
    found = winobias(model, tokenizer, folder, **SMALL_BOOTSTRAP)
    assert found.share.n == 2 and "type1" not in found.share.by_category


def test_options_and_rows_that_mean_nothing_are_refused():
    model, tokenizer = llama(), tiny_bias.spelling_tokenizer("causal")
    row = {"pro": "he ran", "anti": "she ran", "type": "type3"}
    with pytest.raises(ValueError, match="row 1 must have 'type1' or 'type2' .*got 'type3'"):
        winobias(model, tokenizer, [row], **SMALL_BOOTSTRAP)
    with pytest.raises(ValueError, match="mismatched must be 'error' or 'leave_out', got 'skip'"):
        winobias(model, tokenizer, [row], mismatched="skip", **SMALL_BOOTSTRAP)
