"""The main job: score three data sets, couple, mask, measure before and after, report.

A run folder:

    fastdean_run.json        the job, and whether it is finished
    scores/<data set>/       sparse scores, enough for any ratio up to the curve's last
    mask/                    the mask of the job's rule
    controls/<rule>/         the masks it is measured against
    results.json             every figure of the report
    report.html

Each part is written atomically. The same job started again on the same folder goes on with the scores that
are there; another job is refused.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fastdean._logging import logger
from fastdean.coupling import DEFAULT_RATIO, couple, overlap
from fastdean.data import Example, encode
from fastdean.distributed import Ranks
from fastdean.evaluation import (
    Interval,
    compare_margins,
    compare_perplexity,
    encode_pairs,
    last_token_states,
    layer_dependence,
    paired_bootstrap,
    perplexity,
    prompts_only,
    response_margins,
)
from fastdean.findings import findings
from fastdean.loading import load_model
from fastdean.masks import NeuronMask
from fastdean.provenance import now, versions
from fastdean.report import write_report
from fastdean.scores import Scores
from fastdean.scoring import score
from fastdean.sources import load_rows, sample_rows
from fastdean.storage import write_json_atomic

DATA_SETS = ("fairness", "privacy", "general")
CONTROLS = ("random", "released")
RUN_FILE = "fastdean_run.json"
RESULTS_FILE = "results.json"
REPORT_FILE = "report.html"

# Ratios at which the overlap of the sets is shown; scores keep as much as the largest needs.
_CURVE = {
    "weight": (1e-6, 2e-6, 5e-6, 1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3),
    "neuron": (1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1),
}
_PERMUTATIONS = 200


@dataclass(frozen=True)
class Job:
    """What is asked for; two runs with equal jobs give equal results.

    Attributes:
        model, fairness, privacy, general: see `loading.load_model` and `sources.load_rows`.
        ratio: share of a matrix's entries in each top set; None: 5e-7 for weights, 1e-3 for units.
        examples: rows of each source that are scored; None: all.
        eval_examples: rows, others than these where there are any, that are measured on.
        seed: of the shuffles, the random control, permutations and bootstraps.
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

    @property
    def effective_ratio(self) -> float:
        return DEFAULT_RATIO[self.granularity] if self.ratio is None else self.ratio


@dataclass
class _Rows:
    """One source, split into what is scored and what is measured on."""

    scored: list[dict[str, Any]]
    measured: list[dict[str, Any]]
    held_out: bool


@dataclass
class _Costs:
    """Seconds, tokens and the process's memory peak of each step."""

    steps: list[dict[str, Any]] = field(default_factory=list)

    @contextmanager
    def step(self, name: str, tokens: int | None = None) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.steps.append(
            {
                "step": name,
                "seconds": time.perf_counter() - start,
                "tokens": tokens,
                "peak_bytes": _peak_bytes(),
            }
        )


