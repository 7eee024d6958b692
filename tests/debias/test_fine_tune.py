"""The training loop: what it minimises, repeats, resumes, says and refuses."""

from __future__ import annotations

import json
import logging
import shutil

import pytest
import tiny_models
import torch

from fastdean.debias import METHODS, augment, causal_loss, fine_tune, objectives
from fastdean.debias.adept import bias_loss
from fastdean.debias.bec import masked_lm_loss
from fastdean.debias.course import Course

SPECIAL = ("[PAD]", "[BOS]", "[EOS]", "[UNK]", "[MASK]", "[CLS]", "[SEP]")
LISTED = """
    she he her his him woman man women men girl boy mother father sister brother nurse doctor
    engineer teacher pilot farmer the a saw met said works reads and with in town today . old
"""
WORDS = LISTED.split()
TEXTS = [
    {"text": text}
    for text in (
        "she works with the nurse and he works with the engineer .",
        "the doctor said he met her in town .",
        "a pilot saw the old woman today .",
        "his mother reads and her father works .",
        "the teacher met the farmer .",
    )
]
PAIRS = [
    {"premise": "the old woman works in town .", "hypothesis": "a woman works ."},
    {"premise": "a boy reads with the nurse .", "hypothesis": "a boy reads ."},
    {"premise": "his sister met the pilot today .", "hypothesis": "the pilot saw a girl ."},
    {"premise": "the farmer works .", "hypothesis": "a farmer works ."},
]
LISTS = {
    "pairs": [["she", "he"], ["her", "his"], ["woman", "man"], ["women", "men"], ["girl", "boy"]]
    + [["mother", "father"], ["sister", "brother"]],
    "ambiguous": {},
    "names": {},
}
CAUSAL, MASKED = tiny_models.llama, tiny_models.bert


