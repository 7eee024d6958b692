"""Gender knowledge kept: does a model still know the words whose gender is their meaning?

A queen is a woman, whatever a model thinks of nurses. Debiasing by ablation can lose such knowledge
together with the stereotype (GKnow, arXiv 2605.12299). The sentences here were written for this
project; that benchmark's items are not among them, and its figures are not comparable.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastdean.data.sources import PRESETS
from fastdean.default_device import cpu_by_default
from fastdean.evaluation.bias.likelihood import Likelihoods
from fastdean.evaluation.bias.result import mean_result, members, preferred, ties
from fastdean.evaluation.bias.rows import Row, Source, benchmark_rows, require_columns
from fastdean.evaluation.bias.start import LikelihoodResult, Start, named

EMBEDDED = "embedded:gender_facts"
COLUMNS = ("sentence", "right", "wrong", "gender", "topic")
GENDERS = ("female", "male")
BLANK = "_"


@cpu_by_default
def gender_facts(
    model: nn.Module,
    tokenizer: Any,
    source: Source = EMBEDDED,
    *,
    start: Start = "auto",
    tokens_per_batch: int | None = None,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
    progress: bool = True,
) -> LikelihoodResult:
    """Share of sentences, in %, that a model finds likelier with the word of the right gender.

    Causal models: log p of the whole sentence. Masked models: its pseudo-log-likelihood, every
    token masked in turn (Salazar et al. 2020). A tie counts as half.

    Args:
        model: a causal or masked language model; evaluated without dropout and left in its mode.
        source: rows or a file with the columns `COLUMNS`: a `sentence` with one "_", the words
            that fill it, and the `gender` of the right one; or "embedded:gender_facts".
        start: what a causal model's text starts from, see `start.start_token`; the result names it.
        tokens_per_batch: a bound for memory; the result does not depend on it.
        confidence, seed: of the intervals, over sentences.
        resamples: not used; here because other measures have it.

    Returns:
        Guessing has 50 %; there is no neutral value, as every sentence has a right answer. Compare
        it before and after an edit. Categories: "answer: female" and "answer: male" (a model that
        always prefers one pronoun shows there alone), and the topics. Figures: `ties`, and
        `mean_difference_nats`, right minus wrong.

    Raises:
        ValueError: another kind of model, a missing column, a sentence without one blank, words
            that are the same, or a log-likelihood that is no finite number.
    """
    ask = Likelihoods(model, tokenizer, start, tokens_per_batch=tokens_per_batch, progress=progress)
    rows = gender_fact_rows(source)
    filled = [
        row["sentence"].replace(BLANK, row[word]) for word in ("right", "wrong") for row in rows
    ]
    right, wrong = ask.sentences(filled)[0].chunk(2)
    ask.require_finite(torch.stack([right, wrong], dim=1))
    preference = preferred(right, wrong)
    result = mean_result(
        "Gender facts, share of sentences likelier with the right word",
        100.0 * preference,
        unit="%",
        neutral=None,
        categories=members(
            [f"answer: {row['gender']}" for row in rows], [row["topic"] for row in rows]
        ),
        figures={
            "ties": ties(preference),
            "mean_difference_nats": float((right - wrong).mean()),
        },
        notes=[
            f"{'log-likelihood' if ask.start else 'pseudo-log-likelihood'} of whole sentences; "
            "50 % is guessing, higher is more knowledge"
        ],
        confidence=confidence,
        seed=seed,
    )
    return named(result, ask.start)


def gender_fact_rows(source: Source = EMBEDDED) -> list[Row]:
    """The rows of `source`, with the columns `COLUMNS`; arguments and errors as `gender_facts`."""
    if isinstance(source, str) and source == EMBEDDED:
        return list(PRESETS[EMBEDDED]())
    rows = benchmark_rows(source, split="test")
    require_columns(rows, COLUMNS, "gender facts", gender=GENDERS)
    for number, row in enumerate(rows, start=1):
        if row["sentence"].count(BLANK) != 1:
            raise ValueError(
                f"row {number} must have one {BLANK!r} in its sentence, where the words go, got "
                f"{row['sentence'].count(BLANK)} in {row['sentence']!r:.60}; correct the row"
            )
        if row["right"] == row["wrong"]:
            raise ValueError(
                f"row {number} must have two different words, got {row['right']!r} as right and as "
                "wrong; correct the row"
            )
    return rows
