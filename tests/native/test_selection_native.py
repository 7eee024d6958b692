"""The compiled selection on the CPU: bit for bit the reference, at every level and any threads."""

from __future__ import annotations

import time

import pytest
import torch

from fastdean import native
from fastdean.ops import reference

LEVELS = {0: "portable", 1: "avx2"}
WEIGHTS = [None, torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture(autouse=True)
def extension(extension_built):
    if not extension_built:
        pytest.skip("an install without the extension is under test")


@pytest.fixture(params=LEVELS, ids=LEVELS.values())
def level(request):
    if request.param > native.cpu_level():
        pytest.skip(f"this processor has no {LEVELS[request.param]}")
    return request.param


@pytest.fixture(params=[1, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def numbers(kind, numel):
    drawn = torch.rand(numel, generator=torch.Generator().manual_seed(numel))
    return {
        "random": lambda: drawn,
        "few": lambda: (drawn * 4).floor(),
        "all equal": lambda: torch.ones(numel),
        "ascending": lambda: drawn.sort().values,
        "descending": lambda: drawn.sort(descending=True).values,
        "mostly zero": lambda: drawn * (drawn > 0.99),
        "of either sign": lambda: drawn - 0.5,
        "denormal": lambda: drawn * 1e-42,
    }[kind]()


KINDS = [
    *("random", "few", "all equal", "ascending", "descending"),
    *("mostly zero", "of either sign", "denormal"),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", WEIGHTS, ids=str)
def test_every_level_is_the_reference_bit_for_bit(dtype, kind):
    # All in one test: the reference takes longest.
    levels = [level for level in LEVELS if level <= native.cpu_level()]
    # Around a group of 64, and enough for several workers.
    for numel in (1, 63, 64, 65, 1000, 200_001):
        sums = numbers(kind, numel)
        weight = None
        if dtype is not None:
            signs = torch.randn(numel, generator=torch.Generator().manual_seed(1)).sign()
            weight = (signs if kind == "all equal" else signs * numbers("random", numel)).to(dtype)
        for k in (0, 1, 7, numel // 10, numel, numel + 3):
            # 3 makes ties by division; 1000 makes quotients that round to 0.
            for num_examples in (1, 3, 1000):
                expected = reference.select_top(sums, weight, num_examples, k)
                for level in levels:
                    found = native.select_top(sums, weight, num_examples, k, level=level)
                    assert torch.equal(found, expected), (level, numel, k, num_examples)


def spread(values):
    """`values` with NaN in the memory between its elements."""
    holder = torch.full([2 * n + 1 for n in values.shape], float("nan"), dtype=values.dtype)
    view = holder[tuple(slice(1, None, 2) for _ in values.shape)]
    view.copy_(values)
    return view


LAYOUTS = {
    "spread": spread,
    "transposed": lambda t: t.transpose(0, -1).clone().transpose(0, -1),
    "cut": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
    "one row, expanded": lambda t: t[:1].expand(t.shape),
    "one number, expanded": lambda t: t.flatten()[0].expand(t.shape),
}


@pytest.mark.parametrize("shape", [(), (70,), (50, 1100), (7, 0), (6, 20, 31)], ids=str)
@pytest.mark.parametrize("dtype", WEIGHTS, ids=str)
@pytest.mark.parametrize("lay_out", LAYOUTS)
def test_flat_indices_are_row_major_in_any_layout(lay_out, dtype, shape):
    if "expanded" in lay_out and 0 in shape or lay_out != "spread" and not shape:
        return
    generator = torch.Generator().manual_seed(3)
    sums = torch.rand(shape, generator=generator)
    weight = None if dtype is None else torch.rand(shape, generator=generator).to(dtype)
    turned = LAYOUTS[lay_out]
    for given in ((turned(sums), weight), (sums, weight if dtype is None else turned(weight))):
        expected = reference.select_top(*given, 3, 20)
        assert torch.equal(native.select_top(*given, 3, 20), expected)


def test_threads_do_not_change_the_result(threads):
    for kind in KINDS:
        sums = numbers(kind, 300_000)
        for k in (1, 500, 150_000, 300_000):
            assert torch.equal(
                native.select_top(sums, None, 3, k), reference.select_top(sums, None, 3, k)
            )


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("k", [0, 5])
@pytest.mark.parametrize("place", [0, 70, 100_000, 299_999])
def test_the_first_importance_that_is_not_finite_is_named(threads, place, k, bad):
    sums = torch.ones(300_000)
    sums[place:] = bad
    message = f"^importance must be finite, got {bad} at flat index {place}; check the losses"
    with pytest.raises(ValueError, match=message):
        native.select_top(sums, None, 2, k)
    # A weight is taken without its sign.
    with pytest.raises(ValueError, match=message.replace("-inf", "inf")):
        native.select_top(torch.ones(300_000), sums.bfloat16(), 2, k)


def test_a_double_beyond_fp32_is_infinite_as_in_the_reference():
    weight = torch.tensor([1.0, 1e300], dtype=torch.float64)
    with pytest.raises(ValueError, match="got inf at flat index 1"):
        native.select_top(torch.ones(2), weight, 1, 1)


def test_every_number_of_half_precision_is_read(level):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        weight = every.view(dtype)
        weight = weight[weight.isfinite()]
        sums = torch.ones(len(weight))
        for k in (1000, len(weight)):
            expected = reference.select_top(sums, weight, 1, k)
            assert torch.equal(native.select_top(sums, weight, 1, k, level=level), expected)


def test_the_worst_order_of_the_entries_takes_a_small_multiple_of_the_best():
    sums = torch.arange(1, 1_500_001).float()
    seconds = {}
    for name, given in (("ascending", sums), ("descending", sums.flip(0))):
        start = time.perf_counter()
        native.select_top(given, None, 1, 40_000)
        seconds[name] = time.perf_counter() - start
    # Sorting all that was kept at every entry would take minutes.
    assert seconds["ascending"] < 100 * seconds["descending"] + 2


def test_no_memory_of_the_matrix_size_is_taken():
    sums, asked = torch.rand(2_000_000), []
    real = torch.empty

    def empty(*size, **options):
        made = real(*size, **options)
        asked.append(made.nbytes)
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", empty)
        native.select_top(sums, sums, 3, 20)
    assert sum(asked) < sums.nbytes / 50


def test_what_is_returned_owns_no_more_than_its_indices():
    found = native.select_top(torch.tensor([0.0, 2.0, 0.0, 1.0]), None, 1, 4)
    assert found.tolist() == [1, 3] and found.untyped_storage().nbytes() == 16


def test_an_instruction_set_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="level must be an instruction set .* got 9; leave it out"):
        native.select_top(torch.ones(3), None, 1, 1, level=9)


def test_the_default_device_does_not_matter():
    with torch.device("meta"):
        assert native.select_top(torch.ones(3, device="cpu"), None, 1, 2).tolist() == [0, 1]
