"""JSON Lines that are only added to, for work that goes on after a kill."""

from __future__ import annotations

import json
import os
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastdean.files.declared import Kind, require, unfit
from fastdean.wording.printable import error_line

_ADVICE = "delete the line, and what it held is done again"


class Lines:
    """A file with a record on each line. What a kill cut short at its end is no line."""

    def __init__(self, file: Path, kind: Kind, key: Sequence[str] = ()) -> None:
        """
        Args:
            kind: what each record looks like.
            key: the fields that tell one record from another; none: they may be alike.
        """
        self.file, self._kind, self._key = file, kind, tuple(key)

    def key_of(self, record: Mapping[str, Any]) -> tuple[Any, ...]:
        """What tells a record from the others."""
        return tuple(record[name] for name in self._key)

    def read(self, known: Container[tuple[Any, ...]] | None = None) -> list[dict[str, Any]]:
        """The records, in order; none where there is no file.

        Args:
            known: the keys that there may be; None: any.

        Raises:
            Unfit: a line holds anything else, or a record that an earlier one holds.
        """
        if not self.file.exists():
            return []
        whole, _, _ = self.file.read_bytes().rpartition(b"\n")
        found = []
        lines: dict[tuple[Any, ...], int] = {}
        for number, line in enumerate(whole.split(b"\n") if whole else [], start=1):
            where = f"{self.file}, line {number}"
            try:
                record = json.loads(line.decode("utf-8"))
            except (ValueError, RecursionError) as error:
                got = f"something else ({error_line(error)})"
                raise unfit(where, "", "JSON", got, _ADVICE) from None
            require(record, self._kind, where, advice=_ADVICE)
            if self._key:
                key = self.key_of(record)
                told = ", ".join(f"{n} {k!r:.80}" for n, k in zip(self._key, key, strict=True))
                if known is not None and key not in known:
                    raise unfit(where, "", "a record of this job", f"that of {told}", _ADVICE)
                if (first := lines.setdefault(key, number)) != number:
                    got = f"that of {told} again, which line {first} has"
                    raise unfit(where, "", "a record of its own", got, _ADVICE)
            found.append(record)
        return found

    def repair(self) -> None:
        """Cut off what a kill left of a line."""
        if not self.file.exists():
            return
        with open(self.file, "r+b") as file:
            whole, newline, rest = file.read().rpartition(b"\n")
            if rest:
                file.truncate(len(whole) + len(newline))

    def add(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Write the records and have the system put them on the disk."""
        texts = [json.dumps(record, ensure_ascii=False, allow_nan=False) for record in records]
        if not texts:
            return
        # Lone surrogates, which no UTF-8 holds, stand as JSON's own escapes.
        data = "".join(f"{text}\n" for text in texts).encode("utf-8", "backslashreplace")
        with open(self.file, "ab") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
