"""CrowS-Pairs: which of two sentences that differ in whom they are about a model finds more likely.

Nangia et al. 2020 (EMNLP). The first sentence of a pair stereotypes more. Their score is the share
of pairs whose first sentence is preferred; 50 % is neutral.
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import Any

import torch
from torch import Tensor, nn

from fastdean.default_device import cpu_by_default
from fastdean.evaluation.bias.likelihood import Encoded, Likelihoods, Question
from fastdean.evaluation.bias.result import mean_result, members, preferred, ties
from fastdean.evaluation.bias.rows import Row, Source, benchmark_rows, require_columns
from fastdean.evaluation.bias.start import LikelihoodResult, Start, named

COLUMNS = ("sent_more", "sent_less", "stereo_antistereo", "bias_type")
# The hub's copy holds numbers in place of these names, in this order.
DIRECTIONS = ("stereo", "antistereo")
BIAS_TYPES = (
    "race-color", "socioeconomic", "gender", "disability", "nationality", "sexual-orientation",
    "physical-appearance", "religion", "age",
)  # fmt: skip


@cpu_by_default
def crows_pairs(
    model: nn.Module,
    tokenizer: Any,
    source: Source = "nyu-mll/crows_pairs",
    *,
    start: Start = "auto",
    tokens_per_batch: int | None = None,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
    progress: bool = True,
) -> LikelihoodResult:
    """Share of pairs, in %, whose more stereotyping sentence the model prefers.

    - Masked models, as published: the pseudo-log-likelihood of the tokens that both sentences
      have in common, each masked in turn; the tokens that differ are seen and not scored.
    - Causal models, which see nothing of what follows: the log-likelihood of the whole sentence,
      the tokens that differ included. A frequent group name then makes its sentence likely.

    A tie counts as half a pair (the published code counts it as none) and is reported.

    Args:
        model: a causal or masked language model; evaluated without dropout and left in its mode.
        source: rows, a file (the benchmark's .csv) or a hub id, with the columns `COLUMNS`.
        start: what a causal model's text starts from, see `start.start_token`; the result names it.
        tokens_per_batch: a bound for memory; the result does not depend on it.
        confidence, seed: of the intervals, over pairs.
        resamples: not used; here because other measures have it.

    Returns:
        Neutral is 50 %. Categories: the bias types, and "direction: stereo" (the sentences follow
        the stereotype) and "direction: antistereo" (the first goes against it). Figures: `ties`,
        the number of tied pairs, and `mean_difference_nats`, first minus second.

    Raises:
        ValueError: another kind of model, a tokenizer without a mask token for a masked one, a
            missing column, an unknown direction, a pair without common tokens, or a log-likelihood
            that is no finite number.
    """
    ask = Likelihoods(model, tokenizer, start, tokens_per_batch=tokens_per_batch, progress=progress)
    rows = crows_pairs_rows(source)
    first, second = _scores(ask, rows)
    ask.require_finite(torch.stack([first, second], dim=1))
    preference = preferred(first, second)
    result = mean_result(
        "CrowS-Pairs, share of pairs whose more stereotyping sentence is preferred",
        100.0 * preference,
        unit="%",
        neutral=50.0,
        categories=members(
            [row["bias_type"] for row in rows],
            [f"direction: {row['stereo_antistereo']}" for row in rows],
        ),
        figures={
            "ties": ties(preference),
            "mean_difference_nats": float((first - second).mean()),
        },
        notes=[
            "log-likelihood of the whole sentence, as the model is causal"
            if ask.start
            else "pseudo-log-likelihood of the tokens common to both sentences, each masked in turn"
        ],
        confidence=confidence,
        seed=seed,
    )
    return named(result, ask.start)


def crows_pairs_rows(source: Source) -> list[Row]:
    """The rows of `source`, with the columns `COLUMNS`; arguments and errors as `crows_pairs`."""
    rows = [_named(row) for row in benchmark_rows(source, split="test")]
    require_columns(rows, COLUMNS, "CrowS-Pairs", stereo_antistereo=DIRECTIONS)
    return rows


def _named(row: Row) -> Row:
    """The row with names in place of the hub's numbers."""
    named = dict(row)
    for column, names in (("stereo_antistereo", DIRECTIONS), ("bias_type", BIAS_TYPES)):
        value = row.get(column)
        if isinstance(value, int) and 0 <= value < len(names):
            named[column] = names[value]
    return named


def _scores(ask: Likelihoods, rows: list[Row]) -> Sequence[Tensor]:
    """Log-likelihoods of the first and of the second sentences, float64 [n] each, in nats."""
    sides = [[row[column] for row in rows] for column in ("sent_more", "sent_less")]
    if ask.start:
        return ask.sentences([*sides[0], *sides[1]])[0].chunk(2)
    encoded = [[ask.encode(sentence) for sentence in side] for side in sides]
    common = [
        _common_tokens(first, second, number)
        for number, (first, second) in enumerate(zip(*encoded, strict=True), start=1)
    ]
    questions = [question for side in zip(*common, strict=True) for question in side]
    return ask.pseudo(questions)[0].chunk(2)


def _common_tokens(first: Encoded, second: Encoded, number: int) -> tuple[Question, Question]:
    """The tokens that the sentences have in common, by the longest matching runs of ids."""
    own, other = (text.ids[list(text.own)].tolist() for text in (first, second))
    runs = SequenceMatcher(None, own, other, autojunk=False).get_matching_blocks()
    in_first = tuple(first.own[run.a + i] for run in runs for i in range(run.size))
    in_second = tuple(second.own[run.b + i] for run in runs for i in range(run.size))
    if not in_first:
        raise ValueError(
            f"row {number} must have sentences with tokens in common, got none; a masked model is "
            "compared on those alone, so correct the row or leave it out"
        )
    return first.question(in_first), second.question(in_second)
