"""The mask of packed examples, and what it says, looked up once for all layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastdean.data.batching import send


class SegmentMask:
    """What is added to the scores of each example: 0 where a token may attend, -inf elsewhere.

    Args:
        values: [S, 1, L, L], L the longest example's tokens; the places behind an example's end
            are never read.
        lengths: tokens of each example.
        shared: whether layers that get the same tensor share this object, which then keeps what it
            has looked up.
    """

    def __init__(self, values: Tensor, lengths: Sequence[int], *, shared: bool) -> None:
        self._values, self._lengths, self._shared = values, lengths, shared
        self._version = _version(values)
        self._parts: dict[tuple[int, ...], Tensor] = {}
        self._windows: list[tuple[int, int] | None] = []

    def is_of(self, values: Tensor) -> bool:
        """Whether it was made of this very tensor, unchanged since."""
        return values is self._values and _version(values) == self._version

    def part(self, members: tuple[int, ...]) -> Tensor:
        """The mask [s, 1, l, l] of some examples, l the longest of them."""
        found = self._parts.get(members)
        if found is None:
            longest = max(self._lengths[i] for i in members)
            numbers = send(torch.tensor(members), self._values.device)
            found = self._values[:, :, :longest, :longest].index_select(0, numbers)
            if self._shared:
                self._parts[members] = found
        return found

    def window(self) -> tuple[int, int] | None:
        """How many tokens before its own and after it each token attends to.

        Returns:
            (-1, 0) where all before its own take part, (w, 0) where w of them do, and None where
            that is not what the mask says, or where no other layer would be told: the host waits
            for the device to answer.
        """
        if not self._shared:
            return None
        if not self._windows:
            self._windows.append(_window(self._values[:, 0], self._lengths))
        return self._windows[0]


def _window(values: Tensor, lengths: Sequence[int]) -> tuple[int, int] | None:
    steps = torch.arange(values.shape[-1], device=values.device)
    real = steps < send(torch.tensor(lengths), values.device)[:, None]
    allowed = values == 0
    width = (allowed.sum(-1) * real).amax()
    back = steps[:, None] - steps
    said = torch.where((back >= 0) & (back < width), allowed, values == -torch.inf)
    as_said, tokens = torch.stack([(said | ~real[:, :, None]).all().long(), width]).tolist()
    if not as_said or tokens == 0:
        return None
    return (-1, 0) if tokens == max(lengths) else (tokens - 1, 0)


def _version(values: Tensor) -> int | None:
    """The number of changes in place; tensors of inference mode do not count them."""
    return None if values.is_inference() else values._version
