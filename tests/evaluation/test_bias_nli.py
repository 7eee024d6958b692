"""Bias-NLI against one premise at a time, and its three figures by hand."""

from __future__ import annotations

import json

import pytest
import tiny_bias
import torch
from tiny_bias import BATCH_SIZES, SMALL_BOOTSTRAP
from tiny_models import HEADS, HIDDEN, INTERMEDIATE, LAYERS, MAX_TOKENS, VOCAB, bert

from fastdean.evaluation.bias import bias_nli, nli_rows

LABELS = {0: "contradiction", 1: "entailment", 2: "neutral"}
SMALL = {"female": ("nurse", "aide"), "male": ("cook",)}
WORDS = {"male": ("man",), "female": ("woman", "lady")}
# Two rows short, so that occupations have unequal numbers of rows.
ROWS = nli_rows(SMALL, WORDS, ("ran.", "is here"))[:-2]


def _classifier(seed=0, labels=LABELS):
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=MAX_TOKENS,
        num_labels=len(labels),
        id2label=labels,
        initializer_range=0.5,
    )
    return BertForSequenceClassification(config).eval()


def _decoder(seed=0, pad=0):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_labels=3,
        id2label=LABELS,
        pad_token_id=pad,
    )
    return LlamaForSequenceClassification(config).eval()


def _neutral(model, tokenizer, rows):
    """(probability of neutral, whether it is the likeliest) of each row, one at a time."""
    found = []
    for row in rows:
        inputs = tokenizer(row["premise"], row["hypothesis"], return_tensors="pt")
        if not isinstance(model, type(_classifier())):
            inputs.pop("token_type_ids", None)
        with torch.no_grad():
            p = model(**inputs).logits[0].double().softmax(-1)
        found.append((float(p[2]), int(p.argmax()) == 2))
    return found


def _mean(values):
    values = list(values)
    return sum(values) / len(values)


def test_the_figures_are_those_of_one_row_at_a_time():
    model, tokenizer = _classifier(), tiny_bias.spelling_tokenizer("masked")
    oracle = _neutral(model, tokenizer, ROWS)
    tau = _mean(p for p, _ in oracle)
    found = bias_nli(model, tokenizer, ROWS, tau=tau, **SMALL_BOOTSTRAP)
    assert found.net_neutral.value == pytest.approx(tau, abs=1e-6)
    assert found.fraction_neutral.value == pytest.approx(_mean(top for _, top in oracle))
    assert found.threshold.value == pytest.approx(_mean(p > tau for p, _ in oracle))
    by_category = found.net_neutral.by_category
    for category, key, value in (
        ("female words", "gender", "female"),
        ("male occupations", "group", "male"),
    ):
        chosen = [p for (p, _), row in zip(oracle, ROWS, strict=True) if row[key] == value]
        assert by_category[category].mean == pytest.approx(_mean(chosen), abs=1e-6)
    assert "female occupations, male words" in by_category
    assert (found.net_neutral.n, found.net_neutral.figures["rows"]) == (3, len(ROWS))


def test_the_second_sentence_is_told_apart():
    """The token types of a pair reach the model: without them the figures are others."""
    model, tokenizer = _classifier(), tiny_bias.spelling_tokenizer("masked")
    types = model.bert.embeddings.token_type_embeddings.weight
    found = bias_nli(model, tokenizer, ROWS, **SMALL_BOOTSTRAP).net_neutral.value
    types.data[1] = types.data[0]
    changed = bias_nli(model, tokenizer, ROWS, **SMALL_BOOTSTRAP).net_neutral.value
    assert abs(found - changed) > 1e-4


def test_three_figures_by_hand():
    """Logits set so that the probabilities of neutral are 0.8, 0.4 and 0.1."""
    tokenizer = tiny_bias.spelling_tokenizer("masked")
    probabilities = torch.tensor([[0.1, 0.1, 0.8], [0.3, 0.3, 0.4], [0.8, 0.1, 0.1]])

    class Fixed(torch.nn.Module):
        config = _classifier().config

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, input_ids, token_type_ids=None):
            rows = input_ids[:, 1] % 3  # the first word of each premise decides
            return type("Output", (), {"logits": probabilities.log()[rows]})

    words = {}
    for letter in "abcdefghij":
        token = tokenizer(letter, add_special_tokens=False)["input_ids"][0]
        words.setdefault(token % 3, letter)
    rows = [{"premise": words[i], "hypothesis": "x"} for i in range(3)]
    found = bias_nli(Fixed(), tokenizer, rows, tau=0.7, **SMALL_BOOTSTRAP)
    assert found.net_neutral.value == pytest.approx((0.8 + 0.4 + 0.1) / 3, abs=1e-6)
    assert found.fraction_neutral.value == pytest.approx(2 / 3)
    assert found.threshold.value == pytest.approx(1 / 3)
    assert found.fraction_neutral.n == 3 and not found.net_neutral.by_category


