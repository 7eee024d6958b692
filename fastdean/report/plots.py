"""The page's plots, drawn as SVG by hand so that a report needs no plotting library.

Every plot is a function of its data and a width in pixels: the page holds a wide and a narrow
drawing of each and shows one of them, because a plot that is merely shrunk to a phone cannot be
read. What colour says, shape or outline says as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from statistics import fmean
from textwrap import wrap

from fastdean.report.axis import Axis
from fastdean.report.estimates import Estimate
from fastdean.report.markup import Html, element, items, join
from fastdean.report.quantities import MISSING, count, decimal, measured

WIDE, NARROW = 800, 360
_LEFT, _RIGHT = 46, 10
# Widths of a character at the labels' size in the widest of the usual fonts.
_GLYPH, _STRONG_GLYPH = 7.3, 8.4
# From one line of a label to the next.
_LINE = 17


def responsive(draw: Callable[[int], Html]) -> Html:
    """The same plot for wide and for narrow screens; the style sheet shows one of the two."""
    return element(
        "div",
        element("div", draw(WIDE), class_="for-wide"),
        element("div", draw(NARROW), class_="for-narrow"),
    )


def coupling_bars(
    panels: dict[str, dict[int | None, dict[str, int]]],
    label: str,
    width: int,
    *,
    done: str,
    stacked: bool,
) -> Html:
    """One panel per module, one bar per layer (None: outside of the layers, drawn last).

    A bar's pale track is the size k of the top set and its solid part the entries that were edited;
    `done` says how. Where these are the coupled ones less those that the general set protects
    (`stacked`), the protected ones are outlined above them, so that both together are the coupled.
    """
    slots = sorted(
        {layer for bars in panels.values() for layer in bars},
        key=lambda layer: (layer is None, layer or 0),
    )
    every_bar = [bar for bars in panels.values() for bar in bars.values()]
    tallest = max((above for bar in every_bar for *_, above in _layered(bar, stacked)), default=0)
    heading, tall, below = 22, 64, 14
    pitch = (width - _LEFT - _RIGHT) / max(1, len(slots))
    thick = pitch - min(3.0, pitch / 4) if pitch < 40 else 32.0
    parts = []
    for row, (module, bars) in enumerate(panels.items()):
        top = row * (heading + tall + below)
        axis = Axis(0, max(1, tallest), top + heading + tall, top + heading)
        parts += _panel_heading(module, bars, width, top + 13, done)
        for value in sorted({0, tallest}):
            parts += [_text(count(value), _LEFT - 6, axis.place(value) + 4, "end")]
        parts += [_line(_LEFT, axis.start, width - _RIGHT, axis.start, "axis")]
        for slot, layer in enumerate(slots):
            if layer in bars:
                left = _LEFT + slot * pitch + (pitch - thick) / 2
                parts += _stack(axis, _layered(bars[layer], stacked), left, thick)
    height = len(panels) * (heading + tall + below) + 26
    shown = _every(slots, pitch)
    for slot, layer in enumerate(slots):
        if slot in shown:
            name = "–" if layer is None else str(layer)
            parts += [_text(name, _LEFT + (slot + 0.5) * pitch, height - 24, "middle")]
    parts += [_text("layer", (_LEFT + width - _RIGHT) / 2, height - 6, "middle", "name")]
    return _drawing(parts, width, height, label)


def _panel_heading(module: str, bars: dict, width: int, y: float, done: str) -> list[Html]:
    edited = sum(bar["kept"] for bar in bars.values())
    shared = sum(bar["coupled"] for bar in bars.values())
    note = f"{count(shared)} in both, {count(edited)} {done}"
    name = _cut(module, note, width - _LEFT - _RIGHT)
    return [_text(name, _LEFT, y, "start", "strong"), _text(note, width - _RIGHT, y, "end")]


def _layered(bar: dict[str, int], stacked: bool) -> list[tuple[str, int, int]]:
    """Style, lower and upper count of a bar's parts, the later drawn over the earlier."""
    parts = [("track", 0, bar["k"]), ("solid", 0, bar["kept"])]
    if stacked:
        parts.append(("outlined", bar["kept"], bar["kept"] + bar["removed"]))
    return parts


def _stack(
    axis: Axis, parts: Sequence[tuple[str, int, int]], left: float, thick: float
) -> list[Html]:
    return [
        _box(left, axis.place(above), thick, axis.place(below) - axis.place(above), style)
        for style, below, above in parts
        if above > below
    ]


# Line, style and mark of the shares in an overlap plot.
_SHARES = (("shared", "second", "ring"), ("left", "first", "square"), ("chance", "quiet", None))


