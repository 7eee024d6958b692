"""What a run measures only where it is asked to: measures of `--bias`, and answers of its own.

Each is taken of the model as it came and again under every mask, and kept as soon as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from torch import nn

from fastdean.evaluation.answers.generation import (
    MAX_NEW_TOKENS,
    TEMPLATES,
    answers_to,
    encoded_prompt,
)
from fastdean.evaluation.answers.records import Answered
from fastdean.files.declared import Lists, Record, Text
from fastdean.jobs.bias import figures as bias_figures
from fastdean.jobs.coupling.figures import noted
from fastdean.jobs.coupling.job import Job
from fastdean.jobs.rows import NumberedRow
from fastdean.jobs.session import Session
from fastdean.masks import NeuronMask

_ANSWERS = Record({"answers": Lists(Text(longest=100_000_000))})


@dataclass(frozen=True)
class Asked:
    """What is measured besides margins and perplexity.

    Attributes:
        session: of the run; its job says what.
        tokenizer: of the model.
        prompts: by set, the rows whose prompts the model answers.
    """

    session: Session[Job]
    tokenizer: Any
    prompts: Mapping[str, Sequence[NumberedRow]]

    def figures(
        self,
        model: nn.Module,
        state: str,
        notes: list[str],
        mask: NeuronMask | None = None,
        origin: Mapping[int, bias_figures.Found] | None = None,
    ) -> dict[int, bias_figures.Found]:
        """Every figure by the number of its measure; one that cannot be taken is noted.

        Args:
            state: names the files of the figures.
            origin: of the model as it came; under a mask only what stands there is taken.
        """
        found = {}
        with nullcontext() if mask is None else mask.applied(model):
            for number, entry in enumerate(self.session.job.bias):
                if origin is not None and number not in origin:
                    continue
                with noted(notes, f"{entry.partition('=')[0]}, {state},"):
                    found[number] = bias_figures.measure_one(
                        self.session, state, number, entry, model, self.tokenizer
                    )
        return found

    def names(self, figures: Mapping[int, bias_figures.Found]) -> dict[str, tuple[int, str]]:
        """By what it is called beside the others: the number of its measure and its own title."""
        found: dict[str, tuple[int, str]] = {}
        for number, taken in figures.items():
            own = {title: (number, title) for title in taken}
            bias_figures.add(found, self.session.job.bias[number], number, own)
        return found

    def answers(
        self, model: nn.Module, state: str, notes: list[str], mask: NeuronMask | None = None
    ) -> list[Answered]:
        """The answers to the prompts of every set; none where a prompt cannot be answered."""
        asked = [(name, *each) for name, rows in self.prompts.items() for each in rows]
        if not asked or not self.session.job.answers:
            return []
        job = self.session.job
        template = job.template if job.template in TEMPLATES else None

        def take() -> dict[str, Any]:
            prompts = [
                encoded_prompt(row, self.tokenizer, model, template, number, MAX_NEW_TOKENS)
                for _, number, row in asked
            ]
            said = [""] * len(prompts)
            with nullcontext() if mask is None else mask.applied(model):
                for batch in answers_to(
                    model,
                    self.tokenizer,
                    prompts,
                    max_new_tokens=MAX_NEW_TOKENS,
                    progress=self.session.progress,
                ):
                    for place, answer in batch:
                        said[place] = answer.text
            return {"answers": said}

        with noted(notes, f"Answers, {state},"), self.session.costs.step(f"answers, {state}"):
            kept = self.session.folder.figures(f"{state}-answers", take, _ANSWERS)
            return [
                Answered(f"{name}, row {number}", state, str(row["prompt"]), text)
                for (name, number, row), text in zip(asked, kept["answers"], strict=True)
            ]
        return []


def answerable(rows: Sequence[NumberedRow], most: int) -> list[NumberedRow]:
    """The first rows that have a prompt of their own."""
    return [(n, {"prompt": r["prompt"]}) for n, r in rows if isinstance(r.get("prompt"), str)][
        :most
    ]
