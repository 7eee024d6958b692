"""A model whose weights FSDP2 (`fully_shard`) shards over the ranks, whole one layer at a time.

FSDP's own hooks gather a unit's weights for every call of its module. For the time of a job they
are set aside: a layer's units are gathered when its window opens and let go when it closes, by all
ranks together, and between the two each rank runs as many batches as it has. What is outside of the
layers is gathered for the whole job.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastdean.models.available_memory import give_back_freed
from fastdean.models.hooks import Casting, hooks_exchanged
from fastdean.models.layers.first_layers import (
    ScatteredLayersError,
    ending_behind,
    first_of_their_kind,
    stacks_of,
)
from fastdean.models.model_state import undone
from fastdean.models.ranks.distributed import Ranks
from fastdean.models.ranks.shards import (
    OwnBlock,
    is_sharded,
    shard_fault,
    split_alone,
    split_fault,
    split_shard_fault,
    whole,
)

_REMEDY = "load it in one process, or shard it in one of these ways"


def units_of(model: nn.Module) -> dict[str, Any]:
    """Name -> module that `fully_shard` was called with."""
    # Nobody called it where it was never imported, and importing it takes a second.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return {}
    return {n: m for n, m in model.named_modules() if isinstance(m, fsdp.FSDPModule)}


def resharded(model: nn.Module) -> bool:
    """Let go of all weights that FSDP gathered; whether the model is sharded at all.

    A unit may keep its weights after a forward pass. The next one gathers them again.

    Raises:
        ValueError: weights are sharded in another way than by `fully_shard` over all ranks, by
            tensor parallel, or by both over a mesh of all ranks.
    """
    loaded = sys.modules.keys() & {"torch.distributed.tensor", "torch.distributed.fsdp"}
    if not loaded or not isinstance(model, nn.Module):
        return False
    units = units_of(model)
    if units:
        # FSDP shards every unit for it, those too that `reshard` lets be where a pass broke off.
        model.state_dict()
    size = Ranks.of_group().size
    managed = _managed(model)
    # Ranks over which tensor parallel splits each weight that it splits.
    team = max((_team_of(*each) for each in managed.values()), default=1)
    inside = {module for unit in units.values() for module in unit.modules()}
    for path, module in model.named_modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise _not_ours(path or "it", "FullyShardedDataParallel (FSDP1)")
        for name, parameter in module.named_parameters(path, recurse=False):
            if not is_sharded(parameter):
                continue
            if units and module not in inside:
                raise _not_ours(name, "sharded without it (tensor parallel)")
            of_name = (module, name.rpartition(".")[2])
            if not units:
                fault = split_fault(parameter)
            elif of_name in managed and _is_split(*managed[of_name]):
                fault = _split_shard_fault(parameter, size, *managed[of_name])
            elif team > 1 and parameter.device_mesh.size() != size // team:
                ranks = parameter.device_mesh.size()
                fault = f"sharded over {ranks} ranks where each {team} hold a model together"
            else:
                fault = shard_fault(parameter, size // team)
            if fault is not None:
                raise _not_ours(name, fault)
    return any(map(is_sharded, model.parameters()))


def _managed(model: nn.Module) -> dict[tuple[nn.Module, str], tuple[Any, Any]]:
    """(module, name in it) -> the parameter that FSDP2 shards there, and the mesh that it does so
    over."""
    found = {}
    for each, _ in sharded_parameters(model):
        of = each._module_info
        modules = [of.module, *of.shared_modules]
        names = [of.param_name, *of.shared_param_names]
        for place in zip(modules, names, strict=True):
            found[place] = each.sharded_param, each.mesh_info
    return found


def _is_split(parameter: Any, info: Any) -> bool:
    """Whether tensor parallel splits a parameter that FSDP2 shards."""
    return parameter.device_mesh.ndim > info.mesh.ndim


def _team_of(parameter: Any, info: Any) -> int:
    return parameter.device_mesh.size() // info.mesh.size() if _is_split(parameter, info) else 1


def _split_shard_fault(parameter: Any, size: int, managed: Any, info: Any) -> str | None:
    if getattr(info, "is_spmd_mesh", False):
        return "sharded with dp_mesh_dims"
    return split_shard_fault(parameter, size, info.mesh.ndim)


@contextmanager
def left_sharded(model: nn.Module) -> Iterator[None]:
    """Afterwards no unit of FSDP2 has kept the weights that passes inside gathered.

    Who then asks for the parameters, for an optimizer, gets those that the ranks hold.
    """
    units = units_of(model)

    def undo() -> None:
        for unit in units.values():
            unit.reshard()

    with undone(undo):
        yield


def sharded_parameters(model: nn.Module) -> Iterator[tuple[Any, Any]]:
    """What FSDP2 knows of each parameter that it shards, and the unit's group of them.

    Of the first `sharded_param` is the parameter, also while another one with all of the weight
    stands in its place.
    """
    states = {unit._get_fsdp_state() for unit in units_of(model).values()}
    for state in states:
        # Of several groups since torch 2.12.
        groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
        for group in groups:
            if group is not None:
                yield from ((each, group) for each in group.fsdp_params)


def behind(model: nn.Module, module: nn.Module, leaf: str) -> tuple[Tensor | None, float | None]:
    """The sharded parameter in whose place a module may have a gathered weight at the moment.

    Returns:
        (parameter, divisor): None where FSDP2 does not shard it; and by what it divides the sum of
            the ranks' gradients, None for the number of ranks with examples of their own.
    """
    now = module._parameters.get(leaf)
    for each, group in sharded_parameters(model):
        of = each._module_info
        modules = [of.module, *of.shared_modules]
        names = [of.param_name, *of.shared_param_names]
        # A weight that was tied afterwards is no place that FSDP2 knows of.
        tied = now is not None and each.sharded_param is now
        if tied or any(m is module and n == leaf for m, n in zip(modules, names, strict=True)):
            # Weights that were loaded since are noted with the first pass.
            held = now if now is not None and is_sharded(now) else each.sharded_param
            return held, group.gradient_divide_factor
    return None, None


def _not_ours(name: str, found: str) -> ValueError:
    return ValueError(
        f"model must be whole on every rank, sharded over all of them by fully_shard (FSDP2), "
        f"split over a mesh of one dimension by tensor parallel, or both, got {name} {found}; "
        f"{_REMEDY}"
    )


class ShardedModel:
    """The windows of a model that FSDP2 shards; all ranks enter every context together.

    What tensor parallel splits stays so while it is gathered.

    Args:
        model: below its wrappers.
        layers: name -> decoder layer, in the order of the stack.
        ranks: of the whole process group.
    Attributes:
        device: where it computes.
    """

    tables: Mapping[str, nn.Module] = {}
    on_demand: Mapping[str, nn.Module] = {}

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module], ranks: Ranks) -> None:
        self._model, self._layers, self._ranks = model, dict(layers), ranks
        self._units = units_of(model)
        inside = {module for layer in layers.values() for module in layer.modules()}
        self._outside = [unit for unit in self._units.values() if unit not in inside]
        # The sharded parameters, which are not to be seen while their units are gathered.
        self._originals = {
            (module, leaf): parameter
            for module in model.modules()
            for leaf, parameter in module._parameters.items()
            if parameter is not None and is_sharded(parameter)
        }
        self._dims = {place: info.mesh.ndim for place, (_, info) in _managed(model).items()}
        self.device = self._computes_on()
        try:
            stacks_of(model, layers)
        except ScatteredLayersError as error:
            raise ValueError(
                f"model must have its decoder layers in one list to be scored with its weights "
                f"sharded over ranks, got {error}; load it in one process"
            ) from None

    @contextmanager
    def outside_layers(self) -> Iterator[None]:
        """Inside, the weights outside of the layers are whole, and FSDP's hooks do not run."""
        with self._without_hooks(), self._gathered(self._outside):
            yield

    @contextmanager
    def beginning(self) -> Iterator[dict[str, str]]:
        """Inside, the model ends after the first layers, one of each kind at least, and is whole.

        Yields:
            The name of each layer -> that of the first of its kind.
        """
        alike = first_of_their_kind(self._layers)
        with ending_behind(self._model, self._layers, alike.values()) as left, ExitStack() as open_:
            for name in left:
                open_.enter_context(self._gathered(self._units_in(self._layers[name])))
            yield alike

    @contextmanager
    def layer(self, k: int, then: int) -> Iterator[None]:
        """Inside, the weights of layer k are whole. The one of `then` is not gathered before."""
        with self._gathered(self._units_in(list(self._layers.values())[k])):
            yield

    def bring(self, name: str) -> None:
        """Nothing comes in on demand."""

    def close(self) -> None:
        """Nothing was brought."""

    def original(self, module: nn.Module, leaf: str) -> Tensor:
        """A weight as its ranks hold it, detached, in its own dtype; its window is open.

        Of a unit that computes in another dtype it is gathered once more. Else it lives as long as
        the window. What tensor parallel splits is a DTensor.
        """
        weight = module._parameters[leaf]
        assert weight is not None
        sharded = self._originals.get((module, leaf))
        if sharded is None or sharded.dtype == weight.dtype:
            return weight.detach()
        if is_sharded(weight):
            return split_alone(sharded, weight, self._dims[module, leaf])
        return whole(sharded)

    def block(self, module: nn.Module, leaf: str) -> OwnBlock:
        """What this rank has of a weight when its window is open: shapes, on meta."""
        parameter = module._parameters[leaf]
        assert parameter is not None
        if not is_sharded(parameter):
            return OwnBlock.of(parameter)
        return OwnBlock.split(parameter, self._dims[module, leaf])

    def _units_in(self, layer: nn.Module) -> list[Any]:
        inside = set(layer.modules())
        return [unit for unit in self._units.values() if unit in inside]

    @contextmanager
    def _gathered(self, units: Sequence[Any]) -> Iterator[None]:
        def undo() -> None:
            for unit in units:
                unit.reshard()

        # What the last window left, the buffers that weights came in, and the weights themselves
        # would otherwise stay beside what comes next.
        give_back_freed(self.device)
        with undone(undo):
            with self._ranks.together():
                for unit in units:
                    unit.unshard()
            give_back_freed(self.device)
            yield
        give_back_freed(self.device)

    @contextmanager
    def _without_hooks(self) -> Iterator[None]:
        """Inside, of what FSDP's hooks do, the changes of dtype alone are left."""
        with hooks_exchanged(self._units.values(), partial(_instead, self._states())):
            yield

    def _states(self) -> set[Any]:
        return {unit._get_fsdp_state() for unit in self._units.values()}

    def _computes_on(self) -> torch.device:
        parameter: Any = next(iter(self._originals.values()))
        kind = parameter.device_mesh.device_type
        if kind == "cpu":
            return torch.device("cpu")
        return torch.device(kind, torch.get_device_module(kind).current_device())


def _instead(states: set[Any], hook: Callable[..., Any], before: bool) -> Callable | None:
    """What stands in for a forward hook of a unit: itself, if it is none of FSDP's.

    Args:
        before: whether the hook runs before the forward.
    """
    state = _owner(hook)
    if not any(state is each for each in states):
        return hook
    policy = state._mp_policy
    if before:
        dtype = policy.param_dtype if policy.cast_forward_inputs else None
    else:
        dtype = policy.output_dtype
    return None if dtype is None else Casting(dtype, before)


def _owner(hook: Any) -> Any:
    """The object whose method a hook is, below functions that wrap it."""
    while hook is not None and not hasattr(hook, "__self__"):
        hook = getattr(hook, "__wrapped__", None)
    return getattr(hook, "__self__", None)