def tokenizer():
    """A word is a token; [CLS] and [SEP] around every text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(t, vocabulary[t]) for t in ("[CLS]", "[SEP]")]
    )
    names = ("pad_token", "bos_token", "eos_token", "unk_token", "mask_token")
    special = dict(zip(names, SPECIAL, strict=False))
    return PreTrainedTokenizerFast(
        tokenizer_object=words, **special, cls_token="[CLS]", sep_token="[SEP]"
    )


TOKENIZER = tokenizer()
CASES = {"causal": CAUSAL, "bec": MASKED, "mabel": MASKED, "ase": MASKED, "adept": MASKED}


def rows_for(method):
    return PAIRS if method == "mabel" else TEXTS


def train(model, method="causal", rows=None, **options):
    options = {"learning_rate": 1e-2, "batch_size": 4, "lists": LISTS, "progress": False, **options}
    rows = rows_for(method) if rows is None else rows
    return fine_tune(model, TOKENIZER, rows, method, **options)


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


class Regularizer:
    """What training asks of a regulariser: here scale * ||W||^2 of the output embedding."""

    def __init__(self, model, strength=0.5):
        self.model, self.strength = model, strength
        self.of = {"classes": [[1], [2, 3]], "strength": strength}
        self.value, self.calls = None, 0
        self.sums = torch.zeros(3)

    def term(self):
        loss = self.model.get_output_embeddings().weight.square().mean()
        self.value = float(loss.detach())
        self.calls += 1
        self.sums = self.sums + self.value
        return self.strength * loss

    def require_attached_to(self, model):
        assert model is self.model

    def state_dict(self):
        return {"sums": self.sums, "calls": self.calls, "of": self.of}

    def load_state_dict(self, stored):
        assert stored["of"] == self.of
        self.sums, self.calls = stored["sums"], stored["calls"]


@pytest.mark.parametrize("method", ["causal", "bec", "mabel", "ase"])
def test_training_lowers_the_loss(method):
    history = train(CASES[method](), method, steps=24, warmup=0.0)
    assert [entry["step"] for entry in history] == list(range(1, 25))
    assert all(entry["loss"] == entry["base"] and entry["collapse"] is None for entry in history)
    first, last = (sum(e["base"] for e in part) for part in (history[:6], history[-6:]))
    assert last < 0.9 * first


@pytest.mark.parametrize("form", ["published", "paper"])
@pytest.mark.parametrize("build", [CAUSAL, MASKED])
def test_adept_brings_the_affinities_to_both_genders_together(build, form):
    model = build()
    # Far apart at first: the words of one gender are moved away from the others.
    with torch.no_grad():
        male = [TOKENIZER.convert_tokens_to_ids(word) for word in ("he", "his", "man")]
        model.get_input_embeddings().weight[male] += 3.0

    def bias():
        ids = TOKENIZER("she he nurse engineer", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            hidden = model(ids, output_hidden_states=True).hidden_states[-1][0]
        return bias_loss(hidden[3:5], hidden[1:3], form=form).item()

    before = bias()
    train(model, "adept", form=form, steps=30, learning_rate=3e-3)
    assert bias() < 0.9 * before


def given_to(monkeypatch, loss):
    """What training gives to a loss, call by call: its arguments and its options."""
    calls, original = [], getattr(objectives, loss)

    def watched(*arguments, **options):
        calls.append((arguments, options))
        return original(*arguments, **options)

    monkeypatch.setattr(objectives, loss, watched)
    return calls


@pytest.mark.parametrize("limit", [None, 6])
def test_the_gender_direction_is_one_of_the_starting_models_last_representations(
    monkeypatch, limit
):
    """Of the lists read as texts, in pieces where the model takes only short ones."""
    model, calls = MASKED().train(), given_to(monkeypatch, "ase_loss")
    females, males = zip(*LISTS["pairs"], strict=True)
    parts = [slice(0, 7)] if limit is None else [slice(0, 3), slice(3, 7)]
    sums = []
    model.eval()
    for words in (females, males):
        states = []
        for part in parts:
            ids = TOKENIZER(" ".join(words[part]), return_tensors="pt")["input_ids"]
            with torch.no_grad():
                states.append(model(ids, output_hidden_states=True).hidden_states[-1][0, 1:-1])
        sums.append(torch.cat(states).sum(0))
    expected = (sums[1] - sums[0]) / (sums[1] - sums[0]).norm()
    model.train()
    if limit is not None:
        monkeypatch.setattr(objectives, "max_tokens", lambda model: limit)
    # Of a pair with an unknown word neither counts, so that both lists are as long.
    half_known = {**LISTS, "pairs": [["she", "lad"], *LISTS["pairs"]]}
    train(model, "ase", steps=2, lists=half_known)
    directions = [arguments[2] for arguments, _ in calls]
    assert len(directions) == 2 and torch.equal(directions[0], directions[1])
    assert torch.allclose(directions[0], expected, atol=1e-6)
    assert not directions[0].requires_grad


@pytest.mark.parametrize("build", [CAUSAL, MASKED])
@pytest.mark.parametrize("form", ["published", "paper"])
def test_the_forms_of_adept_differ_in_layers_and_in_what_has_a_gradient(monkeypatch, build, form):
    model, calls = build(), given_to(monkeypatch, "adept_loss")
    train(model, "adept", form=form, steps=1)
    ((neutral, prototypes, hidden, original), options) = calls[0]
    layers = 1 if form == "paper" else model.config.num_hidden_layers + 1
    assert {each.shape[1] for each in (neutral, prototypes, hidden, original)} == {
        layers * model.config.hidden_size
    }
    assert prototypes.requires_grad == (form == "paper") and neutral.requires_grad
    assert options == {"form": form}
    # Nothing is trained yet, and these models have no dropout.
    assert torch.allclose(hidden, original, atol=1e-6)


@pytest.mark.parametrize("form", ["published", "paper"])
def test_the_form_reaches_the_loss_of_mabel(monkeypatch, form):
    calls = given_to(monkeypatch, "mabel_loss")
    train(MASKED(), "mabel", form=form, steps=1)
    assert [options for _, options in calls] == [{"form": form}]


def test_a_form_that_a_method_does_not_have_is_refused():
    with pytest.raises(ValueError, match="form must be 'published' or 'paper', got 'mine'"):
        train(MASKED(), "mabel", form="mine")
    with pytest.raises(ValueError, match="form must be 'published' for method 'bec', got 'paper'"):
        train(MASKED(), "bec", form="paper")


def test_another_form_is_another_job(tmp_path):
    train(MASKED(), "mabel", steps=1, out=tmp_path)
    with pytest.raises(ValueError, match="form"):
        train(MASKED(), "mabel", form="paper", steps=1, out=tmp_path)


def test_the_first_loss_is_that_of_the_formula():
    model = CAUSAL()
    texts = [row["text"] for row in augment(TEXTS, lists=LISTS)]
    batch = TOKENIZER(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(**{k: batch[k] for k in ("input_ids", "attention_mask")}).logits
    expected = causal_loss(logits, batch["input_ids"], batch["attention_mask"]).item()
    (entry,) = train(model, steps=1, batch_size=100)
    assert entry["base"] == pytest.approx(expected, rel=1e-5)


def test_accumulated_passes_are_one_step_of_all_their_examples():
    # Texts of one length, so that means over passes are means over tokens.
    rows = [{"text": f"the {word} works ."} for word in ("nurse", "pilot", "doctor", "farmer")]
    whole, parts = CAUSAL(), CAUSAL()
    a = train(whole, rows=rows, steps=3, batch_size=4)
    b = train(parts, rows=rows, steps=3, batch_size=3, accumulation=2, seed=0)
    assert len(b) == 3 and a[0]["loss"] == pytest.approx(b[0]["loss"], rel=1e-5)
    for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-4)


def test_special_tokens_are_never_hidden(monkeypatch):
    from fastdean.debias import objectives

    seen = []

    def spy(logits, labels):
        seen.append(labels)
        return masked_lm_loss(logits, labels)

    monkeypatch.setattr(objectives, "masked_lm_loss", spy)
    train(MASKED(), "bec", steps=12)
    hidden = torch.cat([labels[labels != -100] for labels in seen])
    assert len(hidden) > 20 and hidden.min() >= len(SPECIAL)


def test_random_words_are_words_of_the_tokenizer(monkeypatch):
    from fastdean.debias import objectives

    model, mask_tokens, seen = MASKED(), objectives.mask_tokens, []
    known = set(TOKENIZER.get_vocab().values())
    assert model.get_input_embeddings().num_embeddings > max(known) + 1

    def spy(*arguments, **options):
        seen.extend(options["random_ids"].tolist())
        return mask_tokens(*arguments, **options)

    monkeypatch.setattr(objectives, "mask_tokens", spy)
    train(model, "bec", steps=1)
    assert set(seen) == known - set(TOKENIZER.all_special_ids)


def test_the_tokenizer_is_as_before():
    own = tokenizer()
    before = own.backend_tokenizer.to_str()
    fine_tune(CAUSAL(), own, TEXTS, "causal", steps=1, max_length=4, progress=False)
    assert own.backend_tokenizer.to_str() == before


def test_the_regularisers_term_is_added_and_logged():
    model, plain = CAUSAL(), CAUSAL()
    regularizer = Regularizer(model)
    history = train(model, regularizer=regularizer, steps=2, accumulation=2)
    bare = train(plain, steps=2, accumulation=2)
    for entry in history:
        assert entry["loss"] == pytest.approx(entry["base"] + 0.5 * entry["collapse"], rel=1e-6)
    assert history[0]["base"] == bare[0]["base"]
    # Nine examples: two passes of four, then one of one.
    assert regularizer.calls == 3
    assert not torch.equal(*(m.get_output_embeddings().weight for m in (model, plain)))


@pytest.mark.parametrize("method", CASES)
def test_the_same_arguments_give_the_same_bits(method):
    runs = []
    for _ in range(2):
        model = with_dropout(CASES[method])
        torch.rand(3)  # The caller's random state is no argument.
        runs.append((train(model, method, steps=3), weights(model)))
    assert runs[0][0] == runs[1][0]
    assert_same(runs[0][1], runs[1][1])
    other = with_dropout(CASES[method])
    assert train(other, method, steps=3, seed=1) != runs[0][0]


def with_dropout(build):
    model = build()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1
    return model


class Stop(Exception):
    pass


@pytest.mark.parametrize("method", CASES)
def test_a_resumed_training_has_the_same_bits(method, tmp_path, caplog):
    def run(out, stop_at=None):
        def on_eval(step, model):
            if step == stop_at:
                raise Stop
            return {"norm": float(sum(p.square().sum() for p in model.parameters()))}

        model = with_dropout(CASES[method])
        regularizer = Regularizer(model)
        history = train(
            model,
            method,
            steps=7,
            out=tmp_path / out,
            save_every=2,
            eval_every=1,
            on_eval=on_eval,
            regularizer=regularizer,
        )
        return history, weights(model), regularizer.state_dict()

    straight = run("straight")
    assert "resumes" not in caplog.text
    with pytest.raises(Stop):
        run("stopped", stop_at=5)
    # The last and the one before it, should the last be damaged.
    kept = sorted(p.name for p in (tmp_path / "stopped").iterdir())
    assert kept == ["checkpoint-000002", "checkpoint-000004"]
    resumed = run("stopped")
    assert "training resumes from the checkpoint of step 4 of 7" in caplog.text
    assert resumed[0] == straight[0]
    assert_same(resumed[1], straight[1])
    assert torch.equal(resumed[2]["sums"], straight[2]["sums"])
    assert resumed[2]["calls"] == straight[2]["calls"]

    caplog.clear()
    again = run("stopped")
    assert "training was finished already" in caplog.text
    assert again[0] == straight[0]
    assert_same(again[1], straight[1])


def test_what_is_another_training_is_not_resumed(tmp_path):
    train(CAUSAL(), steps=1, out=tmp_path / "run")
    for options, named in [
        ({"learning_rate": 1e-3}, "learning_rate"),
        ({"rows": TEXTS[:3]}, "examples, rows"),
        ({"seed": 3}, "seed"),
    ]:
        with pytest.raises(ValueError, match=f"out must hold .* one that differs in {named};"):
            train(CAUSAL(), **{"steps": 1, "out": tmp_path / "run", **options})
    with pytest.raises(ValueError, match="differs in model weights; choose another folder, or"):
        train(CAUSAL(seed=1), steps=1, out=tmp_path / "run")
    model = CAUSAL()
    with pytest.raises(ValueError, match="differs in regularizer classes, regularizer strength;"):
        train(model, steps=1, out=tmp_path / "run", regularizer=Regularizer(model))
    with pytest.raises(ValueError, match="no training for resume=False, got .* after step 1;"):
        train(CAUSAL(), steps=1, out=tmp_path / "run", resume=False)


CLASS_WORDS = {"female": ["she", "her", "woman"], "male": ["he", "his", "man"]}


def collapse_regularizer(model, strength=5.0, **options):
    from fastdean.collapse import CollapseClasses, CollapseRegularizer

    forms = {"casing": False, "leading_space": False}
    classes = CollapseClasses.from_words(TOKENIZER, CLASS_WORDS, **forms)
    return CollapseRegularizer(model, classes, strength, **options)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"statistic": "mean"}, "differs in regularizer statistic;"),
        ({"detach_features": False}, "differs in regularizer detach_features;"),
        ({"mode": "window"}, "differs in regularizer decay, regularizer mode;"),
        ({"features": "head"}, "differs in regularizer features;"),
        ({"strength": 6.0}, "differs in regularizer strength;"),
        ({"schedule": lambda step: 0.0}, "a regulariser with the same schedule, got another;"),
        ({"schedule": lambda step: float(step < 2)}, "regulariser with the same schedule, got an"),
    ],
)
def test_the_training_of_another_regulariser_is_not_resumed(options, named, tmp_path):
    def run(**options):
        model = CAUSAL()
        regularizer = collapse_regularizer(model, **{"mode": "batch", **options})
        return model, lambda: train(model, steps=3, out=tmp_path, regularizer=regularizer)

    first, start = run()
    history = start()
    other, start = run(**options)
    before = weights(other)
    with pytest.raises(ValueError, match=named):
        start()
    assert_same(weights(other), before)
    again, start = run(schedule=lambda step: 1.0)
    assert start() == history
    assert_same(weights(again), weights(first))


@pytest.mark.parametrize("case", ["removed", "of another model"])
def test_a_regulariser_that_would_not_be_heard_is_refused_before_anything_is_trained(
    case, tmp_path
):
    model = CAUSAL()
    regularizer = collapse_regularizer(model if case == "removed" else CAUSAL())
    text = "must be attached to the model that is trained, got one attached to another"
    if case == "removed":
        regularizer.remove()
        text = "regularizer must be attached, got one after remove"
    before = weights(model)
    with pytest.raises(ValueError, match=text):
        train(model, steps=1, regularizer=regularizer, out=tmp_path / "run")
    assert_same(weights(model), before)
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_leaves_the_statistics_of_the_step_before():
    model, plain = CAUSAL(), CAUSAL()
    regularizer, expected = collapse_regularizer(model), collapse_regularizer(plain)
    train(plain, steps=1, regularizer=expected, accumulation=2)

    def spoil(step, model):
        with torch.no_grad():
            model.model.norm.weight[0] = float("nan")

    options = {"regularizer": regularizer, "accumulation": 2}
    with pytest.raises(RuntimeError, match="loss must be finite, got nan in step 2"):
        train(model, steps=2, warmup=0.0, eval_every=1, on_eval=spoil, **options)
    found, wanted = regularizer.state_dict(), expected.state_dict()
    assert torch.equal(found["sums"], wanted["sums"]) and found["sums"].any()
    assert torch.equal(found["counts"], wanted["counts"])
    assert (found["step"], found["factors"]) == (wanted["step"], wanted["factors"])


def test_checkpoints_leave_other_files_and_half_written_ones_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    expected = train(CAUSAL(), steps=2, save_every=1, out=tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-000002", "notes.txt"]
    # What a crash leaves while one is written, and a copy that somebody keeps.
    for name in (".checkpoint-000003.ab.tmp", "checkpoint-best"):
        shutil.copytree(tmp_path / "checkpoint-000002", tmp_path / name)
    before = sorted(p.name for p in tmp_path.iterdir())
    assert train(CAUSAL(), steps=2, save_every=1, out=tmp_path) == expected
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_a_checkpoint_that_was_half_removed_is_swept(tmp_path, monkeypatch):
    from fastdean.files import folders

    def crash(folder):
        next(folder.iterdir()).unlink()
        raise Stop

    monkeypatch.setattr(folders.shutil, "rmtree", crash)
    with pytest.raises(Stop):
        train(CAUSAL(), steps=3, save_every=1, out=tmp_path)
    monkeypatch.undo()
    train(CAUSAL(), steps=3, save_every=1, out=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-000003"]


def test_a_crash_between_two_checkpoints_leaves_the_later_one(tmp_path, monkeypatch):
    from fastdean.debias import resuming

    def crash(folder):
        raise Stop

    monkeypatch.setattr(resuming, "remove_folder", crash)
    with pytest.raises(Stop):
        train(CAUSAL(), steps=4, save_every=1, out=tmp_path)
    monkeypatch.undo()
    assert len(list(tmp_path.iterdir())) == 3
    resumed, straight = CAUSAL(), CAUSAL()
    history = train(resumed, steps=4, save_every=1, out=tmp_path)
    assert history == train(straight, steps=4)
    assert_same(weights(resumed), weights(straight))
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-000004"]


def _stopped(out, save_every=1):
    """A training of 5 steps that ended in its fourth, with the checkpoints of steps 2 and 3."""

    def on_eval(step, model):
        if step == 4:
            raise Stop

    with pytest.raises(Stop):
        train(CAUSAL(), steps=5, save_every=save_every, eval_every=1, on_eval=on_eval, out=out)


def _edit_json(change):
    def damage(folder):
        file = folder / "fastdean_config.json"
        config = json.loads(file.read_text("utf-8"))
        change(config)
        file.write_text(json.dumps(config), "utf-8")

    return damage


def _edit_tensors(change):
    def damage(folder):
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / "training.safetensors")
        change(tensors)
        save_file(tensors, folder / "training.safetensors")

    return damage


def _cut(folder):
    file = folder / "training.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


DAMAGE = {
    "cut": _cut,
    "no tensors": lambda folder: (folder / "training.safetensors").unlink(),
    "no configuration": lambda folder: (folder / "fastdean_config.json").unlink(),
    "garbage": lambda folder: (folder / "fastdean_config.json").write_bytes(b"\xff{"),
    "deep": lambda folder: (folder / "fastdean_config.json").write_text("[" * 10**5),
    "no history": _edit_json(lambda c: c.pop("history")),
    "other history": _edit_json(lambda c: c["history"].pop()),
    "no number": _edit_json(lambda c: c["history"][0].update(loss="1")),
    "another step": _edit_json(lambda c: c.update(step=10**15)),
    "no state": _edit_json(lambda c: c.update(state={"value": 1})),
    "no tensor of the state": _edit_json(lambda c: c["state"]["mapping"]["model"].clear()),
    "another optimizer": _edit_json(
        lambda c: c["state"]["mapping"]["optimizer"]["mapping"].update(x={"value": 1})
    ),
    "another shape": _edit_tensors(
        lambda t: t.update({"model/lm_head.weight": t["model/lm_head.weight"][:-1].clone()})
    ),
    "another dtype": _edit_tensors(
        lambda t: t.update({"model/lm_head.weight": t["model/lm_head.weight"].double()})
    ),
    "a weight that is none": _edit_tensors(lambda t: t["model/lm_head.weight"].fill_(float("nan"))),
    "infinite moment": _edit_tensors(lambda t: t["optimizer/0/exp_avg"].fill_(float("inf"))),
    "negative square": _edit_tensors(lambda t: t["optimizer/0/exp_avg_sq"].fill_(-1.0)),
}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The folder of `_stopped`, not to be written to; and what a training straight on gives."""
    out, straight = tmp_path_factory.mktemp("stopped"), CAUSAL()
    _stopped(out)
    return out, train(straight, steps=5), weights(straight)


