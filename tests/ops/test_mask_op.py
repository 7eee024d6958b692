"""zero_at_, gather_at, write_at_: exact on every layout, and nothing written on a refusal."""

from __future__ import annotations

import pytest
import torch

from fastdean import native
from fastdean.ops import gather_at, write_at_, zero_at_

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]

# Each returns (base, view): the view is edited, the base shows what was written beside it.
LAYOUTS = {
    "vector": lambda base: (base, base),
    "matrix": lambda base: (base, base.view(60, 64)),
    "transposed": lambda base: (base, base.view(60, 64).t()),
    "columns-sliced": lambda base: (base, base.view(60, 64)[:, 3:50:7]),
    "rows-sliced": lambda base: (base, base.view(60, 64)[5:41:5]),
    "permuted-3d": lambda base: (base, base.view(4, 15, 64).permute(2, 0, 1)),
    "rank-8-permuted": lambda base: (
        base,
        base.view(2, 3, 2, 5, 2, 2, 4, 4).permute(*range(8)[::-1]),
    ),
    "one-element": lambda base: (base, base.view(60, 64)[7:8, 9:10]),
    "scalar": lambda base: (base, base[11]),
    "empty": lambda base: (base, base.view(60, 64)[:, 5:5]),
}


@pytest.fixture(params=["reference", "native"])
def impl(request: pytest.FixtureRequest, extension_built: bool) -> str:
    if request.param == "native" and not extension_built:
        pytest.skip("an install without the extension is under test")
    return request.param


