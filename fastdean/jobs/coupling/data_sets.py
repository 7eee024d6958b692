"""Which data sets a run has, what each is called, and which of them are coupled or spared."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastdean.wording.mendable import InputTypeError

# The sets of the three options of that name.
DATA_SETS = ("fairness", "privacy", "general")

# A file's name on every system, and a word of a command line.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
# A folder is called by all names of a sweep.
_LONGEST_TOGETHER = 200


@dataclass(frozen=True)
class DataSets:
    """The data sets of a run.

    Attributes:
        sources: name -> SRC, in the order in which they are scored.
        coupled: the two whose top sets are intersected, in the order of `couple`.
        spared: those whose top sets are left out of the mask; maybe none.
        named: whether the caller named them, and not the three options.
    """

    sources: dict[str, str]
    coupled: tuple[str, str]
    spared: tuple[str, ...]
    named: bool

    @classmethod
    def of(
        cls,
        fairness: str | None,
        privacy: str | None,
        general: str | Sequence[str] | None,
        sets: Mapping[str, str] | None,
        couple: str | Sequence[str] | None,
    ) -> DataSets:
        """From the options of a run: three SRC, or sets with the names that are coupled and spared.

        Raises:
            ValueError, TypeError: some of either, names that no file can have, or names of no set.
        """
        if sets is None:
            return cls._of_three(fairness, privacy, general, couple)
        for option, given in (("fairness", fairness), ("privacy", privacy)):
            if given is not None:
                raise ValueError(
                    f"{option} must be left out with sets, got {given!r}; give it as one of them, "
                    "with that name"
                )
        sources = _checked_sources(sets)
        listed = ", ".join(sources)
        if couple is None:
            raise InputTypeError(
                f"couple must name the two sets to couple, got none; choose from {listed}"
            )
        coupled = _names("couple", couple)
        if len(set(coupled)) != 2 or len(coupled) != 2:
            raise ValueError(
                f"couple must name two different sets, got {', '.join(coupled)!r}; choose from "
                f"{listed}"
            )
        spared = () if general is None else _names("general", general)
        for option, names, free in (
            ("couple", coupled, sources),
            ("general", spared, [name for name in sources if name not in coupled]),
        ):
            for name in names:
                if name not in sources:
                    choice = f"choose from {', '.join(free)}, and give" if free else "give"
                    raise ValueError(
                        f"{option} must name sets, got {name!r}; {choice} any other SRC a name of "
                        "its own as one of the sets"
                    )
        for name in spared:
            if name in coupled or spared.count(name) > 1:
                raise ValueError(
                    f"general must name sets that are not coupled, each once, got {name!r}; "
                    "leave it out of one of them"
                )
        return cls(sources, (coupled[0], coupled[1]), spared, named=True)

    @classmethod
    def _of_three(
        cls,
        fairness: str | None,
        privacy: str | None,
        general: str | Sequence[str] | None,
        couple: str | Sequence[str] | None,
    ) -> DataSets:
        if couple is not None:
            raise ValueError(
                f"couple must come with sets, whose names it takes, got {_shown(couple)!r} alone; "
                "pass sets too, or leave it out to couple fairness and privacy"
            )
        sources: dict[str, str] = {}
        for name, source in zip(DATA_SETS, (fairness, privacy, general), strict=True):
            if source is None:
                raise InputTypeError(
                    f"{name} must be the SRC of its rows, got none; name it, or pass sets= of "
                    "other names and couple= two of them"
                )
            if not isinstance(source, str):
                raise InputTypeError(
                    f"{name} must be one SRC without sets, got {_shown(source)!r}; pass sets= to "
                    "name several"
                )
            sources[name] = source
        return cls(sources, ("fairness", "privacy"), ("general",), named=False)

    @property
    def are_the_three(self) -> bool:
        """Whether the three options say the same."""
        return (
            set(self.sources) == set(DATA_SETS)
            and self.coupled == ("fairness", "privacy")
            and self.spared == ("general",)
        )

    @property
    def compared(self) -> tuple[str, ...]:
        """The sets whose margins are measured: all but those that are spared, the coupled first."""
        others = [name for name in self.sources if name not in (*self.coupled, *self.spared)]
        return (*self.coupled, *others)

    def argument(self, name: str) -> str:
        """What a message calls the argument that a set came with."""
        return f"set {name!r}" if self.named else name


def _checked_sources(sets: Any) -> dict[str, str]:
    if not isinstance(sets, Mapping):
        raise InputTypeError(
            f"sets must be names with their SRC, got {type(sets).__name__}; pass a dictionary "
            "{name: SRC}"
        )
    for name, source in sets.items():
        if not (isinstance(name, str) and _NAME.fullmatch(name)):
            raise ValueError(
                "sets must have names of letters, digits, '-' and '_', 64 at most, the first a "
                f"letter or digit, got {name!r}; choose another name"
            )
        if not isinstance(source, str) or not source:
            raise InputTypeError(
                f"sets must have a SRC each, got {source!r} for {name!r}; name its rows"
            )
    names: dict[str, str] = {}
    for name in sets:
        # Files that differ by case alone are one on some systems.
        if names.setdefault(name.casefold(), name) != name:
            raise ValueError(
                f"sets must have names that differ by more than case, got "
                f"{names[name.casefold()]!r} and {name!r}; choose another name"
            )
    if len(sets) < 2:
        raise ValueError(f"sets must be two at least, got {len(sets)}; two of them are coupled")
    together = len(",".join(sets))
    if together > _LONGEST_TOGETHER:
        raise ValueError(
            f"sets must have names of {_LONGEST_TOGETHER} characters at most together, got "
            f"{together}; choose shorter ones"
        )
    return dict(sets)


def _names(option: str, given: Any) -> tuple[str, ...]:
    """The names in one text, separated by commas, or in a sequence."""
    listed = [given] if isinstance(given, str) else given
    if not isinstance(listed, Sequence) or not all(isinstance(each, str) for each in listed):
        raise InputTypeError(
            f"{option} must be names of sets, got {given!r}; pass a text or a sequence of texts"
        )
    return tuple(part.strip() for each in listed for part in each.split(","))


def _shown(given: Any) -> Any:
    return list(given) if isinstance(given, tuple) else given
