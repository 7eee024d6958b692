"""Judging as one call: answers in memory to verdicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import Any

from torch import nn

from fastdean.data.prompts import prompt_row, prompt_text
from fastdean.default_device import cpu_by_default
from fastdean.evaluation.answers.generation import Answer
from fastdean.evaluation.answers.records import ORIGINAL, Answered
from fastdean.evaluation.answers.server import TIMEOUT_SECONDS, Server, require_timeout
from fastdean.evaluation.judging.judges import (
    Verdicts,
    verdicts_of_classifier,
    verdicts_of_model,
    verdicts_of_phrases,
    verdicts_of_server,
)
from fastdean.evaluation.judging.phrases import PHRASES
from fastdean.evaluation.judging.templates import (
    CAUSAL,
    JudgeTemplate,
    Verdict,
    read_template,
)
from fastdean.wording.mendable import InputTypeError


@cpu_by_default
def judge(
    prompts: Sequence[str | Mapping[str, Any]],
    answers: Sequence[str | Answer],
    by: str | JudgeTemplate = PHRASES,
    model: nn.Module | str | None = None,
    tokenizer: Any = None,
    *,
    served: str | None = None,
    key_from: str | None = None,
    tokens_per_batch: int | None = None,
    concurrency: int = 8,
    server_timeout: float = TIMEOUT_SECONDS,
    progress: bool = True,
) -> list[Verdict]:
    """Have a judge say of each answer whether it is safe and, where it does, whether it refuses.

    Equals the command `fastdean judge`, which also keeps every verdict, counts and compares them.

    Args:
        prompts: texts, or rows of `prompt` or `messages`, as for `generate`.
        answers: one for each prompt, texts or what `generate` returns.
        by: "phrases" (refusals by a list of phrases, which needs no model), the name of a template
            of the package, a template's .json file, or what `read_template` returns.
        model: the judge, loaded, a causal model or a classifier as the template says; or the
            address of an OpenAI-compatible server.
        tokenizer: of the loaded judge.
        served, key_from: of a server, the judge's name there and the environment variable with the
            key; None: the only model that is served, and no key.
        tokens_per_batch: of a causal judge that is loaded; a bound for memory.
        concurrency: requests to a server at a time.
        server_timeout: seconds that one of them may take, before it is made once more.

    Returns:
        A verdict for each answer, in their order. `compare_yes_no` compares `Verdict.is_safe` of
        two models' answers to the same prompts.

    Raises:
        ValueError, TypeError: no such judge, other numbers of prompts and answers, a judge without
            its model; what `read_template` and the model raise.
    """
    template = by if isinstance(by, JudgeTemplate) else None
    if template is None and by != PHRASES:
        template = read_template(str(by))
    if len(prompts) != len(answers):
        raise ValueError(
            f"answers must be one for each of the {len(prompts)} prompts, got {len(answers)}; "
            "pass both in one order"
        )
    pairs = enumerate(zip(prompts, answers, strict=True), start=1)
    asked = [
        Answered(number, ORIGINAL, _asked(prompt, number), _text(answer, number))
        for number, (prompt, answer) in pairs
    ]
    found: dict[int, Verdict] = {}
    judging = _verdicts(
        template,
        model,
        tokenizer,
        asked,
        served,
        key_from,
        tokens_per_batch,
        concurrency,
        server_timeout,
        progress,
    )
    with closing(judging) as batches:
        for batch in batches:
            found.update(batch)
    return [found[place] for place in range(len(asked))]


def _verdicts(
    template: JudgeTemplate | None,
    model: nn.Module | str | None,
    tokenizer: Any,
    asked: Sequence[Answered],
    served: str | None,
    key_from: str | None,
    tokens_per_batch: int | None,
    concurrency: int,
    server_timeout: float,
    progress: bool,
) -> Verdicts:
    if template is None:
        if model is not None:
            raise ValueError(
                f"model must be left out where the list of phrases judges, got "
                f"{type(model).__name__}; name the template that it is for with by"
            )
        return verdicts_of_phrases(asked)
    if isinstance(model, str):
        if template.kind != CAUSAL:
            raise ValueError(
                f"model must be a loaded classifier for judge {template.name!r}, got the address "
                f"{model!r}; load it"
            )
        require_timeout("server_timeout", server_timeout)
        server = Server.open(model, served, key_from, timeout_seconds=server_timeout)
        return verdicts_of_server(
            template, server, asked, concurrency=concurrency, progress=progress
        )
    if model is None or tokenizer is None:
        raise ValueError(
            f"model must be the judge and tokenizer its own for judge {template.name!r}, got "
            f"{type(model).__name__} and {type(tokenizer).__name__}; load {template.model}, or "
            "pass a server's address as model"
        )
    if template.kind == CAUSAL:
        return verdicts_of_model(
            template, model, tokenizer, asked, tokens_per_batch=tokens_per_batch, progress=progress
        )
    return verdicts_of_classifier(template, model, tokenizer, asked, progress=progress)


def _asked(prompt: str | Mapping[str, Any], number: int) -> str:
    try:
        return prompt_text(prompt_row({"prompt": prompt} if isinstance(prompt, str) else prompt))
    except ValueError as error:
        raise ValueError(f"row {number} of prompts {error}") from None


def _text(answer: str | Answer, number: int) -> str:
    text = answer.text if isinstance(answer, Answer) else answer
    if not isinstance(text, str):
        raise InputTypeError(
            f"answers must be texts or what generate returns, got {type(answer).__name__} as "
            f"number {number}; pass its text"
        )
    return text
