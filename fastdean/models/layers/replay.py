"""A model run one decoder layer at a time, by its own forward.

Inside a `Replay`, a layer that is called does not compute: it answers at once with what it returned
before. To reach layer k, the model's own forward runs on a batch, layers 0 to k-1 answer, and it
stops where layer k is about to run, whose arguments are taken. So what a model does between its
layers (masks, rotary tables, residual streams, hooks on layers) is its own code, run again each
time, and no layer but one needs its weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastdean.models.model_state import undone
from fastdean.models.trees import Path, mappings, replaced, tensors
from fastdean.wording.mendable import StateError

# A mapping among a layer's arguments, by its path, and one of its keys.
_Place = tuple[Path, Any]
# Of each tensor, how many numbers a sample has at most.
_SAMPLE = 4096


@dataclass(frozen=True)
class Returned:
    """What a layer gave back for one batch.

    Attributes:
        result: what its forward returned.
        put: what it put into mappings it was given, such as keys and values for later layers.
    """

    result: Any
    put: Mapping[_Place, Any]

    def tensors(self) -> dict[Path, Tensor]:
        found = {("result", *path): tensor for path, tensor in tensors(self.result)}
        for (where, key), value in self.put.items():
            found |= {("put", where, key, *path): tensor for path, tensor in tensors(value)}
        return found

    def replaced(self, new: Mapping[Path, Tensor]) -> Returned:
        """The same with the tensors of `new`, by the paths that `tensors` gives them."""
        result = {path[1:]: tensor for path, tensor in new.items() if path[0] == "result"}
        put = {}
        for (where, key), value in self.put.items():
            start = ("put", where, key)
            inside = {path[3:]: tensor for path, tensor in new.items() if path[:3] == start}
            put[where, key] = replaced(value, inside)
        return Returned(replaced(self.result, result), put)


@dataclass(frozen=True)
class Arguments:
    """The arguments of a layer's forward, after all hooks on the layer."""

    args: tuple
    kwargs: dict[str, Any]

    def tensors(self) -> dict[Path, Tensor]:
        return dict(tensors((self.args, self.kwargs)))

    def replaced(self, new: Mapping[Path, Tensor]) -> Arguments:
        return Arguments(*replaced((self.args, self.kwargs), new))


class NotByLayers(StateError):
    """The model cannot be run one layer at a time."""


class _Reached(BaseException):
    """The layer that was asked for is about to run. Models catch exceptions, and not this one."""

    def __init__(self, arguments: Arguments) -> None:
        super().__init__()
        self.arguments = arguments


class Replay:
    """The layers of one model, each answering or run by itself. Made by `replaying`.

    Args:
        layers: name -> decoder layer, in the order in which the model calls them.
    """

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self.names = list(layers)
        self._layers = list(layers.values())
        self._forwards = [layer.forward for layer in self._layers]
        # Layer -> what it answers; the layer that is waited for; which is to be called next.
        self._answers: Sequence[Returned] = ()
        self._next = 0

    def __len__(self) -> int:
        return len(self._layers)

    def reach(self, answers: Sequence[Returned], call: Callable[[], Any]) -> Arguments:
        """The arguments of layer `len(answers)` in `call()`, which runs the model.

        Raises:
            NotByLayers: the model does not call its layers one after the other, each once.
        """
        self._answers, self._next = answers, 0
        try:
            call()
        except _Reached as reached:
            return reached.arguments
        finally:
            self._answers = ()
        raise NotByLayers(self._out_of_order_message(self._next, "left out"))

    def finish(self, answers: Sequence[Returned], call: Callable[[], Any]) -> Any:
        """What `call()`, which runs the model, returns when all layers answer.

        Raises:
            NotByLayers: as `reach`; or what follows asks for something that layers return nothing
                of, and that is recorded while they run (attentions, the logits of routers).
        """
        self._answers, self._next = answers, 0
        try:
            result = call()
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            raise NotByLayers(
                "order='layers' must be able to run what follows the layers on what they return, "
                f"got {type(error).__name__}: {error}; attentions and the logits of routers are "
                "not at hand there"
            ) from error
        finally:
            self._answers = ()
        if self._next != len(self):
            raise NotByLayers(self._out_of_order_message(self._next, "left out"))
        return result

    def run(self, k: int, arguments: Arguments) -> Returned:
        """Layer k itself, below the hooks on it."""
        # A layer may write into the mappings; the caller's stay what they are.
        given = arguments.replaced({})
        tree = (given.args, given.kwargs)
        before = {(path, key): m[key] for path, m in mappings(tree) for key in m}
        result = self._forwards[k](*given.args, **given.kwargs)
        put = {
            (path, key): value
            for path, mapping in mappings(tree)
            for key, value in mapping.items()
            if before.get((path, key)) is not value and any(True for _ in tensors(value))
        }
        return Returned(result, put)

    def _answer(self, j: int, args: tuple, kwargs: dict[str, Any]) -> Any:
        if j != self._next:
            order = "called again" if j < self._next else "called before the one above it"
            raise NotByLayers(self._out_of_order_message(j, order))
        if j == len(self._answers):
            raise _Reached(Arguments(args, kwargs))
        self._next += 1
        answer = self._answers[j]
        given = dict(mappings((args, kwargs))) if answer.put else {}
        for (path, key), value in answer.put.items():
            given[path][key] = value
        return answer.result

    def _out_of_order_message(self, j: int, what: str) -> str:
        return (
            "order='layers' must find each decoder layer called once, in the order of the stack, "
            f"got {self.names[j]} {what}"
        )


