"""GLUE: does a masked language model still learn eight tasks of understanding as well as before?

Wang et al. 2019 (ICLR). A head is trained on a task's training rows, together with the model's
encoder, and scored on its validation rows: those of the test rows have no labels that are known.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdean.data.sources import load_table
from fastdean.evaluation.classifier import HeadCourse, class_logits, fine_tuned_classifier

HUB_ID = "nyu-mll/glue"
NLI_LABELS = ("entailment", "neutral", "contradiction")
_SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
# A label that is not known: of test rows, and of SNLI's rows on which nobody agreed.
_UNKNOWN = (-1, "-1", "-", None)


@dataclass(frozen=True)
class Labelled:
    """Texts or pairs of texts, and the number of each one's label, or its score."""

    texts: list[tuple[str, ...]]
    targets: list[float]

    def first(self, limit: int | None) -> Labelled:
        return self if limit is None else Labelled(self.texts[:limit], self.targets[:limit])


@dataclass(frozen=True)
class Task:
    """Attributes:
    columns: of a row's text or pair.
    labels: their names, in the order of their numbers; none: a score.
    score: (predictions, targets) -> the task's score, at most 1.
    validation: the split that is scored.
    """

    columns: tuple[str, ...]
    labels: tuple[str, ...]
    score: Callable[[Tensor, Tensor], float]
    validation: str = "validation"


def accuracy(predicted: Tensor, targets: Tensor) -> float:
    return float((predicted == targets).double().mean())


def f1(predicted: Tensor, targets: Tensor) -> float:
    """2 TP / (2 TP + FP + FN) of label 1; 0 where neither side has it."""
    hits = float(((predicted == 1) & (targets == 1)).sum())
    named = float((predicted == 1).sum() + (targets == 1).sum())
    return 2.0 * hits / named if named else 0.0


def accuracy_and_f1(predicted: Tensor, targets: Tensor) -> float:
    """Their mean, as GLUE's board averages them."""
    return (accuracy(predicted, targets) + f1(predicted, targets)) / 2.0


def correlation(first: Tensor, second: Tensor) -> float:
    """Pearson's; of two labels it is that of Matthews. 0 where one side is constant."""
    first, second = (side.double() - side.double().mean() for side in (first, second))
    scale = float(first.norm() * second.norm())
    return float(first @ second) / scale if scale else 0.0


def pearson_and_spearman(predicted: Tensor, targets: Tensor) -> float:
    """Their mean, as GLUE's board averages them; Spearman's is Pearson's of ranks."""
    ranks = [_ranks(side) for side in (predicted, targets)]
    return (correlation(predicted, targets) + correlation(*ranks)) / 2.0


_PAIR = ("sentence1", "sentence2")
_ENTAILS = ("entailment", "not_entailment")
TASKS: dict[str, Task] = {
    "cola": Task(("sentence",), ("unacceptable", "acceptable"), correlation),
    "sst2": Task(("sentence",), ("negative", "positive"), accuracy),
    "mrpc": Task(_PAIR, ("not_equivalent", "equivalent"), accuracy_and_f1),
    "stsb": Task(_PAIR, (), pearson_and_spearman),
    "qqp": Task(("question1", "question2"), ("not_duplicate", "duplicate"), accuracy_and_f1),
    "mnli": Task(("premise", "hypothesis"), NLI_LABELS, accuracy, "validation_matched"),
    "qnli": Task(("question", "sentence"), _ENTAILS, accuracy),
    "rte": Task(_PAIR, _ENTAILS, accuracy),
}


