"""Results on disk: one JSON line per measurement in results/<device>/<op>.jsonl; append-only."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shlex
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from cases import Case, Implementation
from measure import Floor, Sample
from progress import say
from timing import Spread

import fastdean
from fastdean import provenance
from fastdean.ops._dispatch import choose

Record = Mapping[str, Any]

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
# What stands for the device's name where the runs of a GPU are tried out without one.
REHEARSAL = "cpu, rehearsal"

# Fields of `Environment` that two measurements share of which one says what the other would.
SAME_CODE = ("device", "sources", "torch", "triton", "transformers")


@dataclass(frozen=True)
class Environment:
    """Where, when and with what something was measured.

    Attributes:
        accumulation: which implementation fastdean's accumulation took.
        driver, cuda: None on a CPU.
        triton: None where it is not installed.
        commit, dirty: None outside a git checkout; results themselves do not make it dirty.
        sources: checksum of the package and the benchmarks, which tells runs of the same code
            from others also where there is no git.
        date: UTC, start of the run; shared by all records of a run.
        command: without absolute paths.
    """

    device: str
    driver: str | None
    cuda: str | None
    threads: int
    cpu_capability: str
    accumulation: str
    torch: str
    triton: str | None
    transformers: str
    fastdean: str
    commit: str | None
    dirty: bool | None
    sources: str
    date: str
    command: str

    @classmethod
    def collect(cls, device: torch.device, argv: Sequence[str]) -> Environment:
        on_gpu = device.type == "cuda"
        return cls(
            device=torch.cuda.get_device_name(device) if on_gpu else cpu_model(),
            driver=_driver() if on_gpu else None,
            cuda=torch.version.cuda if on_gpu else None,
            threads=torch.get_num_threads(),
            cpu_capability=torch.backends.cpu.get_cpu_capability(),
            accumulation=choose("accumulate_importance_", device).name,
            torch=torch.__version__,
            triton=_version("triton"),
            transformers=metadata.version("transformers"),
            fastdean=fastdean.__version__,
            commit=_git("rev-parse", "HEAD"),
            dirty=_dirty(),
            sources=sources_checksum(),
            date=provenance.now(),
            command=command_line(argv),
        )


@dataclass(frozen=True)
class ScoreRecord:
    """One implementation on one case.

    Attributes:
        case: model and targets; with examples and dtype it tells measurements of one kind apart.
        extrapolated: "2 of 30 layers" when the seconds stand for more than was run, else None.
            Peak memory is never extrapolated: it is that of the layers run.
        peak_bytes: memory above the loaded model; None where the system does not tell.
        sums_bytes: 4 for every scored weight: what the result itself takes.
        operations, bytes: the work the floor is made of.
        matrix_rate: operations per second of this dtype at the model's shapes, measured in the run.
        copy_bandwidth: bytes per second, measured in the run.
        share_of_floor: floor_s / median_s; 1 is the best there can be.
        breakdown: group of operations -> share of the run's time, when profiled; else None.
        gate: "passed" or "skipped": the tests that run before a measurement.
    """

    op: str
    case: str
    impl: str
    dtype: str
    model: str
    examples: int
    tokens: int
    target_tokens: int
    repeats: int
    extrapolated: str | None
    median_s: float
    p20_s: float
    p80_s: float
    tokens_per_s: float
    peak_bytes: int | None
    sums_bytes: int
    operations: int
    bytes: int
    matrix_rate: float
    copy_bandwidth: float
    floor_s: float
    share_of_floor: float
    breakdown: dict[str, float] | None
    gate: str

    @classmethod
    def of(
        cls,
        case: Case,
        implementation: Implementation,
        samples: Sequence[Sample],
        floor: Floor,
        **run: Any,
    ) -> ScoreRecord:
        """`run` holds what the other arguments do not say."""
        seconds = Spread.of([sample.seconds for sample in samples])
        peaks = [sample.peak_bytes for sample in samples]
        return cls(
            op=case.op,
            case=case.name,
            impl=implementation.name,
            tokens=case.work.tokens,
            target_tokens=case.work.target_tokens,
            repeats=len(samples),
            extrapolated=implementation.extrapolated,
            median_s=seconds.median,
            p20_s=seconds.p20,
            p80_s=seconds.p80,
            tokens_per_s=case.work.tokens / seconds.median,
            peak_bytes=None if None in peaks else max(peaks),
            sums_bytes=4 * case.work.target_parameters,
            operations=floor.operations,
            bytes=floor.bytes,
            matrix_rate=floor.matrix_rate,
            copy_bandwidth=floor.copy_bandwidth,
            floor_s=floor.seconds,
            share_of_floor=floor.seconds / seconds.median,
            **run,
        )


@dataclass(frozen=True)
class LeftOutRecord:
    """An implementation that was to be measured and could not, in left_out.jsonl.

    Attributes:
        reason: for people.
        failed: whether it is a mistake; not having the memory is not one.
        gate: "passed" or "skipped": the tests that run before a measurement.
    """

    op: str
    case: str
    impl: str
    dtype: str
    reason: str
    failed: bool
    gate: str


@dataclass(frozen=True)
class AgreementRecord:
    """How alike two selections are.

    Attributes:
        reference, impl: what is compared, such as "loop fp32" and "fastdean bf16".
        ratio: share of a matrix's entries that is selected; None when `k` was given instead.
        k: smallest and largest number selected in a matrix.
        kept: share of the reference's set that the other selects too, mean over matrices.
        kept_least: the same in the worst matrix.
        equal: number of matrices whose two sets are equal.
    """

    op: str
    case: str
    reference: str
    impl: str
    model: str
    examples: int
    tokens: int
    ratio: float | None
    k: tuple[int, int]
    matrices: int
    equal: int
    kept: float
    kept_least: float
    gate: str


@dataclass(frozen=True)
class PatchRecord:
    """One way to a copy of a checkpoint, with the mask in it or without.

    Attributes:
        impl: "cp", "cp and fsync" or "fastdean".
        how: what was run, for the table.
        checkpoint_bytes: of all values in it.
        masked: number of values that the mask changes.
        file_system: type of the one that both copies lie on; None where the system does not tell.
        seconds: of every round, in order: those of one round belong together.
        process_peak_bytes: the most that the process ever held, interpreter and torch included;
            None where it is not measured, as for `cp`.
        peak_bytes: the most above what the process held just before the call.
        toy: sizes at which nothing can be learned about speed.
        gate: "passed" or "skipped": the tests that run before a measurement.
    """

    op: str
    case: str
    impl: str
    how: str
    dtype: str
    checkpoint_bytes: int
    shards: int
    matrices: int
    masked: int
    file_system: str | None
    repeats: int
    seconds: tuple[float, ...]
    median_s: float
    p20_s: float
    p80_s: float
    process_peak_bytes: int | None
    peak_bytes: int | None
    toy: bool
    gate: str


@dataclass(frozen=True)
class RegularizerRecord:
    """Training steps with or without the collapse regulariser, or a measurement of collapse.

    Attributes:
        architecture: "causal" or "masked".
        measured: "training step" or "collapse_metrics"; what took turns has the same.
        impl: "without" and the regularisers' names; "forward passes" and "collapse_metrics".
        tokens: of a step, or of the measured text.
        labelled: how many of them are of a class.
        seconds: of every round, in order: those of one round belong together.
        ratio_median, ratio_p20, ratio_p80: of the seconds over those of the floor, round by round.
        floor_s: median of what the others add to: the step without, or the forward passes alone.
        toy: sizes at which nothing can be learned about speed.
        gate: "passed" or "skipped": the tests that run before a measurement.
    """

    op: str
    case: str
    architecture: str
    measured: str
    impl: str
    model: str
    tokens: int
    labelled: int
    classes: int
    features: int
    repeats: int
    seconds: tuple[float, ...]
    median_s: float
    p20_s: float
    p80_s: float
    ratio_median: float
    ratio_p20: float
    ratio_p80: float
    floor_s: float
    toy: bool
    gate: str


@dataclass(frozen=True)
class DebiasRecord:
    """What one training had made of the model after some of its steps.

    Attributes:
        case: model, method and course; with `settings` it tells experiments apart.
        arm: "base" (the model before any training), "none", "words", "random" or "frequency".
        seed: of the training, and of the control classes; None for "base".
        strength: of the regulariser; 0 for "base" and "none".
        step: of `steps` of the optimizer.
        settings: all that was asked for and decides the figures.
        figures: name -> value on text and sentences that were not trained on; None where it could
            not be measured, or is infinite.
        units, neutral: name -> unit; and what an unbiased model has, None where there is no such.
        step_s: median seconds of an optimizer step, evaluation left out; None for "base".
        classes: of the regulariser; 0 where there is none.
        labelled: how many tokens of the training text, swapped copies included, are of them.
        toy: sizes at which nothing can be learned.
        gate: "passed" or "skipped": the tests that run before a measurement.
    """

    op: str
    case: str
    arm: str
    seed: int | None
    strength: float
    step: int
    steps: int
    model: str
    method: str
    settings: dict[str, Any]
    figures: dict[str, float | None]
    units: dict[str, str]
    neutral: dict[str, float | None]
    step_s: float | None
    classes: int
    labelled: int
    trained_rows: int
    held_out_rows: int
    held_out_tokens: int
    toy: bool
    gate: str


def require_this_checkout() -> None:
    """What is recorded are the commit and the sources of this checkout: nothing else is measured.

    Raises:
        RuntimeError: `fastdean` was imported from elsewhere.
    """
    found = Path(fastdean.__file__).resolve().parent
    if found != ROOT / "fastdean":
        raise RuntimeError(
            f"fastdean must be the package of this checkout, {ROOT / 'fastdean'}, got {found}; "
            "set PYTHONPATH to the checkout, or install it from there with `pip install -e .`"
        )


def append(results: Path, op: str, environment: Environment, record: Any) -> Path:
    """Add one line; returns the file."""
    path = results / slug(environment.device) / f"{op}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        _end_last_line(path)
    line = json.dumps({**vars(record), **vars(environment)}, allow_nan=False)
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    return path


def read(results: Path, op: str) -> Iterator[dict[str, Any]]:
    """All records of an op, device after device, oldest first.

    A last line that does not parse was cut off with the run that wrote it: it is named and ignored.

    Raises:
        ValueError: another line is no record; names file and line.
    """
    for path in sorted(results.glob(f"*/{op}.jsonl")):
        lines = path.read_bytes().splitlines()
        for number, line in enumerate(lines, 1):
            record = _parsed(line)
            if record is not None:
                yield record
            elif number == len(lines):
                say(f"warning: {path}, line {number}, was cut off and is ignored")
            else:
                raise ValueError(
                    f"{path}, line {number}, must be a JSON object, got {line[:40]!r}; "
                    "only a last line can have been cut off: repair this one or delete it"
                )


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _end_last_line(path: Path) -> None:
    """Let what is appended start a line: end the last one, or drop it where it was cut off.

    Left where it is, what was cut off would stand in the middle of the file, where it is an error.
    """
    lines = path.read_bytes().splitlines(keepends=True)
    if not lines:
        return
    if _parsed(lines[-1]) is None:
        say(f"warning: {path}, line {len(lines)}, was cut off and is dropped")
        os.truncate(path, sum(map(len, lines[:-1])))
    elif not lines[-1].endswith(b"\n"):
        with path.open("ab") as file:
            file.write(b"\n")


def stands_for(record: Record, environment: Environment, gate: str) -> bool:
    """Whether a record says what the same measurement made now would say.

    Args:
        gate: what would be recorded now; tests that passed are as good as tests left out, and not
            the other way round.
    """
    here = vars(environment)
    # A GPU does not get faster by threads of the host.
    same = SAME_CODE if environment.cuda else (*SAME_CODE, "threads")
    return all(record.get(key) == here[key] for key in same) and record.get("gate") in (
        "passed",
        gate,
    )


def latest(records: Iterable[Record], keys: Sequence[str]) -> list[Record]:
    """Of the records alike in `keys`, those of the last run, in the order of the file."""
    records = list(records)
    last: dict[tuple, str] = {}
    for record in records:
        key = tuple(record[k] for k in keys)
        last[key] = max(last.get(key, ""), record["date"])
    return [r for r in records if r["date"] == last[tuple(r[k] for k in keys)]]


def grouped(records: Iterable[Record], keys: Sequence[str]) -> list[list[Record]]:
    """The records in groups alike in `keys`, in the order in which the groups first occur."""
    groups: dict[tuple, list[Record]] = {}
    for record in records:
        groups.setdefault(tuple(record[key] for key in keys), []).append(record)
    return list(groups.values())


def provenance_line(record: Record) -> str:
    """Where, when and with what a record was made, in one line."""
    on = f"{record['device']}, {record['threads']} threads, {record['cpu_capability']}"
    if record["driver"]:
        on = f"{record['device']}, driver {record['driver']}, CUDA {record['cuda']}"
    triton = f", triton {record['triton']}" if record.get("triton") and record["driver"] else ""
    # Outside a git checkout the checksum of the sources is what a checkout can be compared with.
    known = record["commit"] or f"sources {record.get('sources', 'unknown')}"
    commit = known if record["commit"] is None else known[:10]
    changed = " with changes" if record["dirty"] else ""
    gate = "" if record["gate"] == "passed" else ", tests not run first"
    return (
        f"{on}; torch {record['torch']}{triton}, transformers {record['transformers']}, "
        f"fastdean {record['fastdean']} at {commit}{changed}, {record['date'][:10]}{gate}: "
        f"`{record['command']}`"
    )


def slug(device: str) -> str:
    """ "NVIDIA H200" -> "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()


def command_line(argv: Sequence[str]) -> str:
    """The command as one would type it in a checkout; of absolute paths only the last part."""
    parts = []
    for part in argv:
        # --option=/a/path, and the NAME=/a/path of an option that names what the file is of.
        option, equals, value = part.partition("=")
        if not equals or "/" in option:
            option, equals, value = "", "", part
        if os.path.isabs(value):
            path = Path(value)
            inside = path.is_relative_to(ROOT)
            value = path.relative_to(ROOT).as_posix() if inside else path.name
        parts.append(shlex.quote(f"{option}{equals}{value}"))
    return " ".join(["python", *parts])


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _dirty() -> bool | None:
    changed = _git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    return None if changed is None else bool(changed)


def sources_checksum() -> str:
    """Of every file that a measurement runs."""
    digest = hashlib.sha256()
    for pattern in ("fastdean/**/*.py", "csrc/*", "benchmarks/**/*.py"):
        for path in sorted(ROOT.glob(pattern)):
            digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.splitlines()[0].strip()
