"""Judges at work: a model in memory, a classifier, a model behind a server, a list of phrases.

Each takes answers and gives (number of the answer, verdict), some at a time.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fastdean.data.tokenising import tokenised_prompt
from fastdean.evaluation.answers.continuing import require_generating
from fastdean.evaluation.answers.generation import answers_to
from fastdean.evaluation.answers.records import Answered
from fastdean.evaluation.answers.server import Server, in_order
from fastdean.evaluation.judging.phrases import judged_by_phrases
from fastdean.evaluation.judging.templates import (
    UNPARSED,
    JudgeTemplate,
    Verdict,
    special_tokens,
)
from fastdean.models.model_state import evaluation_state, input_device, max_tokens
from fastdean.wording.doing import titled

Verdicts = Generator[list[tuple[int, Verdict]], None, None]

_TOO_LONG = "longer than the judge's positions"
_CLASSIFIED_AT_A_TIME = 16


def verdicts_of_model(
    template: JudgeTemplate,
    model: nn.Module,
    tokenizer: Any,
    answers: Sequence[Answered],
    *,
    tokens_per_batch: int | None = None,
    progress: bool = True,
) -> Verdicts:
    """Verdicts that a causal model writes, greedily."""
    require_generating(model)
    special, longest = special_tokens(tokenizer), max_tokens(model)
    places, prompts, broken = [], [], []
    for place, each in enumerate(answers):
        shown, count = template.shown(each.prompt, each.answer, special)
        ids = _ids(template, shown, tokenizer, place)
        if longest is not None and len(ids) + template.max_new_tokens > longest:
            yield [(place, Verdict(UNPARSED, None, _TOO_LONG, "", count))]
            continue
        places.append(place)
        prompts.append(ids)
        broken.append(count)
    with closing(
        answers_to(
            model,
            tokenizer,
            prompts,
            max_new_tokens=template.max_new_tokens,
            tokens_per_batch=tokens_per_batch,
            progress=progress,
            keep_special=template.after is not None,
            title="verdicts",
        )
    ) as batches:
        for batch in batches:
            yield [
                (places[i], replace(template.read(said.text), defused=broken[i]))
                for i, said in batch
            ]


def verdicts_of_classifier(
    template: JudgeTemplate,
    model: nn.Module,
    tokenizer: Any,
    answers: Sequence[Answered],
    *,
    progress: bool = True,
) -> Verdicts:
    """Verdicts that are the most likely label of a sequence classifier.

    Texts of one length in tokens go together, so that nothing is padded.
    """
    from tqdm.auto import tqdm

    of_transformers: Any = model
    labels = {int(number): str(label) for number, label in of_transformers.config.id2label.items()}
    unknown = sorted(label for label in labels.values() if label.casefold() not in template.labels)
    if unknown:
        raise ValueError(
            f"judge {template.name!r} must have a verdict for each label of its model, got none "
            f"for {unknown[0]!r}; add it to labels"
        )
    special, longest = special_tokens(tokenizer), max_tokens(model)
    # Without a padding token a decoder does not know where the texts of a batch end.
    padded = getattr(of_transformers.config, "pad_token_id", None) is not None
    at_a_time = _CLASSIFIED_AT_A_TIME if padded else 1
    groups: dict[int, list[tuple[int, list[int], int]]] = {}
    with tqdm(
        total=len(answers), desc=titled("verdicts"), unit="answers", disable=not progress
    ) as bar:
        for place, each in enumerate(answers):
            shown, count = template.shown(each.prompt, each.answer, special)
            ids = _ids(template, shown, tokenizer, place)
            if longest is not None and len(ids) > longest:
                yield [(place, Verdict(UNPARSED, None, _TOO_LONG, "", count))]
                bar.update()
                continue
            groups.setdefault(len(ids), []).append((place, ids, count))
        for _, group in sorted(groups.items()):
            for start in range(0, len(group), at_a_time):
                part = group[start : start + at_a_time]
                shares = _shares(of_transformers, [ids for _, ids, _ in part])
                yield [
                    (place, replace(_labelled(template, labels, row), defused=count))
                    for (place, _, count), row in zip(part, shares, strict=True)
                ]
                bar.update(len(part))


def verdicts_of_server(
    template: JudgeTemplate,
    server: Server,
    answers: Sequence[Answered],
    *,
    concurrency: int = 8,
    progress: bool = True,
) -> Verdicts:
    """Verdicts that a model behind a server writes, greedily."""
    from tqdm.auto import tqdm

    def ask(each: Answered) -> Verdict:
        shown, count = template.shown(each.prompt, each.answer)
        if isinstance(shown, str):
            said = server.complete(shown, template.max_new_tokens)
        else:
            said = server.chat(shown, template.max_new_tokens)
        return replace(template.read(said.text, whole=True), defused=count)

    with (
        tqdm(
            total=len(answers), desc=titled("verdicts"), unit="answers", disable=not progress
        ) as bar,
        closing(in_order(ask, answers, concurrency=concurrency, stop=server.stop)) as found,
    ):
        for place, verdict in found:
            yield [(place, verdict)]
            bar.update()


def verdicts_of_phrases(answers: Sequence[Answered]) -> Verdicts:
    """Whether each answer refuses, by the list of phrases."""
    yield [(place, judged_by_phrases(each.answer)) for place, each in enumerate(answers)]


def _ids(template: JudgeTemplate, shown: Any, tokenizer: Any, place: int) -> list[int]:
    if isinstance(shown, str):
        return list(tokenizer(shown, add_special_tokens=template.special_tokens)["input_ids"])
    try:
        return tokenised_prompt(
            {"messages": shown},
            tokenizer,
            None,
            place,
            generation_prompt=template.generation_prompt,
        )
    except ValueError as error:
        raise ValueError(f"judge {template.name!r}: {error}") from None


@torch.no_grad()
def _shares(model: Any, rows: Sequence[Sequence[int]]) -> torch.Tensor:
    ids = torch.tensor(rows, dtype=torch.int64).to(input_device(model))
    with evaluation_state(model):
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return logits.float().softmax(-1).cpu()


def _labelled(template: JudgeTemplate, labels: dict[int, str], row: torch.Tensor) -> Verdict:
    best = int(row.argmax())
    if not bool(row.isfinite().all()):
        return Verdict(UNPARSED, None, "not a number", "")
    return template.read_label(labels[best], f"{labels[best]} {float(row[best]):.4f}")
