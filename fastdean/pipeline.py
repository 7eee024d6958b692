"""The main job: score three data sets, couple, mask, measure before and after, report.

What it writes, and how it is resumed, is in `run_folder`; the figures are in `measuring`.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from decimal import ROUND_UP, Context, Decimal
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastdean._logging import logger
from fastdean.coupling import DEFAULT_RATIO, couple, overlap
from fastdean.data import TEMPLATES, Example, encode
from fastdean.distributed import Ranks
from fastdean.entries import checked_scale
from fastdean.findings import findings
from fastdean.forward import label_shift
from fastdean.loading import load_model
from fastdean.masks import NeuronMask
from fastdean.measuring import TOPICS, MeasuringSet, measure
from fastdean.provenance import now, versions
from fastdean.report import write_report
from fastdean.run_folder import REPORT_FILE, RESULTS_FILE, RunFolder
from fastdean.scores import Scores
from fastdean.scoring import score
from fastdean.sources import load_rows, sample_rows
from fastdean.storage import write_json_atomic
from fastdean.targets import find_targets

DATA_SETS = (*TOPICS, "general")
RULES = ("paper", "released", "first", "second", "union", "random")
SCOPES = ("matrix", "model")
CONTROLS = ("random", "released")

# Ratios at which the overlap of the sets is shown; scores keep as much as the largest needs.
_CURVE = {
    "weight": (1e-6, 2e-6, 5e-6, 1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3),
    "neuron": (1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1),
}

NumberedRow = tuple[int, dict[str, Any]]


@dataclass(frozen=True)
class Job:
    """What is asked for; two runs with equal jobs give equal results.

    Attributes:
        model, fairness, privacy, general: see `loading.load_model` and `sources.load_rows`.
        ratio: share of a matrix's entries in each top set; None: 5e-7 for weights, 1e-3 for units.
        rule, scope, min_k: see `coupling.couple`.
        scale: what the weights of the masks are multiplied by.
        examples: rows of each source that are scored; None: all.
        eval_examples: rows, of other prompts than these where there are any, that are measured on.
        seed: of the shuffles, the random control, permutations and bootstraps.
    Raises:
        ValueError, TypeError: an option out of range; found here rather than after hours of work.
    """

    model: str
    fairness: str
    privacy: str
    general: str
    ratio: float | None = None
    rule: str = "paper"
    granularity: str = "weight"
    target_modules: str = "mlp"
    scope: str = "matrix"
    min_k: int = 0
    scale: float = 0.0
    examples: int | None = 128
    eval_examples: int = 64
    template: str = "raw"
    max_length: int | None = None
    tokens_per_batch: int | None = None
    memory_budget: int | None = None
    deterministic: bool = False
    dtype: str = "auto"
    device: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in (
            ("rule", RULES),
            ("granularity", tuple(DEFAULT_RATIO)),
            ("scope", SCOPES),
            ("template", TEMPLATES),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}"
                )
        if not 0 < self.effective_ratio <= 1:
            raise ValueError(f"ratio must be above 0 and at most 1, got {self.ratio}")
        for name, least in (("min_k", 0), ("eval_examples", 0), ("examples", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if self.min_k and self.scope == "model":
            raise ValueError(
                f"min_k must be 0 with scope='model', where no matrix has a share of its own, got "
                f"{self.min_k}"
            )
        checked_scale(self.scale)

    @property
    def effective_ratio(self) -> float:
        return DEFAULT_RATIO[self.granularity] if self.ratio is None else self.ratio

    @property
    def curve(self) -> list[float]:
        """The ratios at which the overlap is shown, the job's own among them."""
        return sorted({*_CURVE[self.granularity], self.effective_ratio})


@dataclass
class _Rows:
    """One source, split into what is scored and what is measured on."""

    scored: list[NumberedRow]
    measured: list[NumberedRow]
    held_out: bool

    @property
    def digest(self) -> str:
        content = json.dumps([self.scored, self.measured], sort_keys=True, default=str)
        return hashlib.sha256(content.encode()).hexdigest()


@dataclass
class _Costs:
    """Seconds, tokens and the process's memory peak of each step."""

    steps: list[dict[str, Any]] = field(default_factory=list)

    @contextmanager
    def step(self, name: str, tokens: int | None = None) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.add(name, tokens, time.perf_counter() - start, _peak_bytes())

    def add(
        self, name: str, tokens: int | None, seconds: float | None, peak_bytes: int | None
    ) -> None:
        self.steps.append(
            {"step": name, "seconds": seconds, "tokens": tokens, "peak_bytes": peak_bytes}
        )


