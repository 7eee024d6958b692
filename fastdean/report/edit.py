"""What a run did to which weights, in the words that its options call for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fastdean.report.quantities import measured
from fastdean.report.set_names import SetNames
from fastdean.wording.granularity import stored_granularity

# What each rule selects. Every rule but "paper" may select entries that are not in both sets.
_SELECTIONS = {
    "paper": "the {entries} in the {first} and the {second} set{unspared}",
    "random": "as many {entries} as rule paper selects, drawn at random: a control",
    "released": "what the published code selects, which is not the paper's set",
    "first": "the {entries} in the {first} set{unspared}",
    "second": "the {entries} in the {second} set{unspared}",
    "union": "the {entries} in the {first} or the {second} set{unspared}",
}


@dataclass(frozen=True)
class Edit:
    """The edit of a run: what `rule` selected of the sets `names` was multiplied by `scale`.

    `by_unit` is whether whole units were counted and selected rather than single entries.
    """

    rule: str = "paper"
    scale: float = 0.0
    by_unit: bool = False
    names: SetNames = SetNames()

    @classmethod
    def of(cls, options: Mapping | None) -> Edit:
        """As `options` say it; what they leave open is the default of a run."""
        options = options or {}
        scale = options.get("scale")
        return cls(
            rule=str(options.get("rule") or "paper"),
            scale=float(scale) if measured(scale) else 0.0,
            by_unit=stored_granularity(options.get("granularity")) == "unit",
            names=SetNames.of(options),
        )

    @property
    def done(self) -> str:
        """What happened to the selected entries: zeroed, or multiplied by 0.5."""
        return "zeroed" if self.scale == 0 else f"multiplied by {self.scale:g}"

    @property
    def entry(self) -> str:
        return "unit" if self.by_unit else "entry"

    @property
    def entries(self) -> str:
        return "units" if self.by_unit else "entries"

    @property
    def weights(self) -> str:
        """`entries` in the words of the key numbers."""
        return "units" if self.by_unit else "weights"

    @property
    def is_coupled(self) -> bool:
        """Whether what was selected is what both sets share less what the general set protects."""
        return self.rule == "paper"

    def selection(self, rule: str) -> str | None:
        """What a rule selects, None for a name that is no rule."""
        words = _SELECTIONS.get(rule)
        spared = self.names.spared_sets
        return words and words.format(
            entries=self.entries,
            first=self.names.first,
            second=self.names.second,
            unspared=f", not in {spared}" if spared else "",
        )
