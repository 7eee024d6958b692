"""From examples to batches of tokens: packed where that is exact, else grouped by length.

The grouping is a function of the examples and the options alone, never of free memory, so that a
run can be repeated.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypedDict

import torch
from torch import Tensor

from fastdean.data.examples import IGNORE_INDEX, Example
from fastdean.wording.numbers import require_whole

# The weights of a longer example's attention would take more memory than the model's own, which
# keeps none of them for the backward pass.
LONGEST_SEGMENT = 256

_MOST_TOKENS = 2048
_FEWEST_TOKENS = 192
# Entries of the mask of examples that attend by themselves, for each token of a batch, and the
# fewest tokens that this is counted for: a row of so many has such a mask when it is packed.
_MASK_PER_TOKEN = 2048


@dataclass(frozen=True)
class Batch:
    """A few examples in one forward pass.

    Attributes:
        input_ids: int64 [1, N] when packed, [B, T] when grouped (right padding).
        position_ids: int64 [1, N], restarting at 0 with each example, when packed; those of an
            example that has its own; else None.
        attention_mask: int64 [B, T] when grouped with padding, or of an example that has its own;
            else None.
        segments: int64 [B, 2] on the CPU; (start, end) of each example in the flattened token rows.
        example_index: position of each segment's example in the list the batches were planned from.
        target_rows: int64 [M]; flattened rows whose logits predict a target.
        targets: int64 [M]; the token each of these rows has to predict.
        target_example: int64 [M]; which segment, 0..B-1, each of these rows belongs to.
        target_counts: int64 [B]; how many of these rows each example has, at least 1.
        by_segments: whether each segment attends by itself (`attention.attention_by_segments`).
        columns: further inputs of the model, name -> [B, T], 0 where padding stands.
    """

    input_ids: Tensor
    position_ids: Tensor | None
    attention_mask: Tensor | None
    segments: Tensor
    example_index: list[int]
    target_rows: Tensor
    targets: Tensor
    target_example: Tensor
    target_counts: Tensor
    by_segments: bool = False
    columns: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def num_examples(self) -> int:
        return len(self.example_index)

    def model_inputs(self) -> dict[str, Tensor]:
        """The keyword arguments of the model's forward."""
        inputs = {
            "input_ids": self.input_ids,
            "position_ids": self.position_ids,
            "attention_mask": self.attention_mask,
        }
        given = {key: value for key, value in inputs.items() if value is not None}
        return {**self.columns, **given}

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with everything the device reads on `device`, in one copy.

        The segments stay on the CPU, the same tensor object: kernels keep what they derive from it.
        """
        device = torch.device(device)
        if device.type == "cpu":
            return self
        own = {name: getattr(self, name) for name in _READ_ON_THE_DEVICE}
        own = {name: part for name, part in own.items() if part is not None}
        parts = [*own.values(), *self.columns.values()]
        joined = send(torch.cat([part.flatten().long() for part in parts]), device)
        moved = [
            values.view(part.shape).to(part.dtype)
            for part, values in zip(
                parts, joined.split([part.numel() for part in parts]), strict=True
            )
        ]
        columns = dict(zip(self.columns, moved[len(own) :], strict=True))
        return replace(self, **dict(zip(own, moved, strict=False)), columns=columns)


_READ_ON_THE_DEVICE = (
    "input_ids",
    "position_ids",
    "attention_mask",
    "target_rows",
    "targets",
    "target_example",
    "target_counts",
)


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`; the host does not wait for what is queued on a CUDA device.

    That takes pinned memory: a copy from any other may wait, whatever `non_blocking` says.
    """
    if tensor.device.type == "cpu" and device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def default_tokens_per_batch(
    device: torch.device,
    matrices: Iterable[tuple[int, int]],
    stacks: Iterable[tuple[int, int, int, int]] = (),
) -> int:
    """Tokens in one forward pass, by the shapes of the model's weights and never by free memory.

    A GPU needs about 2k tokens to fill its matrix units. On a CPU the batch grows until what the
    backward pass needs of it takes about the memory of the gradients of one layer's weights. Of a
    mixture that is many tokens for those that an expert gets of them, and few experts' weights are
    read, and their sums added to, for a few rows alone.

    Args:
        matrices: (outputs, inputs) of the weights that every token goes through.
        stacks: (experts, chosen by a token, outputs, inputs) of the weights of mixtures.
    """
    if device.type == "cuda":
        return _MOST_TOKENS
    entries = kept = 0
    for outputs, inputs in matrices:
        entries += outputs * inputs
        kept += outputs + inputs
    for experts, chosen, outputs, inputs in stacks:
        entries += experts * outputs * inputs
        kept += chosen * (outputs + inputs)
    fitting = entries // max(1, kept) // 16 * 16
    return min(max(fitting, _FEWEST_TOKENS), _MOST_TOKENS)


