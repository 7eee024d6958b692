"""What every layer returned for every batch, and the gradients of it, while a sweep needs them.

Where they are meanwhile is the affair of a `Home` (homes.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastdean.coupling.homes import Home
from fastdean.coupling.kept_files import KeptFiles
from fastdean.models.described_trees import described, rebuilt
from fastdean.models.replay import Returned
from fastdean.models.trees import Path, compact


@dataclass
class States:
    """By layer and batch: what a layer returned, and the gradient of the loss in it.

    A home knows a tensor by its place among those that the layer returned.
    """

    home: Home
    # With tensors of no content in their places: the shapes alone.
    _shapes: dict[tuple[int, int], Returned] = field(default_factory=dict)
    _graded: set[tuple[int, int]] = field(default_factory=set)

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
        states._graded |= {(layer, batch) for (_, layer, batch), *_ in home.notes("gradient")}
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

    def add_gradients(self, layer: int, batch: int, gradients: Mapping[Path, Tensor]) -> None:
        """Add to the gradients of some of the tensors; those of no gradient yet start at it."""
        key = ("gradient", layer, batch)
        if not gradients:
            return
        total = dict(gradients)
        if (layer, batch) in self._graded:
            for path, before in self.gradients(layer, batch).items():
                total[path] = before + total[path] if path in total else before
            self.home.drop(key)
        numbers = {path: n for n, path in enumerate(self.shapes(layer, batch).tensors())}
        self.home.keep(key, {numbers[path]: tensor for path, tensor in total.items()})
        self._graded.add((layer, batch))

    def gradients(self, layer: int, batch: int) -> dict[Path, Tensor]:
        if (layer, batch) not in self._graded:
            return {}
        return self._named(layer, batch, self.home.bring(("gradient", layer, batch)))

    def drop(self, layer: int, batch: int) -> None:
        self.home.drop(("state", layer, batch))
        self.home.drop(("gradient", layer, batch))
        self._graded.discard((layer, batch))
        self._shapes.pop((layer, batch), None)

    def _named(
        self, layer: int, batch: int, found: Mapping[int | str, Tensor]
    ) -> dict[Path, Tensor]:
        paths = list(self.shapes(layer, batch).tensors())
        return {paths[int(number)]: tensor for number, tensor in found.items()}
