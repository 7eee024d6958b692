"""What a run found, in three sentences that claim no more than the intervals allow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def findings(results: Mapping[str, Any]) -> list[str]:
    """Three sentences: what was done, what it did to awareness, what it did to everything else."""
    return [_done(results), _awareness(results), _side_effects(results)]


def _done(results: Mapping[str, Any]) -> str:
    options, total = results["options"], results["coupling"]["total"]
    unit = "units" if options["granularity"] == "neuron" else "weights"
    chance = sum(
        row["first"] * row["second"] / row["numel"]
        for row in results["coupling"]["rows"]
        if row["numel"]
    )
    verb = "set to zero" if options["scale"] == 0 else f"multiplied by {options['scale']:g}"
    rows = results["coupling"]["rows"]
    matrices = sum(1 for row in rows if row["kept"])
    return (
        f"At ratio {options['ratio']:g}, {total['coupled']:,} of the {max(total['first'], total['second']):,} "
        f"most important {unit} are important to both fairness and privacy (chance alone: {chance:.2g}); "
        f"{total['removed']:,} of them matter to general ability too, and rule {options['rule']!r} took "
        f"{total['kept']:,} {unit} in {matrices} of {len(rows)} matrices, which were {verb}."
    )


def _awareness(results: Mapping[str, Any]) -> str:
    rule, margins = results["options"]["rule"], results.get("margins", {})
    parts = []
    for topic in ("fairness", "privacy"):
        change = margins.get(topic, {}).get("masks", {}).get(rule)
        if change is None:
            continue
        figures = f"{change['mean']:+.3f} nats per token, 95 % interval {change['low']:+.3f} to {change['high']:+.3f}"
        parts.append(f"{topic} margin {_in_words(change)} ({figures})")
    if not parts:
        return (
            "Awareness was not measured: no weights were taken or no pairs of answers were given."
        )
    sentence = f"Safe over unsafe answers: {', '.join(parts)}"
    noise = [
        topic
        for topic in ("fairness", "privacy")
        if _overlaps_control(margins.get(topic, {}).get("masks", {}), rule)
    ]
    if noise:
        sentence += (
            f"; on {' and '.join(noise)} the interval overlaps that of as many random weights"
        )
    return sentence + "."


def _side_effects(results: Mapping[str, Any]) -> str:
    parts = []
    rule = results["options"]["rule"]
    table = results.get("perplexity", {})
    if rule in table.get("masks", {}):
        change = table["masks"][rule]
        parts.append(
            f"Perplexity on general answers went from {table['origin']:.2f} to {change['value']:.2f} "
            f"({_in_words(change)})"
        )
    layers = results.get("hsic", {}).get("layers", [])
    if layers:
        outside = sum(not row["null_low"] <= row["before"] <= row["null_high"] for row in layers)
        expected = 0.05 * len(layers)
        parts.append(
            f"HSIC of the unpaired prompts lay outside its permutation null in {outside} of {len(layers)} layers "
            f"before the edit (about {expected:.1f} expected by chance), so it carries "
            + ("little" if outside <= 2 * expected + 1 else "some")
            + " evidence of dependence"
        )
    return "; ".join(parts) + "." if parts else "Side effects were not measured."


def _in_words(change: Mapping[str, Any]) -> str:
    return {"higher": "rose", "lower": "fell"}.get(change["verdict"], change["verdict"])


def _overlaps_control(masks: Mapping[str, Mapping], rule: str) -> bool:
    if rule not in masks or "random" not in masks or rule == "random":
        return False
    ours, control = masks[rule], masks["random"]
    return ours["low"] <= control["high"] and control["low"] <= ours["high"]