def overlap_lines(points: Sequence[dict], label: str, width: int, entries: str) -> Html:
    """Shares of the top set (y, per cent) against the ratio that sizes it (x, logarithmic)."""
    height, right = 270, width - _RIGHT
    x = Axis.around([point["ratio"] for point in points], _LEFT + 8, right, log=True)
    shares = [100 * p[name] for p in points for name, *_ in _SHARES if measured(p[name])]
    y = Axis.around([0, *shares], height - 48, 12)
    parts = _grid(y, width, " %")
    parts += _ticks(x, max(2, int((right - _LEFT) / 60)), y.start)
    axis_name = f"ratio (share of each matrix's {entries})"
    parts += [_text(axis_name, (_LEFT + right) / 2, height - 8, "middle", "name")]

    def place(point: dict, name: str) -> tuple[float, float] | None:
        drawn = measured(point["ratio"]) and point["ratio"] > 0 and measured(point[name])
        return (x.place(point["ratio"]), y.place(100 * point[name])) if drawn else None

    for name, style, mark in _SHARES:
        parts += _curve([place(point, name) for point in points], style, mark)
    return _drawing(parts, width, height, label)


def ratio_panels(
    panels: dict[str, tuple[float, Sequence[tuple[float, Estimate]]]],
    chosen: float | None,
    label: str,
    width: int,
    axis_name: str,
) -> Html:
    """One panel for each quantity, one below the other, against ratios (x, logarithmic).

    A panel's name is above it, its value is the one of no effect with its estimates. A dot is
    filled where it is an effect, and a dashed line marks the chosen ratio in all panels.
    """
    heading, tall, below, right = 22, 110, 16, width - _RIGHT
    ratios = [ratio for _, points in panels.values() for ratio, _ in points]
    x = Axis.around([*ratios, chosen], _LEFT + 14, right - 8, log=True)
    parts: list[Html] = []
    for row, (name, (no_effect, points)) in enumerate(panels.items()):
        top = row * (heading + tall + below)
        values = [v for _, each in points for v in (each.value, each.low, each.high)]
        y = Axis.around([no_effect, *values], top + heading + tall, top + heading)
        parts += [_text(_cut(name, "", width - _LEFT), _LEFT, top + 13, "start", "strong")]
        parts += _grid(y, width)
        parts += [_line(_LEFT, y.place(no_effect), right, y.place(no_effect), "zero")]
        if measured(chosen) and chosen > 0:
            parts += [_line(x.place(chosen), y.end, x.place(chosen), y.start, "grid")]
        for ratio, each in points:
            place = x.place(ratio)
            if measured(each.low) and measured(each.high):
                low, high = y.place(each.low), y.place(each.high)
                parts += [_line(place, low, place, high, "whisker")]
                parts += [_line(place - 4, end, place + 4, end, "whisker") for end in (low, high)]
            if measured(each.value):
                style = "dot filled" if each.is_effect(no_effect) else "dot"
                parts += [element("circle", cx=place, cy=y.place(each.value), r=5, class_=style)]
    floor = len(panels) * (heading + tall + below) - below
    parts += _ticks(x, max(2, int((right - _LEFT) / 60)), floor)
    parts += [_text(axis_name, (_LEFT + right) / 2, floor + 40, "middle", "name")]
    return _drawing(parts, width, floor + 48, label)


def dependence_lines(layers: Sequence[dict], label: str, width: int) -> Html:
    """HSIC per layer before and after the edit over the band of the permuted pairs."""
    height, right = 270, width - _RIGHT
    pitch = (right - _LEFT) / max(1, len(layers))
    names = ("before", "after", "null_low", "null_high")
    y = Axis.around([layer.get(name) for layer in layers for name in names], height - 48, 12)
    middles = [_LEFT + (slot + 0.5) * pitch for slot in range(len(layers))]
    parts = []
    for middle, layer in zip(middles, layers, strict=True):
        low, high = layer.get("null_low"), layer.get("null_high")
        if measured(low) and measured(high):
            tall = max(1.0, y.place(low) - y.place(high))
            parts += [_box(middle - pitch / 2, y.place(high), pitch, tall, "band")]
    parts += _grid(y, width)
    shown = _every(layers, pitch)
    for slot, (middle, layer) in enumerate(zip(middles, layers, strict=True)):
        if slot in shown:
            parts += [_text(str(layer.get("layer", slot)), middle, y.start + 19, "middle")]
    parts += [_text("layer", (_LEFT + right) / 2, height - 8, "middle", "name")]
    for name, style, mark in (("before", "second", "ring"), ("after", "first", "square")):
        places = [
            (middle, y.place(layer[name])) if measured(layer.get(name)) else None
            for middle, layer in zip(middles, layers, strict=True)
        ]
        parts += _curve(places, style, mark if pitch >= 9 else None)
    return _drawing(parts, width, height, label)


