"""Where given runs of token ids stand in texts, without reading a value of the texts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from fastdean.data.batching import send

# Keys are node * _NODE + id: no id of a tokenizer, and no -100 in its place, reaches another node.
_NODE = 2**32
MAX_ID = 2**31 - 1


class RunMatcher:
    """Finds runs 0..K-1 in texts: a walk down a prefix tree whose edges are one sorted table.

    A step is a binary search of all positions at once, so that nothing of the vocabulary's size is
    needed and the host never waits.

    Args:
        runs: K different runs of one or more ids each, ids from 0 to MAX_ID.
        device: of the texts.
    """

    def __init__(self, runs: Sequence[Sequence[int]], device: torch.device) -> None:
        edges: dict[int, int] = {}
        ends = [-1]
        for number, run in enumerate(runs):
            node = 0
            for token_id in run:
                key = node * _NODE + token_id
                if key not in edges:
                    edges[key] = len(ends)
                    ends.append(-1)
                node = edges[key]
            ends[node] = number
        keys = sorted(edges)
        # One node more: where a text leaves the tree. It has no edges, and no run ends there.
        self._outside = len(ends)
        self._longest = max(map(len, runs))
        self._keys = send(torch.tensor(keys), device)
        self._targets = send(torch.tensor([edges[key] for key in keys]), device)
        self._ends = send(torch.tensor([*ends, -1]), device)

    def labels(self, ids: Tensor) -> Tensor:
        """The number of the run that covers each position, or -1; int64, the shape of `ids`.

        The longest run counts where several cover a position, of equally long ones the one that
        starts first. A run must stand whole in its row, the last dimension.

        Args:
            ids: int64 [..., T]. Values that are no token ids are in no run.
        """
        ids = ids.contiguous()  # what searchsorted wants
        node = torch.zeros_like(ids)
        labels = torch.full_like(ids, -1)
        for ahead in range(self._longest):
            node = self._step(node, shifted(ids, ahead))
            started = self._ends[node]
            for back in range(ahead + 1):
                covering = shifted(started, -back)
                labels = torch.where(covering >= 0, covering, labels)
        return labels

    def _step(self, node: Tensor, ids: Tensor) -> Tensor:
        keys = node * _NODE + ids
        edge = torch.searchsorted(self._keys, keys).clamp_(max=len(self._keys) - 1)
        return torch.where(self._keys[edge] == keys, self._targets[edge], self._outside)


def shifted(values: Tensor, by: int) -> Tensor:
    """`values[..., t + by]` at position t, and -1 where the row has no such position."""
    length = values.shape[-1]
    by = max(-length, min(by, length))
    return functional.pad(values, (-by, by), value=-1) if by else values
