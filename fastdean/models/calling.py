"""How a transformers model is called: the inputs its forward names, and where its logits are."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from fastdean.models.adapters import base_model
from fastdean.models.model_state import text_config

# Named by forwards, and without influence on the logits.
_SAYS_HOW = {
    "cache_position",
    "logits_to_keep",
    "num_items_in_batch",
    "num_logits_to_keep",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "return_dict",
    "return_loss",
    "use_cache",
}


def forward_inputs(model: nn.Module) -> frozenset[str]:
    """The names of the inputs that move the logits of `model`, as far as its forward tells them.

    A forward that passes the rest on (`**kwargs`) takes what those below it name: of the classes it
    inherits from, and of the base model.
    """
    inner = base_model(model)
    names: set[str] = set()
    for module in (inner, getattr(inner, "base_model", inner)):
        for forward in _forwards(module):
            parameters = inspect.signature(forward).parameters.values()
            kinds = {parameter.kind for parameter in parameters}
            names |= {parameter.name for parameter in parameters}
            if inspect.Parameter.VAR_KEYWORD not in kinds:
                return _moving(names)
    return _moving(names)


def _forwards(module: nn.Module) -> Iterator[Callable[..., Any]]:
    yield module.forward
    for cls in type(module).__mro__:
        if cls is nn.Module:
            return
        if "forward" in vars(cls):
            yield vars(cls)["forward"]


def _moving(names: set[str]) -> frozenset[str]:
    return frozenset(name for name in names - _SAYS_HOW if "label" not in name)


def call(model: nn.Module, inputs: Mapping[str, Tensor], **options: Any) -> Any:
    """`model(**inputs, **options)`, its outputs by name whatever its configuration says.

    Parts of a model read `return_dict` from the configuration they share, so that passing it does
    not reach them. A loss of the routers is not made: it needs what they gave in layers that may be
    answered for, and no caller reads it.
    """
    configs = {id(c): c for c in (getattr(model, "config", None), text_config(model))}
    wanted = {"return_dict": True, "output_router_logits": False}
    others = [
        (config, name, value)
        for config in configs.values()
        for name, value in wanted.items()
        if getattr(config, name, value) is (not value)
    ]
    try:
        for config, name, value in others:
            setattr(config, name, value)
        return model(**inputs, **options)
    finally:
        for config, name, value in others:
            setattr(config, name, not value)


def logits_of(outputs: Any) -> Tensor:
    """The logits of a forward pass without labels; models of one's own may return tuples."""
    return outputs[0] if isinstance(outputs, tuple) else outputs.logits


def require_row_per_token(rows: Tensor, input_ids: Tensor) -> None:
    """Raise ValueError if `rows` [..., C] are not one for each of `input_ids`."""
    if rows[..., 0].numel() != input_ids.numel():
        raise ValueError(
            f"model must give logits for each of its tokens, {list(input_ids.shape)}, got "
            f"{list(rows.shape[:-1])}; pass loss_fn= to define its per-example loss"
        )
