"""What a run says in one line, from the same figures as its tables.

A change is named where its verdict claims one in the light of all tests of its table (Holm), and
nowhere else; a word on its size stands beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastdean.report.coupled import coupling_totals
from fastdean.report.estimates import Estimate
from fastdean.report.figure_names import short_names
from fastdean.report.quantities import count, decimal, measured, percent, plural
from fastdean.report.results import edited_answers, perplexities
from fastdean.report.set_names import SetNames
from fastdean.wording.verdicts import NO_EFFECT

# Below these a change is called small: nats of a likelihood, a share of a ratio, per cent points.
SMALL = {"nats": 0.1, "ratio": 0.01, "%": 1.0}
SMALL_WORDS = "small: below 0.1 nats, 1 % of a ratio, or 1 point of a share"
NONE_SHOWN = "no change shown"
PERPLEXITY = "perplexity"
# Figures of which one direction is no price, and its sign; either may be one of others.
_GAINS = {PERPLEXITY: "−", "Over-refusal": "−", "Gender facts": "+", "BBQ, accuracy": "+"}
# More figures than this are counted, and those that changed named.
_MOST_NAMED = 3


@dataclass(frozen=True)
class Clause:
    """One statement of the line, as in "Privacy: +0.06 nats, small".

    Attributes:
        claims: whether it says that something changed.
    """

    name: str
    said: str
    claims: bool = False

    def __str__(self) -> str:
        return f"{self.name}: {self.said}." if self.name else f"{self.said}."


def verdict_line(results: Mapping[str, Any]) -> str:
    """The verdict as one line; "" of results that nothing was measured of."""
    return " ".join(map(str, clauses(results)))


def clauses(results: Mapping[str, Any]) -> list[Clause]:
    """The statements of the line, in the order in which they are read."""
    found: list[Clause] = []
    if results.get("coupling"):
        found += _of_edit(results)
    if results.get("collapse"):
        found += _of_collapse(results["collapse"])
    for key in ("bias", "measures"):
        if results.get(key):
            found += _of_measures(results[key])
    if not results.get("coupling") and perplexities(results):
        edited = {name: 0 for t in perplexities(results).values() for name in t.get("masks") or {}}
        found.append(_of_price(_perplexities_of(results, next(iter(edited), "trained"))))
    if results.get("judged"):
        found += _of_judges(results)
    elif results.get("answers") and not results.get("coupling"):
        found += _of_answers(edited_answers(results))
    return found


def said_of(estimate: Estimate, no_effect: float, unit: str) -> Clause:
    """What is said of a change, without a name.

    Args:
        unit: "nats", "%", "ratio", or another that is written behind the value.
    """
    verdict = estimate.reading(no_effect)
    if verdict == NO_EFFECT:
        return Clause("", NONE_SHOWN)
    if not estimate.is_effect(no_effect) or not measured(estimate.value):
        return Clause("", verdict)
    size = abs(estimate.value - no_effect)
    if unit == "ratio":
        value = f"{'+' if estimate.value > 1 else ''}{percent(round(estimate.value - 1, 12))}"
    else:
        # A change of a share is in points, not in per cent of it.
        told = "points" if unit == "%" else unit
        value = " ".join(filter(None, [estimate.written(no_effect)[0], told]))
    words = [value, *(["small"] if size < SMALL.get(unit.split(" ")[0], 0.0) else [])]
    if not measured(estimate.p_adjusted):
        words += ["not adjusted for other tests"]
    return Clause("", ", ".join(words), claims=True)


def is_like_random(masks: Mapping[str, Any], rule: str) -> bool:
    """Whether a change was claimed that a random edit of the same size may have made as well."""
    ours, control = masks.get(rule), masks.get("random")
    if rule == "random" or not ours or not control:
        return False
    own, other = Estimate.of("", ours, "mean"), Estimate.of("", control, "mean")
    if not own.is_effect(0.0) or not other.is_known:
        return False
    return ours["low"] <= control["high"] and control["low"] <= ours["high"]


def _of_edit(results: Mapping[str, Any]) -> Iterator[Clause]:
    options = results.get("options") or {}
    rule, margins = str(options.get("rule") or "paper"), results.get("margins") or {}
    total = coupling_totals(results["coupling"])
    if measured(total.get("kept")) and not total["kept"]:
        yield Clause("Edit", "none, no weights were selected")
        return
    for topic in SetNames.of(options).compared:
        masks = (margins.get(topic) or {}).get("masks") or {}
        unit = "nats" if "nats" in str((margins.get(topic) or {}).get("unit")) else ""
        found = said_of(Estimate.of(topic, masks.get(rule), "mean"), 0.0, unit)
        like = ", not told from random weights" if is_like_random(masks, rule) else ""
        yield Clause(_capital(topic), f"{found.said}{like}", found.claims)
    answered = edited_answers(results).get(rule) or {}
    if answered.get("change"):
        found = said_of(Estimate.of("", answered["change"], "mean"), 0.0, "of the answers")
        yield Clause("Refusals", found.said, found.claims)
    yield _of_price([*_perplexities_of(results, rule), *_prices_of(results, rule)])


def _perplexities_of(results: Mapping[str, Any], mask: str) -> list[tuple[str, Clause]]:
    tables = perplexities(results)
    return [
        (
            PERPLEXITY + (f" on {name}" if len(tables) > 1 else ""),
            said_of(Estimate.of(name, (table.get("masks") or {}).get(mask), "ratio"), 1.0, "ratio"),
        )
        for name, table in tables.items()
    ]


def _prices_of(results: Mapping[str, Any], mask: str) -> Iterator[tuple[str, Clause]]:
    table = results.get("price") or {}
    short = short_names(table)
    for name, figure in table.items():
        masks = (figure or {}).get("masks") or {}
        unit = str((figure or {}).get("unit") or "")
        yield short[name], said_of(Estimate.of(name, masks.get(mask), "mean"), 0.0, unit)


def _of_price(found: Sequence[tuple[str, Clause]]) -> Clause:
    """One clause on everything that an edit may have cost; what is known to be no price is last."""
    claimed = [(name, each.said) for name, each in found if each.claims]
    prices, gains = (
        "; ".join(f"{name} {words}" for name, words in claimed if _is_gain(name, words) is gain)
        for gain in (False, True)
    )
    if prices:
        said = ". Besides: ".join(filter(None, [prices, gains]))
        return Clause("Price", said, claims=True)
    others = [name for name, each in found if not each.claims and each.said != NONE_SHOWN]
    if len(others) == len(found):
        told = {each.said for _, each in found}
        return Clause("Price", told.pop() if len(told) == 1 else "not measured")
    open_ = f"{', '.join(others)} not judged" if others else ""
    return Clause("Price", "; ".join(filter(None, ["none shown", gains, open_])), bool(gains))


def _is_gain(name: str, said: str) -> bool:
    """Whether a change is in the direction that costs nothing."""
    return any(name.startswith(start) and said.startswith(sign) for start, sign in _GAINS.items())


def _of_collapse(collapse: Mapping[str, Any]) -> Iterator[Clause]:
    values = ((collapse.get("metrics") or {}).get("unc3_std") or {}).get("values") or {}
    known = [decimal(value, 3) for value in values.values() if measured(value)]
    if not known:
        yield Clause("(U)NC3", "not defined on this text")
    elif len(values) > 1:
        yield Clause("(U)NC3", f"{' to '.join(known)}, not tested")
    else:
        yield Clause("(U)NC3", f"{known[0]}, where 0 is all words aligned alike")


def _of_measures(table: Mapping[str, Any]) -> Iterator[Clause]:
    changed = {name: row for name, row in table.items() if (row or {}).get("change")}
    if not changed:
        yield from _of_states(table)
        return
    found, short = {}, short_names(changed)
    for name, row in changed.items():
        raw = row.get("raw_change") or row["change"]
        clause = said_of(Estimate.of(name, raw), 0.0, str(row.get("unit") or ""))
        if clause.claims and row.get("neutral") is not None:
            away = Estimate.of(name, row["change"]).reading(0.0)
            clause = Clause("", f"{clause.said} ({away})", claims=True)
        found[short[name]] = clause
    if len(found) <= _MOST_NAMED:
        yield from (Clause(_capital(name), each.said, each.claims) for name, each in found.items())
        return
    claimed = [f"{name} {each.said}" for name, each in found.items() if each.claims]
    if claimed:
        said = f"{count(len(claimed))} of {plural(len(found), 'figure')} changed"
        yield Clause("", f"{said}: {'; '.join(claimed)}", claims=True)
    else:
        still = sum(each.said == NONE_SHOWN for each in found.values())
        number = plural(len(found), "figure")
        said = f"{_capital(NONE_SHOWN)} in {_part(still, len(found))}{number}"
        yield Clause("", said if still else f"No verdict on any of {number}")


def _part(number: int, of: int) -> str:
    """Before how many there are: "any of ", or how many of them; the others were not judged."""
    return "any of " if number == of else f"{count(number)} of "


def _of_states(table: Mapping[str, Any]) -> Iterator[Clause]:
    """Of one model: which figures lie off their neutral value."""
    rows = {name: row for name, row in table.items() if measured((row or {}).get("neutral"))}
    off, short = [], short_names(rows)
    for name, row in rows.items():
        value = Estimate.of(name, row.get("before"))
        if value.is_effect(row["neutral"]) and measured(value.p_adjusted):
            off.append(f"{short[name]} {value.reading(row['neutral'])}")
    if off:
        yield Clause("Bias", "; ".join(off))
    elif rows:
        yield Clause("Bias", "none shown")
    else:
        yield Clause("", f"{plural(len(table), 'figure')} of the model alone")


def _of_judges(results: Mapping[str, Any]) -> Iterator[Clause]:
    found = []
    for heading, key in (("Awareness", "changes"), ("Refusals", "refusal_changes")):
        for row in results.get(key) or []:
            change = said_of(Estimate.of("", row.get("change"), "mean"), 0.0, "of the answers")
            name = f"{heading} of {row.get('variant')} by {row.get('judge')}"
            found.append(Clause(name, change.said, change.claims))
    if len(found) <= _MOST_NAMED:
        yield from found
    else:
        yield from (each for each in found if each.claims)
        still = sum(each.said == NONE_SHOWN for each in found)
        if still:
            yield Clause(
                "", f"No change shown in {count(still)} of {count(len(found))} comparisons"
            )
        open_ = [each.name for each in found if not each.claims and each.said != NONE_SHOWN]
        if open_:
            yield Clause("Not judged", ", ".join(open_))
    if not found:
        for row in results["judged"]:
            share = (row.get("awareness") or {}).get("share")
            if measured(share):
                name = f"Awareness of {row.get('variant')} by {row.get('judge')}"
                yield Clause(name, decimal(share, 3))


def _of_answers(variants: Mapping[str, Any]) -> Iterator[Clause]:
    for name, found in variants.items():
        refusals = said_of(Estimate.of("", found.get("change"), "mean"), 0.0, "of the answers")
        changed = f"{count(found.get('changed'))} of {count(found.get('prompts'))} answers changed"
        yield Clause(_capital(name), f"{changed}; refusals: {refusals.said}", refusals.claims)


def _capital(name: str) -> str:
    return name[:1].upper() + name[1:]
