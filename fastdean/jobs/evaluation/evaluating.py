"""The job of `fastdean eval`: what a model can do without a mask and with it, on one load.

General ability by tasks of lm-eval, the price by `over_refusal` and `gender_facts`, bias by the
other measures: each figure before and after, and how it changed item by item, all of them one
family of tests. Each task and each measure is a step of its own that a resumed job does not repeat.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from fastdean.evaluation.ability import require_same_items, task_manager, task_scores
from fastdean.files.declared import Lists, Maps, Record, Text
from fastdean.files.provenance import public_name
from fastdean.files.storage import held, write_json_atomic
from fastdean.jobs.bias import asked as bias_asked
from fastdean.jobs.bias import changes as bias_changes
from fastdean.jobs.bias import figures as bias_figures
from fastdean.jobs.bias import sentences as bias_sentences
from fastdean.jobs.evaluation.job import EvalJob
from fastdean.jobs.folder import ITEMS_FILE, RESULTS_FILE
from fastdean.jobs.inputs import benchmark_digests, described_mask, mask_digest, path_digest
from fastdean.jobs.published import described_model, published
from fastdean.jobs.session import Session
from fastdean.masks import NeuronMask
from fastdean.models.ranks.distributed import Ranks
from fastdean.wording.digits import apart

# What is kept of a task: its figures, and which item each of their values is of.
_TASK = Record({"figures": bias_figures.FIGURES, "items": Maps(Lists(Text(longest=10_000)))})
_Items = dict[str, list[str]]


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
        out: the run folder: new, empty, or of the same unfinished job, which is then resumed; None:
            nothing is left.
        command: the command line, for the record.

    Returns:
        The content of results.json. `measures`: by name, "before", and with a mask "after" and
        "raw_change" with its interval, test and verdict over the same items; where a figure has a
        neutral value, "change" is that of the distance to it. `tests`: their family.

    Raises:
        ValueError, RuntimeError, OSError: as `load_model`, `NeuronMask.apply_`, `task_manager`,
            `task_scores` and the measures; what was measured is kept and not measured again.
    """
    Ranks.require_alone("fastdean eval")
    if out is not None:
        return _run(job, out, command, overwrite, progress)
    with TemporaryDirectory(prefix="fastdean-eval-") as place:
        return _run(job, Path(place) / "evaluation", command, overwrite, progress)


def _run(job: EvalJob, out: Path, command: str, overwrite: bool, progress: bool) -> dict[str, Any]:
    blocks = (len(job.tasks) + len(job.bias)) * (1 if job.mask is None else 2)
    session = Session.open(job, out, command, overwrite, progress, steps=2 + blocks)
    manager = task_manager(job.tasks, job.task_folder) if job.tasks else None
    bias_asked.require_readable(job.bias)
    mask = None if job.mask is None else NeuronMask.from_pretrained(job.mask)
    session.compare(
        {
            **benchmark_digests(job.bias),
            **({} if mask is None else {"mask": mask_digest(mask)}),
            **({} if job.task_folder is None else {"task_folder": path_digest(job.task_folder)}),
        }
    )
    model, tokenizer = session.load_model()
    session.compare_model(model, tokenizer)
    bias_asked.require_start(job.bias, job.start_token, model, tokenizer)
    if mask is not None:
        # Refused now, and not after the first measurements.
        with mask.applied(model):
            pass
    with session.writing():
        session.folder.claim()
        with held(session.folder.path, "out"):
            states: dict[str, bias_figures.Found] = {}
            items: dict[str, _Items] = {}
            for state in ("before",) if mask is None else ("before", "after"):
                masked = mask if state == "after" else None
                states[state], items[state] = _measured(
                    session, state, model, tokenizer, masked, manager
                )
            if mask is not None:
                require_same_items(items["before"], items["after"])
            table, tests, _ = bias_changes.results(states, seed=job.seed)
            results = session.results(
                f"FastDEAN: evaluation of {public_name(job.model)}",
                {
                    "model": described_model(job.model, model),
                    "mask": None if mask is None else described_mask(mask),
                    "options": published(job),
                    "measures": table,
                    "tests": tests,
                    "warnings": session.folder.other_versions,
                    "cost": session.costs.steps,
                    "files": {"figures": RESULTS_FILE, "scores of items": ITEMS_FILE},
                },
            )
            write_json_atomic(session.folder.path / ITEMS_FILE, _by_item(states, items["before"]))
            session.finish(results)
    return results


def table(measures: Mapping[str, Mapping[str, Any]]) -> str:
    """A line for each figure: its value or, with a mask, both values, the change, and a verdict."""
    lines = []
    for name, row in measures.items():
        unit = f" {row['unit']}" if row["unit"] else ""
        before, after = row["before"], row.get("after")
        if after is None:
            lines.append(f"  {name}: {bias_sentences.with_ends(before)}{unit}, n = {before['n']}")
            continue
        values = " -> ".join(apart(before["value"], after["value"], least=3))
        moved = bias_sentences.change_words(row["raw_change"], n=before["n"])
        lines.append(f"  {name}: {values}{unit}; change {moved}")
    return "\n".join(lines)


def _measured(
    session: Session[EvalJob],
    state: str,
    model: nn.Module,
    tokenizer: Any,
    mask: NeuronMask | None,
    manager: Any,
) -> tuple[bias_figures.Found, _Items]:
    """Every figure by its name, and the tasks' items."""
    place: AbstractContextManager = nullcontext() if mask is None else mask.applied(model)
    found: bias_figures.Found = {}
    items: _Items = {}
    with place:
        for number, task in enumerate(session.job.tasks):
            with session.costs.step(f"{task}, {state}"):
                kept = _task(session, state, number, model, tokenizer, manager)
            found |= kept["figures"]
            items |= kept["items"]
        found |= bias_figures.measure(session, state, model, tokenizer)
    return found, items


def _task(
    session: Session[EvalJob],
    state: str,
    number: int,
    model: nn.Module,
    tokenizer: Any,
    manager: Any,
) -> dict[str, Any]:
    job = session.job

    def take() -> dict[str, Any]:
        scored = task_scores(
            model,
            tokenizer,
            job.tasks[number : number + 1],
            shots=job.shots,
            limit=job.limit,
            chat=job.chat_template,
            manager=manager,
            batch_size=job.batch_size,
            seed=job.seed,
            progress=session.progress,
        )
        return {
            "figures": {each.name: bias_figures.stored(each) for each in scored},
            "items": {each.name: list(each.items) for each in scored},
        }

    return session.folder.figures(f"{state}-task-{number}", take, _TASK)


def _by_item(states: Mapping[str, bias_figures.Found], items: _Items) -> dict[str, Any]:
    """Of each metric of a task its items and, for each state, their scores in the same order."""
    return {
        name: {
            "unit": states["before"][name]["unit"],
            "items": of_metric,
            **{state: found[name]["made_of"]["values"] for state, found in states.items()},
        }
        for name, of_metric in items.items()
    }
