"""Answers of a model in memory to prompts."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from torch import nn

from fastdean.data.batching import require_tokens_per_batch
from fastdean.data.prompts import prompt_row
from fastdean.data.tokenising import tokenised_prompt
from fastdean.default_device import cpu_by_default
from fastdean.evaluation.answers.continuing import continued, require_generating, stop_ids
from fastdean.models.batch_size import tokens_per_batch_of
from fastdean.models.model_state import max_tokens, unwrap
from fastdean.wording.doing import titled
from fastdean.wording.numbers import require_whole

TEMPLATES = ("raw", "chat")
MAX_NEW_TOKENS = 64
STOPPED, CUT = "stop", "length"
# What is said of an answer of which the server does not say why it ended.
UNSAID = "unknown"
# By default so many times the tokens of one forward pass: after the prompts each pass takes but one
# token of each row, and many rows keep a machine busy.
_PASSES = 8


@dataclass(frozen=True)
class Answer:
    """What a model answered.

    text: without special tokens; blanks at its ends stay.
    tokens: generated ones, an end token included; None where a server did not say.
    finish: "stop" where the model ended it, "length" where it was cut.
    """

    text: str
    tokens: int | None
    finish: str


@cpu_by_default
def generate(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str | Mapping[str, Any]],
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    template: str | None = None,
    tokens_per_batch: int | None = None,
    progress: bool = True,
) -> list[Answer]:
    """Answer prompts greedily, in batches by length.

    Equivalent, for one prompt, without a cache:

        ids = tokenizer(prompt)["input_ids"]
        while len(ids) < n + max_new_tokens and ids[-1] not in stops:
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].float().argmax()))

    A batch gives what each prompt gives by itself, but for rounding where two tokens are as good as
    tied: the model is tried on a few tokens first. Prompts of different lengths are padded on the
    left where that leaves its logits alone, else prompts of equal length go together, else each
    goes by itself. Of the model's generation settings the end tokens count, and nothing else.

    Args:
        model: a causal language model; evaluated without dropout and left in its mode. Inside
            `mask.applied(model)` the masked model answers.
        prompts: texts, or rows of `prompt` or `messages`; an answer in the row is not looked at.
        max_new_tokens: at most so many.
        template: None or "raw": the prompt by itself; "chat": as a user's turn in the tokenizer's
            chat template. `messages` always take the template.
        tokens_per_batch: of prompts and answers together; a bound for memory.

    Returns:
        An answer for each prompt, in their order.

    Raises:
        TypeError, ValueError: options out of range, no prompts, or a prompt without tokens or
            longer than the model's positions with its answer; logits that are not finite.
    """
    rows = [_row(prompt, number) for number, prompt in enumerate(prompts)]
    if not rows:
        raise ValueError("prompts must hold at least one prompt, got none; check their source")
    check_options(max_new_tokens, template, tokens_per_batch)
    ids = [
        encoded_prompt(row, tokenizer, model, template, number, max_new_tokens)
        for number, row in enumerate(rows)
    ]
    found: dict[int, Answer] = {}
    with closing(
        answers_to(
            model,
            tokenizer,
            ids,
            max_new_tokens=max_new_tokens,
            tokens_per_batch=tokens_per_batch,
            progress=progress,
        )
    ) as batches:
        for batch in batches:
            found.update(batch)
    return [found[number] for number in range(len(rows))]


def answers_to(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    tokens_per_batch: int | None = None,
    progress: bool = True,
    keep_special: bool = False,
    title: str = "answers",
) -> Generator[list[tuple[int, Answer]], None, None]:
    """The answers to prompts given as tokens, batch after batch: (number of the prompt, answer).

    Args:
        keep_special: leave special tokens but the last in the text.
    """
    from tqdm.auto import tqdm

    if not prompts:
        return
    stops = stop_ids(model, tokenizer)
    if tokens_per_batch is None:
        tokens_per_batch = _PASSES * tokens_per_batch_of(unwrap(model))
    with (
        tqdm(total=len(prompts), desc=titled(title), unit="answers", disable=not progress) as bar,
        closing(
            continued(
                model,
                prompts,
                max_new_tokens=max_new_tokens,
                stops=stops,
                tokens_per_batch=tokens_per_batch,
            )
        ) as batches,
    ):
        for batch in batches:
            yield [(i, _answer(new, stops, tokenizer, keep_special)) for i, new in batch]
            bar.update(len(batch))


def check_options(
    max_new_tokens: int, template: str | None, tokens_per_batch: int | None = None
) -> None:
    """Raise TypeError or ValueError for an option out of range."""
    require_whole("max_new_tokens", max_new_tokens, "a number of tokens")
    if max_new_tokens < 1:
        raise ValueError(
            f"max_new_tokens must be at least 1, got {max_new_tokens}; {MAX_NEW_TOKENS} is usual"
        )
    if template is not None and template not in TEMPLATES:
        raise ValueError(
            f"template must be one of {', '.join(TEMPLATES)}, got {template!r}; leave it out for "
            "'raw', the prompt as it stands"
        )
    if tokens_per_batch is not None:
        require_tokens_per_batch(tokens_per_batch)


def encoded_prompt(
    row: Mapping[str, Any],
    tokenizer: Any,
    model: nn.Module,
    template: str | None,
    number: int,
    max_new_tokens: int,
) -> list[int]:
    """Token ids of a prompt; ValueError where the model has no room for it and an answer."""
    require_generating(model)
    ids = tokenised_prompt(row, tokenizer, template, number)
    longest = max_tokens(model)
    if longest is not None and len(ids) + max_new_tokens > longest:
        raise ValueError(
            f"row {number} must leave room for {max_new_tokens} new tokens in the model's "
            f"{longest} positions, got {len(ids)} tokens; lower max_new_tokens, or leave the row "
            "out"
        )
    return ids


def _row(prompt: str | Mapping[str, Any], number: int) -> dict[str, Any]:
    try:
        return prompt_row({"prompt": prompt} if isinstance(prompt, str) else prompt)
    except ValueError as error:
        raise ValueError(f"row {number} {error}") from None


def _answer(new: Sequence[int], stops: Sequence[int], tokenizer: Any, keep_special: bool) -> Answer:
    stopped = bool(new) and new[-1] in stops
    shown = new[:-1] if stopped else new
    text = tokenizer.decode(list(shown), skip_special_tokens=not keep_special)
    return Answer(text, len(new), STOPPED if stopped else CUT)
