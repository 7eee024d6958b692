"""The sections on neural collapse: its metrics, a training with the regulariser, bias measures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastdean.report.estimates import family_words
from fastdean.report.markup import Html, element, figure, folded, items, join, table
from fastdean.report.plots import NARROW, responsive, step_line, value_strips
from fastdean.report.quantities import MISSING, count, decimal, measured, plural
from fastdean.report.summary import change_of, measures_table

_MOST_WORDS = 10
_WHEN_COLLAPSED = (
    "The paper's regulariser lowers (U)NC3 (unc3_std): 0 where all words are aligned alike. With "
    "full collapse the nc1, nc2_equinorm, interference_std and cv figures are 0, interference_mean "
    "is its target, nc3_mean and nc4_agreement are 1."
)


def collapse_section(collapse: Mapping) -> Html:
    """The words' alignment by group, the worst of them, and every metric with its definition.

    `collapse` holds "metrics", from a metric's name to {"definition", "values", "notes"}, the last
    two by state ("before", "after"); "classes" {"kept", "left_out", "groups"}; "settings"; "words",
    each with its "alignment" by state; "groups", by state and name.
    """
    metrics = {name: metric or {} for name, metric in (collapse.get("metrics") or {}).items()}
    states = list(dict.fromkeys(s for m in metrics.values() for s in (m.get("values") or {})))
    rows = [
        [name, metric.get("definition") or "", *(_metric_value(metric, each) for each in states)]
        for name, metric in metrics.items()
    ]
    columns = ["Metric", "Definition", *(state.capitalize() for state in states)]
    notes = [f"{', '.join(where)}: {note}" for note, where in _noted(metrics).items()]
    words = collapse.get("words") or []
    return join(
        [
            _alignment_figure(words),
            _group_table(collapse.get("groups") or {}),
            _worst_table(words),
            element("p", _class_words(collapse.get("classes") or {})),
            _setting_words(collapse.get("settings") or {}),
            element("p", _WHEN_COLLAPSED, class_="note"),
            table("Neural collapse on these words", columns, rows, words=columns[:2]),
            items("ul", notes, "note"),
        ]
    )


def _alignments(words: Sequence[Mapping], group: str, state: str) -> list[float]:
    values = [_alignment(word, state) for word in words if str(word.get("group")) == group]
    return [value for value in values if measured(value)]


def _alignment(word: Mapping, state: str) -> Any:
    return (word.get("alignment") or {}).get(state)


def _states(words: Sequence[Mapping]) -> list[str]:
    return list(dict.fromkeys(state for word in words for state in word.get("alignment") or {}))


def _alignment_figure(words: Sequence[Mapping]) -> Html | None:
    """Each word's alignment, a mark each, group by group before and after."""
    groups, states = dict.fromkeys(str(word.get("group")) for word in words), _states(words)
    marks = {state: ("second", "ring") for state in states[:-1]} | {
        state: ("first", "square") for state in states[-1:]
    }
    rows = [
        (f"{group}, {state}" if len(states) > 1 else group, values, marks[state])
        for group in groups
        for state in states
        if (values := _alignments(words, group, state))
    ]
    if not rows:
        return None
    label = "Alignment of each word's mean with its row of the output embedding. " + " ".join(
        f"{name}: {plural(len(values), 'word')} from {decimal(min(values), 3)} to "
        f"{decimal(max(values), 3)}."
        for name, values, _ in rows
    )
    return figure(
        "Alignment (NC3) of every word, by group; with (U)NC3 of 0 all stand in one place",
        responsive(lambda width: value_strips(rows, label, width, "cosine")),
    )


# Of a group: heading, key.
_OF_GROUP = {"NC3, mean": "nc3_mean", "(U)NC3, std": "unc3_std", "NC1 (CDNV)": "nc1_k1"}


def _group_table(groups: Mapping) -> Html | None:
    states = list(groups)
    names = dict.fromkeys(name for found in groups.values() for name in found or {})
    if not names:
        return None
    columns = ["Group", "Words", *(f"{h}, {s}" for h in _OF_GROUP for s in states)]
    rows = []
    for name in names:
        by_state = [(groups[state] or {}).get(name) or {} for state in states]
        numbers = [decimal(each.get(k)) for k in _OF_GROUP.values() for each in by_state]
        rows.append([name, count(by_state[0].get("words")), *numbers])
    caption = "Neural collapse by group of words; alignment is centred on all words"
    return table(caption, columns, rows, words=columns[:1])


def _worst_table(words: Sequence[Mapping]) -> Html | None:
    """The words whose means align least in the last state."""
    states = _states(words)
    known = [word for word in words if states and measured(_alignment(word, states[-1]))]
    if not known:
        return None
    worst = sorted(known, key=lambda word: _alignment(word, states[-1]))[:_MOST_WORDS]
    columns = ["Word", "Group", "Tokens", *(f"Alignment, {state}" for state in states)]
    rows = [
        [
            element("code", word.get("word") or MISSING),
            str(word.get("group") or MISSING),
            count(word.get("tokens")),
            *(decimal(_alignment(word, state), 3) for state in states),
        ]
        for word in worst
    ]
    return table("The words with the worst alignment", columns, rows, words=columns[:2])


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
    drawn = [
        _step_figure(history, "base", "Loss of the method"),
        _step_figure(history, "collapse", "Term of the regulariser, without its strength"),
        *(_step_figure(evaluations, name, _OVER_TRAINING.get(name, name)) for name in measures),
    ]
    return join(
        [
            element("div", *drawn, class_="pair"),
            _setting_words(settings),
            _history_table(history),
        ]
    )


# What is measured in between, on text that is not trained on.
_OVER_TRAINING = {
    "unc3_std": "(U)NC3 over training, std of the words' alignment",
    "nc3_mean": "NC3 over training, mean alignment",
    "nc1_k1": "NC1 over training, CDNV",
    "nc2_interference_std": "NC2 over training, std of the means' cosines",
}


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
    return figure(heading, step_line(known, label, NARROW))


def _history_table(history: Sequence[Mapping]) -> Html:
    names = ("step", "loss", "base", "collapse")
    shown = [name for name in names if any(measured(row.get(name)) for row in history)]
    if not shown:
        return element("p", "No step was taken.")
    rows = [
        [(count if name == "step" else decimal)(row.get(name)) for name in shown] for row in history
    ]
    return folded(
        f"Every step in numbers ({count(len(history))})",
        table("Training", [name.capitalize() for name in shown], rows),
    )


def bias_section(bias: Mapping, tests: Mapping | None = None) -> Html:
    """Each measure before and after, its change with an interval, and the neutral value.

    The top of the page draws the changes.

    `bias` maps a measure to {"unit", "neutral", "definition", "before", "after", "raw_change",
    "change"}, the last four {"value", "low", "high", "n"}, the changes with their verdicts:
    "raw_change" is after - before, "change" that of the distance to the neutral value.
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
    changed = any(change_of(name, measure) for name, measure in measures.items())
    note = family_words(tests)
    caption = "Measures before and after" if changed else "Measures of this model"
    return join(
        [
            measures_table(measures, caption).html(),
            None if note is None else element("p", note, class_="note"),
            element("p", said, class_="note"),
            items("ul", definitions, "note"),
        ]
    )
