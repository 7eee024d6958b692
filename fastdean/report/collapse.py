"""The sections on neural collapse: its metrics, a training with the regulariser, bias measures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fastdean.report.estimates import Estimate
from fastdean.report.markup import Html, element, figure, folded, items, join, table
from fastdean.report.plots import interval_rows, responsive, step_line
from fastdean.report.quantities import count, decimal, measured, plural

_WHEN_COLLAPSED = (
    "The paper's regulariser lowers (U)NC3 (unc3_std): 0 where all words are aligned alike. With "
    "full collapse the nc1, nc2_equinorm, interference_std and cv figures are 0, interference_mean "
    "is its target, nc3_mean and nc4_agreement are 1."
)


def collapse_section(collapse: Mapping) -> Html:
    """Every metric with its definition, in each state of the model, and which words were classes.

    `collapse` holds "metrics", from a metric's name to {"definition", "values", "notes"}, the last
    two by state ("before", "after"); "classes" {"kept", "left_out", "groups"}; "settings".
    """
    metrics = {name: metric or {} for name, metric in (collapse.get("metrics") or {}).items()}
    states = list(dict.fromkeys(s for m in metrics.values() for s in (m.get("values") or {})))
    rows = [
        [name, metric.get("definition") or "", *(_metric_value(metric, each) for each in states)]
        for name, metric in metrics.items()
    ]
    columns = ["Metric", "Definition", *(state.capitalize() for state in states)]
    notes = [f"{', '.join(where)}: {note}" for note, where in _noted(metrics).items()]
    return join(
        [
            element("p", _class_words(collapse.get("classes") or {})),
            _setting_words(collapse.get("settings") or {}),
            element("p", _WHEN_COLLAPSED, class_="note"),
            table("Neural collapse on these words", columns, rows, words=columns[:2]),
            items("ul", notes, "note"),
        ]
    )


def _noted(metrics: Mapping) -> dict[str, list[str]]:
    """Each remark once, with the metrics and states that it was made on."""
    found: dict[str, list[str]] = {}
    for name, metric in metrics.items():
        states = metric.get("notes") or {}
        for note in dict.fromkeys(part for text in states.values() for part in text.split("; ")):
            made = [state for state, text in states.items() if note in text.split("; ")]
            where = name if len(made) == len(states) else f"{name} ({', '.join(made)})"
            if note:
                found.setdefault(note, []).append(where)
    return found


def _metric_value(metric: Mapping, state: str) -> str:
    value = (metric.get("values") or {}).get(state)
    # JSON has no infinity: it is kept as text, and means that two classes have one mean.
    return "infinite" if value == "inf" else decimal(value)


def _class_words(classes: Mapping) -> str:
    groups = classes.get("groups") or {}
    inside = ", ".join(f"{name} {count(number)}" for name, number in groups.items())
    words = f"{count(classes.get('kept'))} classes, each one form of a word"
    words += f" ({inside})" if inside else ""
    left = classes.get("left_out")
    if measured(left) and left:
        words += f"; {plural(int(left), 'word')} left out, as the tokenizer does not have them"
    return f"{words}."


def _setting_words(settings: Mapping) -> Html | None:
    said = "; ".join(f"{name}: {value}" for name, value in settings.items() if value is not None)
    return element("p", said, class_="note") if said else None


def training_section(training: Mapping) -> Html:
    """The loss and the regulariser's term step by step, and what was measured in between.

    `training` holds "history", a list of {"step", "base", "collapse", "loss"}, and "evaluations", a
    list of {"step", <name>: <number>, ...}; all else is shown as the settings of the training.
    """
    history = training.get("history") or []
    evaluations = training.get("evaluations") or []
    settings = {k: v for k, v in training.items() if k not in ("history", "evaluations")}
    measures = dict.fromkeys(key for row in evaluations for key in row if key != "step")
    return join(
        [
            _setting_words(settings),
            _step_figure(history, "base", "Loss of the method"),
            _step_figure(history, "collapse", "Term of the regulariser, without its strength"),
            *(_step_figure(evaluations, name, name) for name in measures),
            _history_table(history) if history else element("p", "No step was taken."),
        ]
    )


def _step_figure(rows: Sequence[Mapping], name: str, heading: str) -> Html | None:
    points = [(row.get("step"), row.get(name)) for row in rows]
    known = [(step, value) for step, value in points if measured(step) and measured(value)]
    if not known:
        return None
    first, last = known[0], known[-1]
    label = (
        f"{heading} against steps: {decimal(first[1])} at step {count(first[0])}, "
        f"{decimal(last[1])} at step {count(last[0])}."
    )
    return figure(heading, responsive(lambda width: step_line(known, label, width)))


def _history_table(history: Sequence[Mapping]) -> Html:
    names = ("step", "loss", "base", "collapse")
    shown = [name for name in names if any(measured(row.get(name)) for row in history)]
    rows = [
        [(count if name == "step" else decimal)(row.get(name)) for name in shown] for row in history
    ]
    return folded(
        f"Every step in numbers ({count(len(history))})",
        table("Training", [name.capitalize() for name in shown], rows),
    )


def bias_section(bias: Mapping) -> Html:
    """Each measure before and after, its change with an interval, and the neutral value.

    `bias` maps a measure to {"unit", "neutral", "definition", "before", "after", "change"}, the
    last three {"value", "low", "high", "n"}, the change with its "verdict"; what a change is of
    stands in "definition".
    """
    measures = {name: measure or {} for name, measure in bias.items()}
    definitions = [
        join([element("strong", name), f": {measure['definition']}"])
        for name, measure in measures.items()
        if measure.get("definition")
    ]
    said = (
        "A change is called an effect where its interval leaves zero out, a test agrees and there "
        "were enough items. The intervals cover the drawing of the items, not the choice of words, "
        "data or seed."
    )
    columns = ["Measure", "Reading of the change", "Neutral", "Before", "After", "Change"]
    columns += ["Interval of the change", "Items"]
    rows = [_bias_row(name, measure) for name, measure in measures.items()]
    return join(
        [
            element("p", said),
            *(_change_figure(n, m) for n, m in measures.items() if m.get("change")),
            table("Bias measures before and after", columns, rows, words=columns[:2]),
            items("ul", definitions, "note"),
        ]
    )


def _change_figure(name: str, measure: Mapping) -> Html:
    row = Estimate.of(name, measure["change"])
    axis_name = ", ".join(filter(None, ["change", str(measure.get("unit") or "")]))
    return element(
        "figure", interval_rows([row], row.sentence(0), no_effect=0, axis_name=axis_name)
    )


def _bias_row(name: str, measure: Mapping) -> list[object]:
    change = Estimate.of(name, measure["change"]) if measure.get("change") else None
    states = [measure.get(state) or {} for state in ("before", "after")]
    return [
        name,
        change.reading(0) if change else "not compared",
        decimal(measure.get("neutral")),
        *(" ".join(Estimate.of(name, state).written(1)) if state else "" for state in states),
        *(change.written(0) if change else ("", "")),
        count(next(filter(measured, (state.get("n") for state in states)), None)),
    ]
