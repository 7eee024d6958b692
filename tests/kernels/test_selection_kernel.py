"""The selection kernels across the borders of their tiles, spans, groups and buffers."""

from __future__ import annotations

import mmap

import machine  # noqa: F401  # before the kernels: it decides whether they are interpreted
import numpy as np
import pytest
import torch
import triton
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from machine import DEVICE

from fastdean.kernels import selection
from fastdean.ops import select_top

# Linux; the module names it from Python 3.13 on.
MAP_NORESERVE = 0x4000

CUTS = {
    "_TILE": 256,
    "_SPAN": 64,
    "_BLOCK_K": 64,
    "_BLOCK_S": 2,
    "_ROOM": 4,
    "_SPARE_ROOM": 16,
    "_ONE_PROGRAM": 100,
    "_SPARSE_K": 64,
}


@pytest.fixture
def small_cuts(monkeypatch):
    """Sizes that a matrix of a thousand entries crosses in every way one of millions does."""
    for name, value in CUTS.items():
        monkeypatch.setattr(selection, name, value)


def expected(sums, weight, num_examples, k):
    """A stable sort of the positive values, each step of them rounded to fp32."""
    value = sums.cpu().numpy().ravel()
    if weight is not None:
        value = value * np.abs(weight.cpu().float().numpy().ravel())
    value = value / np.float32(num_examples)
    order = np.argsort(-value, kind="stable")
    return np.sort(order[value[order] > 0][:k]).tolist()


def check(sums, weight, num_examples, k):
    sums, weight = sums.to(DEVICE), None if weight is None else weight.to(DEVICE)
    chosen = select_top(sums, weight, num_examples, k, impl="triton")
    assert chosen.dtype == torch.int64 and chosen.device == sums.device
    assert chosen.tolist() == expected(sums, weight, num_examples, k)


