"""The accumulation of weights and units against float64, within the budget, in every form."""

from __future__ import annotations

import pytest
import torch
from budget import assert_within_budget, lost_by_rounding, lost_on_a_gpu
from hypothesis import given, settings
from hypothesis import strategies as st
from machine import DEVICE

from fastdean import native
from fastdean.ops import accumulate_importance_, accumulate_unit_importance_

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# fp64 is for checking models, and only the reference takes it.
FORMS = [("reference", d) for d in [*DTYPES, torch.float64]] + [("triton", d) for d in DTYPES]
# Weights on the CPU, where the extension is built; tests/test_package.py fails where it should be.
NATIVE = DEVICE.type == "cpu" and native.status().state == "available"
SIZES = [1, 63, 123, 128, 129]
OPS = [accumulate_importance_, accumulate_unit_importance_]
IMPL = pytest.mark.parametrize("impl", ["reference", "triton"])
FORM = pytest.mark.parametrize("impl, dtype", FORMS, ids=str)
WEIGHT_FORMS = FORMS + [("native", d) for d in DTYPES if NATIVE]
WEIGHT_FORM = pytest.mark.parametrize("impl, dtype", WEIGHT_FORMS, ids=str)
LAYOUTS = ["contiguous", "transposed", "sliced"]
NAN = float("nan")


def laid_out(values, layout):
    """`values` in another memory layout, with NaN in the memory between its elements."""
    if layout == "contiguous":
        return values.clone()
    if layout == "transposed":
        return values.t().contiguous().t()
    shape = tuple(2 * n + 1 for n in values.shape)
    holder = torch.full(shape, NAN, dtype=values.dtype, device=values.device)
    view = holder[tuple(slice(1, 2 * n + 1, 2) for n in values.shape)]
    view.copy_(values)
    return view


def random(*shape, seed=0, dtype=torch.float32):
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return values.to(DEVICE, dtype)


def zeros(*shape):
    return torch.zeros(*shape, device=DEVICE)


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


def check_weight(acc, x, g, segments, impl):
    oracle = weight_sums(acc, x, g, segments, torch.float64)
    same = weight_sums(acc, x, g, segments, torch.float32)
    assert accumulate_importance_(acc, x, g, segments, impl=impl) is acc
    assert_within_budget(acc, same, oracle, lost=lost_on_a_gpu(x, g, segments) if x.is_cuda else 0)


def check_unit(acc, a, g, segments, impl):
    oracle = unit_sums(acc, a, g, segments, torch.float64)
    same = unit_sums(acc, a, g, segments, torch.float32)
    assert accumulate_unit_importance_(acc, a, g, segments, impl=impl) is acc
    lost = lost_by_rounding(lambda t: a[t].double() * g[t].double(), segments) if a.is_cuda else 0
    assert_within_budget(acc, same, oracle, lost=lost)


# Ragged, out of order, one of length 1, an empty one, and rows 0, 1 and 20.. in none.
RAGGED = spans((2, 3), (10, 20), (5, 5), (3, 10))


@pytest.mark.parametrize("columns", SIZES)
@pytest.mark.parametrize("rows", SIZES)
@WEIGHT_FORM
def test_weight_sums_are_within_the_budget(impl, dtype, rows, columns):
    x, g = random(23, columns, seed=1, dtype=dtype), random(23, rows, seed=2, dtype=dtype)
    check_weight(random(rows, columns, seed=3).abs(), x, g, RAGGED, impl)


