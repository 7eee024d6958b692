"""What a causal model's likelihoods start from, against plain logits, and that results name it."""

from __future__ import annotations

import pytest
import tiny_bias
from tiny_bias import SMALL_BOOTSTRAP, causal_oracle
from tiny_models import bert, llama

from fastdean.evaluation.bias import bec_pro, crows_pairs, stereoset, winobias
from fastdean.evaluation.bias.start import start_token

PAIR = {
    "sent_more": "he is poor",
    "sent_less": "she is poor",
    "stereo_antistereo": "stereo",
    "bias_type": "gender",
}
SENTENCES = (PAIR["sent_more"], PAIR["sent_less"])
ALL = {
    "crows_pairs": (crows_pairs, [PAIR]),
    "stereoset": (
        stereoset,
        [
            {
                "type": "intrasentence",
                "target": "cook",
                "bias_type": "profession",
                "context": "BLANK is the cook.",
                "anti-stereotype": "she is the cook.",
                "stereotype": "he is the cook.",
                "unrelated": "ink is the cook.",
            }
        ],
    ),
    "winobias": (winobias, [{"pro": "he is poor.", "anti": "she is poor.", "type": "type1"}]),
    "bec_pro": (
        bec_pro,
        [
            {
                "sentence": f"{person} is a cook.",
                "person": person,
                "gender": gender,
                "occupation": "cook",
                "group": "male",
            }
            for person, gender in (("he", "male"), ("she", "female"))
        ],
    ),
}


def chat_tokenizer(kind="bare", *, end="</s>", extra=(), template=None, **special):
    """Its BOS token is the marker that a message of a chat starts with."""
    tokenizer = tiny_bias.spelling_tokenizer(kind)
    tokenizer.add_tokens([*extra, "<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.bos_token = special.get("bos", "<|im_start|>")
    tokenizer.eos_token = end
    tokenizer.chat_template = template
    return tokenizer


def difference(model, tokenizer, before):
    """log p of the first sentence minus that of the second, after the tokens `before`."""
    ids = [
        [*before, *tokenizer(sentence, add_special_tokens=False)["input_ids"]]
        for sentence in SENTENCES
    ]
    return causal_oracle(model, ids[0]) - causal_oracle(model, ids[1])


def found(model, tokenizer, **options):
    return crows_pairs(model, tokenizer, [PAIR], **SMALL_BOOTSTRAP, **options)


def test_a_bos_that_marks_a_turn_is_passed_over():
    """Such a marker makes other first words likely than the start of a document does."""
    model, tokenizer = llama(), chat_tokenizer()
    result = found(model, tokenizer)
    expected = difference(model, tokenizer, [tokenizer.convert_tokens_to_ids("</s>")])
    assert result.figures["mean_difference_nats"] == pytest.approx(expected, abs=1e-4)
    assert result.start_token == "</s>"
    assert "'</s>' (the tokenizer's EOS, as '<|im_start|>' marks a turn" in result.describe()
    asked = found(model, tokenizer, start="bos")
    marker = difference(model, tokenizer, [tokenizer.bos_token_id])
    assert asked.figures["mean_difference_nats"] == pytest.approx(marker, abs=1e-4)
    assert asked.start_token == "<|im_start|>" and abs(marker - expected) > 1e-3


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"end": "<|im_end|>", "extra": ["<|endoftext|>"]}, "<|endoftext|>"),
        # Neither is known by its name, but a template writes both around each message.
        (
            {
                "bos": "[open]",
                "end": "[close]",
                "extra": ["[open]", "[close]", "<|endoftext|>"],
                "template": "{% for m in messages %}[open]{{ m.content }}[close]{% endfor %}",
            },
            "<|endoftext|>",
        ),
        # The end of a document also ends a message here.
        (
            {
                "bos": None,
                "end": "<|endoftext|>",
                "extra": ["<|endoftext|>"],
                "template": "{% for m in messages %}{{ m.content }}<|endoftext|>{% endfor %}",
            },
            "<|endoftext|>",
        ),
        ({"bos": None}, "</s>"),
        ({"bos": "<s>"}, "<s>"),
        ({"bos": None, "end": None}, "</s>"),
    ],
)
def test_what_is_chosen_of_what_a_tokenizer_has(options, name):
    chosen = start_token(chat_tokenizer(**options), "auto", masked=False)
    assert chosen.name == name and not chosen.kept


