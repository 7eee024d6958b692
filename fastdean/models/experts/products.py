"""Fused experts run token by token of each expert, so that both of their products can be seen.

    a = act(x W_up[e]^T + b_up[e])          y = a W_down[e]^T + b_down[e]

for each pair of a token x and an expert e that it was routed to, and the sum of its experts' y by
the router's weights for each token. Rows are sorted by expert and, within it, by their place in the
batch; so those of one example at one expert lie side by side.

The function is registered with transformers' experts interfaces. Modules that have no such
interface are called through it while the block lasts. Passes outside of the block, of other threads
and of modules that nobody listens to keep the model's own implementation.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from fastdean.models.experts.fused import FusedExperts, fused_experts
from fastdean.models.model_state import undone
from fastdean.models.ranks.expert_parallel import own_experts, routed_here, summed

NAME = "fastdean_products"


@dataclass(frozen=True)
class Routing:
    """Whose the rows of a product are.

    Attributes:
        rows: int64 [S], the place of each in the batch's rows; ascending within an expert.
        experts: int64 [S], ascending.
        total: rows of the batch.
        dense: every expert was given every token, as zeros those that it was not chosen for.
    """

    rows: Tensor
    experts: Tensor
    total: int
    dense: bool = False

    def segments(self, segments: Tensor) -> tuple[Tensor, Tensor]:
        """Where the examples lie in the product: int64 [M, 2], and the expert of each, int64 [M].

        Those of an example that an expert saw nothing of are left out.

        Args:
            segments: int64 [B, 2], where they lie in the batch's rows.
        """
        here = self.experts.unique_consecutive()
        keys = self.experts * self.total + self.rows
        ends = segments.to(keys.device)[None] + (here * self.total)[:, None, None]
        found = torch.searchsorted(keys, ends.flatten()).view(-1, 2)
        owners = here.repeat_interleave(len(segments))
        seen = found[:, 0] < found[:, 1]
        return found[seen], owners[seen]

    def only(self, kept: Tensor | slice) -> Routing:
        return replace(self, rows=self.rows[kept], experts=self.experts[kept])

    def chosen(self, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Routing]:
        """The rows that add anything to x^T g: without those of zeros, if `dense`."""
        if not self.dense:
            return x, g, self
        kept = x.any(-1)
        return x[kept], g[kept], self.only(kept)


# The name of a weight, the product's input [S, C], the product [S, R] and whose its rows are; what
# is returned takes the product's place.
Listener = Callable[[str, Tensor, Tensor, Routing], Tensor]
# The module, the name of a weight, an expert and its matrix as it is stored; what is returned, a
# tensor of the same values, takes the matrix's place in the product.
Stand = Callable[[nn.Module, str, int, Tensor], Tensor]
# At so many experts of a stack the product is differentiated by the matrix that stands for it. All
# run through the same lines, and a gradient of each would be another model's worth of memory
# traffic for a mixture of hundreds.
_STANDING = 4
# Of 16 bits on a CPU: one, two or three rows take a library's slow way, 7 ms where four take 0.2 ms
# (1536 x 1024, bf16 with AMX), and of hundreds of experts many get no more.
_FEWEST_ROWS = 4
# Called with a module, what was computed here and what the model's own implementation computes.
Compare = Callable[[nn.Module, Tensor, Tensor], None]


@dataclass(frozen=True, eq=False)
class _Block:
    listeners: Mapping[nn.Module, Listener]
    compare: Compare | None
    stand: Stand | None


_BLOCKS: ContextVar[tuple[_Block, ...]] = ContextVar("fastdean_experts", default=())


@dataclass
class _Taken:
    """Something that calls our function, how to undo that, and the blocks it is for."""

    kept: object
    own: str | None
    give_back: Callable[[], None]
    blocks: set[_Block] = field(default_factory=set)


_LOCK = threading.RLock()
# By the identity of a configuration, or of a module without one, which the entry keeps alive.
_TAKEN: dict[int, _Taken] = {}


@contextmanager
def listening_to_experts(
    listeners: Mapping[nn.Module, Listener],
    compare: Compare | None = None,
    stand: Stand | None = None,
) -> Iterator[None]:
    """Inside, these modules run through `run_experts`, and each tells its listener of its products.

    Args:
        listeners: by module, each one that `fused_experts` knows.
        compare: told what the model's own implementation computes of the same inputs, too.
        stand: asked for what stands for the matrices of the few experts that most rows reach.
    """
    block = _Block(listeners, compare, stand)

    def undo() -> None:
        for module in listeners:
            _give_back(module, block)
        _BLOCKS.set(tuple(other for other in _BLOCKS.get() if other is not block))

    with undone(undo):
        if listeners:
            _register()
            _BLOCKS.set((*_BLOCKS.get(), block))
        for module in listeners:
            _take(module, block)
        yield


def running_experts_alike(modules: Collection[nn.Module]) -> AbstractContextManager[None]:
    """Inside, these modules run through `run_experts` also where nobody listens to them.

    So a pass gives the same bits whoever is listened to in it: their own implementation may round
    otherwise.
    """

    def unheard(leaf: str, x: Tensor, product: Tensor, routing: Routing) -> Tensor:
        return product

    return listening_to_experts(dict.fromkeys(modules, unheard))


def _register() -> None:
    for table in _tables():
        if NAME not in table:
            table.register(NAME, _dispatched)


def _tables() -> list[Any]:
    from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    return [ALL_EXPERTS_FUNCTIONS, ALL_FP8_EXPERTS_FUNCTIONS]


def _key(module: nn.Module) -> Any:
    """What is taken for a module: its configuration, which names an implementation, or itself."""
    fused = fused_experts(module)
    assert fused is not None  # Of all that are listened to.
    return module.config if fused.dispatched else module


def _take(module: nn.Module, block: _Block) -> None:
    with _LOCK:
        key = _key(module)
        taken = _TAKEN.get(id(key))
        if taken is None:
            taken = _of_module(module) if key is module else _of_config(key)
            _TAKEN[id(key)] = taken
        taken.blocks.add(block)
        if key is not module:
            key._experts_implementation_internal = NAME


def _of_config(config: Any) -> _Taken:
    own = config._experts_implementation_internal

    def give_back() -> None:
        config._experts_implementation_internal = own

    return _Taken(config, own, give_back)


def _of_module(module: nn.Module) -> _Taken:
    """Put our function where the module's forward is called: below an offloading hook's own."""
    values = vars(module)
    place = "_old_forward" if "_old_forward" in values else "forward"
    own = values.get(place)

    def give_back() -> None:
        if own is None:
            values.pop(place, None)
        else:
            values[place] = own

    def forward(*args: Any, **kwargs: Any) -> Any:
        return _call(module, own or _plain_forward(module), args, kwargs)

    taken = _Taken(module, None, give_back)
    values[place] = forward
    return taken


def _give_back(module: nn.Module, block: _Block) -> None:
    """May be repeated. The last of several blocks gives it back, in whatever order they end."""
    with _LOCK:
        for key in (getattr(module, "config", None), module):
            taken = _TAKEN.get(id(key))
            if taken is None or block not in taken.blocks:
                continue
            if taken.blocks == {block}:
                taken.give_back()
                del _TAKEN[id(key)]
            else:
                taken.blocks.discard(block)


def _plain_forward(module: nn.Module) -> Callable[..., Tensor]:
    """What the class itself computes, below the decorator that looks an implementation up."""
    forward = type(module).forward
    return getattr(forward, "__wrapped__", forward).__get__(module)


def _dispatched(module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """What the registries hold."""
    return _call(module, _own_forward(module), args, kwargs)


def _own_forward(module: nn.Module) -> Callable[..., Tensor]:
    """The implementation that the configuration named before it was taken."""
    taken = _TAKEN.get(id(module.config))
    own = None if taken is None else taken.own
    plain, fp8 = _tables()
    table = fp8 if type(module).__name__ == "FP8Experts" else plain
    function = None if own in (None, NAME) else table.get(own)
    return _plain_forward(module) if function is None else function.__get__(module)


def _call(module: nn.Module, own: Callable[..., Tensor], args: tuple, kwargs: dict) -> Tensor:
    block = next((b for b in reversed(_BLOCKS.get()) if module in b.listeners), None)
    if block is None:
        return own(*args, **kwargs)
    fused = fused_experts(module)
    assert fused is not None
    given = inspect.signature(_plain_forward(module)).bind(*args, **kwargs).args
    result = run_experts(module, fused, block, *given)
    if block.compare is not None:
        with torch.no_grad():
            block.compare(module, result.detach(), _expected(module, own, args, kwargs))
    return result


def _expected(module: nn.Module, own: Callable[..., Tensor], args: tuple, kwargs: dict) -> Tensor:
    try:
        return own(*args, **kwargs)
    except (RuntimeError, ImportError):
        # The grouped product knows no float64, for one.
        return _plain_forward(module)(*args, **kwargs)


def run_experts(
    module: Any, fused: FusedExperts, block: _Block, hidden: Tensor, *routed: Tensor
) -> Tensor:
    """What the module's own implementation computes, by one product for each weight of an expert.

    Args:
        hidden: [N, H], with `routed`, the chosen experts int64 [N, k] and their weights [N, k]; or
            [E * N, H] by expert.
    """
    if not routed:
        return _dense(module, fused, block, hidden)
    if not fused.on_owners:
        return _routed(module, fused, block, hidden, *routed)
    weight = getattr(module, fused.up)
    here = routed_here(weight, hidden, *routed)
    return summed(weight, _routed(module, fused, block, *here))


def _routed(
    module: Any,
    fused: FusedExperts,
    block: _Block,
    hidden: Tensor,
    chosen: Tensor,
    weights: Tensor,
) -> Tensor:
    k = chosen.shape[-1]
    number = len(own_experts(getattr(module, fused.up))), len(own_experts(module.down_proj))
    experts, order = chosen.reshape(-1).to(torch.int64).sort(stable=True)
    routing = Routing(order // k, experts, hidden.shape[0])
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    x = _Gathered.apply(hidden, order, place, k)
    # Experts without weights hand their tokens on as they are.
    with_weights = int((experts < min(number)).sum())
    out = _expert(module, fused, block, x[:with_weights], routing.only(slice(with_weights)))
    if with_weights < len(x):
        out = torch.cat([out, x[with_weights:].to(out.dtype)])
    weighted = out * weights.reshape(-1)[order].unsqueeze(-1)
    by_token = _Gathered.apply(weighted, place, order, 1)
    return by_token.view(-1, k, weighted.shape[-1]).sum(1).to(hidden.dtype)


def _dense(module: Any, fused: FusedExperts, block: _Block, x: Tensor) -> Tensor:
    number = module.down_proj.shape[0]
    each = len(x) // number
    places = torch.arange(len(x), device=x.device)
    routing = Routing(places % each, places // each, each, dense=True)
    return _expert(module, fused, block, x.view(len(x), -1), routing)


def _expert(module: Any, fused: FusedExperts, block: _Block, x: Tensor, routing: Routing) -> Tensor:
    """y of each row of x, sorted by expert."""
    number = len(own_experts(module.down_proj))
    sizes = torch.bincount(routing.experts, minlength=number).tolist()
    standing = _most_reached(x, routing, number) if block.stand is not None else frozenset()

    def product(name: str, x: Tensor) -> Tensor:
        # What reaches the whole stack is of other uses than these products.
        stored = own_experts(getattr(module, name)).detach().unbind(0)

        def matrix(expert: int) -> Tensor:
            own = stored[expert]
            if block.stand is not None and expert in standing:
                own = block.stand(module, name, expert, own)
            return own.mT if fused.transposed else own

        y = block.listeners[module](name, x, _products(x, matrix, sizes), routing)
        has_bias = getattr(module, "has_bias", f"{name}_bias" in module._parameters)
        if not has_bias:
            return y
        return y + own_experts(getattr(module, f"{name}_bias"))[routing.experts]

    units = product(fused.up, x)
    units = _gated(module, units) if fused.has_gate else module.act_fn(units)
    y = product("down_proj", units)
    return module.post_expert_norm(y) if getattr(module, "has_post_expert_norm", False) else y


def _gated(module: Any, units: Tensor) -> Tensor:
    if hasattr(module, "_apply_gate"):
        return module._apply_gate(units)
    gate, value = units.chunk(2, dim=-1)
    return module.act_fn(gate) * value


def _most_reached(x: Tensor, routing: Routing, number: int) -> frozenset[int]:
    """The experts that most rows reach, of which there may be none."""
    experts = routing.experts[x.any(-1)] if routing.dense else routing.experts
    counts = torch.bincount(experts, minlength=number)
    return frozenset(counts.argsort(descending=True, stable=True)[:_STANDING].tolist())


def _products(x: Tensor, matrix: Callable[[int], Tensor], sizes: Sequence[int]) -> Tensor:
    """Rows of x, so many for each expert, by that expert's matrix [R, C]."""
    matrices = [matrix(expert) for expert, size in enumerate(sizes) if size]
    if not matrices:
        return functional.linear(x, matrix(0))
    sizes = [size for size in sizes if size]
    # A cast of the caller's own, such as autocast's, is for the product to make.
    plain = not torch.is_autocast_enabled(x.device.type)
    if plain and all(each.dtype == x.dtype for each in matrices):
        return _Products.apply(x, sizes, *matrices)
    parts = zip(x.split(sizes), matrices, strict=True)
    return torch.cat([functional.linear(rows, each) for rows, each in parts])


