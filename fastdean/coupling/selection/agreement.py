"""On which coupled entries two data sets agree: zeroing them helps both, or harms both.

By the sign of W * dL/dW summed over examples, first order (`Scores.signs`).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fastdean.coupling.results.scores import Scores
from fastdean.coupling.selection.rules import in_both

SIGNS = ("any", "same", "opposite")


@dataclass(frozen=True)
class Agreement:
    """The coupled entries of one matrix, int64 ascending, where the first top set is.

    Attributes:
        same: those whose signs are the same and not 0.
        opposite: the others.
        chance: share of same ones among entries whose two signs are independent, with p the share
            of + among all candidates of a set: p1 p2 + (1 - p1) (1 - p2).
    """

    same: Tensor
    opposite: Tensor
    chance: float

    @classmethod
    def of(cls, name: str, first: Scores, second: Scores, tops: tuple[Tensor, Tensor]) -> Agreement:
        """Of a matrix's top sets, by the signs of both scores."""
        pair = [
            scores.entries[name].signs_at(top)
            for scores, top in zip((first, second), tops, strict=True)
        ]
        positive = [float((signs > 0).double().mean()) if signs.numel() else 0.0 for signs in pair]
        one, other = (top.to(tops[0].device) for top in tops)
        signs, other_signs = (each.to(one.device) for each in pair)
        products = signs[in_both(one, other)] * other_signs[in_both(other, one)]
        coupled = one[in_both(one, other)]
        p, q = positive
        return cls(coupled[products > 0], coupled[products <= 0], p * q + (1 - p) * (1 - q))

    def wanted(self, signs: str) -> Tensor | None:
        """The entries that `couple(signs=)` leaves; None: all."""
        return {"any": None, "same": self.same, "opposite": self.opposite}[signs]

    def counts(self) -> dict[str, int | float]:
        """The columns of the mask's table."""
        same, opposite = self.same.numel(), self.opposite.numel()
        return {
            "same": same,
            "opposite": opposite,
            "same_by_chance": self.chance * (same + opposite),
        }


def require_signs(signs: str, rule: str, first: Scores, second: Scores) -> None:
    """Raise ValueError unless the scores and the rule can be asked for entries of these signs."""
    if signs not in SIGNS:
        raise ValueError(
            f"signs must be one of {', '.join(SIGNS)}, got {signs!r}; any takes all coupled "
            "weights, same those whose zeroing helps both sets or harms both, opposite the others"
        )
    require_rule_for(signs, rule)
    if signs == "any":
        return
    for which, scores in (("first", first), ("second", second)):
        if not scores.has_signs:
            raise ValueError(
                f"signs must be 'any' for scores without signs, got {signs!r} and none in the "
                f"{which} scores; score both with signs=True"
            )


def takes_signs(rule: str) -> bool:
    """Whether a rule selects coupled entries, or as many as there are."""
    return rule in ("paper", "random")


def require_rule_for(signs: str, rule: str) -> None:
    """Raise ValueError unless the rule can be asked for entries of these signs."""
    if signs != "any" and not takes_signs(rule):
        raise ValueError(
            f"signs must be 'any' with rule {rule!r}, which selects entries outside both sets, got "
            f"{signs!r}; use rule 'paper', or its control 'random'"
        )
