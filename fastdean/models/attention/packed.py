"""Attention of packed examples, each by itself.

Several examples stand in one row, and each attends to its own tokens only. A mask over the whole
row says so at the price of its square. Here the model's own mask is asked about each example's
square alone, and what lies between two examples is never computed:

    O_s = softmax(scaling * Q_s K_s^T, where the model's mask allows) V_s     for each example s

On a GPU this is one fused kernel for all examples (varlen.py) where it can be: the mask of each is
causal or a sliding window. Else examples of like length go through batched products together
(segment_products.py).

The function is registered with transformers' `AttentionInterface` and `AttentionMaskInterface`. A
model that does not use them, or asks for something else, keeps its own attention. So do passes
outside of the block: of other threads, and of other models with the same configuration.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastdean.data.batching import send
from fastdean.models.attention import varlen
from fastdean.models.attention.segment_products import SegmentAttention, Segments
from fastdean.models.model_state import undone

NAME = "fastdean_segments"

# Arguments of any attention function that change nothing here: the mask holds them, or they ask for
# outputs and caches that a scoring pass does not have.
_IGNORED = frozenset(
    {
        "attention_mask",
        "cache_position",
        "cu_seq_lens_k",
        "cu_seq_lens_q",
        "dropout",
        "is_causal",
        "layer_idx",
        "max_length_k",
        "max_length_q",
        "num_items_in_batch",
        "output_attentions",
        "output_hidden_states",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "sliding_window",
        "use_cache",
    }
)


class NotExpressible(RuntimeError):
    """The model asks its attention for something that this one does not do."""


# The blocks that are open, and the examples of each. They may end in any order.
_BLOCKS: ContextVar[tuple[tuple[object, Segments], ...]] = ContextVar(
    "fastdean_segments", default=()
)


def _innermost() -> Segments | None:
    """The examples of the block that was opened last, or None outside of all."""
    blocks = _BLOCKS.get()
    return blocks[-1][1] if blocks else None


def _announced() -> Segments:
    segments = _innermost()
    if segments is None:
        raise NotExpressible("a pass outside of the block that says which examples it has")
    return segments


@dataclass
class _Taken:
    """A configuration that names our attention: its own before, and the blocks it is for."""

    config: Any
    own: str | None
    blocks: set[object] = field(default_factory=set)


_LOCK = threading.RLock()
# By the identity of the configuration, which the entry keeps alive.
_TAKEN: dict[int, _Taken] = {}


def _take(config: Any, block: object) -> None:
    with _LOCK:
        own = config._attn_implementation_internal
        _TAKEN.setdefault(id(config), _Taken(config, own)).blocks.add(block)
        # Not through the public setter: it sets the vision and audio parts' as well.
        config._attn_implementation_internal = NAME


def _give_back(config: Any, block: object) -> None:
    """May be repeated. The last of several blocks gives it back, in whatever order they end."""
    with _LOCK:
        taken = _TAKEN.get(id(config))
        if taken is None:
            return
        taken.blocks.discard(block)
        if not taken.blocks:
            config._attn_implementation_internal = taken.own
            del _TAKEN[id(config)]


def _own_name(config: Any) -> str | None:
    """What the configuration names, or named before it was taken."""
    taken = _TAKEN.get(id(config))
    return getattr(config, "_attn_implementation_internal", None) if taken is None else taken.own


@contextmanager
def attention_by_segments(model: nn.Module, segments: Tensor) -> Iterator[None]:
    """The model's attention is the one of this file inside the block, and its own afterwards.

    Args:
        segments: int64 [S, 2] on the CPU, (start, end) of each example in the packed row that the
            model is called on inside.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)
    configs = _configs(model)
    block = object()
    announced, cut = _innermost(), Segments.cut(segments)

    def undo() -> None:
        for config in configs:
            _give_back(config, block)
        _BLOCKS.set(tuple(each for each in _BLOCKS.get() if each[0] is not block))

    with undone(undo):
        # A block inside of another for the same batch goes on with what that one looked up.
        own = announced if announced is not None and announced == cut else cut
        _BLOCKS.set((*_BLOCKS.get(), (block, own)))
        for config in configs:
            _take(config, block)
        yield


def _mask(**asked: Any) -> Any:
    """`segment_mask` inside of a block, the mask of the model's own attention elsewhere."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as masks

    own = masks.get(_own_name(asked.get("config"))) if _innermost() is None else None
    return (segment_mask if own in (None, _mask) else own)(**asked)


def _attention(module: nn.Module, *asked: Any, **further: Any) -> tuple[Tensor, Tensor | None]:
    """`segment_attention` inside of a block, the model's own attention elsewhere."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as functions

    own = None
    if _innermost() is None:
        own = functions.get(_own_name(getattr(module, "config", None)), _eager_of(module))
    return (segment_attention if own in (None, _attention) else own)(module, *asked, **further)


