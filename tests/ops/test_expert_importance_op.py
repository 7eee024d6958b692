"""`accumulate_expert_importance_` against one product per expert and example, in float64."""

from __future__ import annotations

import pytest
import torch
from budget import assert_within_budget, lost_on_a_gpu
from machine import DEVICE

from fastdean import native
from fastdean.ops import accumulate_expert_importance_, accumulate_importance_

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NATIVE = ["native"] if DEVICE.type == "cpu" and native.status().state == "available" else []
IMPL = pytest.mark.parametrize("impl", ["reference", "triton", *NATIVE])
PLACE = pytest.mark.parametrize("place", [torch.device("cpu"), DEVICE], ids=["host", "device"])

# Experts 0 and 3 of five have no token, expert 2 has three examples, one of them without tokens.
SEGMENTS = torch.tensor([[0, 4], [4, 9], [9, 9], [9, 30], [31, 32]])
EXPERTS = torch.tensor([1, 2, 2, 2, 4])


def random(*shape, seed, dtype=torch.float32):
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return values.to(DEVICE, dtype)


def oracle(acc, x, g, segments, experts, dtype):
    result = acc.to(dtype, copy=True)
    for (start, end), expert in zip(segments.tolist(), experts.tolist(), strict=True):
        result[expert] += (g[start:end].to(dtype).T @ x[start:end].to(dtype)).abs()
    return result


@IMPL
@PLACE
@pytest.mark.parametrize("rows, columns", [(1, 1), (63, 5), (129, 64)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_expert_gets_its_own_examples(impl, place, rows, columns, dtype):
    x, g = random(33, columns, seed=1, dtype=dtype), random(33, rows, seed=2, dtype=dtype)
    acc = random(5, rows, columns, seed=3).abs()
    exact = oracle(acc, x, g, SEGMENTS, EXPERTS, torch.float64)
    same = oracle(acc, x, g, SEGMENTS, EXPERTS, torch.float32)
    segments, experts = SEGMENTS.to(place), EXPERTS.to(place)
    before = acc.clone()
    assert accumulate_expert_importance_(acc, x, g, segments, experts, impl=impl) is acc
    lost = torch.zeros_like(exact)
    if x.is_cuda:
        for segment, expert in zip(SEGMENTS, EXPERTS.tolist(), strict=True):
            lost[expert] += lost_on_a_gpu(x, g, segment[None])
    assert_within_budget(acc, same, exact, lost=lost)
    assert torch.equal(acc[[0, 3]], before[[0, 3]])


@IMPL
def test_one_expert_is_an_ordinary_layer(impl):
    x, g, segments = random(20, 17, seed=1), random(20, 9, seed=2), torch.tensor([[0, 7], [7, 20]])
    plain, stacked = torch.zeros(9, 17, device=DEVICE), torch.zeros(1, 9, 17, device=DEVICE)
    accumulate_importance_(plain, x, g, segments, impl=impl)
    accumulate_expert_importance_(stacked, x, g, segments, torch.tensor([0, 0]), impl=impl)
    assert torch.equal(plain, stacked[0])


@IMPL
def test_accumulators_may_be_transposed(impl):
    # Some models store their experts [E, in, out].
    x, g = random(33, 6, seed=1), random(33, 7, seed=2)
    straight = torch.zeros(5, 7, 6, device=DEVICE)
    stored = torch.zeros(5, 6, 7, device=DEVICE)
    accumulate_expert_importance_(straight, x, g, SEGMENTS, EXPERTS, impl=impl)
    accumulate_expert_importance_(stored.mT, x, g, SEGMENTS, EXPERTS, impl=impl)
    assert torch.equal(stored.mT, straight)


@IMPL
def test_no_tokens_at_all(impl):
    acc = torch.ones(2, 3, 4, device=DEVICE)
    nothing = torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    x, g = torch.zeros(0, 4, device=DEVICE), torch.zeros(0, 3, device=DEVICE)
    accumulate_expert_importance_(acc, x, g, *nothing, impl=impl)
    assert acc.eq(1).all()


X, G = torch.ones(6, 4), torch.ones(6, 3)


@pytest.mark.parametrize(
    "change, error, text",
    [
        ({"acc": torch.zeros(3, 4)}, ValueError, r"acc must be \[E, R, C\], got \[3, 4\]; stack"),
        ({"acc": torch.zeros(2, 4, 3)}, ValueError, r"acc must be torch.float32 \[2, 3, 4\]"),
        ({"segments": torch.tensor([[0, 3], [3, 7]])}, ValueError, "<= end <= 6, got rows from 0"),
        ({"segments": torch.zeros(2, 2)}, ValueError, "on the CPU or the inputs' device, got"),
        ({"segments": [[0, 6]]}, TypeError, "segments must be a tensor"),
        ({"experts": [0, 1]}, TypeError, "experts must be a tensor, int64 .* got list; make it"),
        ({"experts": torch.tensor([0])}, ValueError, r"int64 \[2\] on cpu, one per segment, got"),
        ({"experts": torch.tensor([1, 0])}, ValueError, "experts must be in ascending order"),
        ({"experts": torch.tensor([0, 2])}, ValueError, "experts must lie in 0..1, got 0 to 2; "),
        ({"experts": torch.tensor([-1, 1])}, ValueError, "experts must lie in 0..1, got -1 to 1"),
        ({"g": G.half()}, TypeError, "share one floating dtype"),
    ],
)
def test_errors(change, error, text):
    arguments = {
        "acc": torch.zeros(2, 3, 4),
        "x": X,
        "g": G,
        "segments": torch.tensor([[0, 3], [3, 6]]),
        "experts": torch.tensor([0, 1]),
    } | change
    with pytest.raises(error, match=text):
        accumulate_expert_importance_(**arguments)
    assert not arguments["acc"].any()


@IMPL
def test_autograd_sees_the_write(impl):
    acc, x, g = torch.zeros(2, 3, 4, device=DEVICE), random(2, 4, seed=1), random(2, 3, seed=2)
    version = acc._version
    spans, experts = torch.tensor([[0, 2]]), torch.tensor([1])
    accumulate_expert_importance_(acc, x, g, spans, experts, impl=impl)
    assert acc._version > version
