"""Every launch of the fused selection compiles for every chip, without spilled registers."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from ahead_of_time import CAPABILITIES, Build, compile_all, require_fit

from fastdean.kernels.settings import searched_settings

HOME = "fastdean.kernels.importance_selection"
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
POINTERS = {
    "maxima_ptr": "*i32",
    "sums_ptr": "*fp32",
    "tiles_ptr": "*i64",
    "blocks_ptr": "*i64",
    "first_ptr": "*i64",
}
NUMBERS = ("num_tiles", "first_set", "least", "writes_sums")
INNER_STRIDES = ("stride_xc", "stride_gr", "stride_wc")
OUTER_STRIDES = ("stride_xt", "stride_gt", "stride_wr")
# A weight that every tile divides, and one that none does; the latter also with elements of a row
# apart in memory.
WEIGHTS = {"even": (1024, 1024), "ragged": (1001, 1001), "strided": (1001, 1001)}


def tile_build(dtype, weight, tile, layout):
    strided = layout == "strided"
    run_time = ("R", "C", *OUTER_STRIDES, *(INNER_STRIDES if strided else ()))
    inputs = ("x_ptr", "g_ptr", "weight_ptr")
    pointers = (*POINTERS, *inputs)
    return Build(
        name=f"tiles {dtype} {weight} {tile} {layout}",
        kernel=f"{HOME}:_tiles_kernel",
        types={
            **POINTERS,
            **{"x_ptr": f"*{dtype}", "g_ptr": f"*{dtype}", "weight_ptr": f"*{weight}"},
            **dict.fromkeys((*run_time, *NUMBERS), "i32"),
        },
        constants={
            **({} if strided else dict.fromkeys(INNER_STRIDES, 1)),
            "BLOCK_R": tile.block_r,
            "BLOCK_C": tile.block_c,
            "BLOCK_T": tile.block_t,
            "GROUP_R": 8,
            "EVEN": layout == "even",
            "UPCAST": False,
        },
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        divisible=(*pointers, *run_time) if layout == "even" else pointers,
    )


def signed_build(dtype, tokens):
    from fastdean.kernels.importance_selection import _BLOCK_M, _SIGNED_WARPS

    types = {"signed_ptr": "*fp32", "index_ptr": "*i64", "x_ptr": f"*{dtype}"}
    types |= {"g_ptr": f"*{dtype}", "blocks_ptr": "*i64", "first_ptr": "*i64"}
    pointers = tuple(types)
    types |= dict.fromkeys(("M", "C", "number", "stride_xt", "stride_gt"), "i32")
    return Build(
        name=f"signed {dtype} {tokens}",
        kernel=f"{HOME}:_signed_kernel",
        types=types,
        constants={"stride_xc": 1, "stride_gr": 1, "BLOCK_M": _BLOCK_M, "BLOCK_T": tokens},
        num_warps=_SIGNED_WARPS,
        divisible=pointers,
    )


def settings_of(dtype, layout, capability):
    """Those that `tile_setting` can choose, without the one that only a search finds."""
    found = searched_settings(*WEIGHTS[layout], dtype, capability, strided=layout == "strided")
    return [each for each in found if each.num_warps == 8]


@functools.cache
def compiled(capability, quick):
    """`quick`: what takes most of a chip, of a model in bf16; the rest takes minutes."""
    dtypes = [torch.bfloat16] if quick else TYPES
    layouts = ["even"] if quick else WEIGHTS
    builds = [
        tile_build(TYPES[dtype], TYPES[dtype], tile, layout)
        for dtype, layout in itertools.product(dtypes, layouts)
        for tile in settings_of(dtype, layout, capability)[: 1 if quick else None]
    ]
    if not quick:
        builds += [
            tile_build("bf16", "fp32", settings_of(torch.bfloat16, "even", capability)[0], "even")
        ]
    builds += [
        signed_build(TYPES[dtype], n)
        for dtype in dtypes
        for n in ((32,) if quick else (16, 32, 64))
    ]
    return compile_all(builds, capability)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_largest_tile_of_a_model_in_bf16_fits(capability):
    require_fit(compiled(capability, True), capability)


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_no_launch_spills_or_asks_for_more_shared_memory_than_there_is(capability):
    require_fit(compiled(capability, False), capability)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_sums_are_those_of_ieee(capability):
    for name, found in compiled(capability, True).items():
        assert ".ftz" not in found.ptx and "tf32" not in found.ptx, name