@dataclass
class _Prepared:
    """Everything that can be refused before the first long step."""

    model: nn.Module
    rows: dict[str, _Rows]
    scored: dict[str, list[Example]]
    measured: MeasuringSet
    keep_top: float | None


def run(
    job: Job, out: str | Path, *, command: str = "", overwrite: bool = False, progress: bool = True
) -> dict[str, Any]:
    """Do the main job and return its results (the content of results.json).

    Under `torch.distributed` the ranks share the scoring; the first one does the rest, writes, and
    returns the results, the others return an empty dictionary.

    Args:
        job: what to do.
        out: the run folder: new, empty, or of the same unfinished job, which is then resumed.
        command: the command line, for the record.
        overwrite: replace a folder that holds another or a finished run, and nothing else.
        progress: show progress bars.
    Raises:
        ValueError: bad input; whatever `score` and `couple` raise.
        OSError: the disk refused; what was finished before stays and is used again.
    """
    ranks = Ranks.current()
    folder = RunFolder(Path(out).expanduser(), _plain(asdict(job)), overwrite)
    costs = _Costs()
    with ranks.failing_together():
        prepared = _prepare(job, folder, ranks, costs, progress)
    try:
        scores = {
            name: _score(name, prepared, job, folder, ranks, costs, progress) for name in DATA_SETS
        }
        if not ranks.first:
            return {}
        masks, warnings = _couple(scores, prepared.model, job, folder)
        tables, notes = measure(
            prepared.model,
            masks,
            job.rule,
            prepared.measured,
            seed=job.seed,
            timed=costs.step,
            tokens_per_batch=job.tokens_per_batch,
            progress=progress,
        )
        warnings += [*_warnings(job, prepared, masks[job.rule], scores["fairness"]), *notes]
        results = _results(job, command, scores, masks[job.rule], tables, warnings, costs)
        write_json_atomic(folder.path / RESULTS_FILE, results)
        write_report(results, folder.path / REPORT_FILE)
        folder.finish()
        return results
    except BaseException:
        if ranks.first:
            folder.release_if_empty()
        raise


def take_rows(
    source: str, count: int | None, seed: int
) -> tuple[list[NumberedRow], list[NumberedRow]]:
    """(`count` rows of a source in shuffled order, the others), each with its number from 1.

    With fewer rows than `count` all are taken, and a warning says so.
    """
    numbered = list(enumerate(load_rows(source), start=1))
    if count is not None and count > len(numbered):
        logger.warning(
            "%s has %d rows, fewer than the %d asked for: all are taken",
            source,
            len(numbered),
            count,
        )
        count = len(numbered)
    return sample_rows(numbered, count, seed)


def encode_rows(
    rows: Sequence[NumberedRow],
    source: str,
    tokenizer: Any,
    model: nn.Module,
    *,
    template: str = "raw",
    max_length: int | None = None,
) -> list[Example]:
    """Tokenise numbered rows; what the model could not take is refused by source and number.

    Raises:
        ValueError: a row without a target the model predicts, or longer than its positions.
    """
    try:
        return [
            _fitting(
                encode([row], tokenizer, template=template, max_length=max_length, first=n),
                n,
                model,
            )
            for n, row in rows
        ]
    except ValueError as error:
        raise ValueError(f"source {source!r}: {error}") from None


def _fitting(encoded: Sequence[Example], number: int, model: nn.Module) -> Example:
    (example,) = encoded
    if example.num_targets(label_shift(model)) == 0:
        raise ValueError(
            f"row {number} must have at least one target token after its first token, got none; "
            "leave the row out"
        )
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and len(example) > longest:
        raise ValueError(
            f"row {number} must have at most {longest} tokens (max_position_embeddings), got "
            f"{len(example)}; cut it with max_length"
        )
    return example


def _prepare(job: Job, folder: RunFolder, ranks: Ranks, costs: _Costs, progress: bool) -> _Prepared:
    # Other ranks may run on machines that do not see the folder.
    if ranks.first:
        folder.check()
    rows = {name: _split(name, job) for name in DATA_SETS}
    folder.rows = {name: split.digest for name, split in rows.items()}
    if ranks.first:
        folder.check()
    with costs.step("load model"):
        model, tokenizer = load_model(
            job.model, dtype=job.dtype, device=job.device, progress=progress and ranks.first
        )
    sizes = _sizes(model, job)
    _require_selection(sizes, job)
    options = {"template": job.template, "max_length": job.max_length}

    def encoded(name: str, numbered: Sequence[NumberedRow]) -> list[Example]:
        return encode_rows(numbered, getattr(job, name), tokenizer, model, **options)

    def pairs(topic: str) -> list[tuple[Example, Example]]:
        safe = rows[topic].measured
        unsafe = [(n, {"prompt": r["prompt"], "response": r["unsafe"]}) for n, r in safe]
        return list(zip(encoded(topic, safe), encoded(topic, unsafe), strict=True))

    return _Prepared(
        model=model,
        rows=rows,
        scored={name: encoded(name, rows[name].scored) for name in DATA_SETS},
        measured=MeasuringSet(
            {topic: pairs(topic) for topic in TOPICS}, encoded("general", rows["general"].measured)
        ),
        keep_top=_keep_top(sizes, job),
    )


