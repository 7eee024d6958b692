"""Every launch of the selection kernels compiles for every chip, without spilled registers."""

from __future__ import annotations

import functools
import itertools

import pytest
from ahead_of_time import CAPABILITIES, Build, compile_all, require_fit

HOME = "fastdean.kernels.selection"
POINTERS = {
    "maxima_ptr": "*i32",
    "head_ptr": "*i64",
    "search_ptr": "*i64",
    "offsets_ptr": "*i64",
    "reached_ptr": "*i32",
    "groups_ptr": "*i32",
    "flat_ptr": "*i64",
    "tallies_ptr": "*i64",
    "out_ptr": "*i64",
    "sums_ptr": "*fp32",
    "keys_ptr": "*i32",
}
NUMBERS = {
    "divisor": "fp32",
    **dict.fromkeys(("k", "capacity", "num_keys", "num_groups", "search_round"), "i32"),
}
# Kernel -> what it reads besides what the matrix kernels share.
MATRIX_KERNELS = {
    "_maxima_kernel": ("maxima_ptr", "head_ptr"),
    "_count_kernel": (
        *("offsets_ptr", "reached_ptr", "groups_ptr", "maxima_ptr", "search_ptr", "head_ptr"),
        "num_groups",
    ),
    "_gather_kernel": (
        *("keys_ptr", "flat_ptr", "offsets_ptr", "reached_ptr", "groups_ptr", "search_ptr"),
        *("capacity", "divisor"),
    ),
}
CANDIDATE_KERNELS = {
    "_narrow_kernel": (
        *("search_ptr", "head_ptr", "keys_ptr", "num_keys", "k", "search_round", "divisor"),
    ),
    "_finish_kernel": (*("out_ptr", "keys_ptr", "flat_ptr", "head_ptr", "capacity", "k"),),
    "_tally_kernel": (*("tallies_ptr", "keys_ptr", "search_ptr", "head_ptr", "capacity", "k"),),
    "_emit_kernel": (
        *("out_ptr", "tallies_ptr", "keys_ptr", "flat_ptr", "search_ptr", "head_ptr"),
        "capacity",
    ),
}

# (build, compute capability) -> bytes that it spills, with Triton 3.9 alone.
KNOWN_SPILLS = {
    ("_maxima_kernel 16 bf16 even", 120): 8,
    ("_maxima_kernel 16 bf16 long", 120): 8,
    ("_count_kernel 16 fp32 any", 120): 16,
    ("_count_kernel 64 bf16 even", 120): 16,
    ("_count_kernel 64 bf16 long", 120): 16,
    ("_count_kernel 64 fp16 even", 120): 16,
    ("_count_kernel 64 fp32 any", 120): 16,
}


def types_of(names, long):
    types = {name: (POINTERS | NUMBERS)[name] for name in names}
    for name in ("capacity", "num_keys", "num_groups", "k"):
        if name in types and long:
            types[name] = "i64"
    return types


def matrix_builds():
    """Weights of every dtype or none; a size that vectors divide, any size, 1, one past 2^31."""
    from fastdean.kernels.selection import (
        _BLOCK_K,
        _BLOCK_S,
        _DENSE_GROUP,
        _LAUNCH,
        _SPAN,
        _SPARSE_GROUP,
        _TILE,
    )

    cases = [(weight, "even") for weight in ("bf16", "fp16", "fp32", None)]
    cases += [("fp32", "any"), ("bf16", "one"), ("bf16", "long")]
    groups = (_SPARSE_GROUP, _DENSE_GROUP)
    for (kernel, names), group, (weight, size) in itertools.product(
        MATRIX_KERNELS.items(), groups, cases
    ):
        types = types_of((*names, "sums_ptr"), size == "long")
        types["weight_ptr"] = f"*{weight or 'fp32'}"
        pointers = [name for name in types if name.endswith("_ptr")]
        constants = {
            "HAS_WEIGHT": weight is not None,
            "GROUP": group,
            "BLOCK_G": (_TILE if kernel == "_maxima_kernel" else _BLOCK_K) // group,
        }
        if kernel != "_maxima_kernel":
            constants["SPAN"] = _SPAN
        if kernel == "_count_kernel":
            constants |= {"BLOCK_K": _BLOCK_K, "BLOCK_S": _BLOCK_S}
        if size == "one":
            constants["numel"] = 1
        else:
            types["numel"] = "i64" if size == "long" else "i32"
        yield Build(
            name=f"{kernel} {group} {weight} {size}",
            kernel=f"{HOME}:{kernel}",
            types=types,
            constants=constants,
            num_warps=_LAUNCH["num_warps"],
            num_stages=_LAUNCH["num_stages"],
            divisible=[*pointers, "numel"] if size in ("even", "long") else pointers,
        )


def candidate_builds():
    from fastdean.kernels.selection import _BLOCK_K, _BLOCK_S, _LAUNCH, _SPAN

    sizes = {"BLOCK_K": _BLOCK_K, "SPAN": _SPAN, "BLOCK_S": _BLOCK_S}
    taken = {
        "_narrow_kernel": ("BLOCK_K", "SPAN"),
        "_finish_kernel": ("BLOCK_K",),
        "_tally_kernel": ("BLOCK_K", "SPAN", "BLOCK_S"),
        "_emit_kernel": ("BLOCK_K", "SPAN"),
    }
    for kernel, names in CANDIDATE_KERNELS.items():
        for candidates in (True, False) if kernel == "_narrow_kernel" else (None,):
            for long in (False, True):
                types = types_of(names, long)
                constants = {name: sizes[name] for name in taken[kernel]}
                if candidates is not None:
                    constants["CANDIDATES"] = candidates
                yield Build(
                    name=f"{kernel} candidates={candidates} long={long}",
                    kernel=f"{HOME}:{kernel}",
                    types=types,
                    constants=constants,
                    num_warps=_LAUNCH["num_warps"],
                    num_stages=_LAUNCH["num_stages"],
                    divisible=[name for name in types if name.endswith("_ptr")],
                )


@functools.cache
def compiled(capability):
    return compile_all([*matrix_builds(), *candidate_builds()], capability)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_no_launch_spills_or_asks_for_more_shared_memory_than_there_is(capability):
    require_fit(compiled(capability), capability, KNOWN_SPILLS)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_matrix_is_read_in_whole_vectors(capability):
    for name, found in compiled(capability).items():
        if name.endswith(("even", "long")):
            assert "v4.b32" in found.ptx, name


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_rounding_is_that_of_ieee(capability):
    # Denormals are importances too, and an approximate quotient would break ties that there are.
    for name, found in compiled(capability).items():
        assert ".ftz" not in found.ptx and "div.full" not in found.ptx, name
        assert "div.approx" not in found.ptx, name
