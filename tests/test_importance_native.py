"""The compiled accumulation on the CPU: every instruction set, any number of threads."""

from __future__ import annotations

import threading

import pytest
import torch
from budget import assert_within_budget, lost_by_rounding

from fastdean import native
from fastdean.ops import accumulate_importance_

LEVELS = {0: "portable", 1: "avx2", 2: "avx512", 3: "avx512_bf16", 4: "amx_bf16"}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def extension(extension_built):
    if not extension_built:
        pytest.skip("an install without the extension is under test")


@pytest.fixture(params=LEVELS, ids=LEVELS.values())
def level(request):
    if request.param > native.cpu_level():
        pytest.skip(f"this processor has no {LEVELS[request.param]}")
    return request.param


def random(*shape, seed, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


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