@pytest.mark.parametrize("case", DAMAGE)
def test_training_goes_on_from_the_checkpoint_before_a_damaged_one(case, stopped, tmp_path, caplog):
    whole, expected, expected_weights = stopped
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-000002", "checkpoint-000003"]
    DAMAGE[case](tmp_path / "checkpoint-000003")
    resumed = CAUSAL()
    history = train(resumed, steps=5, save_every=1, out=tmp_path)
    (said, goes_on) = caplog.messages
    assert said.startswith("checkpoint-000003 is damaged, training goes on from the one before: ")
    assert str(tmp_path / "checkpoint-000003") in said and len(said.splitlines()) == 1
    assert "training resumes from the checkpoint of step 2 of 5" in goes_on
    assert history == expected
    assert_same(weights(resumed), expected_weights)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-000005"]


def test_checkpoints_that_are_all_damaged_are_refused_in_one_line(tmp_path):
    _stopped(tmp_path)
    for step in (2, 3):
        _cut(tmp_path / f"checkpoint-00000{step}")
    model = CAUSAL()
    before = weights(model)
    with pytest.raises(ValueError, match="checkpoint-000003/training.safetensors' must be a whole"):
        train(model, steps=5, save_every=1, out=tmp_path)
    assert_same(weights(model), before)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-000002", "checkpoint-000003"]


