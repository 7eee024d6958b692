"""What every layer returned for every batch, and the gradients of it, while a sweep needs them.

Where they are meanwhile is the affair of a `Home` (homes.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastdean.coupling.layers.homes import Home
from fastdean.coupling.resuming.kept_files import KeptFiles
from fastdean.models.described_trees import described, rebuilt
from fastdean.models.layers.replay import Returned
from fastdean.models.trees import Path, compact


@dataclass
class States:
    """By layer and batch: what a layer returned, and the gradient of the loss in it.

    A home knows a tensor by its place among those that the layer returned.
    """

    home: Home
    # With tensors of no content in their places: the shapes alone.
    _shapes: dict[tuple[int, int], Returned] = field(default_factory=dict)
    # The power of two that the gradients are multiplied by, as losses in fp16 are.
    _exponents: dict[tuple[int, int], int] = field(default_factory=dict)

    @classmethod
    def of(cls, home: KeptFiles) -> States:
        """Those that an earlier process left."""
        states = cls(home)
        for (_, layer, batch), note, parts in home.notes("state"):
            blank = [
                torch.empty_strided(part.shape, part.stride, dtype=part.dtype, device="meta")
                for part in parts
            ]
            result, put = rebuilt(note, blank)
            named = {(where, key): value for where, key, value in put}
            states._shapes[layer, batch] = Returned(result, named)
        for (_, layer, batch), exponent, _ in home.notes("gradient"):
            states._exponents[layer, batch] = exponent or 0
        return states

    def keep(self, layer: int, batch: int, returned: Returned) -> None:
        found = {path: compact(tensor) for path, tensor in returned.tensors().items()}
        self.home.keep(
            ("state", layer, batch),
            dict(enumerate(found.values())),
            lambda: described((returned.result, [(*k, v) for k, v in returned.put.items()])),
        )
        blank = {path: torch.empty_like(tensor, device="meta") for path, tensor in found.items()}
        self._shapes[layer, batch] = returned.replaced(blank)

    def returned(self, layer: int, batch: int) -> Returned:
        shapes = self._shapes[layer, batch]
        return shapes.replaced(self._named(layer, batch, self.home.bring(("state", layer, batch))))

    def keeps(self, layer: int, batch: int) -> bool:
        """Whether what the layer returned for the batch is there."""
        return (layer, batch) in self._shapes

    def shapes(self, layer: int, batch: int) -> Returned:
        """What the layer returned, its tensors on the meta device."""
        return self._shapes[layer, batch]

    def foresee(self, layer: int, batch: int, share: float, layers: int) -> None:
        """Tell the home how much is to come, from what it got for a batch of the first layer.

        Args:
            share: of the rows of all batches, those of this one.
            layers: of the model, and one for what embeddings return if that is kept. Two more are
                at the end of a window as gradients.
        """
        size = sum(tensor.nbytes for tensor in self.shapes(layer, batch).tensors().values())
        self.home.foresee(int(size / share * (layers + 2)))

    def add_gradients(
        self, layer: int, batch: int, gradients: Mapping[Path, Tensor], exponent: int = 0
    ) -> None:
        """Add to the gradients of some of the tensors; those of no gradient yet start at it.

        Args:
            exponent: of the power of two that they are multiplied by.
        """
        key = ("gradient", layer, batch)
        if not gradients:
            return
        total = dict(gradients)
        if (layer, batch) in self._exponents:
            before = (self.gradients(layer, batch), self.exponent(layer, batch))
            total, exponent = _added(before, (gradients, exponent))
            self.home.drop(key)
        numbers = {path: n for n, path in enumerate(self.shapes(layer, batch).tensors())}
        self.home.keep(
            key,
            {numbers[path]: tensor for path, tensor in total.items()},
            (lambda: exponent) if exponent else None,
        )
        self._exponents[layer, batch] = exponent

    def gradients(self, layer: int, batch: int) -> dict[Path, Tensor]:
        if (layer, batch) not in self._exponents:
            return {}
        return self._named(layer, batch, self.home.bring(("gradient", layer, batch)))

    def exponent(self, layer: int, batch: int) -> int:
        """Of the power of two that the gradients are multiplied by."""
        return self._exponents.get((layer, batch), 0)

    def drop(self, layer: int, batch: int) -> None:
        self.home.drop(("state", layer, batch))
        self.home.drop(("gradient", layer, batch))
        self._exponents.pop((layer, batch), None)
        self._shapes.pop((layer, batch), None)

    def _named(
        self, layer: int, batch: int, found: Mapping[int | str, Tensor]
    ) -> dict[Path, Tensor]:
        paths = list(self.shapes(layer, batch).tensors())
        return {paths[int(number)]: tensor for number, tensor in found.items()}


# Gradients, and the exponent of the power of two that they are multiplied by.
_Scaled = tuple[Mapping[Path, Tensor], int]


def _added(before: _Scaled, after: _Scaled) -> tuple[dict[Path, Tensor], int]:
    """The sum at the lower of two scales; at half of it where fp16 cannot hold the sum."""
    exponent = min(before[1], after[1])
    for lowered in (exponent, exponent - 1):
        (first, second) = (
            multiplied(gradients, lowered - given) for gradients, given in (before, after)
        )
        total = {
            path: first[path] + second[path] if path in first and path in second else tensor
            for path, tensor in {**first, **second}.items()
        }
        if _finite_in_half(total.values()):
            break
    return total, lowered


def multiplied(gradients: Mapping[Path, Tensor], exponent: int) -> dict[Path, Tensor]:
    """Times 2^exponent: exact but for what is too small, or too large, for the dtype."""
    if exponent == 0:
        return dict(gradients)
    return {path: tensor * 2.0**exponent for path, tensor in gradients.items()}


def _finite_in_half(tensors: Iterable[Tensor]) -> bool:
    """Whether those in fp16 are finite; others are not looked at, which a device would wait for."""
    return all(bool(t.isfinite().all()) for t in tensors if t.dtype == torch.float16)