@dataclass(frozen=True)
class Layout:
    """Which ways of batching leave a model's numbers as they are with one example at a time.

    Attributes:
        packed: several examples may stand in one row, `position_ids` restarting, and the model's
            own attention keeps them apart.
        padded: shorter examples may be padded on the right under an `attention_mask`.
        alone_above: examples longer than this many tokens must stand alone (rotary embeddings that
            depend on the length of the batch), or None.
        by_segments: they may also stand in one row where each attends by itself (attention.py);
            so do those of at most `LONGEST_SEGMENT` tokens. One alone keeps the model's own.
        longest_row: tokens that a row of several examples may have at most, or None. Models with a
            table of positions may cut it, or a mask, to the length of the row; others compute
            something else in longer rows.
    """

    packed: bool
    padded: bool = True
    alone_above: int | None = None
    longest_row: int | None = None
    by_segments: bool = False


def require_tokens_per_batch(tokens_per_batch: int) -> None:
    """Raise TypeError or ValueError unless this is a positive number of tokens."""
    require_whole("tokens_per_batch", tokens_per_batch, "a positive number of tokens")
    if tokens_per_batch < 1:
        raise ValueError(
            f"tokens_per_batch must be a positive number of tokens, got {tokens_per_batch}; "
            "leave it out for the device's default"
        )


def plan_batches(
    examples: Sequence[Example],
    *,
    shift: int,
    tokens_per_batch: int,
    packed: bool,
    padded: bool = True,
    alone_above: int | None = None,
    longest_row: int | None = None,
    by_segments: bool = False,
) -> list[Batch]:
    """Split `examples` into batches of at most `tokens_per_batch` tokens.

    An example longer than that stands alone, and so does one with positions or a mask of its own.
    Examples with other columns are never packed, and share a batch with those that have the same.

    Args:
        shift: 1 when the logits of row t predict token t + 1 (causal), 0 when they predict token t
            (masked).
        packed, padded, alone_above, longest_row, by_segments: see `Layout`. Packed rows keep the
            given order; else examples of similar length are padded to the longest of their batch,
            and padding counts as tokens. Without padding only equal lengths share a batch.
    Raises:
        TypeError: `tokens_per_batch` is no integer.
        ValueError: it is not positive, or an example has no target.
    """
    require_tokens_per_batch(tokens_per_batch)
    require_targets(examples, shift)
    short: list[int] = []
    plain: list[int] = []
    alone: list[int] = []
    by_columns: dict[tuple[str, ...], list[int]] = {}
    for i, example in enumerate(examples):
        too_long = alone_above is not None and len(example) > alone_above
        if too_long or example.stands_alone:
            alone.append(i)
        elif by_segments and not example.columns and len(example) <= LONGEST_SEGMENT:
            short.append(i)
        elif packed and not example.columns:
            plain.append(i)
        else:
            by_columns.setdefault(tuple(sorted(example.columns)), []).append(i)
    row_tokens = tokens_per_batch if longest_row is None else min(tokens_per_batch, longest_row)
    rows = [
        replace(_pack(examples, group, shift), by_segments=members is short and len(group) > 1)
        for members in (short, plain)
        for group in _in_order(examples, members, row_tokens, squares=members is short)
    ]
    for members in by_columns.values():
        groups = _by_length(examples, members, tokens_per_batch, padded)
        rows += [pad(examples, group, shift) for group in groups]
    return rows + [pad(examples, [i], shift) for i in alone]