@contextmanager
def replaying(layers: Mapping[str, nn.Module]) -> Iterator[Replay]:
    """Inside, the layers answer to the `Replay`; afterwards their forwards are what they were."""
    replay = Replay(layers)

    def stub(j: int) -> Callable[..., Any]:
        return lambda *args, **kwargs: replay._answer(j, args, kwargs)

    with stand_ins(list(layers.values()), stub):
        yield replay


@contextmanager
def recording(layers: Mapping[str, nn.Module]) -> Iterator[list[dict[Path, Tensor]]]:
    """What each layer returns, below the hooks on it, when the model runs as it is.

    Yields:
        For each layer a `sample` of what it returned last; empty as long as it has not run.
    """
    modules = list(layers.values())
    forwards = [layer.forward for layer in modules]
    found: list[dict[Path, Tensor]] = [{} for _ in modules]

    def recorded(j: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            result = forwards[j](*args, **kwargs)
            found[j] = sample(result)
            return result

        return forward

    with stand_ins(modules, recorded):
        yield found


def sample(result: Any) -> dict[Path, Tensor]:
    """Some numbers of each floating-point tensor in what a layer returned, evenly spread."""
    with torch.no_grad():
        return {
            path: tensor.flatten()[:: 1 + tensor.numel() // _SAMPLE].clone()
            for path, tensor in tensors(result)
            if tensor.is_floating_point()
        }


@contextmanager
def stand_ins(
    modules: Sequence[nn.Module], new: Callable[[int], Callable[..., Any]]
) -> Iterator[None]:
    """Inside, module j runs `new(j)`; afterwards the forwards are what they were."""
    # A forward of the instance's own (accelerate's, a user's) is put back, not deleted.
    own = [module.__dict__.get("forward") for module in modules]

    def undo() -> None:
        for module, forward in zip(modules, own, strict=True):
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = forward

    with undone(undo):
        for j, module in enumerate(modules):
            module.__dict__["forward"] = new(j)
        yield


def leaves_below(tree: Any) -> set[int]:
    """The ids of the leaf tensors that the tree's tensors were computed from, as autograd knows."""
    seen: set[Any] = set()
    found: set[int] = set()
    waiting = []
    for _, tensor in tensors(tree):
        if tensor.grad_fn is not None:
            waiting.append(tensor.grad_fn)
        elif tensor.requires_grad:
            found.add(id(tensor))
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            found.add(id(leaf))
        waiting += [below for below, _ in node.next_functions if below is not None]
    return found


def placeholder(shapes: Returned, device: torch.device) -> Returned:
    """A stand-in for an answer that is not looked at: NaN, or 0 of other types, in one cell."""
    return shapes.replaced(
        {path: _blank(tensor, device) for path, tensor in shapes.tensors().items()}
    )


def _blank(tensor: Tensor, device: torch.device) -> Tensor:
    value = float("nan") if tensor.is_floating_point() else 0
    return torch.full((), value, dtype=tensor.dtype, device=device).expand(tensor.shape)
