"""`torch.compile` as a contender."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Compiled:
    """A contender's `run`: an expression by `torch.compile`, compiled at the first call.

    Args:
        expression: plain torch.
        arguments: inputs of a case -> what the expression takes.
        backend: of `torch.compile`.
    """

    def __init__(
        self,
        expression: Callable[..., Tensor],
        arguments: Callable[[Any], tuple],
        backend: str = "inductor",
    ) -> None:
        self._expression = expression
        self._arguments = arguments
        self._backend = backend
        self._compiled: Callable[..., Tensor] | None = None

    def __call__(self, inputs: Any) -> Tensor:
        if self._compiled is None:
            # Here, since already this call loads the compiler.
            self._compiled = torch.compile(self._expression, backend=self._backend, dynamic=False)
        return self._compiled(*self._arguments(inputs))
