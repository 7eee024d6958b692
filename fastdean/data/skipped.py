"""Rows that are left out because they cannot be read or used, counted."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fastdean.wording.log import logger

# Of the rows that are left out: how many are shown, and how much of each reason.
_SHOWN, _REASON = 3, 160


@dataclass
class Skipped:
    """Rows of one source that are left out, because they could not be read or used.

    Attributes:
        rows: number of each -> the reason.
    """

    rows: dict[int, str] = field(default_factory=dict)

    def described(self) -> dict[str, Any]:
        """For a manifest: how many, and the first of them; nothing where there are none."""
        if not self.rows:
            return {}
        first = [{"row": number, "reason": reason} for number, reason in self._first()]
        return {"skipped_rows": {"count": len(self.rows), "first": first}}

    def told(self, name: str) -> list[str]:
        """A sentence on them, if there are any."""
        if not self.rows:
            return []
        shown = "; ".join(f"row {number} ({_cut(reason)})" for number, reason in self._first())
        more = len(self.rows) - len(self._first())
        rest = f"; and {more} more" if more else ""
        counted = "1 row is" if len(self.rows) == 1 else f"{len(self.rows)} rows are"
        return [f"{name}: {counted} left out: {shown}{rest}"]

    def warn(self, name: str) -> None:
        """Log the sentence, if there is one."""
        for sentence in self.told(name):
            logger.warning("%s", sentence)

    def _first(self) -> list[tuple[int, str]]:
        return sorted(self.rows.items())[:_SHOWN]


def _cut(reason: str) -> str:
    """A reason that is too long ends between two words."""
    if len(reason) <= _REASON:
        return reason
    return f"{reason[: _REASON + 1].rpartition(' ')[0] or reason[:_REASON]} ..."