def _split(name: str, job: Job) -> _Rows:
    """The scored rows, and others to measure on: of other prompts, with what the figures need."""
    scored, others = take_rows(getattr(job, name), job.examples, job.seed)
    seen = {str(row["prompt"]) for _, row in scored if "prompt" in row}
    fresh = [(n, row) for n, row in others if str(row.get("prompt")) not in seen]

    def usable(candidates: Sequence[NumberedRow]) -> list[NumberedRow]:
        found = [(n, row) for n, row in candidates if _is_measurable(row, name)]
        return found[: job.eval_examples]

    held_out = usable(fresh)
    return _Rows(scored, held_out or usable(scored), bool(held_out))


def _is_measurable(row: Mapping[str, Any], name: str) -> bool:
    """Margins need both answers to a prompt; perplexity takes any row."""
    return name == "general" or all(row.get(key) for key in ("prompt", "response", "unsafe"))


def _sizes(model: nn.Module, job: Job) -> list[int]:
    """How many entries compete in each matrix."""
    targets = find_targets(model, job.target_modules, job.granularity)
    if job.granularity == "neuron":
        return [target.num_inputs for target in targets]
    return [target.module.weight.numel() for target in targets]


def _require_selection(sizes: Sequence[int], job: Job) -> None:
    largest = max(sizes) if job.scope == "matrix" else sum(sizes)
    if job.min_k or int(job.effective_ratio * largest):
        return
    smallest = Context(prec=2, rounding=ROUND_UP).divide(Decimal(1), Decimal(largest))
    where = "the largest matrix" if job.scope == "matrix" else "all matrices"
    raise ValueError(
        f"ratio must select at least one entry, got {job.effective_ratio:g}, which selects none of "
        f"the {largest:,} of {where}; the smallest that would is {float(smallest):g}"
        + (", or set min_k to 1" if job.scope == "matrix" else "")
    )


def _keep_top(sizes: Sequence[int], job: Job) -> float | None:
    """The ratio that scores must keep; None keeps all, which a top set of the whole model needs."""
    if job.scope == "model":
        return None
    # Half an entry more, because the count is cut to an integer.
    floor = (job.min_k + 0.5) / min(sizes) if job.min_k else 0.0
    return min(1.0, max(*job.curve, floor))


def _score(
    name: str,
    prepared: _Prepared,
    job: Job,
    folder: RunFolder,
    ranks: Ranks,
    costs: _Costs,
    progress: bool,
) -> Scores | None:
    """Score one data set, or read what an earlier run of this job has finished."""
    examples = prepared.scored[name]
    tokens = sum(len(example) for example in examples)
    if ranks.agree(folder.resumes and folder.scores(name).is_dir()):
        logger.info("%s is scored already, read from %s", name, folder.scores(name))
        costs.add(f"score {name}, by an earlier call", tokens, None, None)
        with ranks.failing_together():
            return Scores.from_pretrained(folder.scores(name)) if ranks.first else None
    with costs.step(f"score {name}", tokens):
        scores = score(
            prepared.model,
            examples,
            granularity=job.granularity,
            target_modules=job.target_modules,
            tokens_per_batch=job.tokens_per_batch,
            keep_top=prepared.keep_top,
            memory_budget=job.memory_budget,
            deterministic=job.deterministic,
            progress=progress,
            description=f"score {name}",
        )
    scores.manifest["data"]["sources"] = [getattr(job, name)]
    # A disk that is full on the first rank must not leave the others waiting for the next sum.
    with ranks.failing_together():
        if ranks.first:
            folder.claim()
            scores.save_pretrained(folder.scores(name))
    return scores