def run(
    job: Job, out: str | Path, *, command: str = "", overwrite: bool = False, progress: bool = True
) -> dict[str, Any]:
    """Do the main job and return its results (the content of results.json).

    Args:
        job: what to do.
        out: the run folder: new, empty, or of the same unfinished job.
        command: the command line, for the record.
        overwrite: replace a folder that holds another or a finished run.
        progress: show progress bars.
    Raises:
        ValueError: bad input; whatever `score` and `couple` raise.
        OSError: the disk refused; what was finished before stays and is used again.
    """
    out = Path(out).expanduser()
    ranks = Ranks.current()
    _check_out(out, job, overwrite)
    costs = _Costs()
    rows = {name: _split(load_rows(getattr(job, name)), name, job) for name in DATA_SETS}
    with costs.step("load model"):
        model, tokenizer = load_model(job.model, dtype=job.dtype, device=job.device)
    examples = {
        name: encode(rows[name].scored, tokenizer, template=job.template, max_length=job.max_length)
        for name in DATA_SETS
    }
    measured = _encode_measured(rows, tokenizer, job)
    ratios = _curve(job)
    scores = {
        name: _score(
            model, name, examples[name], job, max(ratios), out, overwrite, ranks, costs, progress
        )
        for name in DATA_SETS
    }
    if not ranks.first:
        return {}

    fair, priv, gen = (scores[name] for name in DATA_SETS)
    masks = {
        rule: couple(
            fair,
            priv,
            general=gen,
            ratio=job.effective_ratio,
            rule=rule,
            min_k=job.min_k,
            scope=job.scope,
            seed=job.seed,
            model=model,
        ).with_scale(job.scale)
        for rule in (job.rule, *(rule for rule in CONTROLS if rule != job.rule))
    }
    main = masks[job.rule]
    for rule, mask in masks.items():
        folder = out / "mask" if rule == job.rule else out / "controls" / rule
        mask.save_pretrained(folder, overwrite=True)

    results = {
        "title": "FastDEAN: coupled fairness and privacy weights",
        "created": now(),
        "command": command,
        "versions": versions(),
        "model": {**fair.manifest["model"], "name": job.model},
        "data": {
            name: {"source": getattr(job, name), **scores[name].manifest["data"]}
            for name in DATA_SETS
        },
        "options": asdict(job) | {"ratio": job.effective_ratio},
        "coverage": {k: v for k, v in fair.manifest["coverage"].items() if k != "unscorable"},
        "coupling": {"rows": main.table, "total": _total(main.table)},
        "overlap": overlap(fair, priv, general=gen, ratios=ratios),
        "warnings": _warnings(job, rows, main, fair),
    }
    results |= _measure(model, masks, measured, job, costs, progress)
    results["cost"] = costs.steps
    results["files"] = {
        "mask": "mask",
        "control masks": "controls",
        "scores": "scores",
        "figures": RESULTS_FILE,
    }
    results["manifest"] = {"job": asdict(job), "mask": main.manifest}
    results["findings"] = findings(results)
    results = _plain(results)
    write_json_atomic(out / RESULTS_FILE, results)
    write_report(results, out / REPORT_FILE)
    _mark(out, job, finished=True)
    return results


def _check_out(out: Path, job: Job, overwrite: bool) -> None:
    """Refuse a folder that is in use, before any work is done."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"out must be a new or empty folder, got the file {str(out)!r}")
    if not out.exists() or not any(out.iterdir()):
        return
    state = _read_state(out)
    if state is None:
        raise ValueError(
            f"out must be a new or empty folder, got {str(out)!r}, which holds other files; choose another"
        )
    if overwrite:
        return
    if state["job"] != _plain(asdict(job)):
        raise ValueError(
            f"out must be a new or empty folder, got {str(out)!r}, which holds another run; choose another "
            "folder or pass --overwrite"
        )
    if state["finished"]:
        raise ValueError(
            f"out must be a new or empty folder, got {str(out)!r}, which holds this run, finished; "
            "see its report.html, or pass --overwrite to do it again"
        )


def _claim(out: Path, job: Job, overwrite: bool) -> None:
    """Make the folder this job's own, just before the first file is written."""
    state = _read_state(out)
    if state is not None and state["job"] == _plain(asdict(job)) and not state["finished"]:
        return
    if state is not None and overwrite:
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    _mark(out, job, finished=False)


