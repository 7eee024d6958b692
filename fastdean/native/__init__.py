"""Tensors to pointers: the one gate to the compiled extension.

Pointers go stale unnoticed (`.to()`, `p.data =`, offload), so every call reads pointer, shape,
strides, dtype and device anew. Older ones are only compared with.
"""

from fastdean.native.bits import bit_sums
from fastdean.native.collapse import collapse_alignment, collapse_alignment_backward
from fastdean.native.extension import (
    ABI_VERSION,
    BuildFacts,
    CpuLevels,
    NativeStatus,
    cpu_level,
    refusal,
    status,
)
from fastdean.native.importance import accumulate_expert_importance_, accumulate_importance_
from fastdean.native.importance_selection import select_expert_importance, select_importance
from fastdean.native.masks import gather_at, write_at_, zero_at_
from fastdean.native.selection import select_top

__all__ = [
    "ABI_VERSION",
    "BuildFacts",
    "CpuLevels",
    "NativeStatus",
    "accumulate_expert_importance_",
    "accumulate_importance_",
    "bit_sums",
    "collapse_alignment",
    "collapse_alignment_backward",
    "cpu_level",
    "gather_at",
    "refusal",
    "select_expert_importance",
    "select_importance",
    "select_top",
    "status",
    "write_at_",
    "zero_at_",
]
