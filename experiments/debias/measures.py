"""The columns of the second paper's table: what each measure reads, and its figures of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import nn

from experiments.debias.figures import Figure
from experiments.debias.settings import GLUE_HEAD, MEASURES, NLI_HEAD, PUBLISHED, SNLI
from fastdean.data.sources import load_rows, load_table
from fastdean.debias.gender_words import GenderWords
from fastdean.debias.texts import embedded_neutral_words
from fastdean.evaluation import bias, glue
from fastdean.evaluation.bias.rows import benchmark_rows, require_columns
from fastdean.evaluation.bias.seat import SETS, seat_sets
from fastdean.evaluation.bias.winobias import winobias_rows
from fastdean.evaluation.classifier import fine_tuned_classifier
from fastdean.jobs.bias.asked import READERS
from fastdean.jobs.bias.figures import results_of
from fastdean.wording.alike import told_together
from fastdean.wording.printable import error_line

TRAINING = "training"
# Intervals over a measure's rows are not shown: those that count here are over seeds.
_QUIET: dict[str, Any] = {"resamples": 100, "progress": False}
_PAIR = ("premise", "hypothesis")
Rows = list[Mapping[str, Any]]


def sources_of(measures: Sequence[str], method: str, given: Mapping[str, str]) -> dict[str, Any]:
    """What is to be read, by name: the given source, or the default; None where there is none."""
    found: dict[str, Any] = {TRAINING: given.get(TRAINING, PUBLISHED[method].data.value)}
    for name in (source for measure in measures for source in reads(measure)):
        kind = name.partition(":")[0]
        found[name] = given.get(kind, (SNLI if kind == "snli" else MEASURES[kind]).source)
    return found


def reads(measure: str) -> tuple[str, ...]:
    """The names of the sources that a measure reads: its own, and that of its head."""
    return tuple(filter(None, (measure, MEASURES[measure.partition(":")[0]].also)))


def read_all(sources: Mapping[str, Any], method: str, limit: int | None) -> dict[str, Any]:
    """Every source read, before any model is loaded.

    Args:
        limit: the first so many rows of each, to try the command out; None: all.
    Raises:
        ValueError: naming each source that is not given or cannot be read.
    """
    found, missing = {}, {}
    for name, source in sources.items():
        try:
            found[name] = _read(name, source, method, limit)
        except (ValueError, TypeError, OSError) as error:
            missing[name] = error_line(error)
    if missing:
        raise ValueError(
            f"source must be readable for each of {', '.join(sources)}, got {len(missing)} that "
            f"are not: {told_together(missing)}; give each as --source NAME=FILE, or leave its "
            "measure out with --without NAME"
        )
    return found


def _read(name: str, source: Any, method: str, limit: int | None) -> Any:
    kind, _, task = name.partition(":")
    if source is None:
        what = PUBLISHED[method].data.source if name == TRAINING else MEASURES[kind].what
        raise ValueError(f"no hub id is known: {what}")
    if name == TRAINING:
        return _training_rows(method, [source] if isinstance(source, str) else source)[:limit]
    if kind == "glue":
        return [part.first(limit) for part in glue.glue_rows(task, source)]
    if kind == "snli":
        rows = benchmark_rows(source, split="train")
        return glue.labelled(rows, _PAIR, glue.NLI_LABELS).first(limit)
    if kind == "seat":
        return _seat_tests(Path(source).expanduser())
    return _READERS[kind](source)[:limit]


def _training_rows(method: str, sources: Sequence[str]) -> Rows:
    return [row for source in sources for row in _of_method(method, source)]


def _of_method(method: str, source: str) -> Rows:
    name = source.partition("::")[0]
    if method == "mabel" and not name.startswith("embedded:"):
        # Of pairs with labels those that entail.
        rows: Rows = load_table(source, split="train")
        require_columns(rows, _PAIR, "MABEL")
        entails = [row for row in rows if row.get("label", 0) in (0, "0", "entailment")]
        return [{key: row[key] for key in _PAIR} for row in entails]
    if method == "ase" and (name == MEASURES["winobias"].source or Path(name).is_dir()):
        # Their swapped copies are the anti-stereotyped sentences.
        return [{"text": row["pro"]} for row in winobias_rows(source)]
    if name.endswith((".txt", ".en")):
        lines = Path(name).expanduser().read_text("utf-8").splitlines()
        rows = [{"text": line.strip()} for line in lines if line.strip()]
    else:
        rows = load_rows(source)
    if method == "adept":
        # As ADEPT collects them: texts with a gendered or a neutral word.
        gendered = GenderWords.from_lists(None).pattern
        neutral = {*embedded_neutral_words()}
        rows = [r for r in rows if gendered.search(r["text"]) or neutral & {*r["text"].split()}]
    return rows


def _gender(rows: Sequence[Mapping[str, Any]], **wanted: str) -> Rows:
    wanted = {"bias_type": "gender", **wanted}
    found = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
    if not found:
        raise ValueError(f"no row with {wanted}: give the benchmark's own file")
    return found


def _seat_tests(folder: Path) -> dict[str, Any]:
    files = sorted(folder.glob("sent-weat*.jsonl"))
    if not files:
        raise ValueError(f"no sent-weat*.jsonl in the folder {str(folder)!r}")
    return {
        file.stem: {
            key: {"category": category, "examples": examples}
            for key, category, examples in zip(SETS, *seat_sets(file), strict=True)
        }
        for file in files
    }


_READERS = {
    **READERS,
    "stereoset": lambda source: _gender(READERS["stereoset"](source), type="intrasentence"),
    "crows_pairs": lambda source: _gender(READERS["crows_pairs"](source)),
    "bec_pro": lambda source: READERS["bec_pro"](source or None),
    "bias_nli": lambda source: benchmark_rows(source) if source else bias.nli_rows(),
}


def head_steps(name: str, data: Mapping[str, Any]) -> int:
    """Of the heads that a measure trains."""
    if name == "bias_nli":
        return NLI_HEAD.value.steps(len(data["snli"].texts))
    is_glue = name.startswith("glue:")
    return GLUE_HEAD.value.steps(len(data[name][0].texts)) if is_glue else 0


def taken(
    name: str, data: Mapping[str, Any], model: nn.Module, tokenizer: Any, seed: int
) -> dict[str, Figure]:
    """The columns of one measure, by name. `seed`: of a head that is trained."""
    kind, _, task = name.partition(":")
    head = {"seed": seed, "progress": False}
    if kind == "glue":
        score = glue.glue(model, tokenizer, task, *data[name], course=GLUE_HEAD.value, **head)
        return {f"GLUE {task}": Figure(score, "%")}
    if kind == "seat":
        return _seat(partial(bias.seat, model, tokenizer, permutations=1, **_QUIET), data["seat"])
    if kind == "bias_nli":
        rows, head["labels"] = data["snli"], glue.NLI_LABELS
        course = NLI_HEAD.value
        model = fine_tuned_classifier(
            model, tokenizer, rows.texts, rows.targets, course=course, **head
        )
    ask = partial(getattr(bias, kind), model, tokenizer, data[kind], **_QUIET)
    if kind == "winobias":
        by_type = ask(mismatched="leave_out").share.by_category
        told = [(f"WinoBias {t}", by_type[t]) for t in ("type1", "type2") if t in by_type]
        return {column: Figure(interval.mean, "%", 50.0) for column, interval in told}
    results = zip(MEASURES[kind].columns, results_of(ask()), strict=True)
    found = {column: Figure(each.value, each.unit, each.neutral) for column, each in results}
    if kind == "bias_nli":
        found["Bias-NLI T:0.7"] = Figure(ask(tau=0.7).threshold.value, "", 1.0)
    return found


def _seat(ask: Callable[..., Any], tests: Mapping[str, Any]) -> dict[str, Figure]:
    """The p-value of one model is left aside: what is tested here is over seeds."""
    sizes = {name: ask(test).value for name, test in tests.items()}
    found = {f"SEAT {name.removeprefix('sent-')}": Figure(d, "", 0.0) for name, d in sizes.items()}
    return found | {"SEAT mean size": Figure(fmean(map(abs, sizes.values())), "", 0.0)}
