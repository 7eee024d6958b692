"""Which numbers of a page do not follow from the results it was drawn from.

A number follows if it is one of the results', written with fewer digits; a count, a sum, a
difference or a ratio of what stands side by side there; or words of the results hold it. Ticks of
axes are no figures.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import permutations
from typing import Any
from xml.etree import ElementTree

NUMBER = re.compile(r"(?<![\w.,-])[−-]?\d[\d,]*(?:\.\d+)?(?:e-?\d+)?(?![\w])")
# In words of the page that stand there whatever the results are: levels, and what values mean.
SAID = {"0", "1", "2", "0.05", "0.1", "10", "100", "600"}


def untraced(page: str, results: Mapping[str, Any]) -> list[str]:
    """The numbers that do not follow, with the text around each."""
    values = sorted(_values(results))
    texts = {token for text in _texts(results) for token in NUMBER.findall(text)} | SAID
    found = []
    for text in _shown(ElementTree.fromstring(page)):
        for match in NUMBER.finditer(text):
            token = match[0]
            if token not in texts and not _is_among(token, values):
                found.append(f"{token} in {text[max(0, match.start() - 30) : match.end() + 20]!r}")
    return found


def _shown(node: ElementTree.Element) -> Iterator[str]:
    """The texts of the page but for its style, the date, the manifest and ticks."""
    if node.tag in ("style", "time", "pre", "title") or node.get("class") == "tick":
        yield node.tail or ""
        return
    yield node.text or ""
    for child in node:
        yield from _shown(child)
    yield node.tail or ""


def _is_among(token: str, values: list[float]) -> bool:
    from bisect import bisect_left

    plain = token.replace("−", "-").replace(",", "")
    mantissa, _, power = plain.partition("e")
    places = len(mantissa.partition(".")[2])
    shown, half = float(plain), 0.5000001 * 10.0 ** (int(power or 0) - places)
    return any(
        (at := bisect_left(values, sign * shown - half)) < len(values)
        and values[at] <= sign * shown + half
        for sign in (1, -1)
    )


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key)
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, str):
        yield value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _values(value: Any) -> set[float]:
    """Every number of the results, and what is counted, added or divided of them."""
    found: set[float] = set()
    if isinstance(value, Mapping | list):
        parts = list(value.values() if isinstance(value, Mapping) else value)
        found.add(len(parts))
        for part in parts:
            found |= _values(part)
        rows = [part for part in parts if isinstance(part, Mapping)]
        for key in dict.fromkeys(key for row in rows for key in row):
            column = [row[key] for row in rows if _is_number(row.get(key))]
            if column:
                whole = sum(column)
                found |= _forms(whole) | {max(column), len(column)}
                found |= {100 * each / whole for each in column if whole}
        found |= _by_kind(rows)
        own = [part for part in parts if _is_number(part)]
        if isinstance(value, Mapping) and isinstance(value.get("origin"), Mapping):
            # What a mask makes of a margin: the original's, and the change.
            origin, masks = value["origin"].get("mean"), value.get("masks") or {}
            changes = [mask["mean"] for mask in masks.values() if _is_number(mask.get("mean"))]
            found |= {origin + change for change in changes if _is_number(origin)}
        if isinstance(value, Mapping) and len(own) < 20:
            for a, b in permutations(own, 2):
                found |= {a - b, a + b} | (_forms(a / b) if b else set())
    elif _is_number(value):
        found |= _forms(float(value))
    return found


def _by_kind(rows: list[Mapping[str, Any]]) -> set[float]:
    """Sums and means over the rows of one kind, such as a module's or a group's."""
    found: set[float] = set()
    for kind in ("module", "layer", "group"):
        for name in {row.get(kind) for row in rows} - {None}:
            same = [row for row in rows if row.get(kind) == name]
            numbers = [(k, v) for row in same for k, v in row.items() if _is_number(v)]
            sums: dict[str, float] = {}
            for key, number in numbers:
                sums[key] = sums.get(key, 0) + number
            found |= {*sums.values(), len(same)}
            for state in {s for row in same for s in row.get("alignment") or {}}:
                known = [row["alignment"].get(state) for row in same]
                known = [each for each in known if _is_number(each)]
                found |= {sum(known) / len(known), len(known)} if known else set()
    return found


def _forms(value: float) -> set[float]:
    """As it is, in per cent, as a change in per cent, in minutes and hours, in binary units."""
    sizes = {value / 1024**power for power in (1, 2, 3)}
    return {value, 100 * value, 100 * (value - 1), value / 60, value / 3600, *sizes}
