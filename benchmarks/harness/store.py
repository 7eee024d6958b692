"""Records on disk: one JSON line per measurement in results/<device>/<op>.jsonl; append-only."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
# What two measurements share of which one says what the other would.
SAME_CODE = ("device", "sources", "torch", "triton", "transformers")
PASSED, SKIPPED = "passed", "skipped"


def say(line: str) -> None:
    """Progress goes to stderr; stdout holds results."""
    print(line, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Record:
    """What was measured of one contender in one case.

    `record["tokens"]` finds a name in whatever part it stands; no two parts share one.

    Attributes:
        op: name of the results file.
        setup: the case in numbers and names, which tell it from all others.
        seconds: "median_s", "p20_s" and "p80_s" of one call; where turns are compared, "rounds_s",
            in order. Empty where nothing was timed.
        metrics: every other value, by a name that carries its unit; None: could not be measured.
        problem: why it was to be measured and was not, and whether that is a mistake.
        toy: sizes at which nothing can be learned.
        gate: PASSED or SKIPPED: the tests that run before a measurement.
        environment: where, when and with what: see `environment.collect`.
    """

    op: str
    case: str
    contender: str
    setup: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    problem: dict[str, Any] | None = None
    toy: bool = False
    gate: str = SKIPPED
    environment: dict[str, Any] = field(default_factory=dict)

    @property
    def spread(self) -> tuple[float, float, float]:
        """Seconds of one call: the median, 20th and 80th percentile."""
        return self["median_s"], self["p20_s"], self["p80_s"]

    def __getitem__(self, name: str) -> Any:
        for part in (self.setup, self.seconds, self.metrics, self.environment, vars(self)):
            if name in part:
                return part[name]
        raise KeyError(name)


def append(results: Path, record: Record) -> None:
    """Add one line."""
    # "NVIDIA H200" -> "nvidia-h200"
    folder = re.sub(r"[^a-z0-9]+", "-", record["device"].lower()).strip("-")
    path = results / folder / f"{record.op}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        # After a line that was cut off with the run that wrote it a new one starts.
        file.seek(max(0, file.tell() - 1))
        start = b"" if file.read(1) in (b"", b"\n") else b"\n"
        file.write(start + json.dumps(asdict(record), allow_nan=False).encode() + b"\n")


def read(results: Path, op: str) -> Iterator[Record]:
    """All records of an op, device after device, oldest first; names a line that was cut off."""
    for path in sorted(results.glob(f"*/{op}.jsonl")):
        for number, line in enumerate(path.read_bytes().splitlines(), 1):
            try:
                yield Record(**json.loads(line))
            except (ValueError, TypeError):
                say(f"warning: {path}, line {number}, is no record (cut off?) and is left out")


def stands_for(record: Record, here: Mapping[str, Any], gate: str) -> bool:
    """Whether a record says what the same measurement made now would say.

    Args:
        here: the environment of that measurement.
        gate: what would be recorded now; tests that passed are as good as tests left out, and not
            the other way round.
    """
    # A GPU does not get faster by threads of the host.
    same = SAME_CODE if here["cuda"] else (*SAME_CODE, "threads")
    return is_of(record, here, same) and record.gate in (PASSED, gate)


def is_of(record: Record, here: Mapping[str, Any], names: Sequence[str] = SAME_CODE) -> bool:
    """Whether a record was made in an environment like this one."""
    return all(record.environment.get(name) == here.get(name) for name in names)


def latest(records: Iterable[Record], keys: Sequence[str]) -> list[Record]:
    """Of the records alike in `keys`, those of the last run, in the order of the file."""
    records = list(records)
    last = {}
    for group in grouped(records, keys):
        date = max(record["date"] for record in group)
        last |= {id(record): record for record in group if record["date"] == date}
    return [record for record in records if id(record) in last]


def grouped(records: Iterable[Record], keys: Sequence[str]) -> list[list[Record]]:
    """The records in groups alike in `keys`, in the order in which the groups first occur."""
    groups: dict[tuple, list[Record]] = {}
    for record in records:
        groups.setdefault(tuple(record[key] for key in keys), []).append(record)
    return list(groups.values())


def shown(results: Path, op: str, command: str) -> list[Record]:
    """What tables and pictures are made of: all measurements but those of toys."""
    rows = list(read(results, op))
    chosen = [row for row in rows if not row.toy and row.problem is None]
    if chosen:
        return chosen
    found = "only records of toy runs" if rows else f"no record in {op}.jsonl of any device"
    raise ValueError(f"{results} must hold measurements of {op}, got {found}; run `{command}`")
