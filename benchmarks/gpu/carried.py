"""What goes to the output folder: a few flat files, each whole at any moment.

    python3 -m benchmarks.gpu.carried OUT RESULTS    # append OUT's records to RESULTS

The work itself lies elsewhere (folders, logs, a build); what comes back from a borrowed machine is
    summary.md           what passed, what failed, what was measured: to be read
    state.json           the same for the next call, which goes on from it
    records.jsonl        all measurements, each with the results file it belongs to
    log.txt              what every part printed
    checked_forms.json   the forms that passed all their checks
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

from benchmarks.gpu.outcomes import Outcome
from benchmarks.harness import gate, store
from benchmarks.harness.store import Record

SUMMARY, STATE, RECORDS, LOG = "summary.md", "state.json", "records.jsonl", "log.txt"
FORMS = "checked_forms.json"
FILES = (SUMMARY, STATE, RECORDS, LOG, FORMS)
_RESULTS_FILE = "results_file"
_HEAD, _TAIL = 64 << 10, 192 << 10


def put(path: Path, text: str) -> None:
    """The whole file or the one before, whenever the writer is killed."""
    arriving = path.with_name(f".{path.name}")
    arriving.write_text(text, "utf-8")
    os.replace(arriving, path)


def load(state: Path) -> dict[str, Outcome]:
    """Outcomes by part; none where there is no state, or one that cannot be read."""
    try:
        found = json.loads(state.read_text("utf-8"))
        return {name: Outcome(**fields) for name, fields in found.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def save(state: Path, outcomes: dict[str, Outcome]) -> None:
    put(state, json.dumps({name: asdict(each) for name, each in outcomes.items()}, indent=1))


def adopt(out: Path, work: Path) -> None:
    """Where this machine knows nothing, go on from what an earlier call left in `out`."""
    if (work / STATE).exists() or not (out / STATE).is_file():
        return
    put(work / STATE, (out / STATE).read_text("utf-8"))
    if (out / RECORDS).is_file():
        unpack(out / RECORDS, work / "results")


def rows_of(results: Path) -> Iterator[tuple[str, Record]]:
    """(device/file, record) of every whole line; the gates are not measurements."""
    for path in sorted(results.glob("*/*.jsonl")):
        if path.stem == gate.OP:
            continue
        for line in path.read_text("utf-8", "replace").splitlines():
            row = store.parsed(line)
            if row is not None:  # else cut off
                yield f"{path.parent.name}/{path.name}", row


def packed(results: Path) -> str:
    return "".join(
        json.dumps({_RESULTS_FILE: name, **asdict(row)}) + "\n" for name, row in rows_of(results)
    )


def _unpacked(records: Path) -> list[tuple[str, Record]]:
    found = []
    for line in records.read_text("utf-8", "replace").splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError):  # cut off
            fields = json.loads(line)
            found.append((fields.pop(_RESULTS_FILE), Record(**fields)))
    return found


def unpack(records: Path, results: Path) -> int:
    """Append every record to the file it belongs to; returns how many."""
    rows = _unpacked(records)
    for name, row in rows:
        path = results / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(row)) + "\n")
    return len(rows)


def joined_logs(work: Path, names: Iterable[str]) -> str:
    """What every part printed; of a long output the beginning and the end."""
    sections = []
    for name in names:
        log = work / f"{name}.log"
        if log.is_file():
            said = log.read_bytes()
            if len(said) > _HEAD + _TAIL:
                said = said[:_HEAD] + b"\n[...]\n" + said[-_TAIL:]
            sections.append(f"===== {name} =====\n{said.decode('utf-8', 'replace')}\n")
    return "".join(sections)


def main(out: Path, results: Path) -> int:
    records = out / RECORDS
    if any(row.toy or "rehearsal" in row["device"] for _, row in _unpacked(records)):
        print(f"error: {records} must come from a GPU, got a rehearsal's", file=sys.stderr)
        return 2
    print(f"{unpack(records, results)} records appended to {results}")
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python3 -m benchmarks.gpu.carried OUT RESULTS")
    sys.exit(main(*map(Path, sys.argv[1:])))
