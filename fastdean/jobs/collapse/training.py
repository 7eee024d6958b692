"""The job of `fastdean debias`: measure, train with or without the regulariser, measure again.

In the run folder: the figures of every finished step, the training's checkpoints, and at the end
the model, an ordinary Hugging Face folder. The same job goes on where it was interrupted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from math import isinf
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastdean.collapse import CollapseClasses, CollapseRegularizer, collapse_metrics
from fastdean.data.examples import Example
from fastdean.data.skipped import Skipped
from fastdean.debias import Effect, fine_tune, model_card, save_model
from fastdean.debias.course import check_counts, check_course
from fastdean.debias.objectives import require_method
from fastdean.evaluation import Interval, Perplexity, compare_perplexity, perplexity
from fastdean.evaluation.statistics.families import Change
from fastdean.files.declared import Lists, Real, Record, Whole
from fastdean.files.provenance import public_name, public_source
from fastdean.files.storage import remove_folder
from fastdean.jobs import cautions
from fastdean.jobs.bias import asked as bias_asked
from fastdean.jobs.bias import changes as bias_changes
from fastdean.jobs.bias import figures as bias_figures
from fastdean.jobs.bias import sentences as bias_sentences
from fastdean.jobs.collapse.job import DebiasJob
from fastdean.jobs.collapse.measuring import (
    classes_of,
    collapse_figures,
    collapse_results,
)
from fastdean.jobs.folder import RESULTS_FILE
from fastdean.jobs.inputs import benchmark_digests
from fastdean.jobs.published import described_model, published
from fastdean.jobs.rows import (
    NumberedRow,
    content_digest,
    encode_usable,
    same_content_cautions,
    take_rows,
)
from fastdean.jobs.session import Session
from fastdean.models.identity import json_digest
from fastdean.models.label_shift import label_shift
from fastdean.models.ranks.distributed import Ranks
from fastdean.wording.digits import apart

# Of the rows, for the metrics; none of them is trained on.
_MEASURED = 0.25
_FLUENCY = Record(
    {"value": Real(least=0), "nll_sums": Lists(Real()), "token_counts": Lists(Whole())}
)
PERPLEXITY = "perplexity"
# Share of the steps in which the learning rate rises.
_WARMUP = 0.1
# The metrics that are measured in between as well.
_DRAWN = ("unc3_std", "nc3_mean", "nc1_k1", "nc2_interference_std")
_COURSE = ("steps", "epochs", "learning_rate", "batch_size", "accumulation")


@dataclass
class _Prepared:
    """Everything that can be refused before the first long step."""

    model: nn.Module
    tokenizer: Any
    classes: CollapseClasses
    measured_classes: CollapseClasses
    trained: list[dict[str, Any]]
    measured: list[Example]
    identity: dict[str, str] | None
    cautions: list[str]


def run(
    job: DebiasJob,
    out: str | Path,
    *,
    command: str = "",
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Do the job and return its results (the content of results.json).

    Args and errors as for `jobs.run`.
    """
    Ranks.require_alone("debias")
    session = Session.open(job, out, command, overwrite, progress)
    prepared = _prepare(session)
    with session.writing():
        session.folder.claim()
        states = {"before": _measure("before", prepared, session)}
        history = _train(prepared, session)
        states["after"] = _measure("after", prepared, session)
        results = _collect(prepared, states, history, session)
        _save(prepared, results, session)
        session.finish(results)
        # Three times the model in size, and of no use once the model is saved.
        with suppress(OSError):
            remove_folder(session.folder.training)
    return results


def _prepare(session: Session[DebiasJob]) -> _Prepared:
    job = session.job
    with session.costs.step("read data"):
        skipped = {name: Skipped() for name in ("data", "text") if job.skip_bad_rows}
        trained, measured = _split(job, skipped)
        bias_asked.require_readable(job.bias)
    name, source = ("data", job.source) if job.text is None else ("text", job.text)
    texts = _numbered_texts(measured, source, name)
    digests = {"data": json_digest(trained), "text": json_digest(measured)}
    session.compare({**digests, **benchmark_digests(job.bias)})
    model, tokenizer = session.load_model()
    # Collapse, each measure of bias and a causal model's perplexity, before and after.
    session.costs.total = 5 + 2 * (1 + len(job.bias) + label_shift(model))
    model.requires_grad_(True)
    classes = classes_of(job, tokenizer)
    measured_classes = CollapseClasses.from_words(
        tokenizer, job.words, **_options(job, "multi_piece")
    )
    words = json_digest([classes.to_dict(), measured_classes.to_dict()])
    identity = session.compare_model(model, tokenizer, words=words)
    # Refused now, and not after the first measurements.
    require_method(model, job.method)
    bias_asked.require_start(job.bias, job.start_token, model, tokenizer)
    check_counts(save_every=job.save_every, max_length=job.max_length)
    check_course(warmup=_WARMUP, seed=job.seed, **_options(job, *_COURSE))
    _regularizer(model, classes, job).remove()
    options = {"max_length": job.max_length, "name": name}
    _, examples = encode_usable(texts, skipped.get(name), source, tokenizer, model, **options)
    told = same_content_cautions(
        {"data": content_digest(trained), "text": content_digest(measured)}
    )
    told += [sentence for name, rows in skipped.items() for sentence in rows.told(name)]
    session.warn(told)
    rows = [row for _, row in trained]
    return _Prepared(model, tokenizer, classes, measured_classes, rows, examples, identity, told)


