"""Ragged examples cut into token blocks: which rows a kernel reads, in which order.

A kernel runs one loop over this list, which marks where an example ends. An inner loop over each
example would refill its pipeline of loads every time, and examples are short: 76 tokens on average.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fastdean.kernels import on_device

# The blocks of the current examples, so that all layers of a batch share one copy on the device.
# Otherwise every layer would wait for its own transfer.
_PLACED: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

# A CUDA graph copies from this host memory at every replay and does not tell when it is freed. Some
# kilobytes for each batch captured before its blocks were placed.
_COPIED_BY_GRAPHS: list[Tensor] = []


def token_blocks(
    segments: Tensor,
    *,
    num_rows: int,
    block_tokens: int,
    owners: Tensor | None = None,
    num_owners: int = 1,
) -> tuple[Tensor, Tensor]:
    """Cut examples into blocks of at most `block_tokens` rows, grouped by their owners.

    Reads no tensor back from a device: for segments on a device the list has its greatest possible
    length, and `first` tells where it ends.

    Args:
        segments: int64 [S, 2], (start, end) of each example, S > 0; clamped to `num_rows`. On a
            device they must not overlap.
        num_rows: rows of the inputs.
        block_tokens: rows of a block.
        owners: int64 [S], ascending, 0..num_owners - 1, on the device of `segments`; None: all
            belong to one.
    Returns:
        blocks: int64 [M + 1, 2], on the device of `segments`: first row of the block, and the rows
            of its example from there on (at most `block_tokens` in an example's last block). One
            more entry than blocks, because kernels load one ahead.
        first: int64 [num_owners + 1]; the blocks of owner e are first[e] .. first[e + 1].
    """
    device, number = segments.device, len(segments)
    starts, ends = segments.clamp(0, num_rows).unbind(1)
    counts = (ends - starts + block_tokens - 1).clamp_min(0) // block_tokens
    before = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    at_most = int(before[-1]) if device.type == "cpu" else num_rows // block_tokens + number
    if owners is None:
        first = before[::number].contiguous()
    else:
        first = before[torch.searchsorted(owners, torch.arange(num_owners + 1, device=device))]
    place = torch.arange(at_most + 1, device=device)
    example = torch.searchsorted(before[1:], place, right=True).clamp_max_(number - 1)
    row = starts[example] + (place - before[example]) * block_tokens
    return torch.stack([row, ends[example] - row], dim=1), first


def placed_token_blocks(
    segments: Tensor, *, num_rows: int, block_tokens: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """`token_blocks` of CPU segments on `device`, moved there once per segments tensor.

    A CUDA graph being captured may use blocks that were placed on its stream before, for as long as
    `segments` exists. Blocks placed during its capture serve that graph only.
    """
    known = _PLACED.setdefault(segments, {})
    # One per stream, because another stream would have to wait for the copy.
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None
    # By values, because memory shared with NumPy changes without a new version.
    key = (segments.numpy().tobytes(), num_rows, block_tokens, device, stream)
    if key in known:
        return known[key]
    made = token_blocks(segments, num_rows=num_rows, block_tokens=block_tokens)
    if device.type == "cpu":
        return known.setdefault(key, made)
    # From pinned memory: a copy from pageable memory would wait for the device.
    pinned = [tensor.pin_memory() for tensor in made]
    blocks, first = (tensor.to(device, non_blocking=True) for tensor in pinned)
    if not _is_capturing(device):
        return known.setdefault(key, (blocks, first))
    # A captured copy has not run; the blocks are empty until the graph is replayed.
    _COPIED_BY_GRAPHS.extend(pinned)
    return blocks, first


def _is_capturing(device: torch.device) -> bool:
    """Whether the current stream of a CUDA device is being captured into a graph."""
    with on_device(device):
        return torch.cuda.is_current_stream_capturing()
