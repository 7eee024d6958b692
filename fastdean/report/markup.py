"""HTML built from elements, so that no string reaches the page unescaped."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
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


def table(
    caption: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    total: Sequence[object] | None = None,
    *,
    words: Collection[str] = (),
) -> Html:
    """A captioned table whose first column heads its rows; `total` becomes the foot.

    The columns named in `words` are set to the left, numbers to the right. The table lies in a
    region that scrolls sideways and takes the keyboard's focus, so that a narrow screen does not
    squeeze numbers.
    """
    kinds = ["words" if column in words else None for column in columns]

    def row(cells: Sequence[object]) -> Html:
        first, *rest = zip(cells, kinds, strict=True)
        head = element("th", first[0], scope="row", class_=first[1])
        return element("tr", head, *(element("td", cell, class_=kind) for cell, kind in rest))

    heads = zip(columns, kinds, strict=True)
    body = element(
        "table",
        element("caption", caption),
        element(
            "thead",
            element("tr", *(element("th", head, scope="col", class_=kind) for head, kind in heads)),
        ),
        element("tbody", *map(row, rows)),
        None if total is None else element("tfoot", row(total)),
    )
    return element("div", body, class_="scroll", role="region", tabindex=0, aria_label=caption)


def items(tag: str, entries: Iterable[object], class_: str | None = None) -> Html | None:
    """A list, None where it has no entries."""
    listed = [element("li", entry) for entry in entries]
    return element(tag, *listed, class_=class_) if listed else None


def terms(entries: Iterable[Sequence[object]], class_: str) -> Html:
    """A list of terms, each with what is said of it."""
    pairs = (
        element("div", element("dt", term), *(element("dd", said) for said in rest))
        for term, *rest in entries
    )
    return element("dl", *pairs, class_=class_)


def figure(caption: object, *parts: object) -> Html:
    """Plots with their caption."""
    return element("figure", element("figcaption", caption), *parts)


def folded(summary: str, *children: object) -> Html:
    """A part of the page that is shut until it is asked for."""
    return element("details", element("summary", summary), *children)
