"""`bit_sums`: exact, whatever implements it, and whatever the layout."""

from __future__ import annotations

import pytest
import torch

from fastdean import native
from fastdean.ops import bit_sums

DTYPES = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float8_e4m3fn: torch.int8,
}
# Beside the columns of a block, and enough bytes for two threads.
SHAPES = [(), (0,), (13,), (1, 1), (5, 1023), (3, 1025), (700, 2049), (0, 4), (4, 0), (2, 3, 5)]


NATIVE = ["native"] if native.status().state == "available" else []
IMPL = pytest.mark.parametrize("impl", ["reference", *NATIVE])


def random_bits(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    integer = DTYPES[dtype]
    info = torch.iinfo(integer)
    bits = torch.randint(info.min, info.max, shape, generator=generator, dtype=integer)
    return bits.view(dtype)


def require_sums(weight, found):
    bits = weight.contiguous().view(DTYPES[weight.dtype]).to(torch.int64)
    bits = bits.flatten(0, -2) if bits.dim() > 1 else bits.reshape(-1, 1)
    of_rows, of_columns = found
    assert torch.equal(of_rows, bits.sum(1)) and torch.equal(of_columns, bits.sum(0))


@IMPL
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_of_bits_are_exact(impl, dtype, shape):
    weight = random_bits(shape, dtype)
    require_sums(weight, bit_sums(weight, impl=impl))


@IMPL
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_sums_are_the_same_with_any_number_of_threads(impl, threads):
    weight, before = random_bits((1501, 1100), torch.float32), torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        require_sums(weight, bit_sums(weight, impl=impl))
    finally:
        torch.set_num_threads(before)


@IMPL
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_layout(impl, dtype):
    weight = random_bits((9, 8, 12), dtype)
    for view in (weight.mT, weight[:, ::2, 1:7], weight[..., ::3], weight[::3], weight[0].t()):
        require_sums(view, bit_sums(view, impl=impl))


@IMPL
@pytest.mark.parametrize("shift", [1, 2, 3])
def test_memory_that_is_not_aligned(impl, shift):
    """As a tensor may lie in a file."""
    memory = bytearray(shift + 4 * 40 * 33)
    memory[shift:] = random_bits((40, 33), torch.float32).numpy().tobytes()
    weight = torch.frombuffer(memory, dtype=torch.float32, offset=shift).view(40, 33)
    found = bit_sums(weight, impl=impl)
    require_sums(random_bits((40, 33), torch.float32), found)


@IMPL
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("extreme", ["min", "max"])
def test_narrow_sums_do_not_overflow(impl, dtype, extreme):
    """More rows than a sum of 32 bits holds of the largest entries."""
    value = getattr(torch.iinfo(DTYPES[dtype]), extreme)
    weight = torch.full((70_001, 2), value, dtype=DTYPES[dtype]).view(dtype)
    require_sums(weight, bit_sums(weight, impl=impl))


def test_what_is_no_tensor_is_refused():
    with pytest.raises(TypeError, match="weight must be a tensor, got list"):
        bit_sums([1.0])
    with pytest.raises(ValueError, match="weight must hold data, got a tensor on the meta device"):
        bit_sums(torch.empty(2, 2, device="meta"), impl="native")


@IMPL
def test_conjugated_numbers_have_their_own_bits(impl):
    numbers = torch.complex(*torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0)))
    found = bit_sums(numbers.conj(), impl=impl)
    expected = bit_sums(numbers.conj().resolve_conj(), impl=impl)
    assert all(map(torch.equal, found, expected))
    assert not torch.equal(found[0], bit_sums(numbers, impl=impl)[0])


def quantised():
    return torch._empty_affine_quantized((2, 2), dtype=torch.qint8)


@pytest.mark.filterwarnings("ignore:torch.quantize:UserWarning")
@pytest.mark.parametrize("impl", [None, "reference", *NATIVE])
@pytest.mark.parametrize(
    "make, error, text",
    [
        (lambda: torch.eye(3).to_sparse(), ValueError, "dense tensor, got layout torch.sparse_coo"),
        (lambda: torch.eye(3).to_mkldnn(), ValueError, "dense tensor, got layout torch._mkldnn"),
        (
            lambda: torch.zeros(2, 2, dtype=torch.complex128),
            TypeError,
            "of a dtype of 1, 2, 4 or 8 bytes, got torch.complex128; pass the numbers",
        ),
        (quantised, TypeError, "torch.qint8"),
    ],
    ids=["sparse", "of another library", "of 16 bytes", "quantised"],
)
def test_what_has_no_bits_to_sum_is_refused(impl, make, error, text):
    with pytest.raises(error, match=f"weight must be .*{text}"):
        bit_sums(make(), impl=impl)