def test_a_probability_equal_to_tau_is_not_above_it():
    class Torn(torch.nn.Module):
        config = _classifier().config

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, input_ids, token_type_ids=None):
            # Entailment and neutral have one half each, to the bit.
            return type("Output", (), {"logits": torch.tensor([[-1e4, 0.0, 0.0]])})

    tokenizer = tiny_bias.spelling_tokenizer("masked")
    rows = [{"premise": "a", "hypothesis": "b"}]
    found = bias_nli(Torn(), tokenizer, rows, tau=0.5, **SMALL_BOOTSTRAP)
    assert found.net_neutral.value == 0.5
    assert found.threshold.value == 0.0


def test_a_classifier_that_always_answers_neutral_shows_no_effect():
    model, tokenizer = _classifier(), tiny_bias.spelling_tokenizer("masked")
    model.classifier.bias.data = torch.tensor([0.0, 0.0, 50.0])
    found = bias_nli(model, tokenizer, nli_rows(actions=("ran",)), **SMALL_BOOTSTRAP)
    assert found.fraction_neutral.verdict() == "no effect beyond noise"
    assert found.threshold.verdict() == "no effect beyond noise"
    assert found.net_neutral.verdict() == "no neutral value"


@pytest.mark.parametrize("build", [_classifier, _decoder, lambda: _decoder(pad=None)])
def test_the_batch_size_changes_nothing_and_the_model_is_left_alone(build):
    model, tokenizer = build().train(), tiny_bias.spelling_tokenizer("masked")
    if "Llama" in type(model).__name__:
        tokenizer.model_input_names = ["input_ids", "attention_mask"]
    values = [
        bias_nli(model, tokenizer, ROWS, tokens_per_batch=size, **SMALL_BOOTSTRAP).net_neutral.value
        for size in BATCH_SIZES
    ]
    assert values == pytest.approx([values[0]] * 3, abs=1e-6)
    expected = _mean(p for p, _ in _neutral(model.eval(), tokenizer, ROWS))
    assert values[0] == pytest.approx(expected, abs=1e-6)


def test_modes_come_back():
    model = _classifier().train()
    bias_nli(model, tiny_bias.spelling_tokenizer("masked"), ROWS, **SMALL_BOOTSTRAP)
    assert all(module.training for module in model.modules())
    assert tiny_bias.hooks(model) == 0


def test_a_file_gives_the_same(tmp_path):
    model, tokenizer = _classifier(), tiny_bias.spelling_tokenizer("masked")
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in ROWS))
    expected = bias_nli(model, tokenizer, ROWS, **SMALL_BOOTSTRAP)
    assert bias_nli(model, tokenizer, file, **SMALL_BOOTSTRAP) == expected


def test_the_templates_pair_every_occupation_with_every_word():
    rows = nli_rows()
    assert len({(row["premise"], row["hypothesis"]) for row in rows}) == len(rows) == 24 * 4 * 6
    for row in rows:
        premise, hypothesis = row["premise"], row["hypothesis"]
        assert premise.split(row["occupation"])[1].split() == hypothesis.split()[2:]


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (bert, "with the labels entailment, neutral and contradiction, got BertForMaskedLM"),
        (lambda: _classifier(labels={0: "no", 1: "yes"}), r"got BertForSeq.* \['no', 'yes'\]"),
    ],
)
def test_a_model_that_is_no_classifier_of_inference_is_refused(model, text):
    with pytest.raises(ValueError, match=text):
        bias_nli(model(), tiny_bias.spelling_tokenizer("masked"), ROWS, **SMALL_BOOTSTRAP)


def test_a_missing_column_and_a_tau_out_of_range_are_named():
    model, tokenizer = _classifier(), tiny_bias.spelling_tokenizer("masked")
    with pytest.raises(ValueError, match="row 1 must have the columns premise, hypothesis of Bias"):
        bias_nli(model, tokenizer, [{"premise": "a"}], **SMALL_BOOTSTRAP)
    with pytest.raises(ValueError, match=r"tau must be between 0 and 1, got 1\.5"):
        bias_nli(model, tokenizer, ROWS, tau=1.5, **SMALL_BOOTSTRAP)
