"""What can be refused before the first long step, of all seeds and questions at once.

Each job refuses the same before its own first step, which is hours after those of other jobs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.reproduce_spin.paper import ANSWER_TEMPLATE, ASKED, SCORED, TEMPLATE
from experiments.reproduce_spin.steps import Study, scoring_job
from fastdean.data.sources import sample_rows
from fastdean.evaluation.answers.generation import encoded_prompt, require_generating
from fastdean.jobs.coupling.steps import require_selection_as_described
from fastdean.jobs.rows import NumberedRow, encode_rows
from fastdean.models.loading import described_model, load_tokenizer
from fastdean.wording.log import logger
from fastdean.wording.printable import error_line


def require_possible(study: Study, rows: Mapping[str, Sequence[Any]]) -> None:
    """Raise ValueError for what no step of the study could take.

    That is a ratio that selects nothing, and rows and questions that are too long. What a
    configuration does not describe is left to the steps.
    """
    require_selection_as_described(scoring_job(study, 0))
    try:
        model = described_model(study.model, dtype=study.dtype)
        tokenizer = load_tokenizer(study.model)
    except Exception as error:  # Whoever loads the model says what is wrong with it.
        logger.debug("the model is not described before it is loaded: %s", error_line(error))
        return
    require_generating(model)
    for name in SCORED:
        taken = {} if study.skip_bad_rows else _scored(study, rows[name])
        options = {"template": TEMPLATE, "max_length": study.max_length, "name": name}
        encode_rows(list(taken.items()), study.sources[name], tokenizer, model, **options)
    for name in ASKED:
        told, has_room = "", False
        for number, text in enumerate(rows[name], start=1):
            most = study.max_new_tokens
            try:
                encoded_prompt({"prompt": text}, tokenizer, model, ANSWER_TEMPLATE, number, most)
                has_room = True
            except ValueError as error:
                told = told or f"{name} {study.sources[name]!r}: {error}"
                if not study.skip_bad_rows:
                    more = "; or pass skip_bad_rows=True to leave such rows out"
                    raise ValueError(f"{told}{more}") from None
        if not has_room:
            raise ValueError(f"every question had to be left out: {told}")


def _scored(study: Study, rows: Sequence[Any]) -> dict[int, Any]:
    """The rows that are scored with any seed, by their number from 1."""
    found: dict[int, Any] = {}
    for seed in range(study.seeds):
        numbered: list[NumberedRow] = list(enumerate(rows, start=1))
        count = min(study.examples, len(numbered))
        found |= dict(sample_rows(numbered, count, seed)[0])
    return dict(sorted(found.items()))
