"""How a run's data sets are called, for its findings and sections: as its options say it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class SetNames:
    """The names of the two sets that are coupled, of those that are spared, and of the others."""

    first: str = "fairness"
    second: str = "privacy"
    spared: tuple[str, ...] = ("general",)
    others: tuple[str, ...] = ()

    @classmethod
    def of(cls, options: Mapping | None) -> SetNames:
        """As `options` say it; without sets of other names those of the three options."""
        options = options or {}
        coupled, spared = (_names(options.get(key)) for key in ("couple", "general"))
        if len(coupled) != 2:
            return cls()
        sets = options.get("sets")
        listed = sets if isinstance(sets, Mapping) else ()
        others = [name for name in listed if name not in (*coupled, *spared)]
        return cls(coupled[0], coupled[1], spared, tuple(others))

    @property
    def compared(self) -> tuple[str, ...]:
        """The sets whose margins are measured."""
        return (self.first, self.second, *self.others)

    @property
    def spared_sets(self) -> str:
        """As in "the chat or the code set"; "" where none is spared."""
        return f"the {' or the '.join(self.spared)} set" if self.spared else ""


def _names(value: Any) -> tuple[str, ...]:
    """The names in a list of them; none of anything else."""
    is_list = isinstance(value, Sequence) and not isinstance(value, str)
    return tuple(value) if is_list and all(isinstance(each, str) for each in value) else ()
