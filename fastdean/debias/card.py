"""The README.md of a debiased model: its training, and the measured effect."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from fastdean.wording import markdown
from fastdean.wording.verdicts import NO_INTERVAL, reading

_NAMES = {
    "causal": "causal language modelling on gender-swapped text",
    "bec": "BEC: masked language modelling on gender-swapped text",
    "mabel": "MABEL: entailment pairs against their gender-swapped copies (arXiv 2210.14975)",
    "ase": "ASE: stereotype words off the gender direction, with elastic weight consolidation",
    "adept": "ADEPT: neutral words equally near to both genders (arXiv 2211.05414)",
}


@dataclass(frozen=True)
class Effect:
    """One figure before and after training.

    Attributes:
        metric: with its unit and its data, such as "StereoSet SS (gender), %".
        before, after: the figure of the base model and of this one.
        low, high: interval of the change, or None where none was measured.
        verdict: on the change, in the light of the other tests of the table.
        from_neutral: the verdict on the distance from the metric's neutral value, if it has one.
        p_adjusted: of the change, for all tests of the table; None: there was no test.
        no_effect: 0 of a change that is after - before, 1 of one that is their ratio.
    """

    metric: str
    before: float
    after: float
    low: float | None = None
    high: float | None = None
    verdict: str | None = None
    from_neutral: str | None = None
    p_adjusted: float | None = None
    no_effect: float = 0.0

    def reading(self) -> str:
        """The verdicts as `fastdean.wording.verdicts` words them."""
        said = reading(self.low, self.high, self.no_effect, self.verdict, self.p_adjusted)
        if said == NO_INTERVAL or self.from_neutral in (None, said):
            return said
        return f"{said}; {self.from_neutral}"


def model_card(
    name: str,
    *,
    base_model: str,
    method: str,
    strength: float | None,
    data: str,
    regularised: str = "gendered words",
    command: str | None = None,
    effects: Sequence[Effect] = (),
) -> str:
    """A README.md with the hub's metadata.

    Args:
        name: the title, such as the model's "owner/name" on the hub.
        base_model: the model before training; in the metadata if it has the form of a hub id.
        method: as given to `fine_tune`.
        strength: of the collapse regulariser; None: there was none.
        data: the source of the rows, and their number.
        regularised: the words of the regulariser, if there was one.
        command: the command line, with names in place of local paths.
        effects: all measured ones, good and bad; the card says so where there are none.
    Raises:
        ValueError: an unknown method.
    """
    if method not in _NAMES:
        raise ValueError(
            f"method must be one of {', '.join(_NAMES)}, got {method!r}; pass what fine_tune was "
            "given"
        )
    return f"""---
library_name: transformers
{_base_model_line(base_model)}tags:
- fastdean
- debiasing
---
# {markdown.text(name)}

{markdown.code(base_model)}, fine-tuned with FastDEAN to be less biased by gender.

- **Method**: {_NAMES[method]}
- **Collapse regulariser**: {_regulariser(strength, regularised)}
- **Data**: {markdown.code(data)}, with gender-swapped copies

{_command(command)}## Measured effect

{_table(effects)}

**Content warning.** Training against one kind of bias does not remove it, may strengthen others,
and changes what the model knows about gender where that is right to know. Words and names were
swapped by lists of two genders, in English. Evaluate the model on your own task before any use.
"""


def _base_model_line(base_model: str) -> str:
    is_hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", base_model) and base_model[0] not in "./"
    return f"base_model: {json.dumps(base_model)}\n" if is_hub_id else ""


def _regulariser(strength: float | None, words: str) -> str:
    if strength is None:
        return "none"
    return f"(U)NC3 on {markdown.text(words)}, strength {strength:g} (arXiv 2410.04472)"


def _command(command: str | None) -> str:
    return "" if command is None else f"{markdown.block(command, 'bash')}\n\n"


def _table(effects: Sequence[Effect]) -> str:
    if not effects:
        return "None was measured."
    lines = [
        "| metric | before | after | interval of the change | p (Holm) | verdict |",
        "|---|---:|---:|---|---:|---|",
    ]
    for effect in effects:
        measured = effect.low is not None and effect.high is not None
        sign, words = ("+", "") if effect.no_effect == 0 else ("", "ratio ")
        low_high = f"{words}{effect.low:{sign}.4g} to {effect.high:{sign}.4g}" if measured else "-"
        p = "-" if effect.p_adjusted is None else f"{effect.p_adjusted:.2g}"
        lines.append(
            f"| {markdown.text(effect.metric)} | {effect.before:.4g} | {effect.after:.4g} "
            f"| {low_high} | {p} | {effect.reading()} |"
        )
    lines += [
        "",
        "Intervals hold together with 95 % confidence (Bonferroni), p is adjusted for all tests of "
        "the table (Holm), and nothing is called a change whose p exceeds 0.05.",
    ]
    return "\n".join(lines)
