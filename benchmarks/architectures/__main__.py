"""Score every language model class of the installed transformers, built tiny, against autograd.

From the root of a checkout. Without options: all classes, beside what is recorded of them; the
status is 1 where a recorded outcome is another one now, or a class fails.

    python -m benchmarks.architectures --only llama,mixtral
    python -m benchmarks.architectures --shard 0/8 --record
    python -m benchmarks.architectures --page
"""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.architectures import isolated, record
from benchmarks.architectures.classes import listed
from benchmarks.architectures.page import page
from fastdean.files.atomic import write_text_atomic

PAGE = Path(__file__).resolve().parents[2] / "docs" / "architectures.md"


def main(argv: Sequence[str] | None = None) -> int:
    options = _options().parse_args(argv)
    known = record.read()
    if options.page:
        write_text_atomic(PAGE, page(known))
        return 0
    chosen, status = _chosen(options.only, options.shard), 0
    if options.missing:
        chosen = [name for name in chosen if name not in known["classes"]]
    end = None if options.seconds is None else time.monotonic() + options.seconds
    for name in chosen:
        begun = time.monotonic()
        if end is not None and begun > end:
            break
        result = isolated.outcome_of(name, options.limit)
        before, now = known["classes"].get(name), record.outcome(result)
        different = before is not None and record.compared(before) != record.compared(result)
        note = "" if not different else f" (recorded: {record.outcome(before)})"
        if before is None:
            note = " (not in the record)"
        print(f"{name}: {now}{note}, {time.monotonic() - begun:.1f} s", flush=True)
        for line in record.remarks(result):
            print(f"    {line}", flush=True)
        if now == record.FAILURE or (different and not options.record):
            status = 1
        if options.record:
            record.add(name, result, importlib.metadata.version("transformers"))
    return status


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m benchmarks.architectures", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--only", help="names, or parts of names, with commas between them")
    parser.add_argument("--shard", help="I/N: every Nth class from the Ith on")
    parser.add_argument("--limit", type=float, default=isolated.LIMIT_S, help="seconds of a class")
    parser.add_argument("--record", action="store_true", help="record what comes of each class")
    parser.add_argument("--missing", action="store_true", help="those that are not in the record")
    parser.add_argument("--seconds", type=float, help="begin with no further class after these")
    parser.add_argument("--page", action="store_true", help="write docs/architectures.md")
    return parser


def _chosen(only: str | None, shard: str | None) -> list[str]:
    names = list(listed())
    if only is not None:
        parts = only.split(",")
        names = [name for name in names if any(part in name for part in parts)]
    if shard is not None:
        first, _, step = shard.partition("/")
        names = names[int(first) :: int(step)]
    if not names:
        raise SystemExit(f"--only must name a class that transformers has, got {only!r}")
    return names


if __name__ == "__main__":
    sys.exit(main())
