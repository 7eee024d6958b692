"""What a run found, in a few sentences that claim no more than its verdicts do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

from fastdean.report.results import perplexities
from fastdean.report.set_names import SetNames
from fastdean.report.verdict import is_like_random
from fastdean.wording.digits import apart
from fastdean.wording.granularity import stored_granularity
from fastdean.wording.verdicts import direction, reading, verb


def findings(results: Mapping[str, Any]) -> list[str]:
    """What was done, what it did to awareness, what it did to everything else: a sentence each.

    And one on the grid of general ratios, where there is one.

    Args:
        results: of a run, with NaN or None where a figure could not be taken. A change is called
            one only where its verdict is, and its interval excludes "nothing changed".
    """
    found = [_done(results), _awareness(results), _side_effects(results)]
    return found + _grid(results)


def _done(results: Mapping[str, Any]) -> str:
    options, total = results["options"], results["coupling"]["total"]
    rows = results["coupling"]["rows"]
    unit, names = _unit(options), SetNames.of(options)
    removed = f"{total['removed']:,} of these are among the most important to "
    removed = f"{removed}{_ability(names)} too, and" if names.spared else "and"
    chance = sum(row["first"] * row["second"] / row["numel"] for row in rows if row["numel"])
    return (
        f"At ratio {options['ratio']:g}, {total['coupled']:,} of the "
        f"{_counted(total['first'], unit)} most important to {names.first} are also among the "
        f"{total['second']:,} most important to {names.second} ({_expected(chance)} expected by "
        f"chance), {removed} rule {options['rule']!r} "
        f"{_edited(total['kept'], unit, options['scale'], rows)}{_agreement(total, unit)}."
    )


def _agreement(total: Mapping[str, Any], unit: str) -> str:
    """On how many coupled ones the two sets agree; nothing where the scores had no signs."""
    if "same" not in total:
        return ""
    return (
        f"; zeroing {total['same']:,} of the {_counted(total['coupled'], unit)} in both sets helps "
        f"both or harms both, to first order, and on {total['opposite']:,} they differ "
        f"({_expected(total['same_by_chance'])} would agree if the signs on one set told nothing "
        "of those on the other)"
    )


def _ability(names: SetNames) -> str:
    return " or ".join("general ability" if name == "general" else name for name in names.spared)


def _edited(kept: int, unit: str, scale: float, rows: Sequence[Mapping[str, Any]]) -> str:
    if kept == 0:
        return f"selected no {unit}s, so that the model was not edited"
    matrices = sum(1 for row in rows if row["kept"])
    selected = f"selected {_counted(kept, unit)}, in {matrices} of {len(rows)} matrices, "
    edit = "set to zero" if scale == 0 else f"multiplied by {scale:g}"
    if unit == "unit":
        return f"{selected}whose outgoing weights were {edit}"
    return f"{selected}to be {edit}"


def _awareness(results: Mapping[str, Any]) -> str:
    if results["coupling"]["total"]["kept"] == 0:
        return "Awareness was not measured again: no weights were edited."
    rule, tables = results["options"]["rule"], results.get("margins") or {}
    topics = SetNames.of(results["options"]).compared
    changes = {topic: _masks(tables.get(topic)).get(rule) or {} for topic in topics}
    clauses = [_margin_clause(topic, tables, rule) for topic in topics if changes[topic]]
    if not clauses:
        return "Awareness was not measured: there are no margins to compare (see the warnings)."
    sentence = f"The margin of safe over unsafe answers {' and '.join(clauses)}"
    unmeasured = [topic for topic in topics if not changes[topic]]
    if unmeasured:
        sentence += f", and was not measured on {' and '.join(unmeasured)}"
    like_random = [topic for topic in topics if is_like_random(_masks(tables.get(topic)), rule)]
    if like_random:
        sentence += (
            f"; on {' and '.join(like_random)}, editing as many random "
            f"{_unit(results['options'])}s gives an interval that overlaps this one"
        )
    elif rule != "random":
        claimed = [t for t in topics if changes[t] and direction(_reading(changes[t], 0.0))]
        sentence += _random_clause(tables, claimed)
    return sentence + "."


def _random_clause(tables: Mapping[str, Any], topics: Sequence[str]) -> str:
    control = [(topic, _masks(tables[topic]).get("random") or {}) for topic in topics]
    if not control or not all(_known(change.get("mean")) for _, change in control):
        return ""
    figures = " and ".join(f"{change['mean']:+.3g} on {topic}" for topic, change in control)
    return f"; editing as many random ones changed it by {figures}"


def _margin_clause(topic: str, tables: Mapping[str, Any], rule: str) -> str:
    change = tables[topic]["masks"][rule]
    mean, evidence = _evidence(change, "mean", 0.0, least=3, sign=True)
    figures = f"{mean} nats per token, {evidence}{_pairs(tables[topic])}"
    return f"{verb(_reading(change, 0.0))} on {topic} ({figures})"


def _side_effects(results: Mapping[str, Any]) -> str:
    if results["coupling"]["total"]["kept"] == 0:
        return "There are no side effects to measure: no weights were edited."
    parts = [*_perplexity_clause(results), *_dependence_clause(results)]
    return f"{'; '.join(parts)}." if parts else "Side effects were not measured."


def _grid(results: Mapping[str, Any]) -> list[str]:
    """What each general ratio selects, and what that does to the perplexity."""
    grid = results.get("general_grid")
    if not grid:
        return []
    points = []
    for row in grid["rows"]:
        own = ", the run's own" if row["general_ratio"] == grid["chosen"] else ""
        told = [
            f"perplexity on {text} answers {verb(_reading(change, 1.0))}, ratio "
            f"{apart(1.0, change['ratio'])[1]}"
            for text, change in row["perplexity"].items()
            if change and _known(change.get("ratio"))
        ]
        said = f" ({'; '.join(told)})" if told else ""
        unit = _unit(results["options"])
        points.append(f"{row['general_ratio']:g}{own}, {_counted(row['selected'], unit)}{said}")
    return [f"By the general ratio, a family of tests of its own: {'; '.join(points)}."]


def _perplexity_clause(results: Mapping[str, Any]) -> list[str]:
    spared = SetNames.of(results["options"]).spared
    tables = perplexities(results, spared[0] if spared else "general")
    rule = results["options"]["rule"]
    return [said for name, table in tables.items() for said in _perplexity_of(name, table, rule)]


def _perplexity_of(name: str, table: Mapping[str, Any], rule: str) -> list[str]:
    change = _masks(table).get(rule)
    if not change or not _known(table.get("origin"), change.get("value"), change.get("ratio")):
        return []
    values = " to ".join(apart(table["origin"], change["value"]))
    counted = f"{table['n']} answers" if table.get("n") else ""
    ratio, evidence = _evidence(change, "ratio", 1.0)
    figures = f"{values}, ratio {ratio}, {evidence}{counted}".removesuffix(", ")
    said = f"Perplexity on {name} answers {verb(_reading(change, 1.0))} ({figures})"
    moved = change.get("kl") or {}
    if not _known(moved.get("mean"), moved.get("low"), moved.get("high")):
        return [said]
    kl, low, high = (f"{moved[key]:.3g}" for key in ("mean", "low", "high"))
    return [
        f"{said}, with a KL divergence from the unedited model of {kl} nats per token "
        f"(simultaneous 95 % interval {low} to {high})"
    ]


def _dependence_clause(results: Mapping[str, Any]) -> list[str]:
    layers = [
        layer
        for layer in (results.get("hsic") or {}).get("layers", [])
        if _known(layer["before"], layer["null_low"], layer["null_high"])
    ]
    if not layers:
        return []
    names = SetNames.of(results["options"])
    outside = sum(not row["null_low"] <= row["before"] <= row["null_high"] for row in layers)
    clause = (
        f"HSIC of {names.first} and {names.second} prompts, paired by position, lay outside what "
        f"other pairings give in {outside} of {len(layers)} layers before the edit (about "
        f"{0.05 * len(layers):.1f} expected by chance)"
    )
    edited = [layer for layer in layers if _known(layer.get("after"))]
    if edited:
        within = sum(_is_change_within_null(layer) for layer in edited)
        clause += (
            "; its change by the edit is smaller than the width of that range in "
            f"{within} of {len(edited)} layers, and has no test of its own"
        )
    return [clause]


def _is_change_within_null(layer: Mapping[str, Any]) -> bool:
    change = abs(layer["after"] - layer["before"])
    return change <= layer["null_high"] - layer["null_low"]


def _unit(options: Mapping[str, Any]) -> str:
    return stored_granularity(options["granularity"])


def _counted(number: int, unit: str) -> str:
    return f"{number:,} {unit}{'' if number == 1 else 's'}"


def _expected(number: float) -> str:
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"


def _masks(table: Mapping[str, Any] | None) -> Mapping[str, Any]:
    return (table or {}).get("masks") or {}


def _known(*values: float | None) -> bool:
    return all(value is not None and isfinite(value) for value in values)


def _reading(change: Mapping[str, Any], no_effect: float) -> str:
    return reading(
        change["low"], change["high"], no_effect, change.get("verdict"), change.get("p_holm")
    )


def _evidence(
    change: Mapping[str, Any], key: str, no_effect: float, **digits: Any
) -> tuple[str, str]:
    """The figure under `key`; and its interval and p-value, as far as there are any.

    Where no effect is claimed, also how large one had to be to be found.
    """
    found, said = change[key], ""
    if _known(change["low"], change["high"]):
        figure, low, high = apart(found, change["low"], change["high"], **digits)
        together = "simultaneous " if _known(change.get("p_holm")) else ""
        said = f"{together}95 % interval {low} to {high}, "
    else:
        (figure,) = apart(found, **digits)
    if _known(change.get("p_holm")):
        said += f"Holm-adjusted p = {change['p_holm']:.2g}, "
    elif _known(change.get("p_value")):
        said += f"p = {change['p_value']:.2g}, "
    if _known(change.get("detects")) and not direction(_reading(change, no_effect)):
        # A ratio of 1.0002 is not "1", which is no change.
        said += f"changes detected from {apart(no_effect, change['detects'], least=3)[1]}, "
    return figure, said


def _pairs(table: Mapping[str, Any]) -> str:
    pairs, prompts = table["pairs"], table.get("n")
    return f"{pairs} pairs" + (f" of {prompts} prompts" if prompts not in (None, pairs) else "")
