"""The section on a mixture's experts: how many of a layer's routed tokens each of them got."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from fastdean.report.markup import Html, element, folded, join, table
from fastdean.report.quantities import MISSING, count, measured, percent, plural

# Of an even share, below and above which an expert's is drawn otherwise.
_LITTLE, _MUCH = 0.5, 2.0
_WIDTH, _HEIGHT = 128, 12
# A strip of more cells than that has cells that nobody can see.
_MOST_CELLS = 512


def experts_section(loads: Mapping[str, Sequence[dict] | None]) -> Html:
    """A table of layers for each data set, and a strip with a cell for each expert."""
    said = (
        "Share of a layer's routed tokens that each of its experts got. A token counts at every "
        "expert that it was routed to. In a strip a cell is an expert, in their order: empty "
        "without a token, pale below half of an even share, dark above twice of it."
    )
    tables = [
        folded(f"{name} ({plural(len(rows), 'layer')}{_unseen_words(rows)})", _table(name, rows))
        for name, rows in loads.items()
        if rows
    ]
    return join([element("p", said), *_shared(loads), *tables])


def _unseen_words(rows: Sequence[dict]) -> str:
    unseen = sum(int(row["number_unseen"]) for row in rows if measured(row.get("number_unseen")))
    return f", {plural(unseen, 'expert')} without a token" if unseen else ""


def _shared(loads: Mapping[str, Sequence[dict] | None]) -> list[Html]:
    """A note on the experts that every token passes, which are in no strip."""
    found = {
        name: None
        for rows in loads.values()
        for row in rows or ()
        for name in row.get("shared") or ()
    }
    if not found:
        return []
    text = (
        f"Every token passes {plural(len(found), 'shared expert')} beside them, such as "
        f"{next(iter(found))}: these are no part of the shares."
    )
    return [element("p", text, class_="note")]


def _table(name: str, rows: Sequence[dict]) -> Html:
    columns = ["Layer", "Experts", "Routed tokens", "Least", "Median", "Most", "Each expert"]
    columns += ["Without a token"]
    cells = [
        [
            _place(row),
            count(row.get("experts")),
            count(row.get("tokens")),
            *(percent(row.get(key)) for key in ("least", "median", "most")),
            _strip(str(row.get("counts") or "")) or MISSING,
            row.get("unseen") or "none",
        ]
        for row in rows
    ]
    words = ("Layer", "Each expert", "Without a token")
    return table(f"Tokens of {name} by expert", columns, cells, words=words)


def _place(row: dict) -> object:
    return count(row["layer"]) if measured(row.get("layer")) else row.get("name") or MISSING


def _strip(text: str) -> Html | None:
    """One row of cells, those of a kind in one path."""
    parts = text.split()
    if not 0 < len(parts) <= _MOST_CELLS or not all(part.isdecimal() for part in parts):
        return None
    counts = [int(part) for part in parts]
    even = sum(counts) / len(counts)
    kinds = [_kind(number, even) for number in counts]
    paths = [
        element("path", d="".join(_runs(kinds, kind)), class_=f"load {kind}")
        for kind in ("little", "even", "much")
        if kind in kinds
    ]
    return element(
        "svg",
        *paths,
        viewBox=f"0 0 {len(counts)} 1",
        width=_WIDTH,
        height=_HEIGHT,
        preserveAspectRatio="none",
        class_="cells",
        role="img",
        aria_label=(
            f"{kinds.count('none')} experts without a token, {kinds.count('little')} below half of "
            f"an even share, {kinds.count('much')} above twice of it"
        ),
    )


def _kind(number: int, even: float) -> str:
    if not number:
        return "none"
    return "little" if number < _LITTLE * even else "much" if number > _MUCH * even else "even"


def _runs(kinds: Sequence[str], wanted: str) -> Iterator[str]:
    """The cells of one kind as boxes, those side by side as one."""
    start = None
    for place, kind in enumerate([*kinds, None]):
        if kind == wanted and start is None:
            start = place
        elif kind != wanted and start is not None:
            yield f"M{start} 0H{place}V1H{start}Z"
            start = None
