"""What embeddings outside of the layers return, kept for each batch as what layers return is.

A sweep runs what comes before the layers again for every window. An embedding is asked for the same
rows each time, and answers with what it returned the first time, so that its weights are in memory
in the first window alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fastdean.coupling.layers.states import States
from fastdean.coupling.workloads.workload import BatchLosses, Pass
from fastdean.models.layers.replay import NotByLayers, Returned, stand_ins
from fastdean.models.layers.windows import Windows
from fastdean.models.trees import tensors


class Lookups:
    """The embeddings of one sweep, and the other modules whose weights come in on demand.

    Args:
        windows: bring in their weights, and name them.
        states: keep what embeddings return, each call's as of one more layer.
        layers: how many there are.
        without: modules that run each time all the same, as the gradient of their weights is taken.
    """

    def __init__(
        self,
        windows: Windows,
        states: States,
        layers: int,
        without: Collection[nn.Module] = (),
    ) -> None:
        self._windows, self._states, self._layers = windows, states, layers
        self._without = without
        # The batch that goes through the model, and how often it has looked something up.
        self._batch: int | None = None
        self._calls = 0

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Inside, embeddings answer; afterwards they are what they were."""
        modules = self._windows.on_demand
        forwards = {name: module.forward for name, module in modules.items()}
        names = list(modules)

        def stand_in(j: int) -> Callable[..., Any]:
            name = names[j]

            def run(*args: Any, **kwargs: Any) -> Any:
                self._windows.bring(name)
                return forwards[name](*args, **kwargs)

            if name not in self._windows.tables or modules[name] in self._without:
                return run
            return lambda *args, **kwargs: self._answer(name, run, args, kwargs)

        try:
            with stand_ins(list(modules.values()), stand_in):
                yield
        finally:
            self._windows.close()

    def of(self, b: int, batch: Pass) -> Pass:
        """Batch b, which the model is given by way of its lookups."""

        def losses() -> BatchLosses:
            self._batch, self._calls = b, 0
            try:
                return batch.losses()
            finally:
                self._batch = None

        return replace(batch, losses=losses)

    def forget(self, b: int) -> None:
        """Batch b is not needed again."""
        number = self._layers
        while self._states.keeps(number, b):
            self._states.drop(number, b)
            number += 1

    def _answer(self, name: str, run: Callable[..., Any], args: tuple, kwargs: Any) -> Any:
        if self._batch is None:
            return run(*args, **kwargs)
        number, b = self._layers + self._calls, self._batch
        self._calls += 1
        given = [tensor for _, tensor in tensors((args, kwargs))]
        if not self._states.keeps(number, b):
            result = run(*args, **kwargs)
            # The model may change the one, and what is kept must stay.
            self._states.keep(number, b, _copy(Returned((given, result), {})))
            return result
        asked, result = _copy(self._states.returned(number, b)).result
        if len(asked) != len(given) or not all(map(torch.equal, asked, given)):
            raise NotByLayers(
                f"{name} must be asked for the same rows whenever a batch is run, got others; what "
                "comes before the layers is random or keeps a state of its own"
            )
        return result


def _copy(returned: Returned) -> Returned:
    return returned.replaced({p: t.detach().clone() for p, t in returned.tensors().items()})
