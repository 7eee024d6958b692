"""Which weights make up an MLP's unit, besides its column of the down projection.

Found by structure, like `targets`, and believed only after trying: a unit's weights in front of the
down projection are those that, set to zero, change the MLP's output as the column of the down
projection does. A norm between the two, or a layout that nobody thought of, shows there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastdean.coupling.targets.finding import find_targets
from fastdean.coupling.targets.target import Target
from fastdean.models.adapters import parameter_paths, plain_submodule
from fastdean.models.model_state import evaluation_state
from fastdean.models.ranks.shards import is_sharded

_SEED = 11
_TOKENS = 8
# Of the norm of what the columns take away; rounding in bf16 comes to less than 1e-2.
_TOLERANCE = 0.05


@dataclass(frozen=True)
class UnitLayers:
    """The layers whose outputs are the units of one MLP.

    Attributes:
        layers: gate and up, or one layer for both, or the only one of an MLP without a gate.
        rows: units -> the outputs of each of them that belong to these units; ascending.
    """

    layers: tuple[Target, ...]
    rows: Callable[[Tensor], Tensor]

    def places(self, units: Tensor) -> dict[str, Tensor]:
        """Parameter name -> flat row-major indices, ascending, of weights and biases of `units`.

        Args:
            units: int64, ascending, on the CPU.
        """
        rows = self.rows(units)
        found = {}
        for layer in self.layers:
            axis = 1 if layer.transposed else 0
            found[layer.parameter] = flat_places(tuple(layer.weight.shape), axis, rows)
            if layer.module.bias is not None:
                found[f"{layer.name}.bias"] = rows
        return found


def flat_places(shape: tuple[int, ...], axis: int, numbers: Tensor) -> Tensor:
    """Flat row-major indices, ascending, of these rows (axis 0) or columns of a matrix."""
    rows, columns = shape
    if axis == 0:
        return (numbers[:, None] * columns + torch.arange(columns, device=numbers.device)).flatten()
    starts = torch.arange(rows, device=numbers.device) * columns
    return (starts[:, None] + numbers).flatten()


def unit_layers(model: nn.Module, down: str) -> UnitLayers:
    """What lies in front of the down projection whose parameter is called `down`.

    Raises:
        ValueError: its MLP is not one module of a down projection and one or two layers in front of
            it, is offloaded or sharded over ranks, cannot be run by itself, or is changed by them
            otherwise than by the projection.
    """
    targets = {target.parameter: target for target in find_targets(model, "all")}
    if down not in targets:
        raise _unclear_error(down, "no layer of the model's MLPs has that name")
    projection = targets[down]
    parent = projection.name.rpartition(".")[0]
    beside = [
        target
        for target in targets.values()
        if target.name.rpartition(".")[0] == parent
        and target is not projection
        and target.num_inputs == projection.num_outputs
    ]
    units = projection.num_inputs
    sizes = [target.num_outputs for target in beside]
    orders: list[Callable[[Tensor], Tensor]]
    if sizes in ([units], [units, units]):
        orders = [lambda numbers: numbers]
    elif sizes == [2 * units]:
        # All gates, then all ups; or gate and up of a unit side by side.
        orders = [
            lambda numbers: torch.cat([numbers, units + numbers]),
            lambda numbers: torch.stack([2 * numbers, 2 * numbers + 1], 1).flatten(),
        ]
    else:
        raise _unclear_error(
            down, f"{len(beside)} layers beside it have {sizes} outputs for {units} units"
        )
    mlp = plain_submodule(model, parent)
    if any(parameter.device.type == "meta" for parameter in mlp.parameters()):
        raise _unclear_error(down, "it is offloaded, and there are no weights to try")
    if any(map(is_sharded, mlp.parameters())):
        raise _unclear_error(down, "it is sharded over ranks, and no rank has its weights to try")
    for rows in orders:
        found = UnitLayers(tuple(beside), rows)
        if _takes_out_the_same(mlp, parent, projection, found):
            return found
    raise _unclear_error(
        down, "zeroing what lies in front of it does not do what zeroing its columns does"
    )


def _takes_out_the_same(mlp: nn.Module, parent: str, projection: Target, found: UnitLayers) -> bool:
    weight = projection.weight.detach()
    step = max(1, projection.num_inputs // 4)
    units = torch.arange(0, projection.num_inputs, step, device="cpu")
    without_columns = weight.index_fill(projection.unit_axis, units.to(weight.device), 0)
    generator = torch.Generator("cpu").manual_seed(_SEED)
    shape = (1, _TOKENS, projection.num_outputs)
    x = torch.randn(shape, generator=generator, device="cpu").to(weight)
    inside = len(parent) + 1 if parent else 0
    paths = {name: path for name, (path, _) in parameter_paths(mlp).items()}
    rows = {}
    for name, index in found.places(units).items():
        path = paths[name[inside:]]
        edited = mlp.get_parameter(path).detach()
        edited = edited.clone(memory_format=torch.contiguous_format)
        edited.view(-1)[index.to(edited.device)] = 0
        rows[path] = edited
    # Dropout would take out something else every time, and move the caller's random state.
    with torch.no_grad(), evaluation_state(mlp):
        whole = _output(mlp, {}, x, projection.parameter)
        by_columns = _output(
            mlp, {paths[projection.parameter[inside:]]: without_columns}, x, projection.parameter
        )
        by_rows = _output(mlp, rows, x, projection.parameter)
    taken = (whole - by_columns).norm()
    return bool((by_rows - by_columns).norm() <= _TOLERANCE * taken) and bool(taken > 0)


def _output(mlp: nn.Module, changed: Mapping[str, Tensor], x: Tensor, down: str) -> Tensor:
    try:
        output = torch.func.functional_call(mlp, dict(changed), (x,))
    except (TypeError, RuntimeError, ValueError) as error:
        raise _unclear_error(down, f"its MLP cannot be run by itself ({error})") from error
    if not isinstance(output, Tensor):
        raise _unclear_error(down, f"its MLP returns a {type(output).__name__}")
    return output.float()


def _unclear_error(down: str, reason: str) -> ValueError:
    return ValueError(
        f"unit_weights='all' must find what belongs to the units of {down!r}, got an MLP that "
        f"leaves it open: {reason}; use unit_weights='down', which takes the units out as well"
    )
