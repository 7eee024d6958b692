"""HTML built from elements, so that no string reaches the page unescaped."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape as _escape

# Lone surrogates (undecodable bytes of a command line) cannot be written as UTF-8, and control
# characters are no text: both would spoil the file. Marks that turn the direction of reading let a
# name rewrite the line that it stands in.
_NOT_TEXT = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\u061c\u200e\u200f\u2028-\u202e\u2060-\u2069"
    "\ufeff\ufff9-\ufffb\ufffe\uffff]"
)
_VOID = frozenset({"meta", "link", "br"})


class Html(str):
    """Text that is markup already. Only `element` and `join` make it from other text."""


def escape(value: object) -> Html:
    """`value` as text of the page; `Html` passes unchanged."""
    if isinstance(value, Html):
        return value
    return Html(_escape(_NOT_TEXT.sub("\ufffd", str(value)), quote=True))


def join(parts: Iterable[object]) -> Html:
    """The parts one after another, escaped where they are not markup; None is left out."""
    return Html("".join(escape(part) for part in parts if part is not None))


def element(tag: str, /, *children: object, **attributes: object) -> Html:
    """One element with its children escaped.

    Attribute names lose a closing underscore and write the others as hyphens (`class_`,
    `stroke_width`); None leaves an attribute out and floats are rounded to a hundredth.
    The result is well-formed XML as well as HTML.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{_attribute(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    if tag in _VOID:
        return Html(f"<{tag}{written} />")
    return Html(f"<{tag}{written}>{join(children)}</{tag}>")


def _attribute(value: object) -> Html:
    return escape(f"{value:.2f}" if isinstance(value, float) else str(value))


@dataclass(frozen=True)
class Column:
    """Heading of a table's column; `words` columns are set to the left, numbers to the right."""

    heading: str
    words: bool = False


def table(
    caption: str,
    columns: Sequence[Column],
    rows: Iterable[Sequence[object]],
    total: Sequence[object] | None = None,
) -> Html:
    """A captioned table whose first column heads its rows; `total` becomes the foot.

    It lies in a region of its own that scrolls sideways and takes the keyboard's focus, because
    a narrow screen must not squeeze numbers.
    """
    head = [element("th", column.heading, scope="col", class_=_kind(column)) for column in columns]
    foot = None
    if total is not None:
        foot = element("tfoot", _row(columns, total))
    body = element(
        "table",
        element("caption", caption),
        element("thead", element("tr", *head)),
        element("tbody", *(_row(columns, row) for row in rows)),
        foot,
    )
    return element("div", body, class_="scroll", role="region", tabindex=0, aria_label=caption)


def _row(columns: Sequence[Column], cells: Sequence[object]) -> Html:
    first, *rest = zip(columns, cells, strict=True)
    return element(
        "tr",
        element("th", first[1], scope="row", class_=_kind(first[0])),
        *(element("td", cell, class_=_kind(column)) for column, cell in rest),
    )


def _kind(column: Column) -> str | None:
    return "words" if column.words else None


def folded(summary: str, *children: object) -> Html:
    """A part of the page that is shut until it is asked for."""
    return element("details", element("summary", summary), *children)
