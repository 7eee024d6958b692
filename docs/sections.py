"""Docstrings of this project set no blank line between their sections; the site's parser wants one.

An extension of griffe.
"""

from __future__ import annotations

import re

import griffe

# A header below a line of text. Those of one line ("Raises: ValueError if ...") are text as well.
HEADER = re.compile(r"(?<=[^\n])\n(?=(Args|Attributes|Returns|Raises|Source|Example):\n)")


class BlankLines(griffe.Extension):
    """Sets the blank line."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        if obj.docstring:
            obj.docstring.value = HEADER.sub("\n\n", obj.docstring.value)
