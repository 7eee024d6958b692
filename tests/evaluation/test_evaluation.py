"""Margins, perplexity and hidden states against one example at a time through the plain model."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_models import CAUSAL_MODELS, HIDDEN, LAYERS, MODELS, VOCAB

from fastdean.data.examples import IGNORE_INDEX, Example, encode
from fastdean.evaluation import (
    Margins,
    Pair,
    Perplexity,
    compare_margins,
    compare_perplexity,
    compare_shares,
    encode_pairs,
    last_token_states,
    layer_dependence,
    margin_interval,
    perplexity,
    perplexity_of_text,
    prompts_only,
    response_margins,
)
from fastdean.evaluation.dependence import hsic

# Packing is exact for llama and gpt2 and not for bert, so both ways of batching are walked through.
BATCH_SIZES = [1, 40, 4096]


class CharacterTokenizer:
    """One token per character, a BOS token in front."""

    def __call__(self, text, add_special_tokens=True, verbose=True):
        ids = [3 + ord(character) % (VOCAB - 3) for character in text]
        return {"input_ids": [1, *ids] if add_special_tokens else ids}


ROWS = [
    {"prompt": "who may vote?", "response": "all of us", "unsafe": "not them"},
    {"prompt": "hm", "response": "no", "unsafe": "well, if you insist, here it is"},
    {"prompt": "where does she live", "response": "I will not say that", "unsafe": "at 5"},
    {"prompt": "x", "response": "y", "unsafe": "z"},
    {"prompt": "are they all alike", "response": "no two are", "unsafe": "yes, all"},
]


def _log_likelihood(model, example) -> tuple[float, int]:
    """(sum, count) of log p of the targets of one example of a causal model, softmax in float64."""
    with torch.no_grad():
        log_p = model(input_ids=example.input_ids[None]).logits[0].double().log_softmax(dim=-1)
    places = [t for t in range(1, len(example.labels)) if example.labels[t] != IGNORE_INDEX]
    return sum(float(log_p[t - 1, example.labels[t]]) for t in places), len(places)


def _margins(values) -> Margins:
    values = torch.tensor(values, dtype=torch.float64)
    return Margins(values, values, torch.zeros_like(values))


def _perplexity(nll_sums, token_counts) -> Perplexity:
    return Perplexity(torch.tensor(nll_sums, dtype=torch.float64), torch.tensor(token_counts))


# Margins


@pytest.mark.parametrize("tokens_per_batch", BATCH_SIZES)
@pytest.mark.parametrize("name", CAUSAL_MODELS)
def test_margin_is_the_difference_of_mean_log_probabilities(name, tokens_per_batch):
    model = CAUSAL_MODELS[name]()
    pairs = encode_pairs(ROWS, CharacterTokenizer())
    margins = response_margins(model, pairs, tokens_per_batch=tokens_per_batch, progress=False)
    for i, (safe, unsafe) in enumerate(pairs):
        safe_sum, safe_count = _log_likelihood(model, safe)
        unsafe_sum, unsafe_count = _log_likelihood(model, unsafe)
        assert safe_count == len(ROWS[i]["response"])
        assert unsafe_count == len(ROWS[i]["unsafe"])
        assert float(margins.safe[i]) == pytest.approx(safe_sum / safe_count, rel=2e-5)
        assert float(margins.unsafe[i]) == pytest.approx(unsafe_sum / unsafe_count, rel=2e-5)
    torch.testing.assert_close(margins.values, margins.safe - margins.unsafe)
    assert margins.values.dtype == torch.float64
    assert margins.unit == "nats per token"


def test_pairs_may_be_objects_or_rows_and_share_their_prompt():
    tokenizer = CharacterTokenizer()
    objects = [Pair(row["prompt"], row["response"], row["unsafe"]) for row in ROWS]
    for from_row, from_object in zip(
        encode_pairs(ROWS, tokenizer), encode_pairs(objects, tokenizer), strict=True
    ):
        for one, other in zip(from_row, from_object, strict=True):
            assert torch.equal(one.input_ids, other.input_ids)
            assert torch.equal(one.labels, other.labels)
    for safe, unsafe in encode_pairs(ROWS, tokenizer):
        safe_prompt, unsafe_prompt = prompts_only([safe, unsafe])
        assert torch.equal(safe_prompt.input_ids, unsafe_prompt.input_ids)


def test_margins_summarise_themselves():
    margins = _margins([1.0, -0.5, 0.0, 2.5])
    assert margins.mean == 0.75
    assert margins.share_positive == 0.5
    assert len(margins) == 4


def test_margin_changes_are_paired():
    # Pairs differ a hundred times more from each other than before differs from after.
    before = _margins([-100.0, 0.0, 50.0, 200.0, 7.0, -3.0, 80.0, -41.0])
    after = _margins([-99.0, 1.1, 50.9, 201.2, 7.8, -2.0, 81.1, -40.1])
    change = compare_margins(before, after)
    assert change.mean == pytest.approx(1.0)
    assert change.verdict() == "higher"
    assert compare_margins(after, before).verdict() == "lower"
    assert compare_margins(before, before).verdict() == "no effect beyond noise"
    few = compare_margins(_margins([-100.0, 0.0, 50.0]), _margins([-99.0, 1.1, 50.9]))
    assert few.low > 0 and few.verdict() == "no verdict from n = 3"


def test_share_changes_count_sign_flips_only():
    before = _margins([-1.0, -1.0, 1.0, 1.0])
    after = _margins([2.0, -0.5, 5.0, 1.0])
    change = compare_shares(before, after)
    assert change.mean == 0.25
    assert change.n == 4


def test_margins_refuse_a_masked_model():
    pairs = encode_pairs(ROWS, CharacterTokenizer())
    message = "model must be a causal language model, got the masked BertForMaskedLM"
    with pytest.raises(ValueError, match=message):
        response_margins(MODELS["bert"](), pairs, progress=False)


def test_pairs_of_one_prompt_are_one_unit():
    answers = [(f"answer {i}", f"other {i}") for i in range(5)]
    rows = [
        {"prompt": prompt, "response": safe, "unsafe": unsafe}
        for prompt in ("first?", "second?")
        for safe, unsafe in answers
    ]
    model = MODELS["llama"]()

    def measured(chosen):
        return response_margins(model, encode_pairs(chosen, CharacterTokenizer()), progress=False)

    found = measured(rows)
    same = replace(found, values=found.values + torch.linspace(0.1, 0.2, 10, dtype=torch.float64))
    for change in (compare_margins(found, same), compare_shares(found, same)):
        assert (change.n, change.verdict()) == (2, "no verdict from n = 2")
    assert margin_interval(found).n == 2
    assert margin_interval(found).mean == pytest.approx(found.mean)
    # Of a single prompt the answers are what was sampled; without one, the pairs.
    assert margin_interval(measured(rows[:5])).n == 5
    assert margin_interval(measured([row | {"prompt": ""} for row in rows])).n == 10
    apart = [row | {"prompt": f"{row['prompt']} {i}"} for i, row in enumerate(rows)]
    assert margin_interval(measured(apart)).n == 10


def test_margins_errors_name_what_was_expected():
    with pytest.raises(ValueError, match="pairs must hold at least one pair, got none"):
        response_margins(MODELS["llama"](), [], progress=False)
    with pytest.raises(ValueError, match="row 1 must have the text columns .*, got no unsafe"):
        encode_pairs([ROWS[0], {"prompt": "a", "response": "b"}], CharacterTokenizer())
    with pytest.raises(ValueError, match=r"after must be of the same pairs as before \(2\), got 1"):
        compare_margins(_margins([1.0, 2.0]), _margins([1.0]))
    first, second = (replace(_margins([1.0, 2.0]), prompts=order) for order in ("ab", "ba"))
    with pytest.raises(ValueError, match="same pairs as before, in their order, got .* in pair 0"):
        compare_margins(first, second)
    with pytest.raises(ValueError, match="values must be finite, got nan at index 1"):
        compare_margins(_margins([1.0, 2.0]), _margins([1.0, math.nan]))
    with pytest.raises(ValueError, match="margins must be finite, got nan of pair 1; drop that"):
        compare_shares(_margins([1.0, math.nan]), _margins([1.0, 2.0]))


# Perplexity


@pytest.mark.parametrize("tokens_per_batch", BATCH_SIZES)
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_perplexity_weighs_tokens_not_examples(name, tokens_per_batch):
    model = CAUSAL_MODELS[name]()
    examples = encode(ROWS, CharacterTokenizer())
    result = perplexity(model, examples, tokens_per_batch=tokens_per_batch, progress=False)
    sums, counts = zip(*(_log_likelihood(model, example) for example in examples), strict=True)
    assert result.tokens == sum(counts)
    assert result.token_counts.tolist() == list(counts)
    np.testing.assert_allclose(result.nll_sums.numpy(), -np.array(sums), rtol=2e-5)
    assert result.nll_per_token == pytest.approx(-sum(sums) / sum(counts), rel=2e-5)
    assert result.value == pytest.approx(math.exp(-sum(sums) / sum(counts)), rel=1e-4)


def test_perplexity_takes_rows_of_text():
    model = MODELS["llama"]()
    from_rows = perplexity(model, ROWS, tokenizer=CharacterTokenizer(), progress=False)
    from_examples = perplexity(model, encode(ROWS, CharacterTokenizer()), progress=False)
    assert from_rows.value == from_examples.value


def test_masked_model_is_measured_on_masked_positions_only():
    model = MODELS["bert"]()
    visible = Example(torch.tensor([5, 6, 7, 8]), torch.tensor([-100, 6, -100, 8]))
    with pytest.raises(ValueError, match="example 0 must hide its targets .* got 2 of them"):
        perplexity(model, [visible], progress=False)
    hidden = Example(torch.tensor([5, 4, 7, 4]), torch.tensor([-100, 6, -100, 8]))
    with torch.no_grad():
        log_p = model(input_ids=hidden.input_ids[None]).logits[0].log_softmax(dim=-1)
    expected = math.exp(-float(log_p[1, 6] + log_p[3, 8]) / 2)
    assert perplexity(model, [hidden], progress=False).value == pytest.approx(expected, rel=1e-4)


TEXTS = ["the quick brown fox", "jumps over", "", "a very lazy dog indeed"]


def _text_ids() -> list[int]:
    return CharacterTokenizer()("\n\n".join(TEXTS))["input_ids"]


@pytest.mark.parametrize("window", [2, 7, 16, 128])
def test_text_windows_do_not_overlap_by_default(window):
    model = MODELS["llama"]()
    ids = torch.tensor(_text_ids())
    nll, count = 0.0, 0
    for start in range(0, len(ids), window):
        piece = ids[start : start + window]
        total, tokens = _log_likelihood(model, Example(piece, piece))
        nll, count = nll - total, count + tokens
    result = perplexity_of_text(model, CharacterTokenizer(), TEXTS, window=window, progress=False)
    assert result.tokens == count
    assert result.value == pytest.approx(math.exp(nll / count), rel=1e-4)
    assert (result.window, result.stride) == (window, window)


@pytest.mark.parametrize(("window", "stride"), [(8, 3), (8, 7), (5, 1)])
def test_overlapping_windows_count_each_token_once_with_its_context(window, stride):
    model = MODELS["llama"]()
    ids = torch.tensor(_text_ids())
    nll = 0.0
    for token in range(1, len(ids)):
        # The first window that holds the token gives its context.
        start = next(s for s in range(0, len(ids), stride) if s <= token < s + window)
        piece = ids[start : token + 1]
        labels = torch.full_like(piece, IGNORE_INDEX)
        labels[-1] = piece[-1]
        nll -= _log_likelihood(model, Example(piece, labels))[0]
    result = perplexity_of_text(
        model, CharacterTokenizer(), TEXTS, window=window, stride=stride, progress=False
    )
    assert result.tokens == len(ids) - 1
    assert result.nll_per_token == pytest.approx(nll / (len(ids) - 1), rel=2e-5)


def test_default_window_is_what_the_model_holds():
    result = perplexity_of_text(MODELS["gpt2"](), CharacterTokenizer(), "ab" * 100, progress=False)
    assert result.window == 128
    # 201 tokens in windows of 128 and 73, each without its first.
    assert result.token_counts.tolist() == [127, 72]


def test_text_may_be_one_string():
    model = MODELS["llama"]()
    joined = perplexity_of_text(model, CharacterTokenizer(), "\n\n".join(TEXTS), progress=False)
    rows = perplexity_of_text(model, CharacterTokenizer(), TEXTS, progress=False)
    assert joined.value == rows.value


@pytest.mark.parametrize(
    ("name", "texts", "options", "error", "message"),
    [
        ("bert", "ab", {}, ValueError, "got the masked BertForMaskedLM"),
        ("llama", "", {}, ValueError, "texts must come to at least 2 tokens, got 1"),
        ("llama", ["a", None], {}, TypeError, "texts must be text, got NoneType in row 1"),
        ("llama", "ab", {"window": 1}, ValueError, "window must be at least 2 tokens .* got 1"),
        ("llama", "ab", {"window": 129}, ValueError, "at most the model's 128 positions, got 129"),
        (
            "llama",
            "ab",
            {"window": 4, "stride": 5},
            ValueError,
            r"stride must be from 1 to window \(4\), got 5",
        ),
    ],
)
def test_text_errors_name_what_was_expected(name, texts, options, error, message):
    with pytest.raises(error, match=message):
        perplexity_of_text(MODELS[name](), CharacterTokenizer(), texts, progress=False, **options)


def test_perplexity_ratio_is_token_weighted_and_paired():
    before = _perplexity([10.0, 300.0, 40.0] * 3, [10, 100, 10] * 3)
    after = _perplexity([10.5, 301.0, 40.7] * 3, [10, 100, 10] * 3)
    interval = compare_perplexity(before, after)
    assert interval.mean == pytest.approx(after.value / before.value)
    assert interval.mean == pytest.approx(math.exp(2.2 / 120))
    # t = 2.306 of 8 degrees of freedom, on the linearised log ratios.
    log = 2.2 / 120
    parts = [(0.5 - 10 * log) / 40, (1.0 - 100 * log) / 40, (0.7 - 10 * log) / 40] * 3
    half = 2.306004 * math.sqrt(sum(x * x for x in parts) / 8) / 3
    assert interval.low == pytest.approx(math.exp(log - half), rel=1e-6)
    assert interval.high == pytest.approx(math.exp(log + half), rel=1e-6)
    assert interval.verdict() == "higher"
    assert compare_perplexity(after, before).verdict() == "lower"
    assert compare_perplexity(before, before).verdict() == "no effect beyond noise"


def test_perplexity_ratio_errors_name_what_was_expected():
    before = _perplexity([10.0, 300.0], [10, 100])
    with pytest.raises(ValueError, match="after must be measured on the same examples as before"):
        compare_perplexity(before, _perplexity([10.0, 300.0], [10, 101]))
    with pytest.raises(ValueError, match="values must be finite, got nan at index 1"):
        compare_perplexity(before, _perplexity([10.0, math.nan], [10, 100]))


# Representations


@pytest.mark.parametrize("tokens_per_batch", BATCH_SIZES)
@pytest.mark.parametrize("name", MODELS)
def test_states_are_those_of_a_single_example(name, tokens_per_batch):
    model = MODELS[name]()
    examples = encode(ROWS, CharacterTokenizer())
    states = last_token_states(model, examples, tokens_per_batch=tokens_per_batch, progress=False)
    assert states.shape == (LAYERS, len(ROWS), HIDDEN)
    assert states.dtype == torch.float32
    assert not states.requires_grad
    for i, example in enumerate(examples):
        with torch.no_grad():
            outputs = model(input_ids=example.input_ids[None], output_hidden_states=True)
        expected = torch.stack([state[0, -1] for state in outputs.hidden_states[1:]])
        torch.testing.assert_close(states[:, i], expected, rtol=1e-4, atol=2e-5)


def test_first_state_is_the_output_of_the_first_decoder_layer():
    model = MODELS["llama"]()
    (example,) = encode(ROWS[:1], CharacterTokenizer())
    seen = []

    def keep(module, args, output):
        seen.append(output[0] if isinstance(output, tuple) else output)

    with model.model.layers[0].register_forward_hook(keep), torch.no_grad():
        model(input_ids=example.input_ids[None])
    states = last_token_states(model, [example], progress=False)
    torch.testing.assert_close(states[0, 0], seen[0][0, -1])


def test_layers_are_picked_in_the_order_asked_for():
    model = MODELS["llama"]()
    examples = encode(ROWS, CharacterTokenizer())
    every = last_token_states(model, examples, progress=False)
    picked = last_token_states(model, examples, layers=[-1, 0], progress=False)
    assert torch.equal(picked, every[[1, 0]])


def test_states_of_prompts_do_not_see_the_response():
    model = MODELS["llama"]()
    tokenizer = CharacterTokenizer()
    answered_otherwise = [{**row, "response": row["unsafe"]} for row in ROWS]
    states, others = (
        last_token_states(model, prompts_only(encode(rows, tokenizer)), progress=False)
        for rows in (ROWS, answered_otherwise)
    )
    assert torch.equal(states, others)
    prompt = torch.tensor(tokenizer(ROWS[0]["prompt"])["input_ids"])
    with torch.no_grad():
        last = model.model(input_ids=prompt[None]).last_hidden_state[0, -1]
    torch.testing.assert_close(states[-1, 0], last, rtol=1e-4, atol=2e-5)


def test_prompt_of_one_token_has_a_state():
    one_token = Example(torch.tensor([5]), torch.tensor([IGNORE_INDEX]))
    longer = Example(torch.tensor([5, 9, 7]), torch.full((3,), IGNORE_INDEX))
    states = last_token_states(MODELS["llama"](), [one_token, longer], progress=False)
    assert torch.isfinite(states).all()
    assert not torch.allclose(states[:, 0], states[:, 1])


@pytest.mark.parametrize("measure", ["margins", "perplexity", "states"])
def test_model_is_left_as_it_was_and_measured_without_dropout(measure):
    model = MODELS["gpt2"]()
    model.transformer.drop.p = 0.9
    pairs = encode_pairs(ROWS, CharacterTokenizer())
    safe = [pair[0] for pair in pairs]
    run = {
        "margins": lambda: response_margins(model, pairs, progress=False).values,
        "perplexity": lambda: perplexity(model, safe, progress=False).nll_sums,
        "states": lambda: last_token_states(model, safe, progress=False),
    }[measure]
    expected = run()
    model.train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    assert torch.equal(run(), expected)
    assert [module.training for module in model.modules()] == modes
    assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    assert model.config.use_cache is True
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_state_errors_name_what_was_expected():
    model = MODELS["llama"]()
    examples = encode(ROWS[:2], CharacterTokenizer())
    with pytest.raises(ValueError, match="examples must hold at least one example, got none"):
        last_token_states(model, [], progress=False)
    with pytest.raises(ValueError, match=r"layers must be one or more of -2\.\.1, got \[2\]"):
        last_token_states(model, examples, layers=[2], progress=False)
    starts_with_target = Example(torch.tensor([5, 6]), torch.tensor([5, 6]))
    with pytest.raises(ValueError, match="example 1 must have prompt tokens before its first"):
        prompts_only([examples[0], starts_with_target])


def test_layer_dependence_is_hsic_of_each_layer():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 12, 4, generator=generator)
    y = torch.randn(3, 12, 5, generator=generator)
    y[1] = x[1].repeat(1, 2)[:, :5]
    results = layer_dependence(x, y, estimator="unbiased", permutations=50, seed=1)
    assert results == [
        hsic(x[i], y[i], estimator="unbiased", permutations=50, seed=1) for i in range(3)
    ]
    assert results[1].p_value == pytest.approx(1 / 51)


def test_layer_dependence_errors_name_what_was_expected():
    with pytest.raises(ValueError, match=r"states_y must be of as many layers as states_x \(3\)"):
        layer_dependence(torch.zeros(3, 4, 2), torch.zeros(2, 4, 2))
    with pytest.raises(ValueError, match=r"states_x must be of shape \[L, n, D\], got \[4, 2\]"):
        layer_dependence(torch.zeros(4, 2), torch.zeros(2, 4, 2))
    with pytest.raises(ValueError, match=r"y must be of as many rows as x \(4\), got 5"):
        layer_dependence(torch.zeros(3, 4, 2), torch.zeros(3, 5, 2))
