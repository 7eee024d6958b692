"""Finds words of one or more token ids in texts, without waiting for the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from fastdean.data.batching import send

# Keys are node * _NODE + id: no id of a tokenizer, and no -100 in its place, reaches another node.
_NODE = 2**32
MAX_ID = 2**31 - 1


class Matcher:
    """Finds words 0..K-1: a walk down a prefix tree whose edges are one sorted table.

    A step is a binary search of all positions at once, so that nothing has the vocabulary's size
    and the host never waits.

    Args:
        words: K different sequences of one or more ids, from 0 to MAX_ID.
        device: of the texts.
    """

    def __init__(self, words: Sequence[Sequence[int]], device: torch.device) -> None:
        edges: dict[int, int] = {}
        ends = [-1]
        for number, word in enumerate(words):
            node = 0
            for token_id in word:
                key = node * _NODE + token_id
                if key not in edges:
                    edges[key] = len(ends)
                    ends.append(-1)
                node = edges[key]
            ends[node] = number
        keys = sorted(edges)
        # One more node, without edges and words, for texts that leave the tree.
        self._outside = len(ends)
        self._longest = max(map(len, words))
        self._keys = send(torch.tensor(keys), device)
        self._targets = send(torch.tensor([edges[key] for key in keys]), device)
        self._ends = send(torch.tensor([*ends, -1]), device)

    def labels(self, ids: Tensor) -> Tensor:
        """The number of the word at each position, or -1: int64 [..., T].

        Where several words overlap, the longest counts, of equally long ones the first. A word must
        be whole in its row, the last dimension.

        Args:
            ids: int64 [..., T]. Values that are no token ids are in no word.
        """
        ids = ids.contiguous()  # searchsorted wants it
        node = torch.zeros_like(ids)
        labels = torch.full_like(ids, -1)
        for ahead in range(self._longest):
            node = self._step(node, at_offset(ids, ahead))
            started = self._ends[node]
            for back in range(ahead + 1):
                covering = at_offset(started, -back)
                labels = torch.where(covering >= 0, covering, labels)
        return labels

    def _step(self, node: Tensor, ids: Tensor) -> Tensor:
        keys = node * _NODE + ids
        edge = torch.searchsorted(self._keys, keys).clamp_(max=len(self._keys) - 1)
        return torch.where(self._keys[edge] == keys, self._targets[edge], self._outside)


def at_offset(values: Tensor, offset: int) -> Tensor:
    """`values[..., t + offset]` at position t, and -1 where the row has no such position."""
    length = values.shape[-1]
    offset = max(-length, min(offset, length))
    return functional.pad(values, (-offset, offset), value=-1) if offset else values
