"""KL divergence of an edited model from the one before, against torch's own and scipy's."""

from __future__ import annotations

import math
from contextlib import contextmanager

import pytest
import tiny_models
import torch
from scipy import stats

from fastdean.data.examples import IGNORE_INDEX, Example
from fastdean.evaluation import divergence_interval, perplexity, perplexity_and_divergence
from fastdean.evaluation.divergence import Divergence, kl_of_logits


def examples():
    generator = torch.Generator().manual_seed(0)
    found = []
    for length in (3, 9, 5, 12, 4, 7, 8, 6, 5):
        ids = torch.randint(5, tiny_models.VOCAB, (length,), generator=generator)
        labels = ids.clone()
        labels[: length // 2] = IGNORE_INDEX
        found.append(Example(ids, labels))
    return found


def editing(model):
    weight = model.lm_head.weight

    @contextmanager
    def edited():
        kept = weight.detach().clone()
        weight.data[: tiny_models.VOCAB // 2] *= 1.5
        try:
            yield
        finally:
            weight.data.copy_(kept)

    return edited


def log_p(model, example):
    return model(example.input_ids[None]).logits[0, :-1].double().log_softmax(-1)


@torch.no_grad()
def test_each_example_s_divergence_and_perplexity_are_those_of_the_whole_logits():
    model = tiny_models.llama().eval()
    given, edited = examples(), editing(model)
    found, moved = perplexity_and_divergence(model, given, edited=edited, progress=False)
    with edited():
        alone = perplexity(model, given, progress=False)
    assert torch.equal(found.nll_sums, alone.nll_sums)
    assert torch.equal(moved.token_counts, alone.token_counts)
    for number, example in enumerate(given):
        at = example.labels[1:] != IGNORE_INDEX
        p = log_p(model, example)[at]
        with edited():
            q = log_p(model, example)[at]
        expected = torch.nn.functional.kl_div(q, p, log_target=True, reduction="sum")
        assert moved.kl_sums[number] == pytest.approx(float(expected), rel=1e-4)
    interval = divergence_interval(moved)
    assert interval.mean == pytest.approx(moved.value)
    assert 0 <= interval.low < interval.mean < interval.high
    assert interval.p_value is None


def test_small_divergences_are_not_lost_in_rounding():
    generator = torch.Generator().manual_seed(1)
    before = torch.randn(4, 50, generator=generator)
    after = before + 1e-4 * torch.randn(4, 50, generator=generator)
    expected = stats.entropy(*(x.double().softmax(-1).T.numpy() for x in (before, after)))
    assert kl_of_logits(before, after).tolist() == pytest.approx(list(expected), rel=1e-2)
    assert kl_of_logits(before, before).tolist() == [0.0] * 4


def test_impossible_tokens_count_by_what_the_edit_gives_or_takes():
    before = torch.tensor([[0.0, -math.inf, 0.0], [0.0, 0.0, 0.0]])
    after = torch.tensor([[0.0, -math.inf, 0.0], [0.0, -math.inf, 0.0]])
    assert kl_of_logits(before, after).tolist() == [0.0, math.inf]
    assert kl_of_logits(after[1:], before[1:]).tolist() == pytest.approx([math.log(1.5)])


def test_an_interval_of_divergences_does_not_go_below_zero():
    found = Divergence(torch.tensor([0.0, 0.0, 9.0]).double(), torch.tensor([1, 1, 1]))
    assert divergence_interval(found).low == 0.0