def test_a_damaged_regulariser_in_the_last_checkpoint_is_passed_over(tmp_path, caplog):
    def run(model, **options):
        regularizer = collapse_regularizer(model)
        return train(model, steps=5, save_every=1, out=tmp_path, regularizer=regularizer, **options)

    def stop(step, model):
        if step == 4:
            raise Stop

    with pytest.raises(Stop):
        run(CAUSAL(), eval_every=1, on_eval=stop)
    damage = _edit_json(
        lambda c: c["state"]["mapping"]["regularizer"]["mapping"].update(
            factors={"value": [[0, 10**15, 1.0]]}
        )
    )
    damage(tmp_path / "checkpoint-000003")
    resumed = CAUSAL()
    history = run(resumed)
    assert "checkpoint-000003 is damaged" in caplog.text and "of step 2 of 5" in caplog.text
    assert [entry["step"] for entry in history] == [1, 2, 3, 4, 5]


def test_a_checkpoint_of_another_program_is_left_alone(tmp_path):
    other = tmp_path / "checkpoint-7"
    other.mkdir()
    (other / "trainer_state.json").write_text("{}")
    (tmp_path / "checkpoint-²").mkdir()
    train(CAUSAL(), steps=1, out=tmp_path)
    names = ["checkpoint-000001", "checkpoint-7", "checkpoint-²"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names


def test_a_file_is_no_folder_for_checkpoints(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="out must be a folder, got the file"):
        train(CAUSAL(), steps=1, out=tmp_path / "file")


def test_modes_random_state_and_gradients_are_as_before():
    model = MASKED()
    model.cls.train()
    before = torch.get_rng_state()
    modes = [module.training for module in model.modules()]
    train(model, "bec", steps=2, on_eval=lambda step, model: None)
    assert torch.equal(torch.get_rng_state(), before)
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())


