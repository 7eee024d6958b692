"""The compiled accumulation on the CPU: every instruction set, any number of threads."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch
from budget import assert_within_budget, lost_by_rounding
from cpu_levels import DTYPES, random

from fastdean import native
from fastdean.ops import accumulate_importance_

pytestmark = pytest.mark.usefixtures("extension")


def sums(acc, x, g, segments, dtype):
    result = acc.to(dtype)
    for start, end in segments.tolist():
        result = result + (g[start:end].to(dtype).T @ x[start:end].to(dtype)).abs()
    return result


# Ragged, out of order, overlapping, of length 1, empty; odd ends, which pairs of bf16 must fill up.
RAGGED = torch.tensor([[2, 3], [10, 21], [5, 5], [3, 10], [0, 37]])
# More tokens than one chunk takes, in one example and in several.
LONG = torch.tensor([[0, 500], [500, 501], [501, 800], [800, 1003]])


@pytest.mark.parametrize("rows, columns", [(1, 1), (6, 16), (13, 33), (65, 7)])
@pytest.mark.parametrize("segments", [RAGGED, LONG], ids=["ragged", "long"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_level_is_within_the_budget(level, dtype, segments, rows, columns):
    tokens = int(segments.max())
    x, g = random(tokens, columns, seed=1, dtype=dtype), random(tokens, rows, seed=2, dtype=dtype)
    acc = random(rows, columns, seed=3).abs()
    exact, same = (sums(acc, x, g, segments, d) for d in (torch.float64, torch.float32))
    native.accumulate_importance_(acc, x, g, segments, level=level)
    lost = lost_by_rounding(lambda t: g[t, :, None].double() * x[t].double(), segments)
    assert_within_budget(acc, same, exact, lost=lost)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_level_takes_more_columns_than_it_keeps_in_a_cache(level, dtype):
    x, g = random(61, 1100, seed=1, dtype=dtype), random(61, 130, seed=2, dtype=dtype)
    segments = torch.tensor([[0, 20], [20, 61]])
    acc = random(130, 1100, seed=3).abs()
    exact, same = (sums(acc, x, g, segments, d) for d in (torch.float64, torch.float32))
    native.accumulate_importance_(acc, x, g, segments, level=level)
    lost = lost_by_rounding(lambda t: g[t, :, None].double() * x[t].double(), segments)
    assert_within_budget(acc, same, exact, lost=lost)


def spread(values):
    """`values` with NaN in the memory between its elements."""
    holder = torch.full([2 * n + 1 for n in values.shape], float("nan"), dtype=values.dtype)
    view = holder[1::2, 1::2]
    view.copy_(values)
    return view


@pytest.mark.parametrize("lay_out", [spread, lambda t: t.T.clone().T], ids=["spread", "transposed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_do_not_change_a_bit(level, dtype, lay_out):
    x, g = random(37, 70, seed=1, dtype=dtype), random(37, 50, seed=2, dtype=dtype)
    expected, acc = torch.zeros(50, 70), lay_out(torch.zeros(50, 70))
    native.accumulate_importance_(expected, x, g, RAGGED, level=level)
    native.accumulate_importance_(acc, lay_out(x), lay_out(g), RAGGED, level=level)
    assert torch.equal(acc, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_reaches_its_entries_and_no_others(level, dtype):
    x, g = random(37, 70, seed=1, dtype=dtype), random(37, 50, seed=2, dtype=dtype)
    segments = torch.tensor([[0, 1], [1, 36]])
    x[0, 3], g[5, 40], x[36, 9] = float("inf"), float("nan"), float("nan")
    acc = torch.zeros(50, 70)
    native.accumulate_importance_(acc, x, g, segments, level=level)
    is_inf, is_nan = torch.zeros(50, 70, dtype=bool), torch.zeros(50, 70, dtype=bool)
    is_inf[:, 3], is_nan[40] = True, True
    assert torch.equal(acc.isnan(), is_nan)
    assert torch.equal(acc.isinf(), is_inf & ~is_nan)


def test_the_bf16_instructions_take_denormals_for_0(level):
    least = torch.finfo(torch.bfloat16).tiny
    x = torch.tensor([[least, least / 16, 2.0**-40]], dtype=torch.bfloat16)
    g = torch.tensor([[1.0, 2.0**-100]], dtype=torch.bfloat16)
    acc = torch.zeros(2, 3)
    native.accumulate_importance_(acc, x, g, torch.tensor([[0, 1]]), level=level)
    exact = g.T.float() @ x.float()
    if level >= 3:
        exact = torch.where(exact < least, 0.0, exact)
    assert torch.equal(acc, exact)
    assert acc[0, 0] == least and acc[0, 2] == 2.0**-40


# Linux refuses the matrix unit to a process that takes signals on a stack too small for its state.
REFUSED = """
import ctypes