def _split(
    job: DebiasJob, skipped: Mapping[str, Skipped]
) -> tuple[list[NumberedRow], list[NumberedRow]]:
    """The rows that are trained on, and those that are measured on."""
    data, text = skipped.get("data"), skipped.get("text")
    rows, _ = take_rows(job.source, None, job.seed, name="data", skipped=data)
    if job.text is not None:
        return rows, take_rows(job.text, None, job.seed, name="text", skipped=text)[0]
    if len(rows) < 2:
        raise ValueError(
            f"data must hold at least 2 rows, got {len(rows)} in {job.source!r}: a quarter of them "
            "is held out to measure on; add rows, or name others to measure on as text="
        )
    apart = max(1, round(_MEASURED * len(rows)))
    return rows[apart:], rows[:apart]


def _numbered_texts(rows: Sequence[NumberedRow], source: str, name: str) -> list[NumberedRow]:
    """The texts of the rows, each as a row with the number of its own.

    Raises:
        ValueError: a row without a text; left out in silence it would still count as measured.
    """
    unread = {number: row for number, row in rows if not _texts(row)}
    if unread:
        number = min(unread)
        chat = unread[number].get("messages") is not None
        raise ValueError(
            f"{name} {source!r}: row {number} must hold text, or prompt and response, or premise "
            f"and hypothesis, got {'a chat (messages)' if chat else sorted(unread[number])}; write "
            "what is to be measured as text"
        )
    return [(number, {"text": text}) for number, row in rows for text in _texts(row)]


def _texts(row: Mapping[str, Any]) -> list[str]:
    """The texts of a row of any method; none of one that cannot be read."""
    if isinstance(row.get("prompt"), str) and isinstance(row.get("response"), str):
        return [f"{row['prompt']} {row['response']}"]
    return [row[key] for key in ("text", "premise", "hypothesis") if isinstance(row.get(key), str)]


def _measure(state: str, prepared: _Prepared, session: Session[DebiasJob]) -> dict[str, Any]:
    """Collapse on the words (not on their control), bias, and perplexity of a causal model."""
    model, examples = prepared.model, prepared.measured

    def fluency() -> dict[str, Any]:
        found = perplexity(
            model,
            examples,
            tokens_per_batch=session.job.tokens_per_batch,
            progress=session.progress,
        )
        return {
            "value": found.value,
            "nll_sums": found.nll_sums.tolist(),
            "token_counts": found.token_counts.tolist(),
        }

    found = {
        "collapse": collapse_figures(session, state, model, examples, prepared.measured_classes),
        "bias": bias_figures.measure(session, state, model, prepared.tokenizer),
    }
    if label_shift(model) == 1:
        with session.costs.step(f"perplexity, {state}", sum(map(len, examples))):
            found["perplexity"] = session.folder.figures(f"{state}-perplexity", fluency, _FLUENCY)
    return found


def _train(prepared: _Prepared, session: Session[DebiasJob]) -> list[dict[str, Any]]:
    job = session.job
    with (
        session.costs.step("training"),
        _regularizer(prepared.model, prepared.classes, job) as regularizer,
    ):
        return fine_tune(
            prepared.model,
            prepared.tokenizer,
            prepared.trained,
            job.method,
            regularizer=regularizer,
            max_length=job.max_length,
            warmup=_WARMUP,
            seed=job.seed,
            out=session.folder.training,
            identity=prepared.identity,
            save_every=job.save_every,
            eval_every=1,
            on_eval=partial(_metrics_at, prepared, session),
            progress=session.progress,
            **_options(job, "form", *_COURSE),
        )


