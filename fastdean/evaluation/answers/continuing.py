"""Tokens continued by a model, greedily, so that a batch gives what each gives by itself.

transformers generates; here is what is generated and together with what. Nothing of the model's own
generation settings counts but where an answer ends: a penalty on repetition would not be greedy.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastdean.models.exact_layout import alone_above
from fastdean.models.model_state import (
    evaluation_state,
    input_device,
    max_tokens,
    undone,
    unwrap,
)
from fastdean.precision import full_fp32_products

PADDED, EQUAL, ALONE = "padded", "of equal length", "one by one"
# Of the tokens that a model is tried on: how many, of which how many precede the answer in the
# shorter prompt, and how many are generated.
_LONG, _SHORT, _STEPS = 24, 6, 3

Ids = Sequence[int]


def require_generating(model: nn.Module) -> None:
    """Raise ValueError for a model that continues no text."""
    found = unwrap(model)
    if not hasattr(found, "generate") or getattr(found, "generation_config", None) is None:
        raise ValueError(
            f"model must be a causal language model that generates, got {type(found).__name__}; "
            "load one with fastdean.models.load_model"
        )
    if getattr(getattr(found, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"model must be a causal language model, got the encoder-decoder "
            f"{type(found).__name__}; use a decoder"
        )


def stop_ids(model: nn.Module, tokenizer: Any) -> list[int]:
    """The tokens that end an answer: those of the model's generation settings and of its tokenizer.

    Chat models name the end of a turn in the one and the end of a text in the other.
    """
    named = getattr(getattr(unwrap(model), "generation_config", None), "eos_token_id", None)
    found: list[int | None] = []
    for each in (named, getattr(tokenizer, "eos_token_id", None)):
        found += each if isinstance(each, list | tuple) else [each]
    return sorted({each for each in found if each is not None})


@torch.no_grad()
def continued(
    model: nn.Module,
    prompts: Sequence[Ids],
    *,
    max_new_tokens: int,
    stops: Sequence[int],
    tokens_per_batch: int,
) -> Generator[list[tuple[int, list[int]]], None, None]:
    """Continue each prompt greedily; batch after batch, the shortest prompts first.

    Equivalent, for one prompt, without a cache:

        while len(new) < max_new_tokens and (not new or new[-1] not in stops):
            logits = model(torch.tensor([[*prompt, *new]])).logits[0, -1]
            new.append(int(logits.float().argmax()))

    Args:
        prompts: token ids, at least one each.
        stops: the tokens that end an answer; they are a part of what is returned.
        tokens_per_batch: at most so many of prompts and answers together, padding counted; a prompt
            by itself may have more.
    Yields:
        (number of the prompt, its new tokens) for each of a batch.
    Raises:
        ValueError: the model does not generate, or its logits are not finite.
    """
    model = unwrap(model)
    require_generating(model)
    with _state(model):
        way = _way(model, prompts, stops)
        for batch in batches(
            [len(ids) for ids in prompts],
            way=way,
            max_new_tokens=max_new_tokens,
            tokens_per_batch=tokens_per_batch,
            alike_up_to=alone_above(model),
        ):
            chosen = [prompts[number] for number in batch]
            new, _ = _generated(model, chosen, stops, max_new_tokens)
            yield list(zip(batch, new, strict=True))


def batches(
    lengths: Sequence[int],
    *,
    way: str,
    max_new_tokens: int,
    tokens_per_batch: int,
    alike_up_to: int | None = None,
) -> list[list[int]]:
    """Which prompts go together: their numbers, by length, ties in order.

    Args:
        alike_up_to: prompts that are longer with their answers stand with those of their length
            alone: rotary embeddings may depend on the longest of a batch.
    """
    found: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        group = found[-1] if found else []
        # The latest is the longest.
        tokens = (lengths[number] + max_new_tokens) * (len(group) + 1)
        fits = bool(group) and tokens <= tokens_per_batch and way != ALONE
        long = alike_up_to is not None and lengths[number] + max_new_tokens > alike_up_to
        mixed = way == PADDED and not long
        if fits and (mixed or lengths[group[0]] == lengths[number]):
            group.append(number)
        else:
            found.append([number])
    return found


def _way(model: nn.Module, prompts: Sequence[Ids], stops: Sequence[int]) -> str:
    """How prompts may share a batch and still get the answers that each gets alone.

    Names of classes do not say: recurrent states run over padding, and positions may be counted
    from the padding's start. So the model is tried on a few of the tokens.
    """
    if len(prompts) < 2:
        return ALONE
    long = min(_LONG, (max_tokens(model) or _LONG + _STEPS) - _STEPS)
    if long <= _SHORT:
        return ALONE
    tokens = [token for ids in prompts for token in ids[:long]]
    one, other = (tokens * long)[:long], (tokens[::-1] * long)[:long]
    if any(len(ids) != len(prompts[0]) for ids in prompts) and _alike(
        model, [one[:_SHORT], other], stops
    ):
        return PADDED
    return EQUAL if _alike(model, [one, other], stops) else ALONE


@full_fp32_products()
def _alike(model: nn.Module, prompts: Sequence[Ids], stops: Sequence[int]) -> bool:
    """Whether logits in a batch are those of each prompt alone, but for rounding."""
    together, logits = _generated(model, prompts, stops, _STEPS, with_logits=True)
    for row, ids in enumerate(prompts):
        alone, own = _generated(model, [ids], stops, _STEPS, with_logits=True)
        for step in range(min(len(own), len(logits))):
            # Behind another token other logits follow rightly.
            if together[row][:step] != alone[0][:step] or step >= len(alone[0]):
                break
            if not _close(logits[step][row], own[step][0], next(model.parameters()).dtype):
                return False
    return True


def _close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    known = expected.isfinite()
    if not torch.equal(known, found.isfinite()):
        return False
    # Tokens that a model rules out are at minus infinity in both.
    found, expected = found[known], expected[known]
    spread = (expected - expected.mean()).norm()
    # Half of the digits: rounding takes a few, and other positions or padding move far more.
    bound = torch.finfo(dtype).eps ** 0.5 if dtype.is_floating_point else 0.05
    return bool((found - expected).norm() <= bound * spread)


def _generated(
    model: Any,
    prompts: Sequence[Ids],
    stops: Sequence[int],
    max_new_tokens: int,
    *,
    with_logits: bool = False,
) -> tuple[list[list[int]], tuple[Tensor, ...]]:
    """New tokens of each prompt, up to the first that ends it, and the logits of each step."""
    from transformers import GenerationConfig

    filler = stops[0] if stops else 0
    device, width = input_device(model), max(map(len, prompts))
    ids = torch.full((len(prompts), width), filler, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt, dtype=torch.int64)
        mask[row, width - len(prompt) :] = 1
    settings = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(stops) or None,
        pad_token_id=filler,
        use_cache=True,
        return_dict_in_generate=with_logits,
        output_logits=with_logits,
    )
    finite = _FiniteLogits()
    outputs = model.generate(
        ids.to(device),
        attention_mask=mask.to(device),
        generation_config=settings,
        logits_processor=[finite],
    )
    if not with_logits:
        finite.require()
    sequences = outputs.sequences if with_logits else outputs
    logits = tuple(each.float().cpu() for each in outputs.logits) if with_logits else ()
    new = sequences[:, width:].tolist()
    return [_up_to_a_stop(row, stops) for row in new], logits


class _FiniteLogits:
    """Sees the logits of each step and changes none. Of NaN some token would be the largest.

    What is noted stays on the device until the end, so that no step waits for it.
    """

    def __init__(self) -> None:
        self._finite: Tensor | None = None

    def __call__(self, _: Tensor, scores: Tensor) -> Tensor:
        # Tokens that a model rules out are at minus infinity.
        found = scores.amax(-1).isfinite().all()
        self._finite = found if self._finite is None else self._finite & found
        return scores

    def require(self) -> None:
        if self._finite is not None and not bool(self._finite):
            raise ValueError(
                "model must give finite logits, got NaN or infinity while it answered; load it in "
                "bfloat16 or float32"
            )


def _up_to_a_stop(tokens: list[int], stops: Sequence[int]) -> list[int]:
    for place, token in enumerate(tokens):
        if token in stops:
            return tokens[: place + 1]
    return tokens


@contextmanager
def _state(model: Any) -> Iterator[None]:
    """Evaluation mode, and generation settings of the model that say nothing.

    What a call leaves open transformers takes from there.
    """
    from transformers import GenerationConfig

    own = model.generation_config

    def undo() -> None:
        model.generation_config = own

    with evaluation_state(model), undone(undo):
        model.generation_config = GenerationConfig()
        yield
