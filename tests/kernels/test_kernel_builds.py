"""Every launch of the accumulation kernels compiles for every chip, without spilled registers."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from ahead_of_time import CAPABILITIES, SHARED_LIMIT, Build, compile_all, require_fit

from fastdean.kernels.settings import TileSetting, searched_settings, tile_setting

TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
POINTERS = ("acc_ptr", "x_ptr", "g_ptr", "blocks_ptr", "first_ptr")


# A weight that every tile divides, and one that none does; the latter also with elements of a row
# apart in memory.
WEIGHTS = {"even": (1024, 1024), "ragged": (1001, 1001), "strided": (1001, 1001)}
INNER_STRIDES = ("stride_ac", "stride_xc", "stride_gr")
OUTER_STRIDES = ("stride_ar", "stride_xt", "stride_gt")


# (build, compute capability) -> bytes that it spills: two registers once, with Triton 3.6 alone.
KNOWN_SPILLS = {
    (f"importance {dtype} {TileSetting(64, 64, 64, num_warps=8, num_stages=3)} even", chip): 8
    for dtype in ("bf16", "fp16")
    for chip in (86, 89)
}


def importance_builds(capability):
    """Inputs and accumulator contiguous and aligned, of an odd width, and with strides of any."""
    for dtype, layout in itertools.product(TYPES, WEIGHTS):
        strided = layout == "strided"
        run_time = ("R", "C", *OUTER_STRIDES, *(INNER_STRIDES if strided else ()))
        for tile in searched_settings(*WEIGHTS[layout], dtype, capability, strided=strided):
            pointer = f"*{TYPES[dtype]}"
            yield Build(
                name=f"importance {TYPES[dtype]} {tile} {layout}",
                kernel="fastdean.kernels.importance:_importance_kernel",
                types={
                    "acc_ptr": "*fp32",
                    "x_ptr": pointer,
                    "g_ptr": pointer,
                    "blocks_ptr": "*i64",
                    "first_ptr": "*i64",
                    "stride_ae": "i64",
                    **dict.fromkeys(run_time, "i32"),
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
                divisible=(*POINTERS, *run_time) if layout == "even" else POINTERS,
            )


def unit_builds():
    from fastdean.kernels.unit_importance import _BLOCK_C, _BLOCK_M, _BLOCK_T, _NUM_WARPS

    home = "fastdean.kernels.unit_importance"
    for dtype, absolute in itertools.product(TYPES.values(), (True, False)):
        yield Build(
            name=f"unit parts {dtype} absolute={absolute}",
            kernel=f"{home}:_unit_parts_kernel",
            types={
                "parts_ptr": "*fp32",
                "a_ptr": f"*{dtype}",
                "g_ptr": f"*{dtype}",
                "blocks_ptr": "*i64",
                **dict.fromkeys(("C", "stride_at", "stride_gt", "part_tokens"), "i32"),
            },
            constants={
                "stride_ac": 1,
                "stride_gc": 1,
                "ABSOLUTE": absolute,
                "BLOCK_C": _BLOCK_C,
                "BLOCK_T": _BLOCK_T,
            },
            num_warps=_NUM_WARPS,
            divisible=("parts_ptr", "a_ptr", "g_ptr", "blocks_ptr", "C", "stride_at", "stride_gt"),
        )
    sums = {"acc_ptr": "*fp32", "parts_ptr": "*fp32", "C": "i32", "num_parts": "i32"}
    aligned = ("acc_ptr", "parts_ptr", "C")
    yield Build(
        name="unit sum",
        kernel=f"{home}:_unit_sum_kernel",
        types=sums,
        constants={"stride_acc": 1, "BLOCK_C": _BLOCK_C, "BLOCK_M": _BLOCK_M},
        num_warps=_NUM_WARPS,
        divisible=aligned,
    )
    yield Build(
        name="unit join",
        kernel=f"{home}:_unit_join_kernel",
        types={**sums, "blocks_ptr": "*i64", "part_tokens": "i32"},
        constants={"stride_acc": 1, "BLOCK_C": _BLOCK_C},
        num_warps=_NUM_WARPS,
        divisible=aligned,
    )


@functools.cache
def compiled(capability):
    return compile_all([*importance_builds(capability), *unit_builds()], capability)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_no_launch_spills_or_asks_for_more_shared_memory_than_there_is(capability):
    require_fit(compiled(capability), capability, KNOWN_SPILLS)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_products_use_the_matrix_units_and_loads_run_ahead(capability):
    instruction = {90: "wgmma.mma_async", 100: "tcgen05.mma"}.get(capability, "mma.sync")
    for name, found in compiled(capability).items():
        if not name.startswith("importance"):
            continue
        # fp32 goes through the ordinary units: the matrix units would round it to TF32.
        assert (instruction in found.ptx) == ("fp32" not in name), name
        assert "tf32" not in found.ptx, name
        # Several loads in flight where rows are aligned: the pipeline waits for the oldest only.
        if name.endswith("even"):
            waits = found.ptx.count("cp.async.wait_group")
            assert waits > found.ptx.count("cp.async.wait_group \t0;"), name


@pytest.mark.parametrize("capability", SHARED_LIMIT)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_what_is_chosen_is_among_what_was_compiled(capability, dtype):
    for rows, columns in itertools.product((1, 576, 1000, 3584, 18944, 18945, 100_000), repeat=2):
        for tokens, strided in itertools.product((1, 20, 76, 159, 160, 8192), (False, True)):
            tile = tile_setting(rows, columns, tokens, dtype, capability, strided=strided)
            layout = "strided" if strided else "ragged"
            if tile.divides(rows, columns) and not strided:
                layout = "even"
            compiled_for = searched_settings(*WEIGHTS[layout], dtype, capability, strided=strided)
            assert tile in compiled_for


def test_the_setting_follows_the_size_of_the_work():
    def tile(rows, columns, tokens):
        return tile_setting(rows, columns, tokens, torch.bfloat16, 90)

    assert [tile(18944, 3584, n).block_t for n in (10, 76, 512)] == [16, 32, 64]
    large, small = tile(18944, 3584, 76), tile(512, 3584, 76)
    assert (large.block_r, large.block_c) == (128, 128)
    # Smaller tiles rather than idle multiprocessors.
    assert small.programs(512, 3584) >= 132