class Stack(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]

size = 4096
memory = ctypes.create_string_buffer(size)
stack = Stack(ctypes.addressof(memory), 0, size)
assert ctypes.CDLL(None).sigaltstack(ctypes.byref(stack), None) == 0
import torch
from fastdean import native
from fastdean.ops import accumulate_importance_

x, g = torch.full((3, 40), 2.0).bfloat16(), torch.full((3, 50), -3.0).bfloat16()
acc = accumulate_importance_(torch.zeros(50, 40), x, g, torch.tensor([[0, 3]]), impl="native")
assert bool((acc == 18).all())
print(native.cpu_level(), native.status().build.cpu_levels[0].in_use)
"""


def test_without_the_systems_leave_the_next_level_is_taken():
    if native.cpu_level() < 4:
        pytest.skip("this processor has no matrix unit, or its system does not lend it")
    done = subprocess.run([sys.executable, "-c", REFUSED], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("3 AVX512-BF16\n", "")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_do_not_change_a_bit(level, dtype):
    x, g = random(1003, 70, seed=1, dtype=dtype), random(1003, 50, seed=2, dtype=dtype)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            acc = torch.zeros(50, 70)
            native.accumulate_importance_(acc, x, g, LONG, level=level)
            results.append(acc)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_half_precision_reads_every_number(level):
    # Denormals, the largest, both zeros: all finite fp16 numbers, one example each.
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    x = every[every.isfinite()].unsqueeze(1)
    ones = torch.ones_like(x)
    acc = torch.zeros(1, len(x))
    one = torch.tensor([[0, 1]])
    native.accumulate_importance_(acc, x.T.contiguous(), ones[:1], one, level=level)
    assert torch.equal(acc[0], x[:, 0].float().abs())


def test_two_python_threads_on_two_accumulators():
    x, g = random(400, 64, seed=1), random(400, 48, seed=2)
    segments = torch.tensor([[0, 150], [150, 400]])
    expected = accumulate_importance_(torch.zeros(48, 64), x, g, segments, impl="native")
    results = [torch.zeros(48, 64) for _ in range(2)]

    def work(acc):
        accumulate_importance_(acc, x, g, segments, impl="native")

    workers = [threading.Thread(target=work, args=(acc,)) for acc in results]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(torch.equal(acc, expected) for acc in results)


def test_an_instruction_set_that_is_not_there_is_refused():
    acc = torch.zeros(3, 4)
    message = (
        "level must be an instruction set that this processor has, 0 to "
        f"{native.cpu_level()}, got 9; leave it out to take the highest"
    )
    with pytest.raises(ValueError, match=message):
        native.accumulate_importance_(
            acc, torch.ones(2, 4), torch.ones(2, 3), torch.tensor([[0, 2]]), level=9
        )
    assert not acc.any()


def test_fp64_is_refused_and_not_read_as_another_dtype():
    acc = torch.zeros(3, 4)
    x, g = torch.ones(2, 4).double(), torch.ones(2, 3).double()
    with pytest.raises(
        TypeError, match="x and g must be float32, bfloat16 or float16, got float64; cast them"
    ):
        native.accumulate_importance_(acc, x, g, torch.tensor([[0, 2]]))
    assert not acc.any()


def test_segments_out_of_range_are_called_so():
    acc = torch.zeros(3, 4)
    for segments in ([[0, 3]], [[-1, 2]], [[2, 1]]):
        with pytest.raises(
            IndexError, match="segments must satisfy 0 <= start <= end <= 2, got others; check"
        ):
            native.accumulate_importance_(
                acc, torch.ones(2, 4), torch.ones(2, 3), torch.tensor(segments)
            )
    assert not acc.any()


def test_the_default_device_does_not_matter():
    x, g, segments = torch.ones(2, 4), torch.ones(2, 3), torch.tensor([[0, 2]])
    acc = torch.zeros(3, 4)
    with torch.device("meta"):
        native.accumulate_importance_(acc, x, g, segments)
    assert torch.equal(acc, torch.full((3, 4), 2.0))


def test_autograd_sees_the_write():
    acc = torch.zeros(3, 4)
    version = acc._version
    accumulate_importance_(
        acc, torch.ones(2, 4), torch.ones(2, 3), torch.tensor([[0, 2]]), impl="native"
    )
    assert acc._version > version