def _read_state(out: Path) -> dict[str, Any] | None:
    try:
        state = json.loads((out / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return state if isinstance(state, dict) and {"job", "finished"} <= state.keys() else None


def _mark(out: Path, job: Job, finished: bool) -> None:
    write_json_atomic(
        out / RUN_FILE, {"job": asdict(job), "finished": finished, "versions": versions()}
    )


def _split(rows: list[dict[str, Any]], name: str, job: Job) -> _Rows:
    """The scored rows, and as many others to measure on: pairs where `unsafe` is known."""
    count = None if job.examples is None else min(job.examples, len(rows))
    if job.examples is not None and count < job.examples:
        logger.warning("%s has %d rows, fewer than the %d asked for", name, len(rows), job.examples)
    scored, others = sample_rows(rows, count, job.seed)

    def usable(candidates: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        wanted = "unsafe" if name != "general" else "response"
        return [row for row in candidates if row.get(wanted) and row.get("prompt")][
            : job.eval_examples
        ]

    held_out = usable(others)
    return _Rows(scored, held_out or usable(scored), bool(held_out))


def _encode_measured(rows: Mapping[str, _Rows], tokenizer: Any, job: Job) -> dict[str, Any]:
    options = {"template": job.template, "max_length": job.max_length}
    pairs = {
        name: encode_pairs(rows[name].measured, tokenizer, **options)
        for name in ("fairness", "privacy")
    }
    return {**pairs, "general": encode(rows["general"].measured, tokenizer, **options)}


def _curve(job: Job) -> list[float]:
    grid = {*_CURVE[job.granularity], job.effective_ratio}
    return sorted(grid)


def _score(
    model: Any,
    name: str,
    examples: list[Example],
    job: Job,
    keep_top: float,
    out: Path,
    overwrite: bool,
    ranks: Ranks,
    costs: _Costs,
    progress: bool,
) -> Scores | None:
    """Score one data set, or read what an earlier run of this job has finished."""
    folder = out / "scores" / name
    state = _read_state(out)
    same = state is not None and state["job"] == _plain(asdict(job)) and not state["finished"]
    if ranks.agree(same and folder.is_dir()):
        logger.info("%s is scored already, read from %s", name, folder)
        return Scores.from_pretrained(folder) if ranks.first else None
    dense = job.scope == "model"
    with costs.step(f"score {name}", sum(len(example) for example in examples)):
        scores = score(
            model,
            examples,
            granularity=job.granularity,
            target_modules=job.target_modules,
            tokens_per_batch=job.tokens_per_batch,
            keep_top=None if dense else keep_top,
            memory_budget=job.memory_budget,
            deterministic=job.deterministic,
            progress=progress,
            description=f"score {name}",
        )
    if ranks.first:
        _claim(out, job, overwrite)
        scores.manifest["data"]["sources"] = [getattr(job, name)]
        scores.save_pretrained(folder)
    return scores


def _measure(
    model: Any,
    masks: Mapping[str, NeuronMask],
    measured: Mapping[str, Any],
    job: Job,
    costs: _Costs,
    progress: bool,
) -> dict[str, Any]:
    """Margins and perplexity of the model as it came and under every mask; HSIC under the job's own."""
    options = {"tokens_per_batch": job.tokens_per_batch, "progress": progress}

    def figures(name: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        with costs.step(f"measure {name}"):
            for topic in ("fairness", "privacy"):
                if measured[topic]:
                    found[topic] = response_margins(model, measured[topic], **options)
            if measured["general"]:
                found["perplexity"] = perplexity(model, measured["general"], **options)
            if name in ("origin", job.rule):
                found["states"] = _states(model, measured, options)
        return found

    origin = figures("origin")
    after = {}
    for rule, mask in masks.items():
        if len(mask):
            with mask.applied(model):
                after[rule] = figures(rule)
    results: dict[str, Any] = {"margins": {}}
    for topic in ("fairness", "privacy"):
        if topic in origin:
            results["margins"][topic] = _margin_table(topic, origin, after, masks, job.seed)
    if "perplexity" in origin:
        results["perplexity"] = _perplexity_table(origin, after, job.seed)
    if origin.get("states") and job.rule in after:
        results["hsic"] = _hsic_table(origin["states"], after[job.rule]["states"], job.seed)
    return results


def _margin_table(
    topic: str, origin: Mapping, after: Mapping, masks: Mapping[str, NeuronMask], seed: int
) -> dict[str, Any]:
    before = origin[topic]
    return {
        "pairs": len(before),
        "unit": before.unit,
        "confidence": 0.95,
        "share_positive": before.share_positive,
        "origin": _interval(paired_bootstrap(before.values, seed=seed)),
        "masks": {
            rule: {
                **_interval(compare_margins(before, found[topic], seed=seed), verdict=True),
                "share_positive": found[topic].share_positive,
                "weights": len(masks[rule]),
            }
            for rule, found in after.items()
        },
    }


def _perplexity_table(origin: Mapping, after: Mapping, seed: int) -> dict[str, Any]:
    before = origin["perplexity"]
    masks = {}
    for rule, found in after.items():
        interval = _interval(
            compare_perplexity(before, found["perplexity"], seed=seed), verdict=True
        )
        masks[rule] = {
            "value": found["perplexity"].value,
            "ratio": interval.pop("mean"),
            **interval,
        }
    return {
        "text": "responses of the general rows that are measured on",
        "tokens": before.tokens,
        "origin": before.value,
        "masks": masks,
    }


def _states(model: Any, measured: Mapping[str, Any], options: Mapping) -> dict[str, Any] | None:
    """Last prompt token's hidden states, of equally many fairness and privacy prompts."""
    count = min(len(measured["fairness"]), len(measured["privacy"]))
    if count < 4:
        return None
    return {
        topic: last_token_states(
            model, prompts_only([safe for safe, _ in measured[topic][:count]]), **options
        )
        for topic in ("fairness", "privacy")
    }


def _hsic_table(before: Mapping, after: Mapping, seed: int) -> dict[str, Any]:
    options = {"estimator": "unbiased", "kernel": "gaussian", "bandwidth": "median"}
    layers_before = layer_dependence(
        before["fairness"], before["privacy"], permutations=_PERMUTATIONS, seed=seed, **options
    )
    layers_after = layer_dependence(after["fairness"], after["privacy"], **options)
    return {
        **options,
        "n": layers_before[0].n,
        "permutations": _PERMUTATIONS,
        "pairing": "by position in the shuffled sources; the prompts are unrelated, so the pairing is arbitrary",
        "layers": [
            {
                "layer": i,
                "before": b.value,
                "after": a.value,
                "null_low": b.null_low,
                "null_high": b.null_high,
            }
            for i, (b, a) in enumerate(zip(layers_before, layers_after, strict=True))
        ],
    }


def _interval(interval: Interval, verdict: bool = False) -> dict[str, Any]:
    found = {"mean": interval.mean, "low": interval.low, "high": interval.high}
    return {**found, "verdict": interval.verdict()} if verdict else found


def _total(table: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    keys = ("numel", "k", "first", "second", "coupled", "removed", "kept")
    return {key: sum(row[key] for row in table) for key in keys}


def _warnings(job: Job, rows: Mapping[str, _Rows], mask: NeuronMask, scores: Scores) -> list[str]:
    found = []
    empty = sum(1 for row in mask.table if row["k"] == 0)
    if empty and job.scope == "matrix":
        found.append(
            f"The ratio selects nothing from {empty} of {len(mask.table)} matrices: they are too small for it."
        )
    unscorable = sum(scores.manifest["coverage"]["unscorable"].values())
    if unscorable > 0.05 * scores.manifest["coverage"]["model_parameters"]:
        share = unscorable / scores.manifest["coverage"]["model_parameters"]
        found.append(
            f"{share:.0%} of the parameters lie in layers that hooks cannot score, such as fused experts."
        )
    for name in DATA_SETS:
        if not rows[name].measured:
            found.append(
                f"No {name} rows with an unsafe response to compare with: not measured on {name}."
            )
        elif not rows[name].held_out:
            found.append(
                f"The {name} rows that are measured on are the scored ones: no others were left."
            )
    if job.scale:
        found.append(f"The weights are multiplied by {job.scale:g}, not set to zero.")
    return found


def _plain(value: Any) -> Any:
    """JSON has no NaN and no tuples; what is not a number is null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value


def _peak_bytes() -> int | None:
    """The largest memory of this process so far; on a GPU, of its allocations there."""
    import sys

    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
