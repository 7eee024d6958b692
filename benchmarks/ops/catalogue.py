"""The operations that are measured, and the tests each of them has to pass before."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from operations import (
    collapse,
    expert_importance,
    importance,
    mask,
    selection,
    unit_importance,
)
from operations.case import OpCase

# Results file -> its cases, for a toy run or a real one.
OPERATIONS: dict[str, Callable[[bool], Iterator[OpCase]]] = {
    module.OP: module.cases
    for module in (importance, selection, unit_importance, expert_importance, mask, collapse)
}

GATES: dict[str, tuple[str, ...]] = {
    importance.OP: ("tests/test_importance_op.py",),
    unit_importance.OP: ("tests/test_importance_op.py",),
    expert_importance.OP: ("tests/test_expert_importance_op.py",),
    mask.OP: ("tests/test_mask_op.py", "tests/test_edits.py", "tests/test_toggling.py"),
    collapse.OP: ("tests/test_collapse_op.py",),
    selection.OP: ("tests/test_selection_op.py", "tests/test_selection_kernel.py"),
}
