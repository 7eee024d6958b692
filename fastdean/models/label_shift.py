"""By how many places a model's logits are behind the tokens that they predict."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from fastdean.models.adapters import base_model, require_no_prompts
from fastdean.models.model_state import undone
from fastdean.models.probes import (
    repeats,
    sees_ahead,
    sees_back,
)


def label_shift(model: nn.Module, otherwise: str | None = None) -> int:
    """1 for causal language models, 0 for masked ones.

    The class says which of the two the model may be, and a measurement which it is: some classes
    are causal or not by an entry of their configuration.

    Args:
        otherwise: what else the caller's user can do about a model that is neither, for messages.
    Raises:
        ValueError: the model is neither, or not what its class is for. Or it does not compute the
            same twice, or puts a learned prompt in front of the tokens.
    """
    last_way = "" if otherwise is None else f", or {otherwise}"
    require_no_prompts(model)
    shifts = _shifts_by_class(model)
    if not shifts:
        raise ValueError(
            f"model must be a causal or masked language model, got {type(model).__name__}; load it "
            f"as one (AutoModelForCausalLM, AutoModelForMaskedLM){last_way}"
        )
    inner = base_model(model)
    with _as_it_was_built(inner):
        ahead = sees_ahead(inner)
    if ahead is None:
        return max(shifts)
    if ahead and 1 in shifts and repeats(inner) is False:
        raise ValueError(
            "model must give the same logits for the same tokens, got "
            f"{type(inner).__name__}, which does not compute the same twice; turn off what is "
            "random in eval mode too (such as dropout), or what a forward pass changes in it"
        )
    if ahead and 0 not in shifts:
        raise ValueError(
            "model must be causal to be read as the causal language model of its class, got "
            f"{type(inner).__name__}, whose logits depend on later tokens; set is_decoder=True (or "
            "causal=True) in its configuration, or load it as a masked language model"
            f"{last_way}"
        )
    # Of a model that mixes no tokens at all (its attention may be masked out) the class decides.
    if not ahead and 1 not in shifts and sees_back(inner):
        raise ValueError(
            "model must see the tokens on both sides to be read as the masked language model of "
            f"its class, got {type(inner).__name__}, whose logits depend on earlier tokens only; "
            f"load it as a causal language model{last_way}"
        )
    return 0 if ahead or 1 not in shifts else 1


@contextmanager
def _as_it_was_built(model: nn.Module) -> Iterator[None]:
    """Refuse a model that exchanges modules of its own in a short pass, and put them back.

    BigBird goes over from block-sparse to full attention so, and stays with it for longer texts.
    """
    built = [(module, dict(vars(module)), dict(module._modules)) for module in model.modules()]
    exchanged: list[str] = []

    def put_back() -> None:
        exchanged.extend(type(m).__name__ for m, _, parts in built if m._modules != parts)
        for module, attributes, parts in built if exchanged else ():
            vars(module).update(attributes)
            module._modules.update(parts)

    with undone(put_back):
        yield
    if not exchanged:
        return
    raise ValueError(
        "model must keep its modules in a forward pass, got a "
        f"{exchanged[0]} that exchanges some of its own for short texts; load it so that "
        "it computes the same for all lengths (BigBird: attention_type='original_full')"
    )


def label_shift_of_class(model: nn.Module) -> int:
    """By how many places the model's own loss moves the labels: by its class alone.

    Raises:
        ValueError: the model is no causal or masked language model.
    """
    shifts = _shifts_by_class(model)
    if not shifts:
        raise ValueError(
            f"model must be a causal or masked language model, got {type(model).__name__}; load it "
            "with its language modelling head"
        )
    return min(shifts)


def _shifts_by_class(model: nn.Module) -> set[int]:
    from transformers.models.auto import modeling_auto as auto

    masked = set(auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.values())
    causal = set(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        return set()
    for cls in type(base_model(model)).__mro__:
        name = cls.__name__
        shifts = {1} if name in causal else set()
        if name in masked and not getattr(config, "is_decoder", False):
            shifts.add(0)
        if shifts:
            return shifts
    return {1} if getattr(model, "can_generate", lambda: False)() else set()