def test_evaluation_comes_when_asked_for_in_eval_mode():
    seen = []

    def on_eval(step, model):
        seen.append((step, model.training))
        return {"accuracy": 0.5} if step > 2 else None

    history = train(CAUSAL(), steps=5, eval_every=2, on_eval=on_eval)
    assert seen == [(2, False), (4, False), (5, False)]
    assert [entry.get("eval") for entry in history] == [
        None,
        None,
        None,
        {"accuracy": 0.5},
        {"accuracy": 0.5},
    ]


def test_frozen_weights_stay_as_they_are():
    model = MASKED()
    model.get_input_embeddings().weight.requires_grad_(False)
    before = weights(model)
    train(model, "ase", steps=2)
    embedding = "bert.embeddings.word_embeddings.weight"
    assert torch.equal(model.state_dict()[embedding], before[embedding])
    changed = [n for n, tensor in model.state_dict().items() if not torch.equal(tensor, before[n])]
    assert any("attention" in name for name in changed)


def test_epochs_are_counted_with_the_swapped_copies():
    count = len(augment(TEXTS, lists=LISTS))
    assert len(train(CAUSAL(), epochs=2, batch_size=4)) == 2 * -(-count // 4)
    assert len(train(CAUSAL(), batch_size=100)) == 3


def test_an_epoch_has_every_example_once_in_an_order_of_its_own():
    course = Course(
        examples=11, steps=6, learning_rate=1.0, batch_size=2, accumulation=2, warmup=0.5, seed=0
    )
    steps = [course.members(step) for step in range(6)]
    assert [list(map(len, groups)) for groups in steps[:3]] == [[2, 2], [2, 2], [2, 1]]
    epochs = [[i for groups in part for g in groups for i in g] for part in (steps[:3], steps[3:])]
    assert [sorted(epoch) for epoch in epochs] == [list(range(11))] * 2
    assert epochs[0] != epochs[1]


def test_the_rate_rises_and_falls_linearly():
    options = {"examples": 1, "learning_rate": 1.0, "batch_size": 1, "accumulation": 1, "seed": 0}
    course = Course(steps=10, warmup=0.4, **options)
    rates = [course.rate(step) for step in range(10)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    assert Course(steps=2, warmup=0.0, **options).rate(0) == 1.0


def test_a_loss_that_is_not_finite_stops_before_the_step():
    model = CAUSAL()
    regularizer = Regularizer(model, strength=float("inf"))
    before = weights(model)
    with pytest.raises(RuntimeError, match="loss must be finite, got inf in step 1; lower"):
        train(model, steps=1, regularizer=regularizer)
    assert_same(weights(model), before)


@pytest.mark.parametrize(
    ("build", "method", "text"),
    [
        (CAUSAL, "bec", "one of causal, adept for a causal language model, got 'bec'"),
        (CAUSAL, "mabel", "one of causal, adept for a causal language model, got 'mabel'"),
        (MASKED, "causal", "one of bec, mabel, ase, adept for a masked .* got 'causal'"),
        (MASKED, "dpo", f"method must be one of {', '.join(METHODS)}, got 'dpo'"),
        (
            lambda: MASKED().bert,
            "bec",
            "must be a causal or masked language .* got BertModel; load",
        ),
        (lambda: CAUSAL().bfloat16(), "causal", "weights in fp32, got torch.bfloat16 for 'model"),
        (lambda: CAUSAL().requires_grad_(False), "causal", "require a gradient, got none; unfree"),
    ],
)
def test_a_method_that_does_not_fit_the_model_is_refused(build, method, text):
    with pytest.raises(ValueError, match=text):
        train(build(), method)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"steps": 1, "epochs": 1}, "steps and epochs must not both be given, got 1 and 1"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"save_every": 0}, "save_every must be at least 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be finite and above 0, got 0.0"),
        ({"warmup": 1.0}, "warmup must be a share .* got 1.0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"eval_every": 1}, "on_eval must be a function where eval_every is given, got None and 1"),
        ({"max_length": 1000}, "max_length must be at most the model's 128 tokens, got 1000"),
        ({"max_length": 1}, "max_length must be at least 2 for method 'causal', got 1"),
        ({"rows": []}, "rows must hold at least one row, got none"),
        ({"rows": [TEXTS[0], PAIRS[0]]}, "row 1 must have text in the column 'text', got .*'hypo"),
        (
            {"steps": 1, "on_eval": lambda *_: {"x": float("nan")}},
            "figures as finite JSON, got .*na",
        ),
    ],
)
def test_arguments_out_of_range_are_refused(options, text):
    with pytest.raises(ValueError, match=text):
        train(CAUSAL(), **options)