@pytest.mark.parametrize("layout_acc", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
@FORM
def test_strides_do_not_matter(impl, dtype, layout, layout_acc):
    x = laid_out(random(23, 63, seed=1, dtype=dtype), layout)
    g = laid_out(random(23, 129, seed=2, dtype=dtype), layout)
    check_weight(laid_out(random(129, 63, seed=3).abs(), layout_acc), x, g, RAGGED, impl)
    acc = random(63, seed=4).abs()
    a = laid_out(random(23, 63, seed=5, dtype=dtype), layout)
    vector = laid_out(acc, "sliced" if layout_acc == "sliced" else "contiguous")
    check_unit(vector, a, x, RAGGED, impl)


@pytest.mark.parametrize("units", SIZES)
@FORM
def test_unit_sums_are_within_the_budget(impl, dtype, units):
    a, g = random(23, units, seed=1, dtype=dtype), random(23, units, seed=2, dtype=dtype)
    check_unit(random(units, seed=3).abs(), a, g, RAGGED, impl)


@IMPL
@pytest.mark.parametrize(
    "segments",
    [spans(), spans((4, 4)), spans((0, 23)), spans(*((i, i + 1) for i in range(23)))],
    ids=["no examples", "one empty example", "one example", "examples of one row"],
)
def test_numbers_and_lengths_of_examples(impl, segments):
    x, g = random(23, 17, seed=1), random(23, 17, seed=2)
    check_weight(zeros(17, 17) + 1, x, g, segments, impl)
    check_unit(zeros(17) + 1, x, g, segments, impl)


@FORM
def test_a_long_example_beside_a_short_one(impl, dtype):
    # Longer than any part that the kernel for units gives to one program.
    x, g = random(1100, 5, seed=1, dtype=dtype), random(1100, 7, seed=2, dtype=dtype)
    segments = spans((0, 1), (1, 1090), (1090, 1100))
    check_weight(zeros(7, 5), x, g, segments, impl)
    check_unit(zeros(5), x, random(1100, 5, seed=3, dtype=dtype), segments, impl)


def test_the_budget_of_a_gpu_is_that_of_adding_one_product_after_the_other():
    x, g, segments = random(1100, 5, seed=1), random(1100, 7, seed=2), spans((0, 1), (1, 1100))
    start = zeros(7, 5)
    oracle = weight_sums(start, x, g, segments, torch.float64)
    same = weight_sums(start, x, g, segments, torch.float32)
    found = zeros(7, 5)
    for first, end in segments.tolist():
        running = zeros(7, 5)
        for row in range(first, end):
            # As a fused multiply-add: the product is exact in float64, and rounded once.
            running = (running.double() + g[row, :, None].double() * x[row].double()).float()
        found += running.abs()
    lost = lost_on_a_gpu(x, g, segments)
    assert_within_budget(found, same, oracle, lost=lost)
    with pytest.raises(AssertionError):
        assert_within_budget(found * (1 + 1e-4), same, oracle, lost=lost)


@IMPL
def test_more_rows_than_one_block_holds(impl):
    # The reference works in blocks of accumulator rows; 9000 columns make them 16 rows high.
    x, g = random(6, 9000, seed=1), random(6, 37, seed=2)
    check_weight(zeros(37, 9000), x, g, spans((0, 2), (2, 6)), impl)


@IMPL
@pytest.mark.parametrize("rows, columns", [(0, 5), (5, 0)])
def test_empty_matrices(impl, rows, columns):
    acc, segments = zeros(rows, columns), spans((0, 3))
    accumulate_importance_(acc, zeros(3, columns), zeros(3, rows), segments, impl=impl)
    accumulate_unit_importance_(zeros(0), zeros(3, 0), zeros(3, 0), segments, impl=impl)


def output(op):
    """An empty accumulator for five outputs and five inputs."""
    return zeros(5, 5) if op is accumulate_importance_ else zeros(5)


@IMPL
@pytest.mark.parametrize("op", OPS)
def test_rows_outside_every_segment_are_never_read(impl, op):
    x, g = random(9, 5, seed=1), random(9, 5, seed=2)
    segments = spans((2, 4), (6, 8))
    expected = op(output(op), x, g, segments, impl=impl)
    for outside in (0, 1, 4, 5, 8):
        x[outside], g[outside] = NAN, NAN
    assert torch.equal(op(output(op), x, g, segments, impl=impl), expected)


@IMPL
@pytest.mark.parametrize("op", OPS)
def test_the_absolute_value_is_per_example(impl, op):
    x, g = zeros(2, 5) + 1, zeros(2, 5) + torch.tensor([[2.0], [-2.0]], device=DEVICE)
    apart = op(output(op), x, g, spans((0, 1), (1, 2)), impl=impl)
    together = op(output(op), x, g, spans((0, 2)), impl=impl)
    assert apart.eq(4).all() and together.eq(0).all()


@FORM
def test_the_same_inputs_give_the_same_bits(impl, dtype):
    x, g = random(40, 123, seed=1, dtype=dtype), random(40, 129, seed=2, dtype=dtype)
    segments = spans((0, 7), (7, 31), (31, 40))

    def run():
        weight = accumulate_importance_(zeros(129, 123), x, g, segments, impl=impl)
        unit = accumulate_unit_importance_(zeros(123), x, g[:, :123], segments, impl=impl)
        return weight, unit

    first = run()
    for again in (run(), run()):
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


@pytest.mark.parametrize("shared", [False, True], ids=["in place", "through NumPy"])
def test_segments_changed_between_calls_are_read_anew(shared):
    # The kernels keep what they made of a segments tensor for the layers of one batch.
    x, segments = random(6, 5, seed=1), spans((0, 3), (3, 6))
    memory = segments.numpy() if shared else segments
    for op in OPS:
        op(output(op), x, x, segments, impl="triton")
        memory[1, 1] = 4
        check = check_weight if op is accumulate_importance_ else check_unit
        check(output(op), x, x, segments, "triton")
        memory[1, 1] = 6


@IMPL
def test_negated_views_are_read_as_what_they_are(impl):
    pair = torch.view_as_complex(random(6, 5, 2, seed=1)).conj()
    negated = pair.imag
    assert negated.is_neg()
    for op in OPS:
        check = check_weight if op is accumulate_importance_ else check_unit
        check(output(op), negated, random(6, 5, seed=2), spans((0, 4), (4, 6)), impl)


lengths = st.lists(st.integers(0, 40), min_size=1, max_size=6)


def batch(lengths, seed):
    """Inputs, gradients and the segments of examples of these lengths, one after the other."""
    ends = torch.tensor(lengths).cumsum(0)
    segments = torch.stack([ends - torch.tensor(lengths), ends], dim=1)
    return random(sum(lengths), 5, seed=seed), random(sum(lengths), 5, seed=seed + 1), segments


@IMPL
@pytest.mark.parametrize("op", OPS)
@settings(deadline=None, max_examples=25, database=None)
@given(lengths, st.integers(0, 1000), st.randoms(use_true_random=False))
def test_the_order_of_the_examples_does_not_matter(impl, op, lengths, seed, shuffler):
    x, g, segments = batch(lengths, seed)
    order = list(range(len(lengths)))
    shuffler.shuffle(order)
    straight = op(output(op), x, g, segments, impl=impl)
    shuffled = op(output(op), x, g, segments[order], impl=impl)
    torch.testing.assert_close(shuffled, straight, rtol=1e-5, atol=1e-5)


@IMPL
@pytest.mark.parametrize("op", OPS)
@settings(deadline=None, max_examples=25, database=None)
@given(lengths, st.integers(0, 1000), st.integers(0, 6))
def test_a_batch_split_in_two_adds_up(impl, op, lengths, seed, cut):
    x, g, segments = batch(lengths, seed)
    whole = op(output(op), x, g, segments, impl=impl)
    halves = op(output(op), x, g, segments[:cut], impl=impl)
    op(halves, x, g, segments[cut:], impl=impl)
    torch.testing.assert_close(halves, whole, rtol=1e-5, atol=1e-5)


@IMPL
def test_half_precision_products_are_not_rounded_before_the_absolute_value(impl):
    # 256 + 1 rounds to 256 in bfloat16, and 2048 + 1 to 2048 in float16.
    for dtype, large in ((torch.bfloat16, 256.0), (torch.float16, 2048.0)):
        x = torch.tensor([[large], [1.0]], dtype=dtype, device=DEVICE)
        ones = torch.ones_like(x)
        weight = accumulate_importance_(zeros(1, 1), x, ones, spans((0, 2)), impl=impl)
        unit = accumulate_unit_importance_(zeros(1), x, ones, spans((0, 2)), impl=impl)
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
        x, g = random(5, 4), random(5, 3)
        accumulate_importance_(zeros(3, 4), x, g, spans((0, 5)), impl="reference")
        assert torch.get_float32_matmul_precision() == precision
        assert torch.backends.cuda.matmul.fp32_precision == allowed == "tf32"
    finally:
        torch.set_float32_matmul_precision(before)
    assert [cuda for cuda, _ in used] == ["ieee"]


@IMPL
@pytest.mark.parametrize("op", OPS)
def test_autograd_sees_the_write(impl, op):
    acc, x = output(op), random(6, 5)
    version = acc._version
    op(acc, x, x, spans((0, 6)), impl=impl)
    assert acc._version > version


@IMPL
def test_inputs_that_require_grad_are_taken_as_numbers(impl):
    x = random(6, 5).requires_grad_(True)
    for op in OPS:
        assert not op(output(op), x, x * 2, spans((0, 6)), impl=impl).requires_grad


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
        (
            {"acc": torch.zeros(3, 1).expand(3, 4)},
            ValueError,
            "acc must have a place in memory for every element, got an expanded tensor of strides",
        ),
        ({"acc": None}, TypeError, "acc must be a tensor, got NoneType; make it with"),
        ({"x": X.numpy()}, TypeError, "the inputs must be a tensor, got ndarray"),
        ({"g": None}, TypeError, "g must be a tensor, got NoneType"),
        ({"impl": "fast"}, ValueError, "impl must be one of reference, triton, native, got 'fast'"),
    ],
)
def test_errors(change, error, text):
    arguments = {"acc": ACC.clone(), "x": X, "g": G, "segments": spans((0, 6))} | change
    with pytest.raises(error, match=text):
        accumulate_importance_(**arguments)
    acc = arguments["acc"]
    assert acc is None or not acc.is_cpu or not acc.any()


@IMPL
@pytest.mark.parametrize("op", OPS)
def test_an_accumulator_that_cannot_be_written_is_refused_before_the_first_example(impl, op):
    with torch.inference_mode():
        acc = output(op)
    x = random(6, 5, seed=1)
    with pytest.raises(ValueError, match="written in place, got one made in inference mode, out"):
        op(acc, x, x, spans((0, 3), (3, 6)), impl=impl)
    assert not acc.any()
    with torch.inference_mode():
        op(acc, x, x, spans((0, 3), (3, 6)), impl=impl)
    assert acc.any()


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