def _couple(
    scores: Mapping[str, Scores], model: nn.Module, job: Job, folder: RunFolder
) -> tuple[dict[str, NeuronMask], list[str]]:
    """The job's mask and its controls, saved; and what is to be said about them."""
    warnings: list[str] = []
    masks = {job.rule: _mask(scores, model, job, job.rule)}
    for rule in CONTROLS:
        if rule in masks:
            continue
        try:
            masks[rule] = _mask(scores, model, job, rule)
        except ValueError as error:
            warnings.append(f"The control {rule!r} is left out: {error}.")
    for rule, mask in masks.items():
        where = folder.mask if rule == job.rule else folder.control(rule)
        mask.save_pretrained(where, overwrite=True)
    return masks, warnings


def _mask(scores: Mapping[str, Scores], model: nn.Module, job: Job, rule: str) -> NeuronMask:
    fairness, privacy, general = (scores[name] for name in DATA_SETS)
    return couple(
        fairness,
        privacy,
        general=general,
        ratio=job.effective_ratio,
        rule=rule,
        min_k=job.min_k,
        scope=job.scope,
        seed=job.seed,
        model=model,
    ).with_scale(job.scale)


def _results(
    job: Job,
    command: str,
    scores: Mapping[str, Scores],
    mask: NeuronMask,
    tables: Mapping[str, Any],
    warnings: list[str],
    costs: _Costs,
) -> dict[str, Any]:
    fairness, privacy, general = (scores[name] for name in DATA_SETS)
    coverage = fairness.manifest["coverage"]
    results = {
        "title": "FastDEAN: coupled fairness and privacy weights",
        "created": now(),
        "command": command,
        "versions": versions(),
        "model": {**fairness.manifest["model"], "name": job.model},
        "data": {
            name: {"source": getattr(job, name), **scores[name].manifest["data"]}
            for name in DATA_SETS
        },
        "options": asdict(job) | {"ratio": job.effective_ratio},
        "coverage": {key: value for key, value in coverage.items() if key != "unscorable"},
        "coupling": {"rows": mask.table, "total": _total(mask.table)},
        **tables,
        "warnings": warnings,
        "cost": costs.steps,
        "files": {
            "mask": "mask",
            "control masks": "controls",
            "scores": "scores",
            "figures": RESULTS_FILE,
        },
        "manifest": {"job": asdict(job), "mask": mask.manifest},
    }
    if job.scope == "matrix":
        results["overlap"] = overlap(fairness, privacy, general=general, ratios=job.curve)
    return _plain(results | {"findings": findings(results)})


def _total(table: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    keys = ("numel", "k", "first", "second", "coupled", "removed", "kept")
    return {key: sum(row[key] for row in table) for key in keys}


def _warnings(job: Job, prepared: _Prepared, mask: NeuronMask, scores: Scores) -> list[str]:
    return [
        *_about_scores(job, prepared, mask, scores),
        *_about_rows(job, prepared.rows),
        *([f"The weights are multiplied by {job.scale:g}, not set to zero."] if job.scale else []),
    ]


def _about_scores(job: Job, prepared: _Prepared, mask: NeuronMask, scores: Scores) -> Iterator[str]:
    empty = sum(1 for row in mask.table if row["k"] == 0)
    if empty and job.scope == "matrix":
        yield (
            f"The ratio selects nothing from {empty} of {len(mask.table)} matrices: they are too "
            "small for it, or their scores are zero."
        )
    if job.scope == "model":
        yield "The overlap over ratios is left out: it is counted matrix by matrix."
    coverage = scores.manifest["coverage"]
    share = sum(coverage["unscorable"].values()) / coverage["model_parameters"]
    if share > 0.05:
        yield (
            f"{share:.0%} of the parameters lie in layers that hooks cannot score, such as fused "
            "experts."
        )
    if label_shift(prepared.model) == 0:
        yield (
            "The model is a masked language model, scored on responses that it sees: their "
            "importance is that of copying them."
        )


def _about_rows(job: Job, rows: Mapping[str, _Rows]) -> Iterator[str]:
    if not job.eval_examples:
        yield "Nothing was measured: eval_examples is 0."
        return
    for name in DATA_SETS:
        if job.examples is not None and len(rows[name].scored) < job.examples:
            yield (
                f"{name.capitalize()} has {len(rows[name].scored)} rows, fewer than the "
                f"{job.examples} asked for: all were scored."
            )
        if not rows[name].measured:
            yield (
                f"No {name} rows have an unsafe response beside the safe one: not measured on "
                f"{name}."
            )
        elif not rows[name].held_out:
            yield (f"The {name} rows that were measured on are scored ones: no others were left.")


def _plain(value: Any) -> Any:
    """JSON has no NaN and no tuples; what is not a number is null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not isfinite(value):
        return None
    return value


def _peak_bytes() -> int | None:
    """The largest memory of this process so far; on a GPU, of its allocations there."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
