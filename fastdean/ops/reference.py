"""Every operation in plain torch: written to be read, and what runs where nothing faster does.

Arguments have passed the checks of the public functions in `fastdean.ops`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastdean.precision import full_fp32_products

# What the collapse-alignment loss means at its edges; csrc/fastdean.h has the same numbers.
CV_EPSILON = 1e-3
LEAST_COUNT = 2.0**-20
CENTRED_ROUNDING = 8.0

# Of bits that are summed at a time: 1 MiB of int64, which a CPU's caches hold.
_CHUNK_ENTRIES = 1 << 17


# A decorator and no block: an interrupt as a block ends would leave autograd off.
@torch.no_grad()
def zero_at_(tensors: Sequence[Tensor], indices: Sequence[Tensor]) -> None:
    """See `ops.zero_at_`."""
    # All before the first write: an index may be a view of what is written.
    places = [_coordinates(t, i) for t, i in zip(tensors, indices, strict=True)]
    for tensor, coordinates in zip(tensors, places, strict=True):
        _at_least_1d(tensor).index_put_(coordinates, tensor.new_zeros(()))


@torch.no_grad()
def gather_at(tensors: Sequence[Tensor], indices: Sequence[Tensor]) -> list[Tensor]:
    """See `ops.gather_at`."""
    return [
        _at_least_1d(tensor)[_coordinates(tensor, index)]
        for tensor, index in zip(tensors, indices, strict=True)
    ]


@torch.no_grad()
def write_at_(
    tensors: Sequence[Tensor],
    indices: Sequence[Tensor],
    values: Sequence[Tensor],
) -> None:
    """See `ops.write_at_`."""
    # All before the first write: indices and values may be views of what is written.
    places = [_coordinates(t, i) for t, i in zip(tensors, indices, strict=True)]
    copies = [v.to(t.device, copy=True) for t, v in zip(tensors, values, strict=True)]
    for tensor, coordinates, value in zip(tensors, places, copies, strict=True):
        _at_least_1d(tensor).index_put_(coordinates, value)


def _at_least_1d(tensor: Tensor) -> Tensor:
    # A scalar has one element, index 0, and no coordinate to address it by.
    return tensor.unsqueeze(0) if tensor.dim() == 0 else tensor


def _coordinates(tensor: Tensor, index: Tensor) -> tuple[Tensor, ...]:
    """Row-major flat indices [M] as one coordinate [M] per dimension: right for any strides."""
    return torch.unravel_index(index.to(tensor.device), tensor.shape or (1,))


def _block_height(x: Tensor) -> int:
    """Rows of the product to compute at a time."""
    # On a CPU a block stays in a core's cache between the product, the absolute value and the add.
    # Elsewhere many small blocks would wait for their launches: whole matrices, up to the memory
    # that a product may take.
    block_bytes = (1 if x.device.type == "cpu" else 256) * 1024 * 1024
    return max(16, block_bytes // (x.element_size() * max(1, x.shape[1])))


@torch.no_grad()
def accumulate_importance_(acc: Tensor, x: Tensor, g: Tensor, segments: Tensor) -> None:
    """See `ops.accumulate_importance_`."""
    x, g = _at_least_fp32(x), _at_least_fp32(g)
    height = _block_height(x)
    spans = [(start, end) for start, end in segments.tolist() if end > start]
    with full_fp32_products():
        for top in range(0, acc.shape[0], height):
            block = acc[top : top + height]
            product = x.new_empty(block.shape)
            for start, end in spans:
                torch.mm(g[start:end, top : top + height].T, x[start:end], out=product)
                block += product.abs_()


@torch.no_grad()
def accumulate_expert_importance_(
    acc: Tensor,
    x: Tensor,
    g: Tensor,
    segments: Tensor,
    experts: Tensor,
) -> None:
    """See `ops.accumulate_expert_importance_`."""
    for expert in experts.unique_consecutive().tolist():
        accumulate_importance_(acc[expert], x, g, segments[experts == expert].cpu())


@torch.no_grad()
def accumulate_unit_importance_(acc: Tensor, a: Tensor, g: Tensor, segments: Tensor) -> None:
    """See `ops.accumulate_unit_importance_`."""
    products = _at_least_fp32(a) * _at_least_fp32(g)
    for start, end in segments.tolist():
        acc += products[start:end].sum(0).abs_()


def importance(sums: Tensor, weight: Tensor | None, num_examples: int) -> Tensor:
    """Importance from its stored parts: sums * |weight| / n, every step in fp32.

    Args:
        sums: fp32, any shape.
        weight: floating, shape of `sums`; None for units, whose importance is sums / n.
        num_examples: n, at least 1.
    Returns:
        fp32, shape of `sums`.
    """
    # Divided by a tensor: by a number torch multiplies with its rounded inverse on a GPU.
    divisor = sums.new_full((), num_examples)
    if weight is None:
        return sums / divisor
    return (sums * weight.detach().to(sums.device).float().abs()).div_(divisor)


def select_top(sums: Tensor, weight: Tensor | None, num_examples: int, k: int) -> Tensor:
    """See `ops.select_top`."""
    return _top(sums, weight, num_examples, k, 0)


def bit_sums(bits: Tensor) -> tuple[Tensor, Tensor]:
    """See `ops.bit_sums`; of integers [R, C]."""
    # Elsewhere than on a CPU launches must be few.
    chunk = _CHUNK_ENTRIES * (1 if bits.device.type == "cpu" else 64)
    step = max(1, chunk // max(1, bits.shape[1]))
    of_columns = torch.zeros(bits.shape[1], dtype=torch.int64, device=bits.device)
    of_rows = torch.zeros(bits.shape[0], dtype=torch.int64, device=bits.device)
    for first in range(0, bits.shape[0], step):
        part = bits[first : first + step].to(torch.int64)
        of_columns += part.sum(0)
        of_rows[first : first + step] = part.sum(1)
    return of_rows, of_columns


def _top(sums: Tensor, weight: Tensor | None, num_examples: int, k: int, offset: int) -> Tensor:
    """`select_top` of a part of a tensor that begins at flat index `offset`, which is added."""
    value = importance(sums, weight, num_examples).flatten()
    if not value.isfinite().all():
        first = int((~value.isfinite()).nonzero()[0])
        raise ValueError(
            f"importance must be finite, got {float(value[first])} at flat index {offset + first}; "
            "check the losses and the model's weights"
        )
    k = min(k, int((value > 0).sum()))
    if k == 0:
        return torch.empty(0, dtype=torch.int64, device=value.device)
    # torch.topk leaves open which of equal entries it takes, so it only supplies the k-th value.
    threshold = value.topk(k).values[-1]
    above = (value > threshold).nonzero().squeeze(1)
    ties = (value == threshold).nonzero().squeeze(1)[: k - above.numel()]
    return torch.cat([above, ties]).sort().values + offset


def select_importance(
    x: Tensor,
    g: Tensor,
    segments: Tensor,
    sets: Tensor,
    weight: Tensor,
    k: Sequence[int],
    *,
    batches: Tensor | None = None,
    signed: bool = False,
) -> list[tuple[Tensor, ...]]:
    """See `ops.select_importance`; examples are added one by one, whatever their batch."""
    num_examples = [max(1, int((sets == number).sum())) for number in range(len(k))]
    experts, stacked = torch.zeros_like(sets), weight.unsqueeze(0)
    return select_expert_importance(
        x, g, segments, experts, sets, stacked, k, num_examples, batches=batches, signed=signed
    )


@torch.no_grad()
def select_expert_importance(
    x: Tensor,
    g: Tensor,
    segments: Tensor,
    experts: Tensor,
    sets: Tensor,
    weight: Tensor,
    k: Sequence[int],
    num_examples: Sequence[int],
    *,
    x_rows: Tensor | None = None,
    g_rows: Tensor | None = None,
    batches: Tensor | None = None,
    signed: bool = False,
) -> list[tuple[Tensor, ...]]:
    """See `ops.select_expert_importance`; `batches` as for `select_importance`."""
    found: list[tuple[Tensor, ...]] = []
    for number, (most, examples) in enumerate(zip(k, num_examples, strict=True)):
        nothing = [torch.empty(0, dtype=torch.float32, device=x.device)] * (1 + signed)
        parts = [(torch.empty(0, dtype=torch.int64, device=x.device), *nothing)]
        for expert, matrix in enumerate(weight):
            mine = segments[(sets == number) & (experts == expert)]
            # Of every token's inputs, those of this group alone exist.
            of_x, of_g = (_rows_of(*each, mine) for each in ((x, x_rows), (g, g_rows)))
            lengths = mine.diff(dim=1).squeeze(1)
            ends = lengths.cumsum(0)
            spans = torch.stack([ends - lengths, ends], 1)
            sums = torch.zeros(matrix.shape, dtype=torch.float32, device=x.device)
            accumulate_importance_(sums, of_x, of_g, spans)
            offset = expert * matrix.numel()
            index = _top(sums, matrix, examples, most, offset)
            more = [_signed_sums(of_x, of_g, index - offset)] if signed else []
            parts.append((index, sums.flatten()[index - offset], *more))
        found.append(tuple(torch.cat(each) for each in zip(*parts, strict=True)))
    return found


def _rows_of(tensor: Tensor, rows: Tensor | None, segments: Tensor) -> Tensor:
    """The segments' tokens, one after the other, [.., columns]."""
    tokens = [torch.arange(start, end, device=segments.device) for start, end in segments.tolist()]
    if not tokens:
        return tensor[:0]
    chosen = torch.cat(tokens).to(tensor.device)
    return tensor[chosen if rows is None else rows[chosen]]


