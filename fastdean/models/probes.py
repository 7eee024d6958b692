"""What a model does with its tokens, measured by running it on a few of them.

Names of classes and entries of configurations say what a model was written for, not what it
computes. An answer is kept until the model's configuration, modules, hooks or weights change.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fastdean.data.batching import pad
from fastdean.data.examples import Example
from fastdean.models.attention.packed import attends_plainly, attends_ragged, attention_by_segments
from fastdean.models.calling import call, logits_of, require_row_per_token
from fastdean.models.experts.fused import chosen_experts
from fastdean.models.hooks import forward_pre_hooks
from fastdean.models.model_state import (
    eager,
    evaluation_state,
    input_device,
    input_embedding,
    max_tokens,
    text_config,
    weight_of,
)
from fastdean.models.ranks.lost_ranks import is_of_a_collective
from fastdean.precision import autocast_dtype, full_fp32_products, product_epsilon
from fastdean.wording.mendable import is_out_of_memory

T = TypeVar("T")

_PROBE_TOKENS = 12
# Devices on which examples may attend by segments.
_BY_SEGMENTS = ("cpu", "cuda")
# What a module notes as a number or a text.
_PLAIN = (bool, int, float, str)
# What a model raises that takes more than token ids, or cannot run at all, which its own run will
# say better.
_NO_RUN = (AttributeError, RuntimeError, TypeError, ValueError)
# Model -> the state that it was measured in, and the answers.
_ANSWERS: WeakKeyDictionary[nn.Module, tuple[int, dict]] = WeakKeyDictionary()


@dataclass(frozen=True)
class _Here:
    """A model inside of `undisturbed`.

    Attributes:
        answers: by question.
        alone: token ids -> the logits that the model gave for them by themselves.
    """

    model: nn.Module
    answers: dict[str | tuple, bool]
    alone: dict[tuple[int, ...], Tensor] = field(default_factory=dict)


_HERE: ContextVar[_Here | None] = ContextVar("undisturbed", default=None)


def sees_ahead(model: nn.Module) -> bool | None:
    """Whether the logits of a token depend on the tokens after it.

    The later half of a few tokens is changed, and the logits of the earlier half compared; where
    they moved so little that it may be rounding, with the movement of the later half when the
    earlier tokens change: in a bidirectional model the two are alike.

    Returns:
        None where it cannot be measured: the model does not run on token ids alone, or its logits
        are not finite.
    """
    return _asked_once(model, "sees_ahead", lambda: _measured_sight(model, ahead=True))


def sees_back(model: nn.Module) -> bool | None:
    """Whether the logits of a token depend on the tokens before it; None as in `sees_ahead`."""
    return _asked_once(model, "sees_back", lambda: _measured_sight(model, ahead=False))


def repeats(model: nn.Module) -> bool | None:
    """Whether the same tokens give the same logits again; None as in `sees_ahead`.

    False for a layer that is random in eval mode too, or whose passes change what it computes.
    """

    def measured() -> bool:
        ids, _ = _ordinary_ids(model)
        first, again = _logits_of_ids(model, ids), _logits_of_ids(model, ids)
        return _distance(again, first) <= _epsilon(model) / 4

    return _asked_once(model, "repeats", lambda: _tried(measured, _NO_RUN, None))


def _measured_sight(model: nn.Module, *, ahead: bool) -> bool | None:
    def measured() -> bool | None:
        ids, others = _ordinary_ids(model)
        half = len(ids) // 2
        if half == 0:
            return None
        earlier, later = slice(half), slice(half, None)
        logits = _logits_alone(model, ids)
        if logits.is_meta or not logits.isfinite().all():
            return None

        def moved_by_the_earlier() -> float:
            changed = torch.cat([others[earlier], ids[later]])
            return _distance(_logits_of_ids(model, changed)[later], logits[later])

        epsilon = _epsilon(model)
        if not ahead:
            return moved_by_the_earlier() > epsilon / 4
        changed = torch.cat([ids[earlier], others[later]])
        moved = _distance(_logits_of_ids(model, changed)[earlier], logits[earlier])
        return _more_than_rounding(moved, epsilon, moved_by_the_earlier)

    return _tried(measured, _NO_RUN, None)


def _more_than_rounding(moved: float, epsilon: float, seen: Callable[[], float]) -> bool:
    """Whether logits moved with other tokens because they see these tokens.

    In a mixture they may move by rounding alone: an expert gets more or fewer tokens then, and some
    processors add up products of another size in another order.

    Args:
        seen: how far logits move with tokens that they see.
    """
    if moved <= epsilon / 4:
        return False
    return moved > 32 * epsilon or moved > seen() / 10


def _tried(measure: Callable[[], T], errors: tuple[type[Exception], ...], otherwise: T) -> T:
    """The answer of `measure`, or `otherwise` where the model raises one of these errors.

    Errors that say nothing of the model go on: there was no memory, or another rank is lost.
    """
    try:
        return measure()
    except errors as error:
        if is_out_of_memory(error) or is_of_a_collective(error):
            raise
        return otherwise


def numbers_from(model: nn.Module, start: int) -> bool:
    """Whether the model, given no `position_ids`, numbers tokens `start`, `start` + 1 and so on."""

    def measured() -> bool:
        ids, _ = _ordinary_ids(model)
        positions = torch.arange(start, start + len(ids))
        own = _logits_alone(model, ids)
        numbered = _logits_of_ids(model, ids, position_ids=positions)
        return _distance(numbered, own) <= max(1e-6, _epsilon(model))

    errors = (AttributeError, IndexError, TypeError, ValueError)
    question = ("numbers_from", start)
    return bool(_asked_once(model, question, lambda: _tried(measured, errors, False)))


def own_autocast(model: nn.Module) -> torch.dtype | None:
    """The dtype that the model's own forward pass casts products to, as accelerate prepares models.

    None, unmeasured, for the forward pass of a class of transformers, and for what accelerate puts
    in its place to move weights, which would come in once more.
    """
    ordinary = getattr(model.forward, "__module__", "").startswith("transformers.")
    if "_old_forward" in vars(model) or (ordinary and "forward" not in vars(model)):
        return None

    def measured() -> torch.dtype | None:
        found: list[torch.dtype | None] = []
        device = input_device(model)

        def look(module: nn.Module, args: tuple, kwargs: dict) -> None:
            found.append(autocast_dtype(device))

        ids, _ = _ordinary_ids(model)
        with forward_pre_hooks({input_embedding(model): look}):
            _logits_of_ids(model, ids)
        return found[0] if found else None

    # With a loss of its caller's it may be any module.
    return _tried(measured, (*_NO_RUN, LookupError), None)


def packing_is_exact(model: nn.Module, examples: Sequence[Example]) -> bool:
    """Whether restarting `position_ids` keeps packed examples apart in this causal model.

    Measured on the first two examples: (1) changing one packed example must not move the other's
    logits, in either direction; (2) a packed example's logits must be those it has alone.
    State-space and bidirectional models fail the first, models that ignore `position_ids` the
    second. False, unmeasured, for a single example, which has nothing to be packed with.
    """
    if len(examples) < 2:
        return False

    def measured() -> bool:
        return _keeps_apart(model, examples, lambda parts: _packed_logits(model, parts))

    # Of a model that takes no position_ids.
    errors = (TypeError, ValueError)
    found = _asked_once(model, "packing_is_exact", lambda: _tried(measured, errors, False))
    return bool(found) and numbers_from(model, 0)


def segments_are_exact(model: nn.Module, examples: Sequence[Example]) -> bool:
    """Whether packed examples of this causal model may attend by themselves (attention.py).

    Measured as in `packing_is_exact`, on a CPU and on CUDA. False, unmeasured, on other devices,
    for attention that is not one of transformers' own, and for FlashAttention, which does as much.
    """
    of_its_own = attends_ragged(model) or not attends_plainly(model)
    if len(examples) < 2 or input_device(model).type not in _BY_SEGMENTS or of_its_own:
        return False

    def packed_logits(parts: Sequence[Tensor]) -> Tensor:
        lengths = torch.tensor([len(part) for part in parts])
        ends = lengths.cumsum(0)
        with attention_by_segments(model, torch.stack([ends - lengths, ends], dim=1)):
            return _packed_logits(model, parts)

    def measured() -> bool:
        return _keeps_apart(model, examples, packed_logits)

    # Whatever a model does with a mask or an attention that it does not know.
    errors = (*_NO_RUN, IndexError, KeyError)
    # The mode may choose another form of the attention.
    question = ("segments_are_exact", torch.get_deterministic_debug_mode())
    found = _asked_once(model, question, lambda: _tried(measured, errors, False))
    return bool(found) and numbers_from(model, 0)


def _keeps_apart(
    model: nn.Module,
    examples: Sequence[Example],
    packed_logits: Callable[[Sequence[Tensor]], Tensor],
) -> bool:
    """Whether packed examples do not move each other's logits, which are those they have alone."""
    # Both together within the model's positions, as every packed row.
    enough = min(_PROBE_TOKENS, (max_tokens(model) or 2 * _PROBE_TOKENS) // 2)
    if enough == 0:
        return False
    a, b = (example.input_ids[:enough] for example in examples[:2])
    ab = packed_logits([a, b])
    changed_a = packed_logits([_another(a), b])
    changed_b = packed_logits([a, _another(b)])
    alone = _logits_alone(model, b)
    epsilon = _epsilon(model)

    def seen() -> float:
        """In one text of both; nothing where products keep their sizes, and so their rounding."""
        if chosen_experts(text_config(model)) is None:
            return 0.0
        texts = (torch.cat([first, b]) for first in (a, _another(a)))
        one, other = (_logits_of_ids(model, text)[len(a) :] for text in texts)
        return _distance(other, one)

    return (
        _distance(alone, ab[len(a) :]) <= max(1e-4, 6 * epsilon)
        and not _more_than_rounding(_distance(changed_a[len(a) :], ab[len(a) :]), epsilon, seen)
        and not _more_than_rounding(_distance(changed_b[: len(a)], ab[: len(a)]), epsilon, seen)
    )


def padding_is_exact(model: nn.Module, examples: Sequence[Example]) -> bool:
    """Whether padding on the right under an `attention_mask` leaves an example's logits alone.

    Measured on the first two examples, which have the same columns: models that mix tokens outside
    of attention (Fourier transforms, convolutions) see the padding. True, unmeasured, for a single
    example.
    """
    if len(examples) < 2:
        return True

    def measured() -> bool:
        cut = [example.first(_PROBE_TOKENS).predicting_itself() for example in examples[:2]]
        longer, shorter = sorted(cut, key=len)[::-1]
        shorter = shorter.first(max(1, len(longer) // 2))
        together = pad([longer, shorter], [0, 1], shift=0).model_inputs()
        alone = _logits(model, pad([shorter], [0], shift=0).model_inputs())[0]
        padded = _logits(model, together)[1]
        return _distance(padded[: len(shorter)], alone) <= max(1e-4, 6 * _epsilon(model))

    question = ("padding_is_exact", *sorted(examples[0].columns))
    return bool(_asked_once(model, question, measured))


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Nothing but measurements of this file touches the model inside.

    So one look at its state does for all that is asked, and what it gave for some tokens is kept.
    """
    here = _HERE.get()
    if here is not None and here.model is model:
        yield
        return
    kept, answers = _ANSWERS.get(model, (None, {}))
    here = _Here(model, dict(answers) if kept == _state(model) else {})
    known = len(here.answers)
    token = _HERE.set(here)
    try:
        yield
    finally:
        _HERE.reset(token)
        if len(here.answers) > known:
            # Some modules note something in their first run.
            _ANSWERS[model] = _state(model), here.answers


def _asked_once(
    model: nn.Module, question: str | tuple, measure: Callable[[], bool | None]
) -> bool | None:
    """The answer of `measure`, kept until the model is seen to change."""
    with undisturbed(model):
        here = _HERE.get()
        assert here is not None
        if question not in here.answers:
            answer = measure()
            if answer is None:
                return None
            here.answers[question] = answer
        return here.answers[question]


def _state(model: nn.Module) -> int:
    """A number that is another once the model computes something else, as far as that shows.

    Changes of tensors show in the counters that autograd keeps of them.
    """
    config: Any = getattr(model, "config", None)
    found: list[Any] = [getattr(config, "_attn_implementation", None)]
    if hasattr(config, "to_dict"):
        # Every measurement and every pass turns the cache off and back on.
        found.append(re.sub(r"'use_cache': \w+", "", str(config.to_dict())))
    for module in model.modules():
        own = vars(module)
        found += [type(module), id(type(module).forward), id(own.get("forward"))]
        found += own["_forward_hooks"], own["_forward_pre_hooks"]
        found += [
            (name, value)
            for name, value in own.items()
            if isinstance(value, _PLAIN) and name != "training"
        ]
        for tensor in (*own["_parameters"].values(), *own["_buffers"].values()):
            if tensor is not None:
                version = None if tensor.is_inference() else tensor._version
                found.append((version, tensor.dtype, tensor.device))
    return hash(tuple(tuple(part) if isinstance(part, dict) else part for part in found))


def _ordinary_ids(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Twice a few different token ids, int64 [T], none of which the model's configuration names."""
    embedding = input_embedding(model)
    vocabulary = getattr(embedding, "num_embeddings", None) or weight_of(embedding).shape[0]
    special = set(_special_ids(vars(model.config)))
    enough = 2 * _PROBE_TOKENS + len(special)
    ids = [i for i in range(min(vocabulary, enough)) if i not in special]
    length = min(_PROBE_TOKENS, len(ids) // 2, max_tokens(model) or _PROBE_TOKENS)
    found = torch.tensor(ids, dtype=torch.int64)
    return found[:length], found[length : 2 * length]


def _special_ids(config: Mapping[str, Any]) -> Iterator[int]:
    for name, value in config.items():
        if name.endswith(("_token_id", "_token_index", "_token_ids")):
            values = value if isinstance(value, list | tuple) else [value]
            yield from (each for each in values if isinstance(each, int))
        elif hasattr(value, "to_dict"):
            yield from _special_ids(vars(value))


def _another(ids: Tensor) -> Tensor:
    flipped = ids.flip(0)
    return flipped if not torch.equal(flipped, ids) else (ids - 1).abs()


def _packed_logits(model: nn.Module, parts: Sequence[Tensor]) -> Tensor:
    positions = torch.cat([torch.arange(part.numel()) for part in parts])
    return _logits_of_ids(model, torch.cat(list(parts)), position_ids=positions)


def _logits_alone(model: nn.Module, ids: Tensor) -> Tensor:
    """`_logits_of_ids` of these tokens, kept inside of `undisturbed`."""
    here = _HERE.get()
    assert here is not None and here.model is model
    key = tuple(ids.tolist())
    if key not in here.alone:
        here.alone[key] = _logits_of_ids(model, ids)
    return here.alone[key]


def _logits_of_ids(model: nn.Module, ids: Tensor, **columns: Tensor) -> Tensor:
    rows = {"input_ids": ids, **columns}
    return _logits(model, {name: row.unsqueeze(0) for name, row in rows.items()})[0]


@torch.no_grad()
def _logits(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """float64 [B, T, V], without dropout."""
    device = input_device(model)
    # Uncompiled: nothing would be gained, and a compiled model fires no hooks added later.
    # In full: what TF32 rounds is neither another token nor a neighbour.
    with eager(), evaluation_state(model), full_fp32_products():
        outputs = call(model, {name: value.to(device) for name, value in inputs.items()})
    logits = logits_of(outputs)
    require_row_per_token(logits, inputs["input_ids"])
    return logits.double()


def _epsilon(model: nn.Module) -> float:
    """Of what the model's matrices are rounded to, as in `_logits`."""
    weight = next(model.parameters())
    with full_fp32_products():
        return product_epsilon(weight.device, weight.dtype)


def _distance(value: Tensor, reference: Tensor) -> float:
    return float((value - reference).norm() / reference.norm().clamp_min(1e-30))