def test_without_any_the_first_token_is_not_scored_and_that_is_said():
    class Bare:
        """A vocabulary of words alone."""

        bos_token_id = eos_token_id = chat_template = None

        def __call__(self, text, **options):
            return {"input_ids": [7], "special_tokens_mask": [0]}

        def get_vocab(self):
            return {"a": 7}

    chosen = start_token(Bare(), "auto", masked=False)
    assert chosen.ids == () and chosen.name == "none"
    assert "so that a text's first token is not scored" in chosen.note


def test_what_the_tokenizer_puts_before_a_text_stays_unless_another_is_asked_for():
    model, tokenizer = llama(), chat_tokenizer("causal")
    kept = found(model, tokenizer)
    own = tokenizer.convert_tokens_to_ids("<s>")
    assert kept.start_token == "<s>"
    assert kept.figures["mean_difference_nats"] == pytest.approx(
        difference(model, tokenizer, [own]), abs=1e-4
    )
    for start, before in [("eos", ["</s>"]), ("none", []), ("poor", ["poor"]), (9, [9])]:
        ids = [t if isinstance(t, int) else tokenizer.convert_tokens_to_ids(t) for t in before]
        other = found(model, tokenizer, start=start)
        assert other.figures["mean_difference_nats"] == pytest.approx(
            difference(model, tokenizer, ids), abs=1e-4
        )
        assert other.start_token == (tokenizer.convert_ids_to_tokens(ids)[0] if ids else "none")


@pytest.mark.parametrize("name", ALL)
def test_every_measure_of_likelihood_takes_and_names_it(name):
    measure, rows = ALL[name]
    results = {}
    for start in ("auto", "bos"):
        result = measure(llama(), chat_tokenizer(), rows, start=start, **SMALL_BOOTSTRAP)
        parts = list(vars(result).values()) if not hasattr(result, "value") else [result]
        results[start] = [part.to_dict() for part in parts]
    assert {part["start_token"] for part in results["auto"]} == {"</s>"}
    assert {part["start_token"] for part in results["bos"]} == {"<|im_start|>"}
    assert all("start token: '</s>'" in part["notes"][-1] for part in results["auto"])


@pytest.mark.parametrize("name", ALL)
def test_a_masked_model_starts_from_no_token(name):
    measure, rows = ALL[name]
    tokenizer = tiny_bias.spelling_tokenizer("masked")
    result = measure(bert(), tokenizer, rows, **SMALL_BOOTSTRAP)
    part = result if hasattr(result, "value") else next(iter(vars(result).values()))
    assert part.start_token is None and part.to_dict()["start_token"] is None
    with pytest.raises(ValueError, match="start must be 'auto' for a masked model, got 'eos'"):
        measure(bert(), tokenizer, rows, start="eos", **SMALL_BOOTSTRAP)


@pytest.mark.parametrize(
    ("start", "error", "text"),
    [
        ("bos", ValueError, "start must be a token that the tokenizer has, got 'bos' of"),
        ("<|nope|>", ValueError, r"or a token of the vocabulary, got '<\|nope\|>'; spell it"),
        ("", ValueError, "or a token of the vocabulary, got ''"),
        (-1, ValueError, r"start must be an id in 0\.\.\d+, got -1"),
        (10**6, ValueError, r"start must be an id in 0\.\.\d+, got 1000000"),
        (None, TypeError, "start must be auto, bos, eos, none, a token or its id, got NoneType"),
        (True, TypeError, "start must be auto, bos, eos, none, a token or its id, got bool"),
    ],
)
def test_a_start_that_is_no_token_is_refused(start, error, text):
    with pytest.raises(error, match=text):
        found(llama(), chat_tokenizer(bos=None), start=start)


def test_a_text_of_one_token_needs_something_before_it():
    rows = [{**PAIR, "sent_more": "poor", "sent_less": "rich"}]
    with pytest.raises(ValueError, match="text must have a token after its first where no start"):
        crows_pairs(llama(), chat_tokenizer(), rows, start="none", **SMALL_BOOTSTRAP)