def step_line(points: Sequence[tuple[float, float]], label: str, width: int) -> Html:
    """One quantity (y) against the steps of a training (x)."""
    height, right = 220, width - _RIGHT
    x = Axis.around([step for step, _ in points], _LEFT + 8, right)
    y = Axis.around([value for _, value in points], height - 48, 12)
    parts = _grid(y, width)
    parts += _ticks(x, max(2, int((right - _LEFT) / 60)), y.start)
    parts += [_text("step", (_LEFT + right) / 2, height - 8, "middle", "name")]
    places = [(x.place(step), y.place(value)) for step, value in points]
    parts += _curve(places, "first", "square" if len(points) <= 20 else None)
    return _drawing(parts, width, height, label)


def interval_rows(
    rows: Sequence[Estimate],
    label: str,
    *,
    no_effect: float,
    axis_name: str,
    span: Iterable[object] = (),
    width: int = NARROW,
) -> Html:
    """A dot with its interval per row and a line at `no_effect`; the dot of an effect is filled.

    `span` holds values that the axis must cover as well, so that plots side by side share a scale.
    """
    pitch, inset = 46, 24
    written = [_written(row, no_effect) for row in rows]
    names = [_beside(row.name, value, width) for row, value in zip(rows, written, strict=True)]
    # Where a row's last line of text begins; its interval is below.
    tops = [4 + n * pitch + _LINE * more for n, more in enumerate(_lines_before(names))]
    height = 4 + pitch * len(rows) + _LINE * sum(len(name) - 1 for name in names) + 44
    values = [value for row in rows for value in (row.value, row.low, row.high)]
    x = Axis.around([no_effect, *values, *span], inset, width - inset)
    floor = height - 42
    zero = x.place(no_effect)
    parts = [_line(inset, floor, width - inset, floor, "axis")]
    # Of every row, beside its interval alone: no line runs through the text above it.
    for row_top in tops:
        parts += [_line(zero, row_top + 20, zero, row_top + 38, "zero")]
    parts += _ticks(x, 5, floor)
    parts += [_text(axis_name, width / 2, height - 6, "middle", "name")]
    for row, name, value, row_top in zip(rows, names, written, tops, strict=True):
        parts += _name(name, row_top)
        parts += [_text(value, width - 2, row_top + 14, "end", "value")]
        parts += _interval_row(row, x, row_top, no_effect)
    return _drawing(parts, width, height, label)


def _written(row: Estimate, no_effect: float) -> str:
    value, ends = row.written(no_effect)
    return value + (f" {ends}" if ends != MISSING else " no interval" if value != MISSING else "")


def _interval_row(row: Estimate, x: Axis, top: float, no_effect: float) -> list[Html]:
    parts = []
    y = top + 29
    if measured(row.low) and measured(row.high):
        low, high = x.place(row.low), x.place(row.high)
        parts += [_line(low, y, high, y, "whisker")]
        parts += [_line(end, y - 4, end, y + 4, "whisker") for end in (low, high)]
    if measured(row.value):
        style = "dot filled" if row.is_effect(no_effect) else "dot"
        parts += [element("circle", cx=x.place(row.value), cy=float(y), r=5, class_=style)]
    return parts


def value_strips(
    rows: Sequence[tuple[str, Sequence[float], tuple[str, str]]],
    label: str,
    width: int,
    axis_name: str,
) -> Html:
    """A strip for each row's values, a mark each, with a tick at their mean.

    A row is a name, its values, and the style and mark they are drawn in.
    """
    pitch, inset = 40, 24
    notes = [f"mean {decimal(fmean(own), 3)} of {count(len(own))}" for _, own, _ in rows]
    names = [_beside(row[0], note, width) for row, note in zip(rows, notes, strict=True)]
    before = _lines_before(names)
    floor = pitch * len(rows) + _LINE * sum(len(name) - 1 for name in names) + 6
    x = Axis.around([v for _, values, _ in rows for v in values], inset, width - inset)
    parts = [_line(inset, floor, width - inset, floor, "axis")]
    parts += _ticks(x, 5, floor)
    parts += [_text(axis_name, width / 2, floor + 36, "middle", "name")]
    for number, (_, values, (style, mark)) in enumerate(rows):
        top, note = number * pitch + _LINE * before[number], notes[number]
        parts += _name(names[number], top)
        parts += [_text(note, width - 2, top + 14, "end")]
        mean = x.place(fmean(values))
        parts += [_line(mean, top + 20, mean, top + 38, "whisker")]
        parts += _marks([(x.place(value), top + 29) for value in values], style, mark)
    return _drawing(parts, width, floor + 44, label)


