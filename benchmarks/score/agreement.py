"""`agreement`: how alike two selections are.

bf16 against fp32, and `fastdean.score` against the plain loop.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import fastdean
from benchmarks.harness import models, tables
from benchmarks.harness.session import Session
from benchmarks.harness.store import Record
from benchmarks.harness.tables import Cells, Table
from benchmarks.score import subject
from benchmarks.score.baselines import loop_sums
from fastdean.data import Example
from fastdean.targets import find_targets

RATIOS = (1e-5, 1e-4, 1e-3)
TOP = 256

Selections = dict[str, Tensor]


@dataclass(frozen=True)
class Agreement:
    """Two selections over the same matrices.

    Attributes:
        k: smallest and largest number selected in a matrix.
        equal: number of matrices whose two sets are equal.
        kept: share of the reference's set that the other selects too, mean over matrices.
        kept_least: the same in the worst matrix.
    """

    k: tuple[int, int]
    matrices: int
    equal: int
    kept: float
    kept_least: float


def compare(reference: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> Agreement:
    """Per matrix the share of `reference`'s flat indices that `other` has too.

    Matrices in which `reference` selects nothing are left out.

    Raises:
        ValueError: the matrices differ, or `reference` selects nothing anywhere.
    """
    if set(reference) != set(other):
        raise ValueError("selections must cover the same matrices, got different names")
    pairs = [(set(reference[n].tolist()), set(other[n].tolist())) for n in reference]
    pairs = [(ours, theirs) for ours, theirs in pairs if ours]
    if not pairs:
        raise ValueError(
            "reference must select at least one entry, got none; "
            "the matrices are too small for the ratio, so take a larger one"
        )
    kept = [len(ours & theirs) / len(ours) for ours, theirs in pairs]
    sizes = [len(ours) for ours, _ in pairs]
    return Agreement(
        k=(min(sizes), max(sizes)),
        matrices=len(pairs),
        equal=sum(ours == theirs for ours, theirs in pairs),
        kept=sum(kept) / len(kept),
        kept_least=min(kept),
    )


def loop_selection(
    model: nn.Module, examples: Sequence[Example], target_modules: str, k: int
) -> Selections:
    """The k most important entries of each matrix by the plain loop and torch's own top-k."""
    targets = find_targets(model, target_modules)
    sums = loop_sums(model, examples, targets)
    weights = {target.parameter: target.module.weight.detach() for target in targets}
    return {
        name: (sums[name] * weights[name].abs()).flatten().topk(min(k, sums[name].numel())).indices
        for name in sums
    }


def measure_agreement(
    model: nn.Module, examples: Sequence[Example], target_modules: str
) -> list[tuple[str, str, float | None, Agreement]]:
    """(reference, other, ratio or None, agreement) of an fp32 model, which is bf16 afterwards.

    The bf16 model has its weights rounded too, so what differs is both rounding and arithmetic.
    """
    loop = loop_selection(model, examples, target_modules, TOP)
    scores = fastdean.score(model, examples, target_modules=target_modules, progress=False)
    ours = {name: scores.select(name, TOP) for name in scores}
    results = [("loop fp32", "fastdean fp32", None, compare(loop, ours))]

    fp32 = {ratio: _selection(scores, ratio) for ratio in RATIOS}
    del scores
    models.cast_parameters_(model, torch.bfloat16)
    rounded = fastdean.score(model, examples, target_modules=target_modules, progress=False)
    for ratio in RATIOS:
        if any(index.numel() for index in fp32[ratio].values()):
            agreement = compare(fp32[ratio], _selection(rounded, ratio))
            results.append(("fastdean fp32", "fastdean bf16", ratio, agreement))
    return results


def _selection(scores: fastdean.Scores, ratio: float) -> Selections:
    return {
        name: scores.select(name, int(ratio * entry.numel))
        for name, entry in scores.entries.items()
    }


def run(session: Session) -> int:
    """Append how alike the loop and fastdean in fp32, and fastdean in bf16, select."""
    options = session.options
    for _ in session.due(["all"]):
        found = subject.load_subject(options, "fp32")
        examples = found.examples(subject.examples_in(options, "bf16"))
        rows = []
        for against, other, ratio, result in measure_agreement(
            found.model, examples, options.targets
        ):
            setup = {
                "reference": against,
                "ratio": ratio,
                "model": found.name,
                "examples": len(examples),
                "tokens": sum(map(len, examples)),
            }
            case, metrics = f"{found.name}, {options.targets}", dict(vars(result))
            rows.append(session.append("agreement", case, other, setup=setup, metrics=metrics))
        print(tables.rendered(TABLE, rows))
    return 0


def _lines(rows: Sequence[Record]) -> tuple[Cells, list[Cells]]:
    header = ["selection", "of", "ratio", "k", "kept (mean)", "kept (worst matrix)"]
    return [*header, "equal matrices"], [_cells(row) for row in rows]


def _cells(row: Record) -> Cells:
    least, most = row["k"]
    return [
        row.contender,
        row["reference"],
        "" if row["ratio"] is None else f"{row['ratio']:g}",
        str(least) if least == most else f"{least} to {most}",
        f"{row['kept']:.1%}",
        f"{row['kept_least']:.1%}",
        f"{row['equal']} of {row['matrices']}",
    ]


def _notes(rows: Sequence[Record]) -> list[str]:
    row = rows[0]
    size = f"{row['examples']} examples, {row['tokens']} tokens"
    return [f"{row.case}. {size}. {tables.provenance_line(row)}"]


_KEYS = ("device", "case")
TABLE = Table("python -m benchmarks agreement", _KEYS, _KEYS, _lines, _notes)