def _eager_of(module: nn.Module) -> Callable | None:
    """The model's default attention, from the file of the module's class."""
    files = (sys.modules.get(cls.__module__) for cls in type(module).__mro__)
    found = (getattr(file, "eager_attention_forward", None) for file in files)
    return next((function for function in found if function is not None), None)


def attends_plainly(model: nn.Module) -> bool:
    """Whether the model attends through transformers' own functions, which all compute the same.

    One that somebody else registered may compute anything for longer texts than one can try.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as masks
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as functions

    def known(function: Callable | None) -> bool:
        origin = getattr(function, "__module__", None) or ""
        return function is None or origin.partition(".")[0] == "transformers"

    names = {_own_name(config) for config in _configs(model)}
    return all(known(of.get(name)) for of in (functions, masks) for name in names)


def attends_ragged(model: nn.Module) -> bool:
    """Whether the model was loaded with FlashAttention, which keeps packed examples apart itself.

    By name, as transformers tells: "flash_attention_2" and the like, and kernels of the hub.
    """
    return any("flash" in (_own_name(config) or "") for config in _configs(model))


def _configs(model: nn.Module) -> list[Any]:
    """The configurations that the model's modules read their attention from, each once."""
    # Each once before anything is read of them: most modules share one, and batches are many.
    configs = {id(config): config for config in map(_config_of, model.modules())}
    return [c for c in configs.values() if hasattr(c, "_attn_implementation_internal")]


def _config_of(module: nn.Module) -> Any:
    """`module.config`, or None, without the error that torch words for each module without one."""
    own, kind = vars(module), type(module)
    plain = kind.__getattr__ is nn.Module.__getattr__
    if "config" not in own and plain and not hasattr(kind, "config"):
        return None
    return getattr(module, "config", None)


def segment_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Tensor] | None = None,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor:
    """What is added to the scores of each example: `dtype` [S, 1, L, L], 0 where a token may attend
    and -inf elsewhere, L the longest example's tokens.

    The model's mask function is asked by row numbers of the whole batch, so that sliding windows
    and chunks mean what they mean in the model. The places behind an example's end attend as its
    last token does; their results are not read.
    """
    segments = _announced()
    if (batch_size, q_length, kv_length, q_offset, kv_offset) != (1, *2 * (segments.rows,), 0, 0):
        raise NotExpressible("a mask between other tokens than the packed row's own")
    if use_vmap or attention_mask is not None or mask_function is None:
        raise NotExpressible("a mask that is not a function of two positions")
    bounds = send(torch.tensor(segments.bounds), torch.device(device))
    starts, lengths = bounds[:, :1], bounds[:, 1:] - bounds[:, :1]
    steps = torch.arange(segments.longest(), device=device)
    places = starts + steps.minimum(lengths - 1)
    zero = torch.zeros((), dtype=torch.int64, device=device)
    allowed = mask_function(zero, zero, places[:, None, :, None], places[:, None, None, :])
    allowed = allowed & (steps < lengths)[:, None, None, :]
    return torch.zeros(allowed.shape, dtype=dtype, device=device).masked_fill_(~allowed, -torch.inf)


def segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of each announced example by itself.

    Args:
        query: [1, H, N, d]; key, value: [1, H_kv, N, d] and [1, H_kv, N, d_v], H a multiple of
            H_kv.
        attention_mask: what `segment_mask` returned.
        scaling: of the products; None: d^-1/2.
        softcap: cap * tanh(scores / cap) takes the scores' place before they are masked.
        s_aux: [H], one more score of each head, which takes part in the softmax alone (sinks).
    Returns:
        [1, N, H, d_v], as transformers' attention functions do, and no weights.
    Raises:
        NotExpressible: the model asks for anything else.
    """
    asked = {name for name, value in kwargs.items() if value is not None and value is not False}
    unknown = sorted(asked - _IGNORED)
    if unknown or kwargs.get("dropout"):
        raise NotExpressible(f"attention with {', '.join(unknown) or 'dropout'}")
    segments = _announced()
    batch, heads, rows, width = query.shape
    kv_heads = key.shape[1]
    mask_shape = (len(segments.bounds), 1, *2 * (segments.longest(),))
    if (
        attention_mask is None
        or attention_mask.shape != mask_shape
        or (batch, rows) != (1, segments.rows)
        or key.shape[2] != rows
        or heads % kv_heads
    ):
        raise NotExpressible("attention between other tokens than the packed row's own")
    scaling = float(width**-0.5 if scaling is None else scaling)
    mask = segments.mask(attention_mask)
    window = None
    if varlen.declined(query, key, value, softcap=softcap, sinks=s_aux) is None:
        window = mask.window()
    if window is None:
        apply = SegmentAttention.apply
        return apply(query, key, value, s_aux, mask, segments, scaling, softcap), None
    offsets = segments.offsets(query.device)
    of_all = segments.longest()
    return varlen.attend(query, key, value, offsets, of_all, window, scaling), None
