"""The same inputs give the same bits, run after run, on whatever device the kernels run on.

What differs between two runs of one kernel is the order in which its programs get their turn: a sum
that depends on it, or memory that nobody wrote, shows as bits that move. On a CPU the interpreter
has only one order, so that the test is worth its time on a GPU; it is the same test.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from tiny_data import batches, make_examples
from tiny_models import llama

import fastdean
from fastdean.ops import (
    accumulate_expert_importance_,
    accumulate_importance_,
    accumulate_unit_importance_,
    select_importance,
    select_top,
)

RUNS = {"cuda": 20, "cpu": 3}

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
IMPLEMENTATIONS = ["triton", "reference"]


@dataclass(frozen=True)
class Size:
    """Sizes that no tile divides; on a GPU with enough tiles to keep all its processors busy."""

    rows: int
    columns: int
    lengths: tuple[int, ...]


SIZES = {
    "cuda": Size(1203, 1157, (1, 76, 33, 130, 64, 5) * 6),
    "cpu": Size(37, 29, (1, 20, 7)),
}


@dataclass(frozen=True)
class Tensors:
    size: Size
    x: torch.Tensor
    g: torch.Tensor
    sums: torch.Tensor
    weight: torch.Tensor
    segments: torch.Tensor


def random_tensors(device, dtype):
    size = SIZES[device.type]
    generator = torch.Generator().manual_seed(11)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(device)

    ends = torch.tensor(size.lengths).cumsum(0)
    tokens = int(ends[-1])
    return Tensors(
        size,
        x=draw(tokens, size.columns).to(dtype),
        g=draw(tokens, size.rows).to(dtype),
        # Few distinct values: most of the selection is then decided by the order of ties.
        sums=draw(size.rows, size.columns).abs().mul_(2).round_(),
        weight=draw(size.rows, size.columns).sign().to(dtype),
        segments=torch.stack([ends - torch.tensor(size.lengths), ends], dim=1),
    )


def weight_sums(t, impl):
    acc = torch.full_like(t.sums, 0.25)
    return accumulate_importance_(acc, t.x, t.g, t.segments, impl=impl)


def unit_sums(t, impl):
    columns = min(t.x.shape[1], t.g.shape[1])
    acc = torch.full((columns,), 0.25, device=t.x.device)
    return accumulate_unit_importance_(
        acc, t.x[:, :columns], t.g[:, :columns], t.segments, impl=impl
    )


def expert_sums(t, impl):
    acc = torch.full((3, *t.sums.shape), 0.25, device=t.x.device)
    experts = torch.arange(len(t.segments)) * 3 // len(t.segments)
    return accumulate_expert_importance_(acc, t.x, t.g, t.segments, experts, impl=impl)


def selection(t, impl):
    return select_top(t.sums, t.weight, 4, t.sums.numel() // 3, impl=impl)


def fused_selection(t, impl):
    sets = torch.arange(len(t.segments)) * 2 // len(t.segments)
    k = [t.sums.numel() // 2000 + 1, t.sums.numel() // 3]
    found = select_importance(t.x, t.g, t.segments, sets, t.weight, k, signed=True, impl=impl)
    return torch.cat([part.double() for of_set in found for part in of_set])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", [weight_sums, unit_sums, expert_sums, selection, fused_selection])
def test_an_op_repeats_its_bits(op, dtype, impl, device):
    tensors = random_tensors(device, dtype)
    first = op(tensors, impl)
    assert first.numel() and not first.isnan().any()
    for run in range(1, RUNS[device.type]):
        # Other work in between, so that memory and caches are not as the first run found them.
        torch.randn(run * 1000, device=device).sort()
        assert torch.equal(op(tensors, impl), first), f"run {run} differs from the first"


@pytest.mark.parametrize("granularity", ["weight", "unit"])
def test_a_deterministic_run_of_score_repeats_its_bits(granularity, device):
    model, examples = llama().to(device), make_examples()

    def run():
        return fastdean.score(
            model,
            batches(examples, 4),
            granularity=granularity,
            impl="triton",
            deterministic=True,
            progress=False,
        )

    first = run()
    for number in range(1, RUNS[device.type]):
        again = run()
        assert list(again) == list(first)
        for parameter, entry in again.entries.items():
            same = torch.equal(entry.sums, first.entries[parameter].sums)
            assert same, f"run {number} differs from the first in {parameter}"