def require_targets(examples: Sequence[Example], shift: int, first: int = 0) -> None:
    """Raise ValueError for the first example, counted from `first`, without a target."""
    for i, example in enumerate(examples, start=first):
        if example.num_targets(shift) == 0:
            where = " after its first token" if shift else ""
            raise ValueError(
                f"example {i} must have at least one target token{where}, got labels that are all "
                "-100 there; set its labels on the response tokens or leave it out"
            )


def _in_order(
    examples: Sequence[Example],
    members: Sequence[int],
    tokens_per_batch: int,
    *,
    squares: bool = False,
) -> Iterator[list[int]]:
    """Groups of at most so many tokens.

    Args:
        squares: the mask of a group, examples x longest^2, is bounded too.
    """
    most = _MASK_PER_TOKEN * max(tokens_per_batch, _MASK_PER_TOKEN) if squares else None
    group: list[int] = []
    tokens = longest = 0
    for i in members:
        length = len(examples[i])
        entries = (len(group) + 1) * max(longest, length) ** 2
        full = tokens + length > tokens_per_batch or (most is not None and entries > most)
        if group and full:
            yield group
            group, tokens, longest = [], 0, 0
        group.append(i)
        tokens += length
        longest = max(longest, length)
    if group:
        yield group


def _by_length(
    examples: Sequence[Example], members: Sequence[int], tokens_per_batch: int, padded: bool
) -> Iterator[list[int]]:
    group: list[int] = []
    for i in sorted(members, key=lambda i: len(examples[i])):
        full = len(examples[i]) * (len(group) + 1) > tokens_per_batch
        longer = bool(group) and len(examples[i]) > len(examples[group[0]])
        if group and (full or (longer and not padded)):
            yield group
            group = []
        group.append(i)
    if group:
        yield group


def _pack(examples: Sequence[Example], group: list[int], shift: int) -> Batch:
    members = [examples[i] for i in group]
    ends = torch.tensor([len(example) for example in members]).cumsum(0)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), ends[:-1]])
    return Batch(
        input_ids=torch.cat([example.input_ids for example in members]).unsqueeze(0),
        position_ids=torch.cat([torch.arange(len(example)) for example in members]).unsqueeze(0),
        attention_mask=None,
        segments=torch.stack([starts, ends], dim=1),
        example_index=group,
        **_targets(members, starts, shift),
    )


def pad(examples: Sequence[Example], group: list[int], shift: int) -> Batch:
    """The examples of `group` as rows of one batch, padded on the right to the longest of them."""
    members = [examples[i] for i in group]
    lengths = torch.tensor([len(example) for example in members])
    width = int(lengths.max())
    starts = torch.arange(len(members)) * width
    padding_mask = (torch.arange(width) < lengths[:, None]).long()
    columns = {
        name: _padded([example.columns[name] for example in members], width)
        for name in members[0].columns
    }
    return Batch(
        input_ids=_padded([example.input_ids for example in members], width),
        position_ids=columns.pop("position_ids", None),
        attention_mask=columns.pop(
            "attention_mask", padding_mask if lengths.min() < width else None
        ),
        segments=torch.stack([starts, starts + lengths], dim=1),
        example_index=group,
        columns=columns,
        **_targets(members, starts, shift),
    )


def _padded(rows: Sequence[Tensor], width: int) -> Tensor:
    joined = rows[0].new_zeros(len(rows), width)
    for place, row in zip(joined, rows, strict=True):
        place[: len(row)] = row
    return joined


class _Targets(TypedDict):
    target_rows: Tensor
    targets: Tensor
    target_example: Tensor
    target_counts: Tensor


def _targets(members: Sequence[Example], starts: Tensor, shift: int) -> _Targets:
    rows, targets, owners, counts = [], [], [], []
    for b, (example, start) in enumerate(zip(members, starts.tolist(), strict=True)):
        labels = example.labels[shift:]
        places = (labels != IGNORE_INDEX).nonzero().squeeze(1)
        rows.append(start + places)
        targets.append(labels[places])
        owners.append(torch.full_like(places, b))
        counts.append(places.numel())
    return {
        "target_rows": torch.cat(rows),
        "targets": torch.cat(targets),
        "target_example": torch.cat(owners),
        "target_counts": torch.tensor(counts),
    }
