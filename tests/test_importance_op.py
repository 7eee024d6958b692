"""`accumulate_importance_` and `accumulate_unit_importance_` against float64, within the budget."""

from __future__ import annotations

import pytest
import torch
from budget import assert_within_budget

from fastdean.ops import accumulate_importance_, accumulate_unit_importance_

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SIZES = [1, 63, 123, 128, 129]
LAYOUTS = ["contiguous", "transposed", "sliced"]
NAN = float("nan")


def laid_out(values, layout):
    """`values` in another memory layout, with NaN in the memory between its elements."""
    if layout == "contiguous":
        return values.clone()
    if layout == "transposed":
        return values.t().contiguous().t()
    holder = torch.full(tuple(2 * n + 1 for n in values.shape), NAN, dtype=values.dtype)
    view = holder[tuple(slice(1, 2 * n + 1, 2) for n in values.shape)]
    view.copy_(values)
    return view


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def spans(*pairs):
    return torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)


def weight_sums(acc, x, g, segments, dtype):
    result = acc.to(dtype)
    for start, end in segments.tolist():
        result = result + (g[start:end].to(dtype).T @ x[start:end].to(dtype)).abs()
    return result


def unit_sums(acc, a, g, segments, dtype):
    result = acc.to(dtype)
    for start, end in segments.tolist():
        result = result + (a[start:end].to(dtype) * g[start:end].to(dtype)).sum(0).abs()
    return result


def check_weight(acc, x, g, segments):
    oracle = weight_sums(acc, x, g, segments, torch.float64)
    same = weight_sums(acc, x, g, segments, torch.float32)
    assert accumulate_importance_(acc, x, g, segments) is acc
    assert_within_budget(acc, same, oracle)


def check_unit(acc, a, g, segments):
    oracle = unit_sums(acc, a, g, segments, torch.float64)
    same = unit_sums(acc, a, g, segments, torch.float32)
    assert accumulate_unit_importance_(acc, a, g, segments) is acc
    assert_within_budget(acc, same, oracle)


# Ragged, out of order, one of length 1, an empty one, and rows 0, 1 and 20.. in none.
RAGGED = spans((2, 3), (10, 20), (5, 5), (3, 10))