def _metrics_at(
    prepared: _Prepared, session: Session[DebiasJob], step: int, model: nn.Module
) -> dict[str, float | None] | None:
    """What is drawn over the training: neural collapse after 1, 4, 16, 64 steps and so on.

    How long the training is need not be known, and late changes, which are slow, cost little.
    """
    if step.bit_count() != 1 or step.bit_length() % 2 == 0:
        return None
    metrics = collapse_metrics(
        model,
        prepared.measured,
        prepared.measured_classes,
        tokens_per_batch=session.job.tokens_per_batch,
        progress=False,
        **_options(session.job, "shift", "features"),
    )
    values = {name: metrics.values[name].value for name in _DRAWN}
    return {n: None if v is None or isinf(v) else v for n, v in values.items()}


def _over_training(
    states: Mapping[str, Mapping[str, Any]], history: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Neural collapse by step, from before the first to after the last."""

    def of(state: str) -> dict[str, Any]:
        metrics = states[state]["collapse"]["metrics"]
        return {name: metrics[name]["value"] for name in _DRAWN}

    between = [{"step": e["step"], **e["eval"]} for e in history[:-1] if "eval" in e]
    return [{"step": 0, **of("before")}, *between, {"step": len(history), **of("after")}]


def _options(job: DebiasJob, *names: str) -> dict[str, Any]:
    """Of the job, as arguments: whoever takes them checks them."""
    return {name: getattr(job, name) for name in names}


def _regularizer(model: nn.Module, classes: CollapseClasses, job: DebiasJob) -> CollapseRegularizer:
    return CollapseRegularizer(
        model,
        classes,
        job.collapse_strength,
        detach_features=not job.live_features,
        **_options(job, "statistic", "mode", "shift", "features"),
    )


def _collect(
    prepared: _Prepared,
    states: Mapping[str, Mapping[str, Any]],
    history: Sequence[Mapping[str, Any]],
    session: Session[DebiasJob],
) -> dict[str, Any]:
    job, public = session.job, published(session.job)
    fluency = _fluency(states)
    table, tests, judged = bias_changes.results(
        {state: found["bias"] for state, found in states.items()},
        others=_fluency_changes(fluency, job.seed),
        seed=job.seed,
    )
    collapse = collapse_results(
        prepared.measured_classes, {state: found["collapse"] for state, found in states.items()}
    )
    return session.results(
        "FastDEAN: a debiased model, before and after",
        {
            "model": described_model(job.model, prepared.model),
            "data": {
                "training": {
                    "source": public_source(job.source),
                    "examples": len(prepared.trained),
                },
                "measuring": {
                    "source": public["text"] or f"{public_source(job.source)}, other rows",
                    "examples": len(prepared.measured),
                },
            },
            "options": public,
            "collapse": collapse,
            "bias": table,
            "tests": tests,
            **_perplexity_table(fluency, judged),
            "training": {
                "method": job.method,
                "form": job.form,
                "strength": job.collapse_strength,
                "classes of the regulariser": _regularised(job, prepared.classes),
                "steps": len(history),
                "history": [
                    {key: value for key, value in entry.items() if key != "eval"}
                    for entry in history
                ],
                "evaluations": _over_training(states, history),
            },
            "findings": [
                _collapse_change(job, collapse),
                *bias_sentences.change_sentences(table),
                *_perplexity_change(fluency, judged),
            ],
            "warnings": [
                *session.folder.other_versions,
                *prepared.cautions,
                *cautions.about_classes(
                    len(prepared.measured_classes), states["before"]["collapse"]
                ),
                *cautions.about_precision(prepared.model),
                *cautions.about_regularizer(job.collapse_strength, job.control, history),
            ],
            "cost": session.costs.steps,
            "files": {"model": "model", "figures": RESULTS_FILE},
            "manifest": {
                "job": public,
                "classes": prepared.classes.to_dict(),
                "start_token": bias_figures.start_token(states["before"]["bias"]),
            },
        },
    )


def _regularised(job: DebiasJob, classes: CollapseClasses) -> str:
    words = public_source(job.words)
    kind = f"{job.control} control words of {words}" if job.control else f"words of {words}"
    return f"{len(classes)} {kind}"


def _collapse_change(job: DebiasJob, collapse: Mapping[str, Any]) -> str:
    values = collapse["metrics"]["unc3_std"]["values"]
    trained = f"{job.method} with the regulariser at strength {job.collapse_strength:g}"
    if job.collapse_strength == 0:
        trained = f"{job.method} without the regulariser"
    if None in values.values():
        return f"After {trained}, (U)NC3 could not be measured: too few classes in the text."
    words = public_source(job.words)
    before, after = apart(values["before"], values["after"])
    return (
        f"After {trained}, the spread of the alignment of {words} words ((U)NC3, std, on text "
        f"not trained on) is {after}; it was {before}."
    )


def _fluency(states: Mapping[str, Mapping[str, Any]]) -> dict[str, Perplexity]:
    """Perplexity by state; nothing of a masked model."""
    return {
        state: Perplexity(
            torch.tensor(kept["nll_sums"]).double(), torch.tensor(kept["token_counts"])
        )
        for state, found in states.items()
        if (kept := found.get("perplexity"))
    }


def _fluency_changes(fluency: Mapping[str, Perplexity], seed: int) -> dict[str, Change]:
    """The ratio of the perplexities, as one more test of the table.

    Nothing where one is infinite, or no number: they are shown as they are, and not judged.
    """
    if not fluency:
        return {}

    def take(confidence: float) -> Interval:
        return compare_perplexity(
            fluency["before"], fluency["after"], confidence=confidence, seed=seed
        )

    try:
        take(0.95)
    except ValueError:
        return {}
    return {PERPLEXITY: take}


def _perplexity_table(
    fluency: Mapping[str, Perplexity], judged: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    if not fluency:
        return {}
    change = dict(judged.get(PERPLEXITY, {}))
    found = {"ratio": change.pop("mean"), **change} if change else {}
    return {
        PERPLEXITY: {
            "set": "measured text",
            "text": "the measured text, of the same kind as the training text",
            "n": len(fluency["before"].token_counts),
            "tokens": fluency["before"].tokens,
            "origin": fluency["before"].value,
            "masks": {"trained": {"value": fluency["after"].value, **found}},
        }
    }


def _perplexity_change(
    fluency: Mapping[str, Perplexity], judged: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    if not fluency:
        return []
    moved = ""
    if PERPLEXITY in judged:
        moved = f", ratio {bias_sentences.change_words(judged[PERPLEXITY], 'mean', 1.0)}"
    was, now = apart(*(fluency[state].value for state in ("before", "after")))
    return [
        f"Perplexity of the measured text: {was} before, {now} after{moved}. It is of the "
        "same kind as the training text, so that most of a fall is adaptation to it."
    ]


def _save(prepared: _Prepared, results: dict[str, Any], session: Session[DebiasJob]) -> None:
    job = session.job
    effects = [*_collapse_effects(results), *_bias_effects(results), *_fluency_effects(results)]
    card = model_card(
        f"{Path(job.model).name}-{job.method}",
        base_model=public_name(job.model),
        method=job.method,
        strength=job.collapse_strength or None,
        data=f"{public_source(job.source)}, {len(prepared.trained)} rows",
        regularised=_regularised(job, prepared.classes),
        command=results["command"],
        effects=effects,
    )
    with session.costs.step("save"):
        save_model(
            session.folder.model,
            prepared.model,
            prepared.tokenizer,
            card=card,
            manifest=results["manifest"],
            overwrite=True,
        )


def _collapse_effects(results: Mapping[str, Any]) -> list[Effect]:
    names = {"unc3_std": "(U)NC3, std of the words' alignment", "nc3_mean": "NC3, mean alignment"}
    found = []
    for key, name in names.items():
        values = results["collapse"]["metrics"][key]["values"]
        if None not in values.values():
            found.append(Effect(name, values["before"], values["after"]))
    return found


def _bias_effects(results: Mapping[str, Any]) -> list[Effect]:
    return [
        Effect(
            f"{name}, {row['unit']}",
            row["before"]["value"],
            row["after"]["value"],
            row["raw_change"]["low"],
            row["raw_change"]["high"],
            row["raw_change"]["verdict"],
            None if row["neutral"] is None else row["change"]["verdict"],
            p_adjusted=row["raw_change"]["p_holm"],
        )
        for name, row in results["bias"].items()
    ]


def _fluency_effects(results: Mapping[str, Any]) -> list[Effect]:
    table = results.get(PERPLEXITY)
    if not table or table["origin"] is None:
        return []
    found = table["masks"]["trained"]
    if found["value"] is None:
        return []
    return [
        Effect(
            "Perplexity of the measured text",
            table["origin"],
            found["value"],
            found.get("low"),
            found.get("high"),
            found.get("verdict"),
            p_adjusted=found.get("p_holm"),
            no_effect=1.0,
        )
    ]