def legend(samples: Iterable[tuple[tuple[str, str | None], str]]) -> Html | None:
    """A list of samples, each a style with its mark, and what they stand for."""
    return items("ul", (join([_swatch(*style), words]) for style, words in samples), "legend")


def _swatch(style: str, mark: str | None) -> Html:
    if style in ("track", "solid", "outlined", "band"):
        parts = [_box(1, 2, 22, 10, style)]
    else:
        parts = _curve([(1, 7), (23, 7)], style, None) + _marks([(12, 7)], style, mark)
    return element("svg", *parts, viewBox="0 0 24 14", width=24, height=14, aria_hidden="true")


def _curve(places: Sequence[tuple | None], style: str, mark: str | None) -> list[Html]:
    """A line through the places, broken where one is None, with a mark on each."""
    parts, run = [], []
    for place in [*places, None]:
        if place is not None:
            run.append(place)
        elif run:
            points = " ".join(f"{x:.2f},{y:.2f}" for x, y in run)
            parts += [element("polyline", points=points, class_=f"line {style}")]
            parts += _marks(run, style, mark or ("ring" if len(run) == 1 else None))
            run = []
    return parts


def _marks(places: Sequence[tuple], style: str, mark: str | None) -> list[Html]:
    if mark == "ring":
        return [
            element("circle", cx=float(x), cy=float(y), r=4, class_=f"mark ring {style}")
            for x, y in places
        ]
    if mark == "square":
        return [_box(x - 2.5, y - 2.5, 5, 5, f"mark {style}") for x, y in places]
    return []


def _grid(y: Axis, width: int, unit: str = "") -> list[Html]:
    parts = []
    for value, text in y.ticks(5):
        style = "axis" if value == y.low else "grid"
        parts += [_line(_LEFT, y.place(value), width - _RIGHT, y.place(value), style)]
        parts += [_text(text + unit, _LEFT - 6, y.place(value) + 4, "end", "tick")]
    return parts


def _ticks(x: Axis, most: int, floor: float) -> list[Html]:
    parts = []
    for value, text in x.ticks(most):
        place = x.place(value)
        parts += [_line(place, floor, place, floor + 5, "axis")]
        parts += [_text(text, place, floor + 19, "middle", "tick")]
    return parts


def _every(slots: Sequence[object], pitch: float, room: float = 26) -> range:
    """The slots whose labels are shown: every n-th, n a round number that leaves them apart."""
    steps = (1, 2, 5, 10, 20, 50, 100, 1000, len(slots) + 1)
    step = next(step for step in steps if step * pitch >= room or step > len(slots))
    return range(0, len(slots), step)


def _most_beside(note: str, width: float) -> int:
    """How many characters of a strong label have room in `width` pixels to the left of `note`."""
    return max(2, int((width - _GLYPH * (len(note) + 1)) / _STRONG_GLYPH))


def _cut(name: str, note: str, width: float) -> str:
    """As much of the name of a module or a set, which has one line, as fits beside `note`."""
    most = _most_beside(note, width)
    return name if len(name) <= most else name[: most - 1] + "…"


def _beside(name: str, note: str, width: float) -> list[str]:
    """A strong label in lines of `width` pixels, of which the last leaves room for `note`."""
    most = _most_beside(note, width)
    if len(name) <= most:
        return [name]
    lines = wrap(name, max(2, int(width / _STRONG_GLYPH)), break_on_hyphens=False)
    return lines if len(lines[-1]) <= most else [*lines, ""]


def _lines_before(names: Sequence[Sequence[str]]) -> list[int]:
    """Of each row, how many lines it and those above it have more than one."""
    return [*accumulate(len(name) - 1 for name in names)]


def _name(lines: Sequence[str], top: float) -> list[Html]:
    """A label's lines, the last of which is the row's."""
    return [
        _text(line, 2, top + 14 - _LINE * above, "start", "strong")
        for above, line in zip(range(len(lines) - 1, -1, -1), lines, strict=True)
        if line
    ]


def _text(text: str, x: float, y: float, anchor: str, style: str | None = None) -> Html:
    return element("text", text, x=float(x), y=float(y), text_anchor=anchor, class_=style)


def _line(x1: float, y1: float, x2: float, y2: float, style: str) -> Html:
    return element("line", x1=float(x1), y1=float(y1), x2=float(x2), y2=float(y2), class_=style)


def _box(x: float, y: float, width: float, height: float, style: str) -> Html:
    return element(
        "rect", x=float(x), y=float(y), width=float(width), height=float(height), class_=style
    )


def _drawing(parts: Iterable[Html], width: int, height: float, label: str) -> Html:
    return element(
        "svg",
        *parts,
        viewBox=f"0 0 {width} {height:.0f}",
        width=width,
        height=int(height),
        role="img",
        aria_label=label,
        class_="plot",
    )
