"""A table as data, written as HTML for the page and as Markdown for the card."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fastdean.report.markup import Html, element, join, table
from fastdean.wording import markdown


@dataclass(frozen=True)
class Cell:
    """A value with what qualifies it below; a strong one stands out."""

    value: str
    note: str = ""
    strong: bool = False

    def html(self) -> Html:
        value = element("strong", self.value) if self.strong else self.value
        note = element("span", self.note, class_="under") if self.note else None
        return join([value, " " if self.note else None, note])

    def markdown(self) -> str:
        value = f"**{markdown.text(self.value)}**" if self.strong else markdown.text(self.value)
        return f"{value} {markdown.text(self.note)}".strip()


@dataclass(frozen=True)
class Table:
    """Columns named in `words` hold words, the others numbers; the first heads its rows."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell | str]]
    words: Sequence[str] = ()

    def html(self) -> Html:
        rows = [[cell.html() if isinstance(cell, Cell) else cell for cell in r] for r in self.rows]
        return table(self.caption, self.columns, rows, words=self.words)

    def markdown(self) -> str:
        rules = ["---" if column in self.words else "---:" for column in self.columns]
        lines = [_line(map(markdown.text, self.columns)), _line(rules)]
        for row in self.rows:
            lines.append(
                _line(c.markdown() if isinstance(c, Cell) else markdown.text(c) for c in row)
            )
        return "\n".join([f"{markdown.text(self.caption)}:", "", *lines])


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
