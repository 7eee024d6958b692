"""What was aimed at on an H100 or H200, 7B shapes in bf16, and what was measured.

A figure is made of recorded rows and of nothing else: one that was not measured is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.harness import store
from benchmarks.harness.store import Record as Row


@dataclass(frozen=True)
class Aim:
    """Attributes:
    text: what is aimed at.
    op: the results file.
    cases: how many measurements make it whole.
    chosen: whether a row is one of them.
    value: (row, all rows) -> its figure; None where what it is compared with is missing.
    least, most: the aim's bound.
    shown: how the figure is written.
    """

    text: str
    op: str
    cases: int
    chosen: Callable[[Row], bool]
    value: Callable[[Row, Sequence[Row]], float | None]
    least: float | None = None
    most: float | None = None
    shown: str = "{:.2f}x"

    def met_by(self, value: float) -> bool:
        return (self.least is None or value >= self.least) and (
            self.most is None or value <= self.most
        )


@dataclass(frozen=True)
class Figure:
    """Attributes:
    met: None where it is missing.
    text: the figure, worst first, or that it is missing.
    """

    aim: str
    met: bool | None
    text: str


def figures(rows: Iterable[tuple[str, Row]], facts: Mapping[str, str]) -> list[Figure]:
    """Of the rows of this code on this machine.

    Args:
        rows: (results file, record).
    """
    here = _of_this_code(rows, facts)
    return [_figure(aim, [row for row in here if row.op == aim.op]) for aim in AIMS]


def _of_this_code(rows: Iterable[tuple[str, Row]], facts: Mapping[str, str]) -> list[Row]:
    """Rows of the same code on the same machine, after its tests; none of toys."""
    return [
        row
        for _, row in rows
        if not row.toy and row.gate == store.PASSED and store.is_of(row, facts)
    ]


def _figure(aim: Aim, rows: list[Row]) -> Figure:
    found: dict[str, float] = {}
    for row in rows:  # oldest first: the last one of a case stands
        if row.seconds and aim.chosen(row):
            value = aim.value(row, rows)
            if value is not None:
                found[row.case] = value
    if not found:
        return Figure(aim.text, None, "not measured")
    worst = (min if aim.most is None else max)(found, key=found.__getitem__)
    met = sum(map(aim.met_by, found.values()))
    text = f"{aim.shown.format(found[worst])} ({worst})"
    if aim.cases > 1:
        best = (max if aim.most is None else min)(found.values())
        text = f"worst {text}, best {aim.shown.format(best)}; met in {met} of {len(found)}"
    if len(found) < aim.cases:
        text += f"; {aim.cases - len(found)} of {aim.cases} missing"
    return Figure(aim.text, met == len(found), text)


def of_floor(row: Row, rows: Sequence[Row]) -> float:
    """Times the floor."""
    return row["median_s"] / row["floor_s"]


def _share_of_floor(row: Row, rows: Sequence[Row]) -> float:
    return row["floor_s"] / row["median_s"]


def _of_bandwidth(row: Row, rows: Sequence[Row]) -> float:
    return row["bytes_per_s"] / row["copy_bandwidth"]


def times_faster_than(impl: str) -> Callable[[Row, Sequence[Row]], float | None]:
    """How many times as long the same case takes `impl`, in its last measurement."""

    def value(row: Row, rows: Sequence[Row]) -> float | None:
        alike = [
            each["median_s"]
            for each in rows
            if each.contender == impl and each.case == row.case and each.seconds
        ]
        return alike[-1] / row["median_s"] if alike else None

    return value


def _importance(row: Row, beavertails: bool) -> bool:
    if row.contender != "triton":
        return False
    if beavertails:
        return row["lengths"] == "beavertails"
    return row["lengths"] == "fixed" and row["tokens_per_example"] >= 256


def _large_collapse(row: Row) -> bool:
    return row.contender == "native" and (row["tokens"], row["features"]) == (16384, 4096)


def _score(row: Row) -> bool:
    return (
        row.contender == "fastdean"
        and row["dtype"] == "bf16"
        and row["examples"] == 128
        and "qwen2-7b, BeaverTails' lengths" in row["model"]
    )


AIMS = (
    Aim(
        "weight importance, BeaverTails' lengths: at most 2x of one plain weight-gradient product",
        "importance",
        12,
        lambda row: _importance(row, beavertails=True),
        of_floor,
        most=2.0,
    ),
    Aim(
        "weight importance, 256 tokens and more: at most 1.5x of that product",
        "importance",
        24,
        lambda row: _importance(row, beavertails=False),
        of_floor,
        most=1.5,
    ),
    Aim(
        "finish + top-k, 18944 x 3584, ratio up to 1e-5: at most 1.3x of one read of W and sums",
        "selection",
        3,
        lambda row: row.contender == "triton" and row["ratio"] <= 1e-5,
        of_floor,
        most=1.3,
    ),
    Aim(
        "unit importance, 16384 x 18944: at least 85 % of the copy bandwidth",
        "unit_importance",
        1,
        lambda row: row.contender == "triton",
        _of_bandwidth,
        least=0.85,
        shown="{:.0%}",
    ),
    Aim(
        "masks, 84 matrices, one launch: at most 60 us of host time",
        "mask",
        1,
        lambda row: row.contender == "native, zeros only" and row["matrices"] == 84,
        lambda row, rows: row["host_s"] * 1e6,
        most=60.0,
        shown="{:.1f} us",
    ),
    Aim(
        "collapse loss and gradient, 16384 x 4096, 287 and 8192 classes: at least 5x the reference",
        "collapse",
        6,
        _large_collapse,
        times_faster_than("reference"),
        least=5.0,
    ),
    Aim(
        "the same: at least 40 % of the copy bandwidth",
        "collapse",
        6,
        _large_collapse,
        _of_bandwidth,
        least=0.4,
        shown="{:.0%}",
    ),
    Aim(
        "score, 7B, 128 examples of BeaverTails' lengths, MLP: at least 50 % of the floor",
        "score",
        1,
        _score,
        _share_of_floor,
        least=0.5,
        shown="{:.0%}",
    ),
    Aim(
        "the same: at least 4x the plain loop",
        "score",
        1,
        _score,
        times_faster_than("loop"),
        least=4.0,
    ),
)


def slower_than_the_reference(
    rows: Iterable[tuple[str, Row]], facts: Mapping[str, str], op: str, impl: str
) -> str:
    """How much slower in its first case, the largest or most usual; "" if it is not, or unknown."""
    here = [row for row in _of_this_code(rows, facts) if row.op == op]
    ours = [row for row in here if row.contender == impl]
    if not ours:
        return ""
    first = [row for row in ours if row.case == ours[0].case][-1]
    faster = times_faster_than("reference")(first, here)
    if faster is None or faster >= 1:
        return ""
    return f"{1 / faster:.2f} times as long: {first.case}"
