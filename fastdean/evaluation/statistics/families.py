"""Several tests that are read together: Holm's p-values, Bonferroni's intervals, one verdict each.

Of 20 tests of edits that changed nothing one is at p <= 0.05 by chance. A family is every test of
a table, whatever came out of it, and the chance that any of its verdicts is wrong stays at 5 %.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from fastdean.evaluation.statistics.intervals import BOOTSTRAP, Interval, check_confidence
from fastdean.evaluation.statistics.power import POWER, detectable_change
from fastdean.wording.numbers import require_real, require_whole
from fastdean.wording.verdicts import judge

Key = TypeVar("Key", bound=Hashable)


def holm(p_values: Sequence[float], tests: int | None = None) -> list[float]:
    """The p-values adjusted for each other (Holm 1979), in their order.

    Equivalent: the i-th smallest of m becomes the largest of (m - j + 1) p_j over all j <= i, and
    at most 1.

    Args:
        p_values: of one family.
        tests: m, where some of the family have no p-value, which are taken to be 1.

    Raises:
        ValueError: a p-value outside of 0..1, or fewer tests than p-values.
        TypeError: what is no number.
    """
    if tests is not None:
        require_whole("tests", tests)
    tests = len(p_values) if tests is None else tests
    if tests < len(p_values):
        raise ValueError(
            f"tests must be at least the {len(p_values)} p-values, got {tests}; count those "
            "without one too"
        )
    for p in p_values:
        require_real("p_values", p)
        if not 0.0 <= p <= 1.0:
            raise ValueError(f"p_values must lie in 0..1, got {p}; leave out what was not tested")
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (tests - rank) * p_values[place]))
        adjusted[place] = highest
    return adjusted


@dataclass(frozen=True)
class Family:
    """Tests that are read together.

    Attributes:
        tests: how many were asked for, also those that gave no figure.
        confidence: that all of their intervals hold the true value.
    """

    tests: int
    confidence: float = 0.95

    def __post_init__(self) -> None:
        check_confidence(self.confidence)
        require_whole("tests", self.tests)
        if self.tests < 0:
            raise ValueError(
                f"tests must be at least 0, got {self.tests}; count those of the table"
            )

    @property
    def confidence_of_each(self) -> float:
        """Of each interval, so that all hold together (Bonferroni)."""
        return 1.0 - (1.0 - self.confidence) / max(1, self.tests)

    def judged(self, changes: Mapping[Key, Interval]) -> dict[Key, dict[str, Any]]:
        """Each change as `Interval.to_dict` gives it, with a verdict in the light of the others.

        `p_holm` is the adjusted p-value. A verdict takes p_holm <= 1 - confidence and the
        simultaneous interval. `detects` is the smallest change that this design finds, as
        `detectable_change` says. An interval without a test stands as it is.

        Args:
            changes: those of the family that have a figure, with intervals of
                `confidence_of_each`, but for bootstraps.

        Raises:
            ValueError: more tests than the family has, or intervals of another confidence.
        """
        tested = {key: each for key, each in changes.items() if each.p_value is not None}
        for key, each in tested.items():
            if each.method != BOOTSTRAP and each.confidence != self.confidence_of_each:
                raise ValueError(
                    f"changes must have intervals of confidence {self.confidence_of_each:.6g}, got "
                    f"{each.confidence:.6g} for {key}; take them with confidence=family."
                    "confidence_of_each"
                )
        p_values = [each.p_value or 0.0 for each in tested.values()]
        adjusted = dict(zip(tested, holm(p_values, self.tests), strict=True))
        found = {}
        for key, each in changes.items():
            if key not in adjusted:
                found[key] = {**each.to_dict(), "p_holm": None, "detects": None}
                continue
            place = list(tested).index(key)
            best = [*p_values[:place], each.least_p or 0.0, *p_values[place + 1 :]]
            found[key] = {
                **each.to_dict(),
                "p_holm": adjusted[key],
                "verdict": judge(
                    each.low,
                    each.high,
                    each.no_effect,
                    n=each.n,
                    confidence=self.confidence,
                    p_value=adjusted[key],
                    least_p=holm(best, self.tests)[place],
                    tests=self.tests,
                ),
                "detects": detectable_change(each),
            }
        return found

    def to_dict(self) -> dict[str, Any]:
        """What the figures of the family went through, as JSON values."""
        return {
            "tests": self.tests,
            "p_values": "Holm",
            "intervals": "Bonferroni",
            "confidence": self.confidence,
            "confidence_of_each": self.confidence_of_each,
            "power": POWER,
        }


# A change that is tested, as what gives it with an interval of the confidence it is called with; or
# the interval of one without a test, as of a bootstrap, which is no part of a family.
Change = Callable[[float], Interval] | Interval


def tests_of(changes: Iterable[Change]) -> int:
    """How many of the changes are tested."""
    return sum(not isinstance(each, Interval) for each in changes)


def at(change: Change, family: Family) -> Interval:
    """A change with an interval of the family's confidence."""
    return change if isinstance(change, Interval) else change(family.confidence_of_each)


def judged_together(
    changes: Mapping[Key, Change], *, confidence: float = 0.95
) -> tuple[dict[Key, dict[str, Any]], Family]:
    """Every change of a table in the light of the others, and their family.

    Args:
        changes: by key, what gives the change with an interval of the confidence it is called with.
            One without a test, as of a bootstrap, is given as its interval: it stands as it is.

    Returns:
        As `Family.judged`, and the family.
    """
    family = Family(tests_of(changes.values()), confidence)
    return family.judged({key: at(each, family) for key, each in changes.items()}), family