def random(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


# Few for groups of 64; for groups of 16, with candidates that fit into one program and that do not;
# as many as there are groups; more than there are entries.
@pytest.mark.parametrize("k", [9, 20, 40, 70, 1100])
def test_every_k_across_tiles(small_cuts, k):
    check(random(1030), random(1030, seed=1) - 0.5, 7, k)


@pytest.mark.parametrize("numel", [255, 256, 257, 1023, 1025])
def test_sizes_at_the_edge_of_a_tile(small_cuts, numel):
    sums = random(numel)
    sums[-1] = 5.0
    check(sums, None, 1, 3)


@pytest.mark.parametrize("k, value", [(3, 1.0), (3, 1e-45), (30, 1.0), (30, 3e38)])
def test_more_ties_than_there_is_room_for(small_cuts, k, value):
    sums = torch.full((900,), value)
    sums[:300] = 0.0
    check(sums, None, 1, k)


def test_an_entry_below_the_bound_that_division_lifts_to_it():
    # The bound is found to 15 bits, so that only numbers with the others zero are bounds exactly.
    bound = 1.5 + torch.arange(1, 64) / 128
    below = bound.nextafter(torch.tensor(0.0))
    three = torch.tensor(3.0)
    lifted = (bound / three == below / three).nonzero()[0, 0]
    sums = torch.zeros(200)
    sums[3], sums[150] = below[lifted], bound[lifted]
    assert expected(sums, None, 3, 1) == [3]
    check(sums, None, 3, 1)


@pytest.mark.parametrize("k", [4, 60])
def test_the_largest_entries_in_one_group(small_cuts, k):
    sums = random(1000)
    sums[512:640] += 10.0
    check(sums, None, 3, k)


@pytest.mark.parametrize("k", [5, 80])
def test_fewer_positive_entries_than_k(small_cuts, k):
    sums = torch.zeros(1000)
    sums[[3, 700]] = 1.0
    check(sums, None, 1, k)


def test_nothing_positive(small_cuts):
    check(torch.zeros(600), -torch.ones(600), 1, 50)


@pytest.mark.parametrize("k", [6, 50])
def test_importances_over_the_whole_range(small_cuts, k):
    exponents = torch.linspace(-149, 127, 800)[torch.randperm(800)]
    check(torch.exp2(exponents), None, 1000, k)


values = st.sampled_from([0.0, 1e-45, 1e-38, 1.0, 1.0 + 2**-23, 2.0, 1e30, 3.4e38])


# The cuts are the same for every example, so one fixture serves them all.
@settings(
    deadline=None,
    max_examples=10,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    st.lists(values, min_size=1, max_size=20),
    st.integers(1, 800),
    st.integers(0, 100),
    st.integers(0, 99),
)
def test_adversarial_ties(small_cuts, drawn, numel, k, seed):
    generator = torch.Generator().manual_seed(seed)
    sums = torch.tensor(drawn)[torch.randint(len(drawn), (numel,), generator=generator)]
    check(sums, None, 3, k)


# Importances that differ in their last bits alone: every window of the search is full of them.
def few_bits(examples):
    def decorated(test):
        test = example(0x3F800000, 8, 300, 60, 0)(test)
        test = example(0x3F800000, 9, 300, 4, 0)(test)
        test = given(
            st.sampled_from([1, 0x3F800000 - 77, 0x7F000000]),
            st.integers(1, 18),
            st.integers(1, 600),
            st.integers(1, 100),
            st.integers(0, 99),
        )(test)
        return settings(
            deadline=None,
            max_examples=examples,
            database=None,
            suppress_health_check=[HealthCheck.function_scoped_fixture],
        )(test)

    return decorated


def check_few_bits(lowest, bits, numel, k, seed):
    generator = torch.Generator().manual_seed(seed)
    keys = lowest + torch.randint(2**bits, (numel,), generator=generator)
    check(keys.to(torch.int32).view(torch.float32), None, 1, k)


@few_bits(8)
def test_importances_within_a_few_bits(small_cuts, lowest, bits, numel, k, seed):
    check_few_bits(lowest, bits, numel, k, seed)


@pytest.mark.slow
@few_bits(80)
def test_many_importances_within_a_few_bits(small_cuts, lowest, bits, numel, k, seed):
    check_few_bits(lowest, bits, numel, k, seed)


@pytest.mark.parametrize("k", [4, 3600])
def test_importances_within_a_few_bits_at_real_sizes(k):
    # Few enough for one program, and too many.
    generator = torch.Generator().manual_seed(k)
    keys = 0x3F800000 + torch.randint(300, (20_000,), generator=generator)
    check(keys.to(torch.int32).view(torch.float32), None, 1, k)


@pytest.mark.parametrize("k", [2, 9000])
def test_the_sizes_of_real_launches(k):
    generator = torch.Generator().manual_seed(k)
    sums = torch.rand(150, 130, generator=generator)
    weight = torch.randn(150, 130, generator=generator).to(torch.bfloat16)
    check(sums, weight, 128, k)


def test_repeats_give_the_same_bits():
    sums = torch.randint(0, 50, (12_000,), generator=torch.Generator().manual_seed(0)).float()
    chosen = [select_top(sums.to(DEVICE), None, 1, 300, impl="triton") for _ in range(2)]
    assert torch.equal(*chosen)


@pytest.mark.parametrize("k", [0, 5, 60])
def test_the_first_flaw_of_several_tiles_is_named(small_cuts, k):
    sums = torch.ones(900, device=DEVICE)
    sums[[880, 600, 601]] = torch.tensor([float("inf"), float("nan"), float("inf")], device=DEVICE)
    with pytest.raises(ValueError, match="must be finite, got nan at flat index 600; check"):
        select_top(sums, None, 1, k, impl="triton")


def test_the_host_waits_once(small_cuts, monkeypatch):
    waits = []
    read = selection._State.read
    monkeypatch.setattr(selection._State, "read", lambda state: waits.append(0) or read(state))
    for k in (9, 60):
        check(random(1000), None, 1, k)
        assert len(waits) == 1, k
        waits.clear()


@pytest.mark.gpu
def test_entries_beyond_2_to_the_31():
    sums = torch.zeros(2**31 + 100, device=DEVICE)
    places = [7, 2**31 - 1, 2**31, 2**31 + 99]
    sums[places] = torch.tensor([1.0, 2.0, 2.0, 3.0], device=DEVICE)
    assert select_top(sums, None, 1, 3, impl="triton").tolist() == places[1:]
    sums[2**31 + 50] = float("nan")
    with pytest.raises(ValueError, match=f"got nan at flat index {2**31 + 50}; "):
        select_top(sums, None, 1, 3, impl="triton")


class Untouched:
    """An array too large for memory, of which only the pages that are written exist.

    A kernel gets `base`, whose address is the array's and whose size is one element.
    """

    def __init__(self, numel, dtype):
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
        self.itemsize, self.dtype = dtype.itemsize, dtype
        self.memory = mmap.mmap(-1, numel * self.itemsize, flags=flags)
        self.base = self.part(0, 1)

    def part(self, start, count):
        offset = start * self.itemsize
        return torch.frombuffer(self.memory, dtype=self.dtype, count=count, offset=offset)


@pytest.mark.skipif(
    DEVICE.type == "cuda", reason="on a GPU test_entries_beyond_2_to_the_31 does this in full"
)
def test_addresses_beyond_2_to_the_31(monkeypatch):
    from triton.runtime.interpreter import interpreter_builder

    def run_only(program, kernel, *arguments, **constants):
        place = interpreter_builder.set_grid_idx
        with monkeypatch.context() as patch:
            patch.setattr(
                interpreter_builder,
                "set_grid_idx",
                lambda x, y, z: (
                    place(x, y, z),
                    setattr(interpreter_builder, "grid_idx", (program, y, z)),
                ),
            )
            kernel[(1,)](*arguments, **constants)

    far, numel, group = 2**31, 2**31 + 8192, 64
    sums, flaws = Untouched(numel, torch.float32), torch.tensor([5, 8000])
    sums.part(far, 8192)[flaws] = torch.tensor([3.0, 2.0])
    num_groups = numel // group
    maxima, groups = Untouched(num_groups, torch.int32), Untouched(num_groups, torch.int32)
    state = selection._State.zeros(DEVICE)
    matrix = (sums.base, sums.base, numel)
    read = {"HAS_WEIGHT": False, "GROUP": group}

    run_only(
        far // 8192, selection._maxima_kernel, maxima.base, state.head, *matrix, BLOCK_G=128, **read
    )
    found = maxima.part(far // group, 128).view(torch.float32)
    assert found[[0, 125]].tolist() == [3.0, 2.0] and found.count_nonzero() == 2

    state.of_groups[selection._LEAST.value] = 1
    span, spans = 4096, triton.cdiv(num_groups, 4096)
    offsets = torch.zeros(spans, dtype=torch.int64)
    reached = torch.zeros(spans, dtype=torch.int32)
    lists = (reached, groups.base)
    cut = {"BLOCK_G": 32, "SPAN": span, **read}
    run_only(
        *(spans - 1, selection._count_kernel, offsets, *lists, maxima.base),
        *(state.of_groups, state.head, *matrix, num_groups),
        **{"BLOCK_K": 2048, "BLOCK_S": 512, **cut},
    )
    assert (int(offsets[-1]), int(reached[-1])) == (2, 2)

    offsets.zero_()
    keys = torch.zeros(8, dtype=torch.int32)
    flat = torch.zeros(8, dtype=torch.int64)
    run_only(
        *(spans - 1, selection._gather_kernel, keys, flat, offsets, *lists),
        *(state.of_groups, *matrix, 8, 1.0),
        **cut,
    )
    assert flat.tolist() == [far + 5, far + 8000] + [0] * 6
    assert keys.view(torch.float32)[:2].tolist() == [3.0, 2.0]

    sums.part(far + 9, 1).fill_(float("nan"))
    run_only(
        far // 8192, selection._maxima_kernel, maxima.base, state.head, *matrix, BLOCK_G=128, **read
    )
    assert int(state.head[0]) == numel - (far + 9)
