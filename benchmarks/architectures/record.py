"""What came of every class, kept in `record.json` beside this file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastdean.files.atomic import write_text_atomic

RECORD = Path(__file__).with_name("record.json")
EXACT, REFUSED, PARTLY, NOT_BUILT, FAILURE = "exact", "refused", "partly", "not built", "failure"
OUTCOMES = (EXACT, PARTLY, REFUSED, NOT_BUILT, FAILURE)


def outcome(result: Mapping[str, Any]) -> str:
    """One word of `OUTCOMES`.

    "partly" is exact in some cases and refused in others. "failure" is everything that must not be:
    a score that is off, an error that is none of FastDEAN's, a model left changed, a process that
    ended or went on for too long.
    """
    if "not built" in result:
        return NOT_BUILT
    kinds = {each.partition(":")[0] for each in result.get("cases", {}).values()}
    if not kinds or "failed" in result or not kinds <= {EXACT, REFUSED}:
        return FAILURE
    return PARTLY if len(kinds) > 1 else kinds.pop()


def compared(result: Mapping[str, Any]) -> Any:
    """What must stay as it is recorded: outcomes with FastDEAN's own reasons, and what is left."""
    return outcome(result), result.get("cases"), result.get("left")


def remarks(result: Mapping[str, Any]) -> list[str]:
    """Why the outcome is not "exact", case by case, cases with one reason together."""
    said = [result[key] for key in (NOT_BUILT, "failed") if key in result]
    reasons: dict[str, list[str]] = {}
    for case, text in result.get("cases", {}).items():
        if text != EXACT:
            reasons.setdefault(text, []).append(case)
    everywhere = len(reasons) == 1 and outcome(result) != PARTLY
    for text, cases in reasons.items():
        said.append(text if everywhere else f"{', '.join(cases)}: {text}")
    return said


def read() -> dict[str, Any]:
    """transformers: its version; classes: name -> result."""
    return json.loads(RECORD.read_text(encoding="utf-8"))


def add(name: str, result: Mapping[str, Any], version: str) -> None:
    """Put a result in, in the order of names; what others have put in meanwhile stays."""
    classes = {**read()["classes"], name: dict(result)}
    found = {"transformers": version, "classes": dict(sorted(classes.items()))}
    write_text_atomic(RECORD, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
