"""Text that stays text in a Markdown card.

Names of models, files and measures come from others. None of them may begin a heading, close a
fence, open a tag or a link, or end the metadata above a card.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from fastdean.wording.printable import one_line, printable

# Markup in running text or in the cell of a table.
_MEANT = re.compile(r"([\\`*_{}\[\]<>#|~$!])")


def text(words: str) -> str:
    """As running text, in a heading or in the cell of a table: one line without markup."""
    return _MEANT.sub(r"\\\1", one_line(words).replace("&", "&amp;")).replace("\\<", "&lt;")


def code(words: str) -> str:
    """As code in a line, also in the cell of a table."""
    words = one_line(words)
    ticks = _longer_than_any(words, "`", least=1)
    # A space that belongs to the fence keeps it apart from a tick of the text.
    space = " " if words[:1] in ("`", " ", "") or words[-1:] in ("`", " ") else ""
    return f"{ticks}{space}{words}{space}{ticks}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table, each cell as text."""
    shown = (list(map(text, row)) for row in (header, *rows))
    head, *body = (f"|{'|'.join(f' {cell} ' if cell else ' ' for cell in r)}|" for r in shown)
    return [head, "|" + "---|" * len(header), *body]


def block(words: str, language: str = "") -> str:
    """As lines of code, fenced."""
    words = printable(words)
    ticks = _longer_than_any(words, "`", least=3)
    return f"{ticks}{language}\n{words}\n{ticks}"


def _longer_than_any(words: str, mark: str, *, least: int) -> str:
    longest = max((len(run) for run in re.findall(f"{mark}+", words)), default=0)
    return mark * max(least, longest + 1)
