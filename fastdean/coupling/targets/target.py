"""One weight that is scored: which module holds it, in which layout, in which layer."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from fastdean.models.experts.fused import fused_experts
from fastdean.models.model_state import execution_device, materialised_weight, weight_of
from fastdean.models.ranks.shards import OwnBlock


@dataclass(frozen=True)
class Target:
    """One weight that is scored, or whose input units are.

    Attributes:
        name: module name in the model, without what PEFT adds to it, of stacked weights with the
            weight's own name; the score is stored under `parameter`.
        module: the nn.Linear or Conv1D, or the module of fused experts.
        transposed: True when the weight is stored [C, R] (in x out), as Conv1D does, or [E, C, R].
        layer_index: position of the decoder layer it lies in, or None.
        group: "mlp", "self_attn", another group of its layer (`fastdean.models.layers.blocks`), or
            None outside the decoder layers.
        leads_from_units: whether its inputs are an MLP's units.
        adapted: an adapter that is neither merged nor off is on top of it.
        leaf: name of the weight in its module.
        stacked: whether the weight holds a matrix for each of several experts.
        part: of a stacked weight the experts (first, end) that are scored in this pass; None: all.
        by_example: scored from its gradient, one backward pass for each example (`by_example.py`);
            the weight may have any shape.
        aliases: the other names of a weight that several modules share, or one module with several
            names.
        block: what this rank has of a weight of a model that tensor parallel splits; None of
            another model.
    """

    name: str
    module: nn.Module
    transposed: bool
    layer_index: int | None
    group: str | None
    leads_from_units: bool = False
    adapted: bool = False
    leaf: str = "weight"
    stacked: bool = False
    part: tuple[int, int] | None = None
    by_example: bool = False
    aliases: tuple[str, ...] = ()
    block: OwnBlock | None = None

    @property
    def parameter(self) -> str:
        return self.parameter_called(self.name)

    @property
    def key(self) -> str:
        """What the sums are kept under: the parameter, with the part of it."""
        return (
            self.parameter
            if self.part is None
            else f"{self.parameter}[{self.part[0]}:{self.part[1]}]"
        )

    @property
    def experts(self) -> slice:
        """The experts of `part`, or all of them."""
        return slice(*(self.part or (0, self.shape[0])))

    @property
    def shape(self) -> torch.Size:
        """Of the weight, or of what this rank has of it."""
        return self.weight.shape if self.block is None else self.block.tensor.shape

    @property
    def weightless(self) -> int:
        """Of a stacked weight, how many of its last experts lack another and hand tokens on."""
        layout = fused_experts(self.module) if self.stacked else None
        if layout is None:
            return 0
        fewest = min(len(weight_of(self.module, leaf)) for leaf in layout.weights)
        return len(self.weight) - fewest

    @property
    def summed_shape(self) -> tuple[int, ...]:
        """The shape of what is scored: the weight's, or that of a part of its experts."""
        shape = tuple(self.shape)
        return shape if self.part is None else (self.part[1] - self.part[0], *shape[1:])

    def pieces(self, fit: Callable[[Target], bool]) -> Iterator[Target]:
        """The target, or its experts in as few consecutive parts as each `fit` by itself.

        One expert is a part also where it does not fit.
        """
        # Experts that lie on several ranks are as many parts of a pass on each.
        if not self.stacked or (self.block is not None and self.block.along[0] is not None):
            yield self
            return
        first, end = self.part or (0, self.shape[0])
        while first < end and not fit(self._part(first, end)):
            unfit = partial(self._is_unfit, first, fit)
            middle = first + max(1, bisect_right(range(1, end - first), False, key=unfit))
            yield self._part(first, middle)
            first = middle
        if first < end:
            yield self._part(first, end)

    def _is_unfit(self, first: int, fit: Callable[[Target], bool], number: int) -> bool:
        return not fit(self._part(first, first + number))

    def _part(self, first: int, end: int) -> Target:
        whole = (first, end) == (0, self.shape[0])
        return replace(self, part=None if whole else (first, end))

    def parameter_called(self, name: str) -> str:
        """What the weight would be called were the target called `name`."""
        return joined_name(name, "weight") if self.leaf == "weight" else name

    def is_called(self, ending: str) -> bool:
        """Whether its parameter has this name, or one that ends with it, at a point."""
        return any(ends_with(name, ending) for name in (self.parameter, *self.aliases))

    def in_place_of(self, name: str, model: nn.Module) -> Target:
        """The same weight of another layer of one kind, by the target's name there."""
        owner = self.parameter_called(name).removesuffix(f".{self.leaf}")
        return replace(self, name=name, module=model.get_submodule(owner))

    def unhooked(self) -> Target:
        """The same weight, scored by example; of stacked ones as one tensor."""
        return replace(self, by_example=True, stacked=False, transposed=False)

    @property
    def weight(self) -> Tensor:
        """As it is stored; a meta tensor where it is offloaded."""
        return weight_of(self.module, self.leaf)

    def materialised(self) -> Tensor:
        """The weight; an offloaded one is copied to the CPU (`materialised_weight`)."""
        return materialised_weight(self.module, self.leaf)

    def device(self, default: torch.device) -> torch.device:
        """Where the module computes, also when its weight is offloaded."""
        return execution_device(self.module, default, self.leaf)

    @property
    def num_inputs(self) -> int:
        return self.shape[self.input_axis]

    @property
    def num_outputs(self) -> int:
        return self.shape[self.output_axis]

    @property
    def input_axis(self) -> int:
        return -2 if self.transposed else -1

    @property
    def output_axis(self) -> int:
        return -1 if self.transposed else -2

    @property
    def unit_axis(self) -> int:
        """The axis of the stored weight that counts the layer's inputs."""
        return 0 if self.transposed else 1


def joined_name(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def ends_with(name: str, ending: str) -> bool:
    return name == ending or name.endswith(f".{ending}")
