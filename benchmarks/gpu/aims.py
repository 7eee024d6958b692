"""What was aimed at on an H100 or H200, 7B shapes in bf16, and what was measured.

A figure is made of recorded rows and of nothing else: one that was not measured is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from benchmarks.harness import store
from benchmarks.harness.store import Record as Row


class Aim(NamedTuple):
    """Attributes:
    text: what is aimed at.
    op: the results file.
    cases: how many measurements make it whole.
    contender: whose figure it is.
    chosen: whether a row of the contender's is one of them.
    value: (row, all rows) -> its figure; None where what it is compared with is missing.
    least, most: the aim's bound, one of them.
    shown: how the figure is written.
    """

    text: str
    op: str
    cases: int
    contender: str
    chosen: Callable[[Row], bool]
    value: Callable[[Row, Sequence[Row]], float | None]
    least: float | None = None
    most: float | None = None
    shown: str = "{:.2f}x"

    def is_met_by(self, value: float) -> bool:
        return value >= self.least if self.most is None else value <= self.most


class Figure(NamedTuple):
    """`met`: None where it is missing; `text`: the figure, worst first, or that it is missing."""

    aim: str
    met: bool | None
    text: str


def figures(rows: Iterable[Row], facts: Mapping[str, str]) -> list[Figure]:
    """Of the rows of this code on this machine."""
    here = _of_this_code(rows, facts)
    return [_figure(aim, [row for row in here if row.op == aim.op]) for aim in AIMS]


def slower_text(rows: Iterable[Row], facts: Mapping[str, str], op: str, impl: str) -> str:
    """How much slower than the reference an implementation is in its first case, the largest or
    most usual; "" if it is not, or unknown."""
    here = [row for row in _of_this_code(rows, facts) if row.op == op]
    ours = [row for row in here if row.contender == impl]
    if not ours:
        return ""
    first = [row for row in ours if row.case == ours[0].case][-1]
    faster = _faster_than_reference(first, here)
    if faster is None or faster >= 1:
        return ""
    return f"{1 / faster:.2f} times as long: {first.case}"


def _of_this_code(rows: Iterable[Row], facts: Mapping[str, str]) -> list[Row]:
    """Rows of the same code on the same machine, after its tests; none of toys."""
    tested = [row for row in rows if not row.toy and row.gate == store.PASSED]
    return [row for row in tested if store.is_of(row, facts)]


def _figure(aim: Aim, rows: list[Row]) -> Figure:
    chosen = [r for r in rows if r.seconds and r.contender == aim.contender and aim.chosen(r)]
    # Oldest first: the last one of a case stands.
    values = {row.case: aim.value(row, rows) for row in chosen}
    values = {case: value for case, value in values.items() if value is not None}
    if not values:
        return Figure(aim.text, None, "not measured")
    ordered = sorted(values, key=values.__getitem__, reverse=aim.least is None)
    met = sum(map(aim.is_met_by, values.values()))
    text = f"{aim.shown.format(values[ordered[0]])} ({ordered[0]})"
    if aim.cases > 1:
        best = aim.shown.format(values[ordered[-1]])
        text = f"worst {text}, best {best}; met in {met} of {len(values)}"
    if len(values) < aim.cases:
        text += f"; {aim.cases - len(values)} of {aim.cases} missing"
    return Figure(aim.text, met == len(values), text)


def _of_floor(row: Row, rows: Sequence[Row]) -> float:
    return row["median_s"] / row["floor_s"]


def _of_bandwidth(row: Row, rows: Sequence[Row]) -> float:
    return row["bytes_per_s"] / row["copy_bandwidth"]


def _faster_than(impl: str, row: Row, rows: Sequence[Row]) -> float | None:
    """How many times as long the same case takes `impl`, in its last measurement."""
    same = [r for r in rows if r.contender == impl and r.case == row.case and r.seconds]
    return same[-1]["median_s"] / row["median_s"] if same else None


_faster_than_reference = partial(_faster_than, "reference")


def _large_collapse(row: Row) -> bool:
    return (row["tokens"], row["features"]) == (16384, 4096)


def _score_7b(row: Row) -> bool:
    of_the_model = "qwen2-7b, BeaverTails' lengths" in row["model"]
    return of_the_model and (row["dtype"], row["examples"]) == ("bf16", 128)


# fmt: off
AIMS = (
    Aim("weight importance, BeaverTails' lengths: at most 2x of one plain weight-gradient product",
        "importance", 12, "triton", lambda row: row["lengths"] == "beavertails",
        _of_floor, most=2.0),
    Aim("weight importance, 256 tokens and more: at most 1.5x of that product",
        "importance", 24, "triton",
        lambda row: row["lengths"] == "fixed" and row["tokens_per_example"] >= 256,
        _of_floor, most=1.5),
    Aim("finish + top-k, 18944 x 3584, ratio up to 1e-5: at most 1.3x of one read of W and sums",
        "selection", 3, "triton", lambda row: row["ratio"] <= 1e-5, _of_floor, most=1.3),
    Aim("unit importance, 16384 x 18944: at least 85 % of the copy bandwidth",
        "unit_importance", 1, "triton", lambda row: True,
        _of_bandwidth, least=0.85, shown="{:.0%}"),
    Aim("masks, 84 matrices, one launch: at most 60 us of host time",
        "mask", 1, "native, zeros only", lambda row: row["matrices"] == 84,
        lambda row, rows: row["host_s"] * 1e6, most=60.0, shown="{:.1f} us"),
    Aim("collapse loss and gradient, 16384 x 4096, 287 and 8192 classes: at least 5x the reference",
        "collapse", 6, "native", _large_collapse, _faster_than_reference, least=5.0),
    Aim("the same: at least 40 % of the copy bandwidth",
        "collapse", 6, "native", _large_collapse, _of_bandwidth, least=0.4, shown="{:.0%}"),
    Aim("score, 7B, 128 examples of BeaverTails' lengths, MLP: at least 50 % of the floor",
        "score", 1, "fastdean", _score_7b,
        lambda row, rows: row["floor_s"] / row["median_s"], least=0.5, shown="{:.0%}"),
    Aim("the same: at least 4x the plain loop", "score", 1, "fastdean", _score_7b,
        partial(_faster_than, "loop"), least=4.0),
)
# fmt: on