class _Products(torch.autograd.Function):
    """Rows of x, so many for each matrix [R, C], by that matrix; both ways into one tensor.

    Of a product each, autograd would make a tensor each and copy them together.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: Sequence[int], *matrices: Tensor) -> Tensor:
        ctx.sizes = sizes
        ctx.save_for_backward(x if any(ctx.needs_input_grad[2:]) else None, *matrices)
        return _in_one(x, sizes, [each.mT for each in matrices])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, *matrices = ctx.saved_tensors
        of_x = _in_one(g, ctx.sizes, matrices) if ctx.needs_input_grad[0] else None
        of_matrices: list[Tensor | None] = [None] * len(matrices)
        if x is not None:
            parts = zip(x.split(ctx.sizes), g.split(ctx.sizes), strict=True)
            for i, (rows, own) in enumerate(parts):
                if ctx.needs_input_grad[2 + i]:
                    of_matrices[i] = own.mT @ rows
        return of_x, None, *of_matrices


def _in_one(x: Tensor, sizes: Sequence[int], matrices: Sequence[Tensor]) -> Tensor:
    """Rows of x, so many for each matrix [C, R], times that matrix."""
    result = x.new_empty((len(x), matrices[0].shape[1]))
    fewest = _FEWEST_ROWS if x.is_cpu and x.element_size() == 2 else 0
    for rows, out, each in zip(x.split(sizes), result.split(sizes), matrices, strict=True):
        if len(rows) < fewest:
            padded = rows.new_zeros((fewest, rows.shape[1]))
            padded[: len(rows)] = rows
            out.copy_(torch.mm(padded, each)[: len(rows)])
        else:
            torch.mm(rows, each, out=out)
    return result


class _Gathered(torch.autograd.Function):
    """Rows of x [N, H] that stand k times, in an order of all [N * k, H].

    Autograd would add gradients up row by row.

    Args:
        order: int64 [N * k], which row, k of each; place: where each of them went.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, place: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(place)
        ctx.k = k
        return x.index_select(0, order // k if k > 1 else order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (place,) = ctx.saved_tensors
        rows = g.index_select(0, place)
        if ctx.k > 1:
            rows = rows.view(-1, ctx.k, rows.shape[-1]).sum(1)
        return rows, None, None, None
