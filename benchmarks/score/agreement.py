"""`agreement`: how alike two selections are.

bf16 against fp32, and `fastdean.score` against the plain loop.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import fastdean
from benchmarks.harness import models, tables
from benchmarks.harness.gate import test_files
from benchmarks.harness.session import Session
from benchmarks.score import subject
from benchmarks.score.baselines import loop_sums
from benchmarks.score.subject import add_options  # noqa: F401
from fastdean.coupling.targets.finding import find_targets
from fastdean.data.examples import Example

RATIOS = (1e-5, 1e-4, 1e-3)
TOP = 256


def tests(options: argparse.Namespace, on_gpu: bool) -> Sequence[str]:
    """It selects as well."""
    return test_files("score", *(("score_kernels", "repeatable") if on_gpu else ()))


def run(session: Session) -> int:
    """Append how alike the loop and fastdean in fp32, and fastdean in bf16, select."""
    options = session.options
    for _ in session.due(["all"]):
        found = subject.load_subject(options, "fp32")
        examples = found.examples(subject.examples_in(options, "bf16"))
        size = {"examples": len(examples), "tokens": sum(map(len, examples))}
        case, rows = f"{found.name}, {options.targets}", []
        for against, other, ratio, metrics in measured(found.model, examples, options.targets):
            setup = {"reference": against, "ratio": ratio, "model": found.name, **size}
            rows.append(session.append("agreement", case, other, setup=setup, metrics=metrics))
        print(tables.rendered(TABLE, rows))
    return 0


def measured(
    model: nn.Module, examples: Sequence[Example], target_modules: str
) -> Iterator[tuple[str, str, float | None, dict[str, Any]]]:
    """(reference, other, ratio or None, metrics) of an fp32 model, which is bf16 afterwards.

    The bf16 model has its weights rounded too, so what differs is both rounding and arithmetic.
    """
    targets = find_targets(model, target_modules)
    sums, loop = loop_sums(model, examples, targets), {}
    for target in targets:
        importance = sums.pop(target.parameter) * target.module.weight.detach().abs()
        loop[target.parameter] = importance.flatten().topk(min(TOP, importance.numel())).indices
    scores = fastdean.score(model, examples, target_modules=target_modules, progress=False)
    ours = {name: scores.select(name, TOP) for name in scores}
    yield "loop fp32", "fastdean fp32", None, compare(loop, ours)

    def selections(scores: fastdean.Scores, ratio: float) -> dict[str, Tensor]:
        entries = scores.entries.items()
        return {name: scores.select(name, int(ratio * each.numel)) for name, each in entries}

    fp32 = {ratio: selections(scores, ratio) for ratio in RATIOS}
    del scores
    models.cast_parameters_(model, torch.bfloat16)
    rounded = fastdean.score(model, examples, target_modules=target_modules, progress=False)
    for ratio, chosen in fp32.items():
        if any(index.numel() for index in chosen.values()):
            found = compare(chosen, selections(rounded, ratio))
            yield "fastdean fp32", "fastdean bf16", ratio, found


def compare(reference: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, Any]:
    """How much of `reference`'s flat indices `other`, of the same matrices, has too.

    Matrices in which `reference` selects nothing are left out.

    Returns:
        k: smallest and largest number selected in a matrix; matrices; equal: how many have two
        equal sets; kept: share of the reference's set that the other selects too, mean over
        matrices; kept_least: in the worst of them.
    """
    pairs = [(set(index.tolist()), set(other[n].tolist())) for n, index in reference.items()]
    pairs = [(ours, theirs) for ours, theirs in pairs if ours]
    if not pairs:
        raise ValueError(
            "reference must select at least one entry, got none; "
            "the matrices are too small for the ratio, so take a larger one"
        )
    kept = [len(ours & theirs) / len(ours) for ours, theirs in pairs]
    sizes = [len(ours) for ours, _ in pairs]
    return {
        "k": [min(sizes), max(sizes)],
        "matrices": len(pairs),
        "equal": sum(ours == theirs for ours, theirs in pairs),
        "kept": sum(kept) / len(kept),
        "kept_least": min(kept),
    }


_COLUMNS: tables.Columns = {
    "selection": "{contender}",
    "of": "{reference}",
    "ratio": lambda row: "" if row["ratio"] is None else f"{row['ratio']:g}",
    "k": lambda row: " to ".join(map(str, dict.fromkeys(row["k"]))),
    "kept (mean)": "{kept:.1%}",
    "kept (worst matrix)": "{kept_least:.1%}",
    "equal matrices": "{equal} of {matrices}",
}
_NOTE = "{case}. {examples} examples, {tokens} tokens."
TABLE = tables.Table("python -m benchmarks agreement", _COLUMNS, _NOTE)