def glue(
    model: nn.Module,
    tokenizer: Any,
    task: str,
    train: Labelled,
    validation: Labelled,
    *,
    course: HeadCourse | None = None,
    seed: int = 0,
    progress: bool = True,
) -> float:
    """Score a task in per cent, after training a head: see `fine_tuned_classifier`.

    CoLA: Matthews' correlation. STS-B: mean of Pearson's and Spearman's. MRPC and QQP: mean of
    accuracy and F1. The others, MNLI on its matched rows: accuracy.

    Args:
        task: one of `TASKS`.
        train, validation: of `glue_rows`.
        seed: of the head's training.

    Raises:
        ValueError, RuntimeError: as `fine_tuned_classifier`.
    """
    asked, course = TASKS[require_task(task)], course or HeadCourse()
    classifier = fine_tuned_classifier(
        model,
        tokenizer,
        train.texts,
        train.targets,
        labels=asked.labels,
        course=course,
        seed=seed,
        progress=progress,
    )
    logits = class_logits(classifier, tokenizer, validation.texts, course)
    predicted = logits.argmax(1) if asked.labels else logits[:, 0]
    return 100.0 * asked.score(predicted, torch.tensor(validation.targets))


def glue_rows(task: str, source: str | Path = HUB_ID) -> tuple[Labelled, Labelled]:
    """The rows to train on, and those to score.

    Args:
        source: the hub id, or a folder with the files TASK-train and TASK-validation (of MNLI its
            matched rows), ending in .csv, .tsv, .json, .jsonl or .parquet, with GLUE's columns.

    Raises:
        ValueError: an unknown task, a file that is missing, or a row without text or label.
    """
    asked = TASKS[require_task(task)]
    folder = Path(source).expanduser()
    if folder.is_dir():
        parts = [load_table(_file(folder, f"{task}-{part}")) for part in ("train", "validation")]
    else:
        parts = [load_table(source, config=task, split=s) for s in ("train", asked.validation)]
    train, validation = (labelled(rows, asked.columns, asked.labels) for rows in parts)
    return train, validation


def labelled(
    rows: Sequence[Mapping[str, Any]], columns: Sequence[str], labels: Sequence[str]
) -> Labelled:
    """The rows whose column `label` holds a number or name of `labels`, or a score without any.

    Rows whose label is not known (-1, as in test rows) are left out.

    Raises:
        ValueError: a row without text in one of `columns`, with another label, or none at all.
    """
    found = Labelled([], [])
    numbers = {str(key): n for n, name in enumerate(labels) for key in (n, name)}
    for number, row in enumerate(rows, start=1):
        label = row.get("label")
        if labels and label in _UNKNOWN:
            continue
        text = tuple(str(row.get(column) or "") for column in columns)
        if not all(text):
            raise ValueError(
                f"row {number} must have text in the columns {', '.join(columns)}, got "
                f"{sorted(map(str, row))}; rename its columns"
            )
        try:
            found.targets.append(float(numbers[str(label)] if labels else str(label)))
        except (KeyError, ValueError):
            wanted = f"one of {', '.join(labels)} or its number" if labels else "a score"
            raise ValueError(
                f"row {number} must have {wanted} in the column label, got {label!r:.40}; correct "
                "the row"
            ) from None
        found.texts.append(text)
    if not found.texts:
        raise ValueError("rows must hold at least one with a known label, got none; give others")
    return found


def require_task(task: str) -> str:
    """The task; ValueError for an unknown one."""
    if task not in TASKS:
        raise ValueError(
            f"task must be one of {', '.join(TASKS)}, got {task!r}; give one task at a time"
        )
    return task


def _file(folder: Path, stem: str) -> Path:
    for suffix in _SUFFIXES:
        if (folder / f"{stem}{suffix}").is_file():
            return folder / f"{stem}{suffix}"
    raise ValueError(
        f"source must be a folder with the file {stem} in .csv, .tsv, .json, .jsonl or .parquet, "
        f"got none in {str(folder)!r}; put it there, or leave the task out"
    )


def _ranks(values: Tensor) -> Tensor:
    """From 1; those of equal values are their mean."""
    _, place, counts = values.unique(sorted=True, return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    return (ends - (counts - 1) / 2.0)[place]
