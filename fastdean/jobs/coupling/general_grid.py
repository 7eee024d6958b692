"""The price against the general ratio: how much must be spared for an edit to cost little.

At small scale most of what couples two sets is what general ability needs just below the
threshold, so that the size of the general set decides what an edit is and what it costs. The two
coupled sets keep their ratio; masks are toggled on the loaded model, from scores read once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastdean.evaluation import Divergence, Margins, Perplexity
from fastdean.files.declared import Kind, Lists, Maps, Real, Record, Text
from fastdean.jobs.coupling.comparing import compared, family_of
from fastdean.jobs.coupling.figures import Figures, MeasuringSet, figures_of
from fastdean.masks import NeuronMask

# What is kept of a point: a number for each example, from which all else is computed.
_KEPT = Record(
    {
        "safe": Maps(Lists(Real())),
        "unsafe": Maps(Lists(Real())),
        "nll_sums": Maps(Lists(Real())),
        "kl_sums": Maps(Lists(Real())),
        "notes": Lists(Text(longest=10_000)),
    }
)


@dataclass(frozen=True)
class GeneralGrid:
    """Masks of one rule and ratio, each with another ratio of the general sets.

    Attributes:
        masks: general ratio -> mask, the chosen one among them.
        chosen: the general ratio of the run's own mask.
        rule: of all masks.
        kept: `RunFolder.figures`: the figures of a step, from an earlier call of the job or taken.
    """

    masks: Mapping[float, NeuronMask]
    chosen: float
    rule: str
    kept: Callable[[str, Callable[[], dict[str, Any]], Kind], dict[str, Any]]

    @property
    def to_measure(self) -> dict[float, NeuronMask]:
        """Those with weights that are not the run's own, which is measured anyway."""
        return {
            ratio: mask for ratio, mask in self.masks.items() if ratio != self.chosen and len(mask)
        }


def grid_table(
    grid: GeneralGrid,
    model: nn.Module,
    examples: MeasuringSet,
    options: Mapping[str, Any],
    notes: list[str],
    origin: Figures,
    chosen: Figures | None,
    timed: Callable[[str], AbstractContextManager],
    seed: int,
) -> dict[str, Any]:
    """Weights, margins and price at every general ratio, with the chosen one among them.

    Args:
        origin, chosen: figures of the model as it came, and under the run's own mask.
    """
    after: dict[float, Figures] = {} if chosen is None else {grid.chosen: chosen}
    for ratio, mask in grid.to_measure.items():

        def take(ratio: float = ratio, mask: NeuronMask = mask) -> dict[str, Any]:
            said: list[str] = []
            name = f"general ratio {ratio:g}"
            found = figures_of(model, examples, options, said, mask, name, origin, False)
            return _plain(found, said)

        with timed(f"measure general ratio {ratio:g}"):
            after[ratio] = _restored(grid.kept(f"general-{ratio!r}", take, _KEPT), origin, notes)
    after = {ratio: after[ratio] for ratio in sorted(after)}
    family = family_of(examples, len(after))
    changes = compared(origin, after, family, seed, notes, alone=len(examples.texts) == 1)
    return {
        "rule": grid.rule,
        "chosen": grid.chosen,
        "tests": family.to_dict(),
        "rows": [
            {
                "general_ratio": ratio,
                "selected": sum(row["kept"] for row in mask.table or []),
                "weights": len(mask),
                "margins": {
                    topic: table[ratio]
                    for topic, table in changes.margins.items()
                    if ratio in table
                },
                "perplexity": {
                    text: table[ratio]
                    for text, table in changes.perplexity.items()
                    if ratio in table
                },
            }
            for ratio, mask in sorted(grid.masks.items())
        ],
    }


def _plain(found: Figures, notes: list[str]) -> dict[str, Any]:
    return {
        "safe": {topic: each.safe.tolist() for topic, each in found.margins.items()},
        "unsafe": {topic: each.unsafe.tolist() for topic, each in found.margins.items()},
        "nll_sums": {text: each.nll_sums.tolist() for text, each in found.perplexity.items()},
        "kl_sums": {text: each.kl_sums.tolist() for text, each in found.divergence.items()},
        "notes": notes,
    }


def _restored(kept: Mapping[str, Any], origin: Figures, notes: list[str]) -> Figures:
    notes += kept["notes"]
    found = Figures()
    for topic, before in origin.margins.items():
        if topic in kept["safe"]:
            safe, unsafe = (
                torch.tensor(kept[side][topic], dtype=torch.float64) for side in ("safe", "unsafe")
            )
            found.margins[topic] = Margins(safe - unsafe, safe, unsafe, prompts=before.prompts)
    for text, measured in origin.perplexity.items():
        counts = measured.token_counts
        if text in kept["nll_sums"]:
            sums = torch.tensor(kept["nll_sums"][text], dtype=torch.float64)
            found.perplexity[text] = Perplexity(sums, counts)
        if text in kept["kl_sums"]:
            sums = torch.tensor(kept["kl_sums"][text], dtype=torch.float64)
            found.divergence[text] = Divergence(sums, counts)
    return found
