"""`memory_budget` by layers bounds what a window really holds, its sums and one batch."""

from __future__ import annotations

import re

import pytest
import torch
from live_bytes import LiveBytes
from tiny_data import batches, make_examples
from tiny_models import bert
from torch import nn

import fastdean
from fastdean.coupling import order
from fastdean.coupling.layers import by_layers

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {"llama": {}, "gemma2": {}, "gpt2": {"n_head": 4}, "mixtral": {"num_local_experts": 4}}
# Losses, masks, indices, and the sparse scores of the layers that are through.
_SMALL = 200_000


def built(family):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(SIZES | FAMILIES[family]))
    return AutoModelForCausalLM.from_config(config).eval().float()


def loader():
    generator = torch.Generator().manual_seed(1)
    lengths = (60, 80, 100) * 2
    ids = [torch.randint(3, 90, (1, n), generator=generator) for n in lengths]
    return [{"input_ids": each, "labels": each.clone()} for each in ids]


def score(model, folder, **options):
    options = {"keep_top": 1e-3, "tokens_per_batch": 240, "progress": False, **options}
    return fastdean.score(model, loader(), order="layers", states=folder, **options)


def named(caught):
    """The number of bytes that a refusal names."""
    return int(re.search(r"at least ([\d,]+)", str(caught.value))[1].replace(",", ""))


@pytest.fixture
def groups(monkeypatch):
    """The targets whose sums were alive together, each time."""
    found, real = [], by_layers.accumulators_of

    def accumulators_of(targets, *args):
        found.append([target.name for target in targets])
        return real(targets, *args)

    monkeypatch.setattr(by_layers, "accumulators_of", accumulators_of)
    return found


def least_of(model, folder, **options):
    with pytest.raises(ValueError, match="memory_budget must be at least") as caught:
        score(model, folder, memory_budget=100_000, **options)
    return named(caught)


def test_a_budget_that_holds_not_even_a_matrix_is_told_the_whole_need(tmp_path):
    """Not the sums first, and then what a window takes besides."""
    model = built("llama")
    with pytest.raises(ValueError, match="memory_budget must be at least") as caught:
        score(model, tmp_path, memory_budget=8)
    assert score(model, tmp_path, memory_budget=named(caught))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("family", [*FAMILIES, "watched"])
def test_what_is_held_stays_within_the_budget(family, dtype, tmp_path):
    """In fp16 the pairs of a batch are held until all of them are known to be finite."""
    model, options = built("llama" if family == "watched" else family), {"target_modules": "all"}
    model.to(dtype)
    if family == "watched":
        # Whoever watches a layer is given what it returned on the way to every other.
        model.model.layers[0].register_forward_hook(lambda *_: None)
    expected = score(model, tmp_path, **options)
    least = least_of(model, tmp_path, **options)
    with LiveBytes() as live:
        found = score(model, tmp_path, memory_budget=least, **options)
    # Not by far too much either, or budgets would be refused that would do.
    assert live.peak - _SMALL < least < 1.6 * (live.peak - _SMALL)
    assert list(found) == list(expected)
    assert all(torch.equal(found.index(name), expected.index(name)) for name in expected)


def test_a_smaller_batch_needs_less(tmp_path):
    model = built("llama")
    less = least_of(model, tmp_path, tokens_per_batch=100)
    assert less < 0.5 * least_of(model, tmp_path)
    score(model, tmp_path, memory_budget=less, tokens_per_batch=100)


def test_a_window_takes_its_sums_in_as_many_passes_as_the_budget_says(tmp_path, groups):
    model = built("llama")
    least, matrix = least_of(model, tmp_path), 64 * 176 * 4
    for budget, sizes in ((least, [1, 1, 1]), (least + matrix, [2, 1]), (least + 2 * matrix, [3])):
        groups.clear()
        score(model, tmp_path, memory_budget=budget)
        # The loss has no target; then the layers, each in so many passes.
        assert [len(group) for group in groups] == [0, *(sizes * 2)]


def test_targets_behind_the_layers_are_split_too(groups):
    model = bert()
    head = model.cls.predictions.transform
    head.dense = nn.Sequential(head.dense, nn.Linear(32, 32))
    options = {"target_modules": r".*transform\.dense\..*", "progress": False, "keep_top": 0.5}
    expected = fastdean.score(model, batches(make_examples(), 4), **options)
    with pytest.raises(ValueError, match="memory_budget must be at least") as caught:
        fastdean.score(
            model, batches(make_examples(), 4), order="layers", memory_budget=10_000, **options
        )
    groups.clear()
    found = fastdean.score(
        model, batches(make_examples(), 4), order="layers", memory_budget=named(caught), **options
    )
    assert [len(group) for group in groups] == [1, 1]
    for name in expected:
        assert torch.equal(found.index(name), expected.index(name))


def test_auto_takes_the_batches_where_a_budget_is_too_small_for_a_window(monkeypatch):
    monkeypatch.setattr(order, "available_memory", lambda device: 1 << 20)
    options = {"keep_top": 1e-3, "tokens_per_batch": 240, "progress": False}
    found = fastdean.score(built("llama"), loader(), order="auto", memory_budget=100_000, **options)
    assert found.manifest["order"]["by"] == "batches"
    assert "memory_budget is less than the" in found.manifest["order"]["why"]