@pytest.mark.parametrize(
    ("method", "options", "text"),
    [
        ("mabel", {"rows": PAIRS[3:]}, "at least one pair with a gendered word, got none"),
        ("mabel", {"rows": TEXTS}, "row 0 must have text in the column 'premise'"),
        ("ase", {"rows": TEXTS, "neutral_words": ["plumber"]}, "one neutral word, got none"),
        ("adept", {"rows": TEXTS[4:]}, "at least one female word, got none"),
        (
            "ase",
            {"lists": {**LISTS, "pairs": [["lass", "lad"]]}},
            "tokenizer must know both words of at least one pair, got none",
        ),
    ],
)
def test_rows_without_the_words_of_a_method_are_refused(method, options, text):
    with pytest.raises(ValueError, match=text):
        train(MASKED(), method, **options)


def test_a_tokenizer_must_know_places_and_have_a_mask():
    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="tokenizer must be a fast one, .* got Slow; load it"):
        fine_tune(CAUSAL(), Slow(), TEXTS, "causal", progress=False)
    bare = tokenizer()
    bare.mask_token = None
    with pytest.raises(ValueError, match="tokenizer must have a mask token .* got none"):
        fine_tune(MASKED(), bare, TEXTS, "bec", progress=False)


def test_progress_says_nothing_when_it_is_off(capfd, caplog):
    with caplog.at_level(logging.DEBUG):
        train(CAUSAL(), steps=1)
    assert capfd.readouterr() == ("", "") and caplog.text == ""


def test_each_step_has_the_weights_of_the_last_one_inside_of_autocast(tmp_path):
    """Autocast goes on with what it cast weights to before, unless it is told that they changed."""

    def stop(step, model):
        raise KeyboardInterrupt

    def trained(cached):
        model, options = CAUSAL(), {"steps": 4, "save_every": 2, "out": tmp_path / str(cached)}
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=cached):
            with pytest.raises(KeyboardInterrupt):
                train(model, on_eval=stop, eval_every=3, **options)
            history = train(CAUSAL(), **options)
            return history, train(CAUSAL(), steps=4)

    kept, straight = trained(cached=True)
    assert kept == straight
    assert (kept, straight) == trained(cached=False)
