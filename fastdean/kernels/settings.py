"""Launch settings: a pure function of sizes, dtype and chip, or searched for on request.

The same sizes on the same chip give the same settings, so that results repeat bit for bit.
FASTDEAN_AUTOTUNE=1 times the candidates on the first use of a size instead; two processes may then
find different settings and add in different orders.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch

from fastdean.kernels import interpreted

AUTOTUNE_VARIABLE = "FASTDEAN_AUTOTUNE"

# Programs that keep a large GPU busy: about two for each of its 132 multiprocessors (H100, H200).
_ENOUGH_PROGRAMS = 256

_FOUND: dict[Hashable, TileSetting] = {}


@dataclass(frozen=True)
class TileSetting:
    """How the weight-importance kernel is cut: tile of the weight, tokens a step, and resources."""

    block_r: int
    block_c: int
    block_t: int
    num_warps: int
    num_stages: int

    def divides(self, rows: int, columns: int) -> bool:
        return rows % self.block_r == 0 and columns % self.block_c == 0

    def programs(self, rows: int, columns: int) -> int:
        return -(-rows // self.block_r) * -(-columns // self.block_c)


# Two fp32 accumulators live in registers. On compute capability 9 (warpgroup products) 128 x 128 is
# the largest tile that does not spill, if it needs no mask; on 8 it always spills. 64 x 128 with 64
# tokens a step spills if the inputs' rows are not aligned. Other chips take
# the smaller tiles.
_WARPGROUP_TILES = ((128, 128), (64, 128), (64, 64))
_WARP_TILES = ((64, 128), (64, 64))
_NUM_WARPS = 8
# Of strided rows, whose addresses of single elements take registers too.
_STRIDED_TOKENS = 32
# Two such programs fit a multiprocessor of compute capability 9. For the search only.
_TWO_AT_A_TIME = (64, 128, 32, 4, 4)
# fp32 uses the ordinary arithmetic units, since TF32 would round the inputs to 10 bits.
_FULL_PRECISION = (64, 64, 16, 8, 3)

# Tokens a step -> stages of the load pipeline. Short examples waste part of their last step: at a
# mean of 76 tokens 18 % with 32 tokens a step, 43 % with 64.
_STAGES = {16: 5, 32: 4, 64: 3}


def capability_of(device: torch.device) -> int:
    """Compute capability as major * 10 + minor; an interpreted kernel is launched as on 9.0."""
    if interpreted():
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def tile_settings(dtype: torch.dtype, capability: int) -> list[TileSetting]:
    """Every setting that `tile_setting` can choose for a dtype and a chip, larger tiles first."""
    if dtype == torch.float32:
        return [TileSetting(*_FULL_PRECISION)]
    tiles = _WARPGROUP_TILES if _has_warpgroups(capability) else _WARP_TILES
    return [
        TileSetting(r, c, tokens, _NUM_WARPS, stages)
        for r, c in tiles
        for tokens, stages in _STAGES.items()
    ]


def _has_warpgroups(capability: int) -> bool:
    return 90 <= capability < 100


def searched_settings(
    rows: int, columns: int, dtype: torch.dtype, capability: int, *, strided: bool = False
) -> list[TileSetting]:
    """The candidates of FASTDEAN_AUTOTUNE=1 for a weight; arguments as for `tile_setting`."""
    settings = tile_settings(dtype, capability)
    if dtype != torch.float32 and _has_warpgroups(capability):
        settings.append(TileSetting(*_TWO_AT_A_TIME))
    return [each for each in settings if _is_clean(each, rows, columns, strided)]


def tile_setting(
    rows: int,
    columns: int,
    mean_tokens: float,
    dtype: torch.dtype,
    capability: int,
    *,
    strided: bool = False,
) -> TileSetting:
    """The setting for a weight [rows, columns] and examples of `mean_tokens` tokens.

    Args:
        strided: neighbouring elements of a row of an input or the accumulator are not neighbours in
            memory.
    """
    tokens = 16 if mean_tokens <= 20 else 32 if mean_tokens < 160 else 64
    if strided:
        tokens = min(tokens, _STRIDED_TOKENS)
    settings = tile_settings(dtype, capability)
    fitting = [each for each in settings if each.block_t == tokens] or settings
    for each in fitting[:-1]:
        enough = each.programs(rows, columns) >= _ENOUGH_PROGRAMS
        if enough and _is_clean(each, rows, columns, strided):
            return each
    return fitting[-1]


def _is_clean(setting: TileSetting, rows: int, columns: int, strided: bool) -> bool:
    """Whether the compiler keeps everything in registers for this weight."""
    large = setting.block_r * setting.block_c >= 64 * 128
    if strided:
        return not large and setting.block_t <= _STRIDED_TOKENS
    if not large or setting.divides(rows, columns):
        return True
    return setting.block_r < 128 and setting.block_t < 64 and setting.num_warps == _NUM_WARPS


def searched(
    key: Hashable,
    default: TileSetting,
    candidates: Sequence[TileSetting],
    run: Callable[[TileSetting], None],
) -> TileSetting:
    """`default`, or with FASTDEAN_AUTOTUNE=1 the fastest candidate for this key in this process.

    Args:
        run: launches with a setting and leaves no trace in anybody's tensors.
    """
    if os.environ.get(AUTOTUNE_VARIABLE) != "1" or interpreted():
        return default
    if key not in _FOUND:
        from triton.testing import do_bench

        times = [
            (do_bench(lambda s=each: run(s), warmup=5, rep=20, return_mode="median"), number)
            for number, each in enumerate(candidates)
        ]
        _FOUND[key] = candidates[min(times)[1]]
    return _FOUND[key]