def _signed_sums(x: Tensor, g: Tensor, index: Tensor) -> Tensor:
    """fp32 [M]: G^T X at flat indices of the weight, int64 [M]."""
    # So many entries that their [N, M] products take a few MB.
    parts = index.split(max(1, 2**20 // max(1, len(x))))
    sums = [
        (_at_least_fp32(g[:, part // x.shape[1]]) * _at_least_fp32(x[:, part % x.shape[1]])).sum(0)
        for part in parts
    ]
    return torch.cat(sums).float()


def _at_least_fp32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def collapse_alignment(
    features: Tensor,
    labels: Tensor,
    weight: Tensor,
    sums: Tensor,
    counts: Tensor,
    decay: float,
    statistic: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `ops.collapse_alignment`. Autograd of the loss is right too, for whoever calls this."""
    num_classes = len(sums)
    known = (labels >= 0) & (labels < num_classes)
    sums, counts = _join_batch(features, labels, known, sums, counts, decay)

    seen = counts > 0
    num_seen = seen.sum()
    means = _class_means(sums, counts)
    centre = means.sum(0) / num_seen.clamp(min=1)
    centred = means - centre
    # A class not seen must not spread what its row of weight holds, as 0 * NaN would.
    weight = torch.where(seen.unsqueeze(1), weight.to(sums.dtype), 0)
    length = torch.linalg.vector_norm(centred, dim=1)
    weight_length = torch.linalg.vector_norm(weight, dim=1)
    smallest = CENTRED_ROUNDING * torch.finfo(sums.dtype).eps * torch.linalg.vector_norm(centre)
    # NaN has no direction either, but must show.
    poisoned = (length + weight_length).isnan()
    defined = seen & (poisoned | ((length > smallest) & (weight_length > 0)))
    lengths = torch.where(defined, length * weight_length, 1)
    cosines = torch.where(defined, (weight * centred).sum(1) / lengths, 0).double()

    value, slopes = _statistic(cosines, seen, statistic)
    # Where the labels are not checked beforehand, because looking would wait for the device.
    in_range = ((labels >= -1) & (labels < num_classes)).all()
    loss = torch.where(num_seen >= 2, value, 0)
    loss = torch.where(in_range, loss, float("nan")).to(sums.dtype)
    with torch.no_grad():
        slopes = torch.where(defined & (num_seen >= 2) & in_range, slopes, 0)
        length = torch.where(defined, length, 1).double()
        weight_length = torch.where(defined, weight_length, 1).double()
        factors = (
            slopes / (length * weight_length),
            slopes * cosines / weight_length**2,
            slopes * cosines / length**2,
        )
    return loss, sums.detach(), counts, centre.detach(), torch.stack(factors).to(sums.dtype)


def _join_batch(
    features: Tensor,
    labels: Tensor,
    known: Tensor,
    sums: Tensor,
    counts: Tensor,
    decay: float,
) -> tuple[Tensor, Tensor]:
    """The state's sums and counts, decayed, plus those of the batch's labelled rows."""
    num_classes = len(sums)
    if features.device.type == "cpu":
        rows = known.nonzero().squeeze(1)
        index, features = labels[rows], features[rows]
    else:
        # How many rows are labelled is not known here without waiting: the others join a class
        # of their own.
        index = torch.where(known, labels, num_classes)
    features = features.to(sums.dtype)
    batch_sums = sums.new_zeros(num_classes + 1, sums.shape[1])
    if features.device.type == "cpu":
        batch_sums.index_add_(0, index, features)
    else:
        # index_add_ adds in any order on CUDA; this sorts, and gives the same bits every time.
        batch_sums = batch_sums.index_put((index,), features, accumulate=True)
    batch_counts = counts.new_zeros(num_classes + 1).index_add_(
        0, index, counts.new_ones(len(index))
    )
    batch_sums, batch_counts = batch_sums[:num_classes], batch_counts[:num_classes]
    if decay == 0:
        return batch_sums, batch_counts
    sums, counts = sums * decay + batch_sums, counts * decay + batch_counts
    if decay < 1:
        remembered = counts >= LEAST_COUNT
        sums = torch.where(remembered.unsqueeze(1), sums, 0)
        counts = torch.where(remembered, counts, 0)
    return sums, counts


def _class_means(sums: Tensor, counts: Tensor) -> Tensor:
    """[K, D]; 0 for a class not seen."""
    return sums / torch.where(counts > 0, counts, 1).to(sums.dtype).unsqueeze(1)


def _statistic(cosines: Tensor, seen: Tensor, statistic: str) -> tuple[Tensor, Tensor]:
    """The statistic of the seen classes' cosines, and its derivative by each, [K]."""
    number = seen.sum()
    mean = torch.where(seen, cosines, 0).sum() / number.clamp(min=1)
    if statistic == "mean":
        return 1 - mean, torch.where(seen, -1 / number.clamp(min=1).double(), 0)
    deviations = torch.where(seen, cosines - mean, 0)
    freedom = (number - 1).clamp(min=1)
    variance = deviations.square().sum() / freedom
    # The root has no derivative at 0: there it is taken to be 0.
    spread = torch.where(variance == 0, 0, torch.where(variance == 0, 1, variance).sqrt())
    slopes = deviations / (freedom * torch.where(spread == 0, 1, spread))
    if statistic == "std":
        return spread, slopes
    size = (mean.square() + CV_EPSILON**2).sqrt()
    along_mean = torch.where(seen, spread * mean / (size**3 * number.clamp(min=1)), 0)
    return spread / size, slopes / size - along_mean


@torch.no_grad()
def collapse_alignment_backward(
    grad_loss: Tensor,
    labels: Tensor,
    weight: Tensor,
    sums: Tensor,
    counts: Tensor,
    centre: Tensor,
    factors: Tensor,
    features_dtype: torch.dtype,
    needs_weight: bool,
    needs_features: bool,
) -> tuple[Tensor, Tensor]:
    """See `ops.collapse_alignment_backward`."""
    # A weight's row of a class not seen is not looked at, like its cosine.
    seen = (counts > 0).unsqueeze(1)
    centred = torch.where(seen, _class_means(sums, counts) - centre, 0)
    wide = torch.where(seen, weight.to(sums.dtype), 0)
    by_both, by_weight, by_mean = (grad_loss * factors).unsqueeze(2)
    grad_weight = weight.new_empty(0)
    grad_features = weight.new_empty(0, dtype=features_dtype)
    if needs_weight:
        grad_weight = (by_both * centred - by_weight * wide).to(weight.dtype)
    if needs_features:
        number = seen.sum().clamp(min=1)
        grad_centred = by_both * wide - by_mean * centred
        grad_means = grad_centred - grad_centred.sum(0) / number
        # 1 / count is the derivative of a mean by each of its rows.
        grad_rows = _class_means(grad_means, counts)
        known = (labels >= 0) & (labels < len(sums))
        grad_features = grad_rows[labels.clamp(0, len(sums) - 1)].to(features_dtype)
        grad_features = torch.where(known.unsqueeze(1), grad_features, 0)
    return grad_weight, grad_features
