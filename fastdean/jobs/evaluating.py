"""The job of `fastdean eval`: what a model can do without a mask and with it, on one load.

General ability by tasks of lm-eval, the price by `over_refusal` and `gender_facts`, bias by the
other measures: each figure before and after, and how it changed item by item.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from fastdean.evaluation.ability import (
    TaskResult,
    require_same_items,
    task_manager,
    task_scores,
)
from fastdean.files.provenance import now, public_command, public_name, versions
from fastdean.files.storage import (
    FORMAT_VERSION,
    holds_only_listed,
    listed,
    new_folder,
    write_json_atomic,
)
from fastdean.jobs import bias
from fastdean.jobs.eval_job import EvalJob
from fastdean.jobs.folder import RESULTS_FILE, require_free, require_outside
from fastdean.jobs.session import load_model_of, plain
from fastdean.masks import NeuronMask
from fastdean.wording.digits import apart

MANIFEST = "fastdean_evaluation.json"
ITEMS_FILE = "items.json"


def run(
    job: EvalJob,
    out: Path | None = None,
    *,
    command: str = "",
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure a model, and the same model with the mask.

    Args:
        out: a folder for results.json and, by item, the scores of the tasks (items.json); None:
            nothing is written.
        command: the command line, for the record.

    Returns:
        `measures`: by name, "before", and with a mask "after" and "change" with its interval, test
        and verdict over the same items.

    Raises:
        ValueError, RuntimeError, OSError: as `load_model`, `NeuronMask.apply_`, `task_manager`,
            `task_scores` and the measures.
    """
    manager = task_manager(job.tasks, job.task_folder) if job.tasks else None
    bias.require_readable(job.bias)
    if out is not None:
        require_outside(out, job.model)
        require_free(out, overwrite, _is_evaluation, "an evaluation")
    mask = None if job.mask is None else NeuronMask.from_pretrained(job.mask)
    model, tokenizer = load_model_of(job, progress)
    bias.require_start(job.bias, job.start_token, model, tokenizer)
    states, scores = {}, {}
    states["before"], scores["before"] = _measured(job, model, tokenizer, manager, progress)
    if mask is not None:
        with mask.applied(model):
            states["after"], scores["after"] = _measured(job, model, tokenizer, manager, progress)
        require_same_items(scores["before"], scores["after"])
    results = plain(
        {
            "title": f"Evaluation of {public_name(job.model)}",
            "created": now(),
            "command": public_command(command),
            "versions": versions(),
            "model": public_name(job.model),
            "mask": None if mask is None else {"weights": len(mask), "scale": mask.scale},
            "tasks": list(job.tasks),
            "measures": bias.results(states),
        }
    )
    if out is not None:
        _write(out, overwrite, results, _by_item(scores))
    return results


def table(measures: Mapping[str, Mapping[str, Any]]) -> str:
    """A line for each figure: its value or, with a mask, both values, the change, and a verdict."""
    lines = []
    for name, row in measures.items():
        unit = f" {row['unit']}" if row["unit"] else ""
        before, after = row["before"], row.get("after")
        if after is None:
            lines.append(f"  {name}: {_with_ends(before)}{unit}, n = {before['n']}")
            continue
        moved = row["raw_change"]
        values = " -> ".join(apart(before["value"], after["value"], least=3))
        p = "" if moved["p_value"] is None else f", p = {moved['p_value']:.2g}"
        lines.append(
            f"  {name}: {values}{unit}; change {_with_ends(moved)}, n = {before['n']}{p}: "
            f"{moved['verdict']}"
        )
    return "\n".join(lines)


def _measured(
    job: EvalJob, model: nn.Module, tokenizer: Any, manager: Any, progress: bool
) -> tuple[bias.Found, list[TaskResult]]:
    """Every figure by its name, and the tasks' with their items."""
    scored = []
    if job.tasks:
        scored = task_scores(
            model,
            tokenizer,
            job.tasks,
            shots=job.shots,
            limit=job.limit,
            chat=job.chat_template,
            manager=manager,
            batch_size=job.batch_size,
            seed=job.seed,
            progress=progress,
        )
    found = {each.name: bias.stored(each) for each in scored}
    for number, entry in enumerate(job.bias):
        figures = bias.measured(
            entry, model, tokenizer, start=job.start_token, seed=job.seed, progress=progress
        )
        bias.add(found, entry, number, figures)
    return found, scored


def _by_item(scores: Mapping[str, list[TaskResult]]) -> dict[str, Any]:
    """Of each metric its items and, for each state, their scores in the same order."""
    found: dict[str, Any] = {}
    for state, results in scores.items():
        for each in results:
            entry = found.setdefault(each.name, {"unit": each.unit, "items": list(each.items)})
            values = each.interval.values
            assert values is not None, "the interval of a mean carries them"
            entry[state] = values.tolist()
    return found


def _with_ends(figure: Mapping[str, Any]) -> str:
    if figure["low"] is None:
        return apart(figure["value"])[0]
    value, low, high = apart(*(figure[key] for key in ("value", "low", "high")), least=3)
    return f"{value} [{low}, {high}]"


def _write(out: Path, overwrite: bool, results: dict[str, Any], items: dict[str, Any]) -> None:
    with new_folder(out, overwrite=overwrite, may_replace=_is_evaluation, name="out") as folder:
        write_json_atomic(folder / RESULTS_FILE, results)
        write_json_atomic(folder / ITEMS_FILE, items)
        manifest = {"kind": "evaluation", "format_version": FORMAT_VERSION}
        write_json_atomic(folder / MANIFEST, {**manifest, "sha256": listed(folder)})


def _is_evaluation(folder: Path) -> bool:
    return holds_only_listed(folder, MANIFEST)
