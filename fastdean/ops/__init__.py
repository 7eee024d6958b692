"""What each operation is: contract, checks, a reference in plain torch, and dispatch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastdean.ops.bits import bit_sums
    from fastdean.ops.collapse import collapse_alignment
    from fastdean.ops.importance import (
        accumulate_expert_importance_,
        accumulate_importance_,
        accumulate_unit_importance_,
    )
    from fastdean.ops.importance_selection import select_expert_importance, select_importance
    from fastdean.ops.mask import (
        gather_at,
        write_at_,
        zero_at_,
    )
    from fastdean.ops.selection import select_top

_HOME = {
    "accumulate_expert_importance_": "fastdean.ops.importance",
    "accumulate_importance_": "fastdean.ops.importance",
    "accumulate_unit_importance_": "fastdean.ops.importance",
    "bit_sums": "fastdean.ops.bits",
    "collapse_alignment": "fastdean.ops.collapse",
    "gather_at": "fastdean.ops.mask",
    "select_expert_importance": "fastdean.ops.importance_selection",
    "select_importance": "fastdean.ops.importance_selection",
    "select_top": "fastdean.ops.selection",
    "write_at_": "fastdean.ops.mask",
    "zero_at_": "fastdean.ops.mask",
}

__all__ = [
    "accumulate_expert_importance_",
    "accumulate_importance_",
    "accumulate_unit_importance_",
    "bit_sums",
    "collapse_alignment",
    "gather_at",
    "select_expert_importance",
    "select_importance",
    "select_top",
    "write_at_",
    "zero_at_",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fastdean.ops' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
