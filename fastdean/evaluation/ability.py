"""General ability by lm-eval, in this process, item by item.

EleutherAI's lm-evaluation-harness asks the loaded model as its own `HFLM` does. Its aggregate is a
mean over items; the items' scores are kept, so that two models, or one before and after an edit,
are compared item by item.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastdean.evaluation.bias.result import BiasResult, mean_result, members
from fastdean.evaluation.statistics.intervals import is_share
from fastdean.models.label_shift import label_shift
from fastdean.models.model_state import evaluation_state, unwrap
from fastdean.wording.bars import bars
from fastdean.wording.log import logger
from fastdean.wording.mendable import StateError

INSTALL = "run `pip install 'lm-eval[hf]'`"
# Of lm-eval, what names a filter that changes nothing.
_UNFILTERED = "none"


@dataclass(frozen=True)
class TaskResult(BiasResult):
    """A metric of a task.

    Attributes:
        task, metric: as lm-eval calls them.
        items: of each item, what tells it from others: its task, number and hash.
    """

    task: str = ""
    metric: str = ""
    items: tuple[str, ...] = ()


def require_lm_eval() -> None:
    """Raise StateError, a RuntimeError, unless lm-eval is installed."""
    if find_spec("lm_eval") is None:
        raise StateError(
            f"lm-eval must be installed for tasks of general ability, got no package; {INSTALL}"
        )


def task_scores(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    shots: int | None = None,
    limit: int | None = None,
    chat: bool = False,
    manager: Any = None,
    batch_size: int = 8,
    confidence: float = 0.95,
    seed: int = 0,
    progress: bool = True,
) -> list[TaskResult]:
    """Score a causal model on tasks of lm-eval, item by item.

    Args:
        model: a causal language model, loaded; evaluated without dropout and left in its mode.
        tasks: names of lm-eval's tasks, groups or tags, or those that `manager` knows besides.
        shots: examples before each question; None: as the task says.
        limit: the first so many items of each task; None: all.
        chat: put each question through the tokenizer's chat template.
        manager: of `task_manager`, for several calls or task files of your own; None: lm-eval's.
        batch_size: sequences in one forward pass.
        confidence: of the intervals, over items.
        seed: of the examples before each question and of the tests.

    Returns:
        Of every name, each metric that is one number per item: the share of items in %, or the
        mean. A group is the mean over all items of its tasks, which are its categories. What a
        metric of a whole corpus is made of (perplexity, F1, BLEU) is no number; a name that has
        such metrics alone is left out, with a warning.

    Raises:
        RuntimeError: lm-eval is not installed.
        ValueError: a model that is not causal, an unknown task, or tasks none of whose metrics is
            a mean over items.
    """
    require_lm_eval()
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    manager = task_manager(tasks) if manager is None else manager
    inner = unwrap(model)
    if label_shift(inner) != 1:
        raise ValueError(
            f"model must be a causal language model, got the masked {type(inner).__name__}; tasks "
            "are answered by continuing a text"
        )
    results: list[TaskResult] = []
    with evaluation_state(inner), bars(progress), _only_errors():
        lm = HFLM(pretrained=inner, tokenizer=tokenizer, batch_size=batch_size)
        for name in tasks:
            # One by one: all items then are the name's, also where it stands for several tasks.
            found = lm_eval.simple_evaluate(
                model=lm,
                tasks=[name],
                num_fewshot=shots,
                limit=limit,
                apply_chat_template=chat,
                task_manager=manager,
                # Intervals are ours.
                bootstrap_iters=0,
                log_samples=True,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
            scored = results_of(found["samples"], name, confidence=confidence, seed=seed)
            if not scored:
                logger.warning("%s has no metric that is a mean over items, and is left out", name)
            results += scored
    if not results:
        raise ValueError(
            "tasks must have a metric that is a mean over items, got none of "
            f"{', '.join(tasks)}; name others"
        )
    return results


def task_manager(tasks: Sequence[str], task_folder: str | Path | None = None) -> Any:
    """lm-eval's `TaskManager` that knows `tasks`. Reading all of its task files takes seconds.

    Args:
        task_folder: of task files (YAML) besides lm-eval's own.

    Raises:
        RuntimeError: lm-eval is not installed.
        ValueError: an unknown task, or no such folder.
    """
    require_lm_eval()
    from lm_eval.tasks import TaskManager

    folder = None
    if task_folder is not None:
        folder = Path(task_folder).expanduser()
        if not folder.is_dir():
            raise ValueError(
                f"task_folder must be a folder of task files, got {str(task_folder)!r}; check the "
                "path"
            )
        own = TaskManager(include_path=str(folder), include_defaults=False)
        # A group may name tasks of lm-eval's.
        if set(tasks) <= set(own.all_subtasks):
            return own
    manager = TaskManager(include_path=None if folder is None else str(folder))
    _require_known(tasks, manager)
    return manager


def results_of(
    samples: Mapping[str, Sequence[Mapping[str, Any]]],
    task: str,
    *,
    confidence: float = 0.95,
    seed: int = 0,
) -> list[TaskResult]:
    """The results of `task_scores` for one name from the samples that lm-eval logs.

    Args:
        samples: by task, those of all tasks that the name stands for.
    """
    logged = [(part, row) for part, rows in samples.items() for row in rows]
    results = []
    kinds = dict.fromkeys((name, row["filter"]) for _, row in logged for name in row["metrics"])
    for metric, kept_by in kinds:
        chosen = [(part, row) for part, row in logged if row["filter"] == kept_by and metric in row]
        values = [row[metric] for _, row in chosen]
        # Others are what a metric of the whole corpus is computed from.
        if all(map(_is_number, values)):
            results.append(_result(task, metric, kept_by, chosen, values, confidence, seed))
    return results


def require_same_items(
    before: Mapping[str, Sequence[str]], after: Mapping[str, Sequence[str]]
) -> None:
    """Raise ValueError unless both are the same metrics of the same items.

    Args:
        before, after: name of a metric -> `TaskResult.items`.
    """
    if list(before) == list(after) and all(
        list(items) == list(after[name]) for name, items in before.items()
    ):
        return
    differ = next((n for n, items in before.items() if list(items) != list(after.get(n, ()))), None)
    raise ValueError(
        f"after must be of the same items as before, got others for {differ or 'more metrics'!r}; "
        "score both with the same tasks and options"
    )


def _result(
    task: str,
    metric: str,
    kept_by: str,
    chosen: Sequence[tuple[str, Mapping[str, Any]]],
    values: Sequence[float],
    confidence: float,
    seed: int,
) -> TaskResult:
    numbers = torch.tensor(values, dtype=torch.float64)
    of_share = is_share(numbers.numpy(), 1.0)
    parts = [part for part, _ in chosen]
    name = f"{task}, {metric}" + ("" if kept_by == _UNFILTERED else f" ({kept_by})")
    found = mean_result(
        name,
        100.0 * numbers if of_share else numbers,
        unit="%" if of_share else "",
        neutral=None,
        categories=members(parts) if len(set(parts)) > 1 else None,
        notes=["lm-eval's score of each item, their mean over all items"],
        confidence=confidence,
        seed=seed,
    )
    items = tuple(f"{part} {row['doc_id']} {row['doc_hash']}" for part, row in chosen)
    return TaskResult(**vars(found), task=task, metric=metric, items=items)


def _is_number(value: Any) -> bool:
    return isinstance(value, bool | int | float) or (
        hasattr(value, "item") and getattr(value, "ndim", None) == 0
    )


@contextmanager
def _only_errors() -> Iterator[None]:
    """lm-eval's log without its advice, such as how to have it load the model itself."""
    theirs = logging.getLogger("lm_eval")
    level = theirs.level
    theirs.setLevel(logging.ERROR)
    try:
        yield
    finally:
        theirs.setLevel(level)


def _require_known(tasks: Sequence[str], manager: Any) -> None:
    unknown = [name for name in tasks if name not in manager.all_tasks]
    if unknown:
        close = ", ".join(map(repr, get_close_matches(unknown[0], manager.all_tasks, n=3)))
        raise ValueError(
            f"tasks must be names of lm-eval's tasks, got {unknown[0]!r}; "
            f"{f'near it: {close}; ' if close else ''}`fastdean lm-eval ls tasks` lists them"
        )
