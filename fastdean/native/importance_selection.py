"""The fused accumulation and selection of importance on the CPU."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from fastdean.native.extension import cpu_level, dtype_code, has_dtype, loaded
from fastdean.native.selection import not_finite_error
from fastdean.native.structs import written


def select_importance(
    x: Tensor,
    g: Tensor,
    segments: Tensor,
    sets: Tensor,
    weight: Tensor,
    k: Sequence[int],
    *,
    batches: Tensor | None = None,
    signed: bool = False,
    level: int | None = None,
) -> list[tuple[Tensor, ...]]:
    """`ops.select_importance` in compiled code, for fp32, bf16 and fp16 on the CPU.

    The other arguments have passed its checks. Denormals as in `accumulate_importance_`.

    Args:
        level: number of an instruction set; None for `cpu_level()`.
    Raises: ValueError if an importance is NaN or infinite, or the processor lacks the level.
    """
    of_sets = torch.bincount(sets, minlength=len(k)).clamp_min(1).tolist()
    starts = _starts(sets, len(k))
    rows = (None, None)
    return _select(
        x, g, segments, starts, batches, weight.unsqueeze(0), k, of_sets, *rows, signed, level
    )


def select_expert_importance(
    x: Tensor,
    g: Tensor,
    segments: Tensor,
    experts: Tensor,
    sets: Tensor,
    weight: Tensor,
    k: Sequence[int],
    num_examples: Sequence[int],
    *,
    x_rows: Tensor | None = None,
    g_rows: Tensor | None = None,
    batches: Tensor | None = None,
    signed: bool = False,
    level: int | None = None,
) -> list[tuple[Tensor, ...]]:
    """`ops.select_expert_importance` in compiled code; otherwise as `select_importance`."""
    group = experts * len(k) + sets
    order = group.argsort(stable=True)
    starts = _starts(group[order], len(weight) * len(k))
    batches = None if batches is None else batches[order]
    rows = (x_rows, g_rows)
    return _select(
        x, g, segments[order], starts, batches, weight, k, num_examples, *rows, signed, level
    )


def _starts(owners: Tensor, number: int) -> Tensor:
    """int64 [number + 1]: where each owner's part of an ascending tensor begins, and its end."""
    every = torch.arange(number + 1, device="cpu")
    return torch.searchsorted(owners.contiguous(), every).contiguous()


def _select(
    x: Tensor,
    g: Tensor,
    segments: Tensor,
    starts: Tensor,
    batches: Tensor | None,
    weight: Tensor,
    k: Sequence[int],
    num_examples: Sequence[int],
    x_rows: Tensor | None,
    g_rows: Tensor | None,
    signed: bool,
    level: int | None,
) -> list[tuple[Tensor, ...]]:
    """`starts`: int64 [E S + 1], of each expert's sets; `weight`: [E, R, C]."""
    extension = loaded()
    experts, rows, columns = weight.shape
    ks = [min(each, rows * columns) for each in k]
    room = experts * sum(ks)
    indices = torch.empty(room, dtype=torch.int64, device="cpu")
    sums = torch.empty(room, dtype=torch.float32, device="cpu")
    signed_sums = torch.empty(room if signed else 0, dtype=torch.float32, device="cpu")
    counts = [[0] * len(ks) for _ in range(experts)]
    if weight.numel() and ks:
        found = torch.empty(experts, len(ks), 3, dtype=torch.int64, device="cpu")
        x, g, weight = (each.detach().resolve_neg() for each in (x, g, weight))
        weight = weight if has_dtype(weight.dtype) else weight.float()
        weight = weight if columns == 1 or weight.stride(2) == 1 else weight.contiguous()
        segments = segments.contiguous()
        x_rows, g_rows, batches = (
            None if t is None else t.contiguous() for t in (x_rows, g_rows, batches)
        )
        of_sets, examples = array("q", ks), array("q", num_examples)
        params = written(
            "ImportanceSelectionParams",
            x=x.data_ptr(),
            x_stride_t=x.stride(0),
            x_stride_c=x.stride(1),
            x_rows=0 if x_rows is None else x_rows.data_ptr(),
            g=g.data_ptr(),
            g_stride_t=g.stride(0),
            g_stride_r=g.stride(1),
            g_rows=0 if g_rows is None else g_rows.data_ptr(),
            dtype=dtype_code(x.dtype),
            weight=weight.data_ptr(),
            weight_stride_e=weight.stride(0),
            weight_stride_r=weight.stride(1),
            weight_dtype=dtype_code(weight.dtype),
            experts=experts,
            rows=rows,
            columns=columns,
            tokens=len(x if x_rows is None else x_rows),
            segments=segments.data_ptr(),
            group_starts=starts.data_ptr(),
            batches=0 if batches is None else batches.data_ptr(),
            ks=of_sets.buffer_info()[0],
            num_examples=examples.buffer_info()[0],
            num_sets=len(ks),
            indices=indices.data_ptr(),
            sums=sums.data_ptr(),
            signed_sums=signed_sums.data_ptr() if signed else 0,
            found=found.data_ptr(),
            level=cpu_level() if level is None else level,
            num_workers=torch.get_num_threads(),
        )
        address = params.buffer_info()[0]
        size = extension.select_importance_workspace_bytes(params=address)
        workspace = torch.empty(size, dtype=torch.uint8, device="cpu")
        params[-1] = workspace.data_ptr()
        extension.select_importance_cpu(params=address)
        counts = found[..., 0].tolist()
        # Of the first set that has one, at its first expert.
        for flaw, bits in found.transpose(0, 1)[..., 1:].flatten(0, 1).tolist():
            if flaw >= 0:
                raise not_finite_error(bits, flaw)
    results = (indices, sums, signed_sums)[: 2 + signed]
    by_set = [each.view(experts, sum(ks)).split(ks, 1) for each in results]
    return [
        tuple(_joined(each[number], [row[number] for row in counts]) for each in by_set)
        for number in range(len(ks))
    ]


def _joined(found: Tensor, counts: Sequence[int]) -> Tensor:
    """The first of each row of [E, k], as many as `counts` says; keeps no memory of the others."""
    parts = [row[:count] for row, count in zip(found, counts, strict=True)]
    return torch.cat([found.new_empty(0), *parts])