@pytest.mark.parametrize("columns", SIZES)
@pytest.mark.parametrize("rows", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weight_sums_are_within_the_budget(dtype, rows, columns):
    x, g = random(23, columns, seed=1, dtype=dtype), random(23, rows, seed=2, dtype=dtype)
    check_weight(random(rows, columns, seed=3).abs(), x, g, RAGGED)


@pytest.mark.parametrize("layout_acc", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_do_not_matter(dtype, layout, layout_acc):
    x = laid_out(random(23, 63, seed=1, dtype=dtype), layout)
    g = laid_out(random(23, 129, seed=2, dtype=dtype), layout)
    check_weight(laid_out(random(129, 63, seed=3).abs(), layout_acc), x, g, RAGGED)
    acc = random(63, seed=4).abs()
    a = laid_out(random(23, 63, seed=5, dtype=dtype), layout)
    vector = laid_out(acc, "sliced" if layout_acc == "sliced" else "contiguous")
    check_unit(vector, a, x, RAGGED)


@pytest.mark.parametrize("units", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unit_sums_are_within_the_budget(dtype, units):
    a, g = random(23, units, seed=1, dtype=dtype), random(23, units, seed=2, dtype=dtype)
    check_unit(random(units, seed=3).abs(), a, g, RAGGED)


@pytest.mark.parametrize(
    "segments",
    [spans(), spans((4, 4)), spans((0, 23)), spans(*((i, i + 1) for i in range(23)))],
    ids=["no examples", "one empty example", "one example", "examples of one row"],
)
def test_numbers_and_lengths_of_examples(segments):
    x, g = random(23, 17, seed=1), random(23, 17, seed=2)
    check_weight(torch.ones(17, 17), x, g, segments)
    check_unit(torch.ones(17), x, g, segments)


def test_more_rows_than_one_block_holds():
    # The reference works in blocks of accumulator rows; 9000 columns make them 16 rows high.
    x, g = random(6, 9000, seed=1), random(6, 37, seed=2)
    check_weight(torch.zeros(37, 9000), x, g, spans((0, 2), (2, 6)))


@pytest.mark.parametrize("rows, columns", [(0, 5), (5, 0)])
def test_empty_matrices(rows, columns):
    acc = torch.zeros(rows, columns)
    accumulate_importance_(acc, torch.ones(3, columns), torch.ones(3, rows), spans((0, 3)))
    accumulate_unit_importance_(torch.zeros(0), torch.ones(3, 0), torch.ones(3, 0), spans((0, 3)))


@pytest.mark.parametrize("op", [accumulate_importance_, accumulate_unit_importance_])
def test_rows_outside_every_segment_are_never_read(op):
    x, g = random(9, 5, seed=1), random(9, 5, seed=2)
    shape = (5, 5) if op is accumulate_importance_ else (5,)
    expected = op(torch.zeros(shape), x, g, spans((2, 4), (6, 8)))
    for outside in (0, 1, 4, 5, 8):
        x[outside], g[outside] = NAN, NAN
    assert torch.equal(op(torch.zeros(shape), x, g, spans((2, 4), (6, 8))), expected)


@pytest.mark.parametrize("op", [accumulate_importance_, accumulate_unit_importance_])
def test_the_absolute_value_is_per_example(op):
    x, g = torch.tensor([[1.0], [1.0]]), torch.tensor([[2.0], [-2.0]])
    shape = (1, 1) if op is accumulate_importance_ else (1,)
    assert op(torch.zeros(shape), x, g, spans((0, 1), (1, 2))).item() == 4
    assert op(torch.zeros(shape), x, g, spans((0, 2))).item() == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_inputs_give_the_same_bits(dtype):
    x, g = random(40, 123, seed=1, dtype=dtype), random(40, 129, seed=2, dtype=dtype)
    segments = spans((0, 7), (7, 31), (31, 40))

    def run():
        weight = accumulate_importance_(torch.zeros(129, 123), x, g, segments)
        unit = accumulate_unit_importance_(torch.zeros(123), x, g[:, :123], segments)
        return weight, unit

    first = run()
    for again in (run(), run()):
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


def test_half_precision_products_are_not_rounded_before_the_absolute_value():
    # 256 + 1 rounds to 256 in bfloat16, and 2048 + 1 to 2048 in float16.
    for dtype, large in ((torch.bfloat16, 256.0), (torch.float16, 2048.0)):
        x = torch.tensor([[large], [1.0]], dtype=dtype)
        ones = torch.ones(2, 1, dtype=dtype)
        weight = accumulate_importance_(torch.zeros(1, 1), x, ones, spans((0, 2)))
        unit = accumulate_unit_importance_(torch.zeros(1), x, ones, spans((0, 2)))
        assert weight.item() == unit.item() == large + 1


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_reduced_matmul_precision_is_the_models_affair_not_ours(precision, monkeypatch):
    used = []
    real = torch.mm

    def mm(*args, **kwargs):
        used.append(
            (torch.backends.cuda.matmul.fp32_precision, torch.get_float32_matmul_precision())
        )
        return real(*args, **kwargs)

    monkeypatch.setattr(torch, "mm", mm)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        allowed = torch.backends.cuda.matmul.fp32_precision
        accumulate_importance_(torch.zeros(3, 4), random(5, 4), random(5, 3), spans((0, 5)))
        assert torch.get_float32_matmul_precision() == precision
        assert torch.backends.cuda.matmul.fp32_precision == allowed == "tf32"
    finally:
        torch.set_float32_matmul_precision(before)
    assert [cuda for cuda, _ in used] == ["ieee"]


def test_inputs_that_require_grad_are_taken_as_numbers():
    x = random(5, 4).requires_grad_(True)
    for op, acc in (
        (accumulate_importance_, torch.zeros(4, 4)),
        (accumulate_unit_importance_, torch.zeros(4)),
    ):
        assert not op(acc, x, x * 2, spans((0, 5))).requires_grad


X, G, ACC = torch.ones(6, 4), torch.ones(6, 3), torch.zeros(3, 4)


@pytest.mark.parametrize(
    "change, error, text",
    [
        ({"x": torch.ones(2, 3, 4)}, ValueError, r"\[N, C\] and \[N, R\] with the same N, got"),
        ({"g": torch.ones(5, 3)}, ValueError, r"got \[6, 4\] and \[5, 3\]; flatten"),
        (
            {"g": G.half()},
            TypeError,
            "share one floating dtype, got torch.float32 and torch.float16",
        ),
        ({"x": X.long(), "g": G.long()}, TypeError, "share one floating dtype, got torch.int64"),
        ({"g": G.to("meta")}, ValueError, "g must be on the device of the inputs, cpu, got meta"),
        (
            {"segments": [[0, 6]]},
            TypeError,
            r"segments must be a tensor, int64 \[B, 2\] on the CPU",
        ),
        (
            {"segments": spans((0, 6)).int()},
            ValueError,
            r"int64 \[B, 2\] on the CPU, got torch.int32",
        ),
        ({"segments": torch.tensor([0, 6])}, ValueError, r"\[B, 2\] on the CPU, got .* \[2\]"),
        ({"segments": spans((0, 6)).to("meta")}, ValueError, r"on the CPU, got .* on meta"),
        ({"segments": spans((-1, 6))}, ValueError, "<= end <= 6, got rows from -1 to 6; check"),
        ({"segments": spans((0, 7))}, ValueError, "<= end <= 6, got rows from 0 to 7; check"),
        ({"segments": spans((0, 6), (4, 3))}, ValueError, "0 <= start <= end <= 6"),
        ({"acc": torch.zeros(4, 3)}, ValueError, r"acc must be torch.float32 \[3, 4\] on cpu, got"),
        ({"acc": ACC.double()}, ValueError, "got torch.float64"),
        ({"acc": ACC.to("meta")}, ValueError, "on cpu, got .* on meta; make it with torch.zeros"),
        ({"impl": "fast"}, ValueError, "impl must be one of reference, triton, native, got 'fast'"),
    ],
)
def test_errors(change, error, text):
    arguments = {"acc": ACC.clone(), "x": X, "g": G, "segments": spans((0, 6))} | change
    with pytest.raises(error, match=text):
        accumulate_importance_(**arguments)
    assert not arguments["acc"].is_cpu or not arguments["acc"].any()


@pytest.mark.parametrize(
    "change, error, text",
    [
        (
            {"g": torch.ones(6, 3)},
            ValueError,
            r"g must have as many columns as a \(4\), got 3; pass",
        ),
        ({"acc": torch.zeros(3)}, ValueError, r"acc must be torch.float32 \[4\] on cpu, got"),
        ({"segments": spans((0, 7))}, ValueError, "got rows from 0 to 7"),
        ({"a": X.half()}, TypeError, "share one floating dtype"),
    ],
)
def test_errors_of_the_unit_op(change, error, text):
    arguments = {"acc": torch.zeros(4), "a": X, "g": X, "segments": spans((0, 6))} | change
    with pytest.raises(error, match=text):
        accumulate_unit_importance_(**arguments)