def _make(layout: str, dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(3840, generator=generator, dtype=torch.float64).to(dtype)
    # No zero before the call, so that every zero after it was written by it.
    base[base == 0] = 1.0
    return LAYOUTS[layout](base)


def _some_indices(numel: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(numel)
    return torch.randperm(numel, generator=generator)[: min(numel, 37)].sort().values


def _bits(tensor: torch.Tensor) -> list[int]:
    width = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.detach().clone().contiguous().view(width).flatten().tolist()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_zero_at_clears_the_addressed_entries_and_no_others(layout, dtype, impl):
    base, view = _make(layout, dtype)
    indices = _some_indices(view.numel())
    expected = _bits(view)
    for index in indices.tolist():
        expected[index] = 0
    zeros_expected = len(indices)

    zero_at_([view], [indices], impl=impl)

    assert _bits(view) == expected
    assert int((base == 0).sum()) == zeros_expected


def test_zero_at_edits_many_tensors_of_mixed_kind_in_one_call(impl):
    made = [_make(name, dtype, seed) for seed, dtype in enumerate(DTYPES) for name in LAYOUTS]
    views = [view for _, view in made]
    indices = [_some_indices(view.numel()) for view in views]
    expected = [_bits(view) for view in views]
    for bits, index in zip(expected, indices, strict=True):
        for i in index.tolist():
            bits[i] = 0

    zero_at_(views, indices, impl=impl)

    assert [_bits(view) for view in views] == expected


def test_zero_at_accepts_nothing_to_do(impl):
    weight = torch.ones(3, 3)
    zero_at_([], [], impl=impl)
    zero_at_([weight], [torch.empty(0, dtype=torch.int64)], impl=impl)
    assert torch.equal(weight, torch.ones(3, 3))


def test_indices_may_be_a_strided_view(impl):
    weight = torch.ones(20)
    zero_at_([weight], [torch.arange(12)[1::4]], impl=impl)
    assert weight.eq(0).nonzero().flatten().tolist() == [1, 5, 9]


def test_parameters_are_edited_and_autograd_notices(impl):
    weight = torch.nn.Parameter(torch.ones(4, 4))
    inputs = torch.ones(2, 4, requires_grad=True)
    loss = torch.nn.functional.linear(inputs, weight).square().sum()
    zero_at_([weight], [torch.tensor([5])], impl=impl)
    assert weight.requires_grad and weight.is_leaf
    assert weight[1, 1] == 0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_tensors_made_in_inference_mode_are_edited(impl):
    with torch.inference_mode():
        weight = torch.ones(4)
        zero_at_([weight], [torch.tensor([2])], impl=impl)
        assert weight.tolist() == [1, 1, 0, 1]


def test_tensors_made_in_inference_mode_are_not_edited_outside_of_it(impl):
    first = torch.ones(4)
    with torch.inference_mode():
        weight = torch.ones(4)
    places, values = [torch.tensor([2])] * 2, [torch.zeros(1)] * 2
    message = (
        r"tensors\[1\] must be a tensor that can be written in place, got one made in inference "
        "mode, outside of it; edit it inside torch.inference_mode, or clone it"
    )
    for edit in (
        lambda: zero_at_([first, weight], places, impl=impl),
        lambda: write_at_([first, weight], places, values, impl=impl),
    ):
        with pytest.raises(ValueError, match=message):
            edit()
    assert first.tolist() == weight.tolist() == [1, 1, 1, 1]
    assert gather_at([weight], places[:1], impl=impl)[0].tolist() == [1]


def test_the_default_device_does_not_matter(impl):
    _, weight = _make("transposed", torch.float32)
    expected, indices = weight.clone(), _some_indices(weight.numel())
    zero_at_([expected], [indices], impl="reference")
    before = _bits(weight)
    with torch.device("meta"):
        taken = gather_at([weight, weight], [indices, indices[:1]], impl=impl)
        zero_at_([weight], [indices], impl=impl)
    assert _bits(weight) == _bits(expected)
    with torch.device("meta"):
        write_at_([weight], [indices], taken[:1], impl=impl)
    assert _bits(weight) == before


def test_write_at_moves_the_version_counter(impl):
    weight = torch.nn.Parameter(torch.ones(4))
    before = weight._version
    write_at_([weight], [torch.tensor([2])], [torch.tensor([7.0])], impl=impl)
    assert weight._version > before
    assert weight.tolist() == [1, 1, 7, 1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gather_zero_write_is_a_bit_exact_round_trip(layout, dtype, impl):
    base, view = _make(layout, dtype)
    # NaN, -0.0, infinities and the smallest subnormal do not survive arithmetic; they must here.
    special = [float("nan"), -0.0, float("inf"), float("-inf"), 5e-324]
    flat = torch.tensor(special, dtype=dtype)
    for position, value in enumerate(flat):
        base[position * 65] = value
    before = _bits(base)
    indices = torch.arange(view.numel())

    originals = gather_at([view], [indices], impl=impl)
    assert originals[0].dtype == dtype and not originals[0].requires_grad
    assert _bits(originals[0]) == _bits(view)
    zero_at_([view], [indices], impl=impl)
    assert not view.ne(0).any()
    write_at_([view], [indices], originals, impl=impl)

    assert _bits(base) == before


def test_gather_and_write_take_many_tensors_of_mixed_kind_in_one_call(impl):
    made = [_make(name, dtype, seed) for seed, dtype in enumerate(DTYPES) for name in LAYOUTS]
    views = [view for _, view in made]
    indices = [_some_indices(view.numel()) for view in views]
    expected = [_bits(view.reshape(-1)[i]) for view, i in zip(views, indices, strict=True)]
    taken = gather_at(views, indices, impl=impl)
    assert [_bits(values) for values in taken] == expected
    assert [values.dtype for values in taken] == [view.dtype for view in views]

    # As many other values, a strided tensor among them.
    written = [(-values).repeat_interleave(2)[::2] for values in taken]
    write_at_(views, indices, written, impl=impl)
    assert [_bits(each) for each in gather_at(views, indices, impl="reference")] == [
        _bits(values) for values in written
    ]


def test_gather_at_copies(impl):
    weight = torch.arange(6.0)
    (taken,) = gather_at([weight], [torch.tensor([1, 4])], impl=impl)
    weight.zero_()
    assert taken.tolist() == [1.0, 4.0]


def test_gather_at_reads_an_expanded_tensor(impl):
    expanded = torch.tensor([[1.0], [2.0]]).expand(2, 3)
    (taken,) = gather_at([expanded], [torch.tensor([2, 3])], impl=impl)
    assert taken.tolist() == [1.0, 2.0]


def _index(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


REFUSED = {
    "negated-on-reading": (
        [torch.view_as_complex(torch.ones(2, 2)).conj().imag],
        [_index(0)],
        ValueError,
        r"tensors\[1\] must hold its values as they are, .* pass tensor.resolve_neg",
    ),
    "not-a-tensor": (
        [[1.0]],
        [_index(0)],
        TypeError,
        r"tensors\[1\] must be a torch.Tensor, got list",
    ),
    "meta": (
        [torch.ones(3, device="meta")],
        [_index(0)],
        ValueError,
        r"tensors\[1\] must hold data, got a tensor on the meta device; an offloaded weight",
    ),
    "integers": (
        [torch.ones(3, dtype=torch.int8)],
        [_index(0)],
        ValueError,
        r"tensors\[1\] must be float16, .* got torch.int8; quantized weights",
    ),
    "sparse": (
        [torch.eye(3).to_sparse()],
        [_index(0)],
        ValueError,
        r"tensors\[1\] must be a dense tensor, got layout torch.sparse_coo",
    ),
    "rank-9": (
        [torch.ones([1] * 9)],
        [_index(0)],
        ValueError,
        r"tensors\[1\] must have at most 8 dimensions, got 9",
    ),
    "index-not-a-tensor": (
        [torch.ones(3)],
        [[0]],
        TypeError,
        r"indices\[1\] must be a torch.Tensor, got list",
    ),
    "index-int32": (
        [torch.ones(3)],
        [_index(0).int()],
        ValueError,
        r"indices\[1\] must be a 1-D int64 tensor, got 1-D torch.int32",
    ),
    "index-2d": (
        [torch.ones(3)],
        [_index(0)[None]],
        ValueError,
        r"indices\[1\] must be a 1-D int64 tensor, got 2-D torch.int64",
    ),
    "index-elsewhere": (
        [torch.ones(3)],
        [torch.zeros(1, dtype=torch.int64, device="meta")],
        ValueError,
        r"indices\[1\] must be on the CPU or on its tensor's device cpu, got meta",
    ),
    "unsorted": (
        [torch.ones(3)],
        [_index(2, 1)],
        ValueError,
        r"indices\[1\] must be sorted in strictly ascending order, .* use torch.unique",
    ),
    "repeated": (
        [torch.ones(3)],
        [_index(1, 1)],
        ValueError,
        r"indices\[1\] must be sorted in strictly ascending order, got unsorted or repeated",
    ),
    "negative": (
        [torch.ones(3)],
        [_index(-1, 1)],
        ValueError,
        r"indices\[1\] must lie in 0..2 for a tensor of shape \(3,\), got -1",
    ),
    "beyond": (
        [torch.ones(2, 3)],
        [_index(0, 6)],
        ValueError,
        r"indices\[1\] must lie in 0..5 for a tensor of shape \(2, 3\), got 6",
    ),
    "index-missing": (
        [torch.ones(3)],
        [],
        ValueError,
        r"indices must have one entry per tensor, got 1 for 2 tensors",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_argument_is_named_and_nothing_is_written(case):
    tensors, indices, error, message = REFUSED[case]
    first = torch.ones(4)
    edited, at = [first, *tensors], [_index(0), *indices]
    with pytest.raises(error, match=message):
        zero_at_(edited, at)
    with pytest.raises(error, match=message):
        gather_at(edited, at)
    with pytest.raises(error, match=message):
        write_at_(edited, at, [torch.zeros(1)] * len(edited))
    assert torch.equal(first, torch.ones(4))


def test_an_expanded_tensor_is_not_written():
    first, row = torch.ones(4), torch.ones(3)
    expanded = row.expand(2, 3)
    message = r"tensors\[1\] must have a place in memory for every element, got an expanded tensor"
    with pytest.raises(ValueError, match=message):
        zero_at_([first, expanded], [_index(0), _index(0)])
    with pytest.raises(ValueError, match=message):
        write_at_([first, expanded], [_index(0), _index(0)], [torch.zeros(1)] * 2)
    assert torch.equal(first, torch.ones(4)) and torch.equal(row, torch.ones(3))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([torch.zeros(1)], "values must have one entry per tensor, got 1 for 2 tensors"),
        (
            [torch.zeros(1), torch.zeros(1, dtype=torch.float64)],
            r"values\[1\] must have its tensor's dtype torch.float32, got torch.float64",
        ),
        (
            [torch.zeros(1), torch.zeros(2)],
            r"values\[1\] must have shape \(1,\), one value per index, got \(2,\)",
        ),
    ],
    ids=["count", "dtype", "shape"],
)
def test_values_that_do_not_fit_are_refused_and_nothing_is_written(values, message):
    tensors = [torch.ones(4), torch.ones(4)]
    with pytest.raises(ValueError, match=message):
        write_at_(tensors, [_index(0), _index(1)], values)
    assert all(torch.equal(tensor, torch.ones(4)) for tensor in tensors)


def test_a_wrapper_subclass_is_refused():
    from torch.testing._internal.two_tensor import TwoTensor

    wrapped = TwoTensor(torch.ones(3), torch.ones(3))
    with pytest.raises(TypeError, match=r"tensors\[0\] must be a plain tensor .* got TwoTensor"):
        zero_at_([wrapped], [_index(0)])


def test_the_extension_checks_every_index_before_it_writes(extension_built):
    if not extension_built:
        pytest.skip("an install without the extension is under test")
    first, second = torch.ones(4), torch.ones(4)
    for bad in (-1, 4):
        with pytest.raises(IndexError, match="indices must lie within their tensors, got"):
            native.zero_at_([first, second], [_index(0), _index(bad)])
    assert torch.equal(first, torch.ones(4)) and torch.equal(second, torch.ones(4))


def test_values_that_are_no_tensors_are_refused():
    tensors = [torch.ones(4), torch.ones(4)]
    message = r"values\[1\] must be a torch.Tensor, got list; make it with torch.tensor"
    with pytest.raises(TypeError, match=message):
        write_at_(tensors, [_index(0), _index(1)], [torch.zeros(1), [1.0]])
    assert all(torch.equal(tensor, torch.ones(4)) for tensor in tensors)


def test_one_thread_and_two_write_the_same(extension_built):
    if not extension_built:
        pytest.skip("an install without the extension is under test")
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(400, 500, generator=generator) for _ in range(3)]
    indices = [torch.arange(0, 200_000, step) for step in (2, 3, 7)]
    found = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            copies = [weight.clone() for weight in weights]
            after = [-values for values in gather_at(copies, indices, impl="native")]
            zero_at_(copies, indices, impl="native")
            found.append([_bits(each) for each in copies])
            write_at_(copies, indices, after, impl="native")
            taken = gather_at(copies, indices, impl="native")
            assert all(torch.equal(a, b) for a, b in zip(taken, after, strict=True))
            found[-1] += [_bits(each) for each in copies]
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1]


@pytest.mark.slow
def test_indices_beyond_32_bits_reach_their_element(impl):
    last = 2**31 + 5
    # Four GiB of address space of which only the touched pages become memory.
    weight = torch.empty(2**31 + 8, dtype=torch.float16)
    weight[-16:] = 1.0
    zero_at_([weight], [_index(last)], impl=impl)
    assert weight[-16:].eq(0).nonzero().flatten().tolist() == [16 - 8 + 5]
    write_at_([weight], [_index(last)], [torch.tensor([3.0], dtype=torch.float16)])
    assert gather_at([weight], [_index(last - 1, last)])[0].tolist() == [1.0, 3.0]


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["reference", "native"])
def test_cuda_clears_what_the_cpu_clears(impl):
    made = [_make(name, dtype, seed)[0] for seed, dtype in enumerate(DTYPES) for name in LAYOUTS]
    names = [name for _ in DTYPES for name in LAYOUTS]
    expected = [LAYOUTS[name](base.clone())[1] for name, base in zip(names, made, strict=True)]
    actual = [LAYOUTS[name](base.cuda())[1] for name, base in zip(names, made, strict=True)]
    indices = [_some_indices(view.numel()) for view in expected]
    zero_at_(expected, indices, impl="reference")
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
        zero_at_(actual, indices, impl=impl)
    torch.cuda.synchronize()
    assert [_bits(view.cpu()) for view in actual] == [_bits(view) for view in expected]


@pytest.mark.gpu
def test_cuda_gathers_and_writes_what_the_cpu_does():
    made = [_make(name, dtype, seed)[0] for seed, dtype in enumerate(DTYPES) for name in LAYOUTS]
    names = [name for _ in DTYPES for name in LAYOUTS]
    views = [LAYOUTS[name](base.cuda())[1] for name, base in zip(names, made, strict=True)]
    indices = [_some_indices(view.numel()) for view in views]
    taken = gather_at(views, indices, impl="native")
    expected = gather_at(views, indices, impl="reference")
    assert [_bits(each.cpu()) for each in taken] == [_bits(each.cpu()) for each in expected]
    after = [-values.cpu() for values in expected]
    write_at_(views, indices, after, impl="reference")
    written = [_bits(view.cpu()) for view in views]
    zero_at_(views, indices, impl="native")
    write_at_(views, indices, after, impl="native")
    assert [_bits(view.cpu()) for view in views] == written
