"""The fused selection of stacked experts on the CPU: bit for bit the operations it stands for."""

from __future__ import annotations

import pytest
import torch
from cpu_levels import DTYPES, random

from fastdean import native

pytestmark = pytest.mark.usefixtures("extension")
# Of four experts the first and the third saw nothing of the first set, the last nothing at all; of
# one token, empty, more tokens than a chunk takes; in no order.
SEGMENTS = torch.tensor(
    [[40, 71], [2, 3], [5, 5], [3, 40], [71, 900], [900, 1203], [7, 700], [8, 11], [11, 18], [4, 6]]
)
EXPERTS = torch.tensor([1, 0, 2, 1, 2, 1, 0, 1, 1, 1])
SETS = torch.tensor([1, 1, 1, 0, 1, 1, 1, 1, 1, 1])
# The last is of examples that a call adds together before it adds them to the sums.
BATCHES = torch.tensor([3, 0, 1, 0, 5, 4, 2, 9, 9, 9])


def spread(values):
    """`values` with NaN in the memory between its elements."""
    fill = float("nan") if values.is_floating_point() else -1
    holder = torch.full([2 * n + 1 for n in values.shape], fill, dtype=values.dtype)
    view = holder[tuple(slice(1, None, 2) for _ in values.shape)]
    view.copy_(values)
    return view


def expected(x, g, weight, k, level, batches):
    """Set by set, from sums of all experts, batch by batch, and one selection of each."""
    numel = weight[0].numel()
    for number, each in enumerate(k):
        sums = torch.zeros(weight.shape)
        for batch in batches.unique():
            mine = (number == SETS) & (batches == batch)
            experts, order = EXPERTS[mine].sort(stable=True)
            segments = SEGMENTS[mine][order]
            native.accumulate_expert_importance_(sums, x, g, segments, experts, level=level)
        picked = [
            native.select_top(sums[e], weight[e], 5 + number, each) + e * numel
            for e in range(len(weight))
        ]
        index = torch.cat(picked)
        yield index, sums.flatten()[index]


@pytest.mark.parametrize("rows, columns", [(1, 1), (13, 33), (130, 70)])
@pytest.mark.parametrize("batches", [None, BATCHES], ids=["one batch", "batches"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_level_has_the_bits_of_the_two_operations(level, dtype, batches, rows, columns):
    x_rows, g_rows = torch.arange(1203) * 7 % 300, torch.arange(1203) * 11 % 700
    x, g = random(300, columns, seed=1, dtype=dtype), random(700, rows, seed=2, dtype=dtype)
    weight, k = random(4, rows, columns, seed=3, dtype=dtype), [9, 400]
    calls = torch.zeros_like(SETS) if batches is None else batches
    whole = list(expected(x[x_rows], g[g_rows], weight, k, level, calls))
    before, signed_sums = torch.get_num_threads(), []
    try:
        for threads, lay_out in ((1, lambda t: t), (3, spread)):
            torch.set_num_threads(threads)
            found = native.select_expert_importance(
                *(lay_out(x), lay_out(g), SEGMENTS, EXPERTS, SETS, lay_out(weight), k, [5, 6]),
                x_rows=lay_out(x_rows),
                g_rows=lay_out(g_rows),
                batches=None if batches is None else lay_out(batches),
                signed=True,
                level=level,
            )
            signed_sums.append([signed for _, _, signed in found])
            for (index, sums, _), (wanted, values) in zip(found, whole, strict=True):
                assert torch.equal(index, wanted) and torch.equal(sums, values)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(*pair) for pair in zip(*signed_sums, strict=True))


def test_signed_sums_of_gathered_tokens_are_exact_to_one_rounding(level):
    x_rows, g_rows = torch.arange(1203) * 7 % 300, torch.arange(1203) * 11 % 700
    x, g, weight = (random(*s, seed=s[0]) for s in ((300, 33), (700, 13), (4, 13, 33)))
    found = native.select_expert_importance(
        *(x, g, SEGMENTS, EXPERTS, SETS, weight, [9, 400], [5, 6]),
        x_rows=x_rows,
        g_rows=g_rows,
        signed=True,
        level=level,
    )
    for number, (index, _, signed) in enumerate(found):
        exact = torch.zeros(4, 13, 33, dtype=torch.float64)
        for segment, expert, of in zip(SEGMENTS, EXPERTS.tolist(), SETS.tolist(), strict=True):
            tokens = slice(*segment.tolist())
            if of == number:
                exact[expert] += g[g_rows[tokens]].double().T @ x[x_rows[tokens]].double()
        torch.testing.assert_close(signed.double(), exact.flatten()[index], rtol=1e-7, atol=1e-11)


def test_no_memory_of_the_size_of_an_expert_is_taken():
    x, g, weight = torch.rand(8, 2000), torch.rand(8, 2000), torch.rand(2, 2000, 2000)
    real, asked = torch.empty, []

    def empty(*size, **options):
        made = real(*size, **options)
        asked.append(made.nbytes)
        return made

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", empty)
        zeros = torch.zeros(2, dtype=torch.int64)
        segments, experts = torch.tensor([[0, 8], [0, 8]]), torch.tensor([0, 1])
        native.select_expert_importance(x, g, segments, experts, zeros, weight, [20], [2])
    torch.set_num_threads(before)
    assert sum(asked) < weight[0].nbytes / 10
