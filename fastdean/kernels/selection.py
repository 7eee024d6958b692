"""Importance and the exact top k of a matrix, fused: no sort, no importance in memory.

    value = sums * |weight| / n,  each step rounded to fp32;  the k largest positive values, ties to
    the lowest flat index, as ascending flat indices

Positive fp32 numbers and their bits, read as integers, have the same order, so every comparison
below is one of integers. "product" is the bits of sums * |weight| and "key" those of its quotient
by n. Rounding is monotone, so only candidates need the division, which costs as much as the rest.

 1. `_maxima_kernel` reads the matrix once: the largest product of every GROUP consecutive entries,
    and where the first NaN or Inf stands. The k-th largest of the group maxima is reached by k
    entries, one in each of k groups, so no entry below it (but for ties made by the division, see
    `_least_product`) can be among the top k. If the k largest entries are scattered over G groups,
    about -G log(1 - k / G) entries reach it: 1.001 k at k = G / 512, 1.1 k at k = G / 6.
 2. `_narrow_kernel` finds that bound to 15 of its 31 bits, rounded down, by a histogram of 8 bits
    at a time. If fewer than k groups hold a positive entry, every positive entry is a candidate.
 3. `_count_kernel` lists the groups whose maximum reaches the bound, reads them and no others again
    and counts the candidates; `_gather_kernel` reads them once more and writes key and flat index
    of every candidate, in flat order.
 4. The key of rank k among the candidates, exactly, 8 bits at a time, and the candidates above it
    with the first of those equal to it: in one program where k is small (`_finish_kernel`), else
    by `_narrow_kernel`, `_tally_kernel` and `_emit_kernel`.

Bytes moved, with w bytes a weight, G = numel / GROUP groups of which H (about k, or G if that is
less) reach the bound, and C candidates (about k):
 1. (4 + w) numel read, 4 G written: 1 % of it for groups of 64, 4 % for groups of 16.
 2. 8 G read.
 3. 4 G + 8 H + 2 (4 + w) GROUP H read, 4 H + 12 C written.
 4. 20 C + 8 k read in one program, 24 C + 8 k in many, 8 k written.
All but the reads of the matrix fit into the cache of a large GPU for k up to some millions.

Launches: a fill and 6 with the one program, a fill and 11 without. The host waits once, for three
words. If candidates are far more than k (thousands of ties at the bound, or most of the top k in
few groups), they do not fit; they are gathered again with room for all, at most 12 bytes an entry,
and the host waits twice.

The program that finishes last does what needs the results of all (a scan, the descent through a
histogram). Programs add to shared integers only: the same bits every time.

Source: radix selection; the bound from group maxima is our own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdean.kernels import on_device

_TILE = 8192
# Group maxima of 64 entries cost 1 % of the traffic. Where the top k are so dense that many such
# groups hold one, smaller groups save more of the second read than they cost.
_SPARSE_GROUP, _DENSE_GROUP = 64, 16
_SPARSE_K = 512  # sparse: at most one selected entry in this many
_SPAN = 4096  # keys of one program
_BLOCK_K = 2048  # keys that it holds at a time
_BLOCK_S = 512  # counts scanned at a time
# Room for candidates: so many a selected entry, and a few more. Entries of similar size in random
# places need about one; rows whose sizes are log-normal with sigma 1 need up to five.
_ROOM, _SPARE_ROOM = 8, 4096
_ONE_PROGRAM = 32768  # room for so many candidates or fewer is left to a single program
_BOUND_ROUNDS = 2
_LAUNCH = {"num_warps": 8, "num_stages": 1, "enable_fp_fusion": False}

_BINS = tl.constexpr(256)
_ROUNDS = tl.constexpr(4)
_INFINITY_BITS = tl.constexpr(0x7F800000)
_MAGNITUDE_BITS = tl.constexpr(0x7FFFFFFF)

# Words of the head of the state, all int64 and zero at first.
_FLAW = tl.constexpr(0)  # numel minus the flat index of the first NaN or Inf; 0 if there is none
_CANDIDATES = tl.constexpr(1)
_CHOSEN = tl.constexpr(2)
# Words of a search: the lower edge of the window with the wanted rank, the rank in that window,
# tickets of the rounds and of the scan that follows, the least product whose key reaches the lower
# edge, histograms of the rounds.
_LOW = tl.constexpr(0)
_WANT = tl.constexpr(1)
_TICKETS = tl.constexpr(2)
_SCAN_TICKET = tl.constexpr(6)
_LEAST = tl.constexpr(7)
_HISTOGRAMS = tl.constexpr(16)
_HEAD_WORDS = 16
_SEARCH_WORDS = _HISTOGRAMS.value + _ROUNDS.value * _BINS.value


@triton.jit
def _product(sums_ptr, weight_ptr, flat, mask, HAS_WEIGHT: tl.constexpr):
    """Bits of sums * |weight|, 0 where masked."""
    # Read once, or again much later: the cache is for results.
    value = tl.load(sums_ptr + flat, mask=mask, other=0.0, eviction_policy="evict_first")
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + flat, mask=mask, other=0.0, eviction_policy="evict_first")
        value = value * tl.abs(weight.to(tl.float32))
    return value.to(tl.int32, bitcast=True)


@triton.jit
def _quotient(product, divisor):
    """The key of a product."""
    value = tl.div_rn(product.to(tl.float32, bitcast=True), divisor)
    return value.to(tl.int32, bitcast=True)


@triton.jit
def _least_product(bound, divisor):
    """A product, at least 1, below which no key reaches that of `bound`."""
    # p / n rounds to a key below q if p < n * pred(q), pred being the next number down; one unit
    # less makes up for the rounding of this product.
    below = tl.maximum(_quotient(bound, divisor) - 1, 0).to(tl.float32, bitcast=True) * divisor
    return tl.maximum(below.to(tl.int32, bitcast=True) - 1, 1)


@triton.jit
def _is_last(ticket_ptr):
    """Whether all other programs have come here, so that what they wrote can be read."""
    # The barrier puts the writes of all threads before the ticket, which releases and acquires. The
    # reads that follow ask for .cg, the cache that all multiprocessors share.
    tl.debug_barrier()
    return tl.atomic_add(ticket_ptr, 1) == tl.num_programs(0) - 1


@triton.jit
def _scan(values_ptr, num_values, BLOCK_S: tl.constexpr):
    """Replace int64 values by the sums of those before them; returns the sum of all."""
    total = tl.full((), 0, tl.int64)
    for first in range(0, num_values, BLOCK_S):
        offs_s = first + tl.arange(0, BLOCK_S).to(tl.int64)
        mask_s = offs_s < num_values
        value = tl.load(values_ptr + offs_s, mask=mask_s, other=0, cache_modifier=".cg")
        tl.store(values_ptr + offs_s, total + tl.cumsum(value, 0) - value, mask=mask_s)
        total += tl.sum(value, 0)
    return total


@triton.jit
def _histogram(keys_ptr, start, end, low, shift, BLOCK_K: tl.constexpr):
    """int32 [256]: how many positive keys lie in each bin of 2^shift from `low` on."""
    counts = tl.zeros((_BINS,), dtype=tl.int32)
    for first in range(start, end, BLOCK_K):
        offs_k = first + tl.arange(0, BLOCK_K).to(tl.int64)
        key = tl.load(keys_ptr + offs_k, mask=offs_k < end, other=0)
        bin_k = (key - low) >> shift
        inside = (key > 0) & (key >= low) & (bin_k < _BINS)
        counts += tl.histogram(tl.where(inside, bin_k, 0), _BINS, mask=inside)
    return counts


@triton.jit
def _shift_of(search_round):
    """Bits below the digit of a round: 24, 16, 8, 0, so that each bin holds the next round's 256.

    A key has 31 bits: the first round leaves the upper half of its bins empty.
    """
    return 24 - 8 * search_round


@triton.jit
def _descend(counts, low, want, shift):
    """The bin with the `want`-th largest key: its lower edge, and how many to take from it.

    (0, 0), "every positive key", if there are fewer; no further round changes that.
    """
    reaching = tl.sum(counts, 0) - tl.cumsum(counts, 0) + counts
    last = tl.sum((reaching >= want).to(tl.int32), 0) - 1
    found = (want > 0) & (last >= 0)
    above = tl.sum(tl.where(tl.arange(0, _BINS) > last, counts, 0), 0)
    new_low = tl.where(found, low + (last << shift), 0)
    new_want = tl.where(found, want - above, 0)
    return new_low.to(tl.int32), new_want.to(tl.int64)


@triton.jit
def _entries_of(
    offs_g,
    mask_g,
    sums_ptr,
    weight_ptr,
    numel,
    HAS_WEIGHT: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Flat indices and products, [groups, GROUP]; products are 0 where masked."""
    flat = offs_g[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    mask = mask_g[:, None] & (flat < numel)
    return flat, _product(sums_ptr, weight_ptr, flat, mask, HAS_WEIGHT)


@triton.jit
def _sides(keys_ptr, offs_k, end, low):
    """0 or 1: whether a candidate's key lies above `low`, and whether it is `low` and positive."""
    key = tl.load(keys_ptr + offs_k, mask=offs_k < end, other=0)
    return (key > low).to(tl.int32), ((key == low) & (key > 0)).to(tl.int32)


@triton.jit
def _emit(
    out_ptr,
    keys_ptr,
    flat_ptr,
    start,
    end,
    above,
    ties,
    low,
    want,
    BLOCK_K: tl.constexpr,
):
    """Write the indices of candidates start..end that are above `low` or among its first `want`.

    `above` and `ties` count those before `start`; returns how many are chosen up to `end`.
    """
    for first in range(start, end, BLOCK_K):
        offs_k = first + tl.arange(0, BLOCK_K).to(tl.int64)
        is_above, is_tie = _sides(keys_ptr, offs_k, end, low)
        ties_before = tl.cumsum(is_tie, 0) - is_tie
        ties_left = tl.minimum(tl.maximum(want - ties, 0), BLOCK_K).to(tl.int32)
        chosen = (is_above > 0) | ((is_tie > 0) & (ties_before < ties_left))
        flat = tl.load(flat_ptr + offs_k, mask=chosen, other=0)
        place = tl.cumsum(is_above, 0) - is_above + tl.minimum(ties_before, ties_left)
        tl.store(out_ptr + above + tl.minimum(ties, want) + place, flat, mask=chosen)
        above += tl.sum(is_above, 0)
        ties += tl.sum(is_tie, 0)
    return above + tl.minimum(ties, want)


@triton.jit
def _maxima_kernel(
    maxima_ptr,
    head_ptr,
    sums_ptr,
    weight_ptr,
    numel,
    HAS_WEIGHT: tl.constexpr,
    BLOCK_G: tl.constexpr,
    GROUP: tl.constexpr,
):
    """int32 [tiles * BLOCK_G]: the largest product of each group, 0 if none is positive."""
    offs_g = tl.program_id(0).to(tl.int64) * BLOCK_G + tl.arange(0, BLOCK_G)
    every = offs_g >= 0
    flat, product = _entries_of(offs_g, every, sums_ptr, weight_ptr, numel, HAS_WEIGHT, GROUP)
    tl.store(maxima_ptr + offs_g, tl.max(tl.maximum(product, 0), 1))
    infinite = (product & _MAGNITUDE_BITS) >= _INFINITY_BITS
    if tl.max(tl.max(infinite.to(tl.int32), 1), 0) > 0:
        to_end = tl.where(infinite, numel - flat, 0)
        tl.atomic_max(head_ptr + _FLAW, tl.max(tl.max(to_end, 1), 0))


@triton.jit(do_not_specialize=["k", "num_keys", "search_round"])
def _narrow_kernel(
    search_ptr,
    head_ptr,
    keys_ptr,
    num_keys,
    k,
    search_round,
    divisor,
    CANDIDATES: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One round: the window of the search becomes the bin of it that holds the wanted rank.

    Keys are the first `num_keys` of group maxima, or of the CANDIDATES that there are.
    """
    num_keys = num_keys.to(tl.int64)
    if CANDIDATES:
        num_keys = tl.minimum(num_keys, tl.load(head_ptr + _CANDIDATES))
    low = tl.load(search_ptr + _LOW).to(tl.int32)
    want = tl.where(search_round == 0, k.to(tl.int64), tl.load(search_ptr + _WANT))
    shift = _shift_of(search_round)
    start = tl.program_id(0).to(tl.int64) * SPAN
    end = tl.minimum(start + SPAN, num_keys)
    counts = _histogram(keys_ptr, start, end, low, shift, BLOCK_K)
    offs_b = tl.arange(0, _BINS)
    histogram_ptrs = search_ptr + _HISTOGRAMS + search_round * _BINS + offs_b
    tl.atomic_add(histogram_ptrs, counts.to(tl.int64), mask=counts > 0, sem="relaxed")
    if _is_last(search_ptr + _TICKETS + search_round):
        total = tl.load(histogram_ptrs, cache_modifier=".cg")
        low, want = _descend(total, low, want, shift)
        tl.store(search_ptr + _LOW, low.to(tl.int64))
        tl.store(search_ptr + _WANT, want)
        if not CANDIDATES:
            tl.store(search_ptr + _LEAST, _least_product(low, divisor).to(tl.int64))


@triton.jit(do_not_specialize=["num_groups"])
def _count_kernel(
    offsets_ptr,
    reached_ptr,
    groups_ptr,
    maxima_ptr,
    search_ptr,
    head_ptr,
    sums_ptr,
    weight_ptr,
    numel,
    num_groups,
    HAS_WEIGHT: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Of each span of groups, those that reach the bound, and how many candidates they hold.

    `groups`, int32 [num_groups], lists them from the start of their span, as places in it;
    `reached`, int32 [spans], is how many they are; `offsets`, int64 [spans], how many candidates
    lie before the span. The number of all candidates goes into the head.
    """
    least = tl.load(search_ptr + _LEAST).to(tl.int32)
    start = tl.program_id(0).to(tl.int64) * SPAN
    in_span = tl.minimum(num_groups - start, SPAN).to(tl.int32)
    reached = tl.full((), 0, tl.int32)
    for first in range(0, SPAN, BLOCK_K):
        offs_k = first + tl.arange(0, BLOCK_K)
        maxima = tl.load(maxima_ptr + start + offs_k, mask=offs_k < in_span, other=0)
        reaches = (maxima >= least).to(tl.int32)
        place = reached + tl.cumsum(reaches, 0) - reaches
        tl.store(groups_ptr + start + place, offs_k, mask=reaches > 0)
        reached += tl.sum(reaches, 0)
    tl.store(reached_ptr + tl.program_id(0), reached)
    # Every thread reads what others of its program have listed.
    tl.debug_barrier()
    count = tl.full((), 0, tl.int32)
    for first in range(0, reached, BLOCK_G):
        offs_g = first + tl.arange(0, BLOCK_G)
        mask_g = offs_g < reached
        group = start + tl.load(groups_ptr + start + offs_g, mask=mask_g, other=0)
        _, product = _entries_of(group, mask_g, sums_ptr, weight_ptr, numel, HAS_WEIGHT, GROUP)
        count += tl.sum(tl.sum((product >= least).to(tl.int32), 1), 0)
    tl.store(offsets_ptr + tl.program_id(0), count.to(tl.int64))
    if _is_last(search_ptr + _SCAN_TICKET):
        tl.store(head_ptr + _CANDIDATES, _scan(offsets_ptr, tl.num_programs(0), BLOCK_S))


@triton.jit(do_not_specialize=["capacity"])
def _gather_kernel(
    keys_ptr,
    flat_ptr,
    offsets_ptr,
    reached_ptr,
    groups_ptr,
    search_ptr,
    sums_ptr,
    weight_ptr,
    numel,
    capacity,
    divisor,
    HAS_WEIGHT: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr,
    SPAN: tl.constexpr,
):
    """Keys and flat indices of the candidates, in flat order, as far as there is room."""
    least = tl.load(search_ptr + _LEAST).to(tl.int32)
    start = tl.program_id(0).to(tl.int64) * SPAN
    reached = tl.load(reached_ptr + tl.program_id(0))
    before = tl.load(offsets_ptr + tl.program_id(0))
    for first in range(0, reached, BLOCK_G):
        offs_g = first + tl.arange(0, BLOCK_G)
        mask_g = offs_g < reached
        group = start + tl.load(groups_ptr + start + offs_g, mask=mask_g, other=0)
        flat, product = _entries_of(group, mask_g, sums_ptr, weight_ptr, numel, HAS_WEIGHT, GROUP)
        wanted = (product >= least).to(tl.int32)
        in_group = tl.sum(wanted, 1)
        before_group = tl.cumsum(in_group, 0) - in_group
        place = before_group[:, None] + tl.cumsum(wanted, 1) - wanted
        room = tl.minimum(tl.maximum(capacity - before, 0), BLOCK_G * GROUP).to(tl.int32)
        mask = (wanted > 0) & (place < room)
        tl.store(keys_ptr + before + place, _quotient(product, divisor), mask=mask)
        tl.store(flat_ptr + before + place, flat, mask=mask)
        before += tl.sum(in_group, 0)


@triton.jit(do_not_specialize=["capacity", "k"])
def _finish_kernel(
    out_ptr,
    keys_ptr,
    flat_ptr,
    head_ptr,
    capacity,
    k,
    BLOCK_K: tl.constexpr,
):
    """One program: the exact key of rank k among the candidates, and the chosen flat indices."""
    start = tl.full((), 0, tl.int64)
    end = tl.minimum(capacity.to(tl.int64), tl.load(head_ptr + _CANDIDATES))
    low = tl.full((), 0, tl.int32)
    want = k.to(tl.int64)
    for search_round in range(0, _ROUNDS):
        shift = _shift_of(search_round)
        counts = _histogram(keys_ptr, start, end, low, shift, BLOCK_K)
        low, want = _descend(counts, low, want, shift)
    chosen = _emit(out_ptr, keys_ptr, flat_ptr, start, end, start, start, low, want, BLOCK_K)
    tl.store(head_ptr + _CHOSEN, chosen)


@triton.jit(do_not_specialize=["capacity", "k"])
def _tally_kernel(
    tallies_ptr,
    keys_ptr,
    search_ptr,
    head_ptr,
    capacity,
    k,
    SPAN: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """int64 [2 * spans]: candidates above the key of rank k before each span, then those at it.

    The second half starts from the number of all above it.
    """
    end = tl.minimum(capacity.to(tl.int64), tl.load(head_ptr + _CANDIDATES))
    low = tl.load(search_ptr + _LOW).to(tl.int32)
    start = tl.program_id(0).to(tl.int64) * SPAN
    above = tl.full((), 0, tl.int32)
    ties = tl.full((), 0, tl.int32)
    for first in range(start, tl.minimum(start + SPAN, end), BLOCK_K):
        offs_k = first + tl.arange(0, BLOCK_K).to(tl.int64)
        is_above, is_tie = _sides(keys_ptr, offs_k, end, low)
        above += tl.sum(is_above, 0)
        ties += tl.sum(is_tie, 0)
    spans = tl.num_programs(0)
    tl.store(tallies_ptr + tl.program_id(0), above.to(tl.int64))
    tl.store(tallies_ptr + spans + tl.program_id(0), ties.to(tl.int64))
    if _is_last(search_ptr + _SCAN_TICKET):
        tl.store(head_ptr + _CHOSEN, tl.minimum(_scan(tallies_ptr, 2 * spans, BLOCK_S), k))


@triton.jit(do_not_specialize=["capacity"])
def _emit_kernel(
    out_ptr,
    tallies_ptr,
    keys_ptr,
    flat_ptr,
    search_ptr,
    head_ptr,
    capacity,
    SPAN: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The chosen flat indices, in order."""
    end = tl.minimum(capacity.to(tl.int64), tl.load(head_ptr + _CANDIDATES))
    start = tl.program_id(0).to(tl.int64) * SPAN
    ties_ptr = tallies_ptr + tl.num_programs(0)
    _emit(
        out_ptr,
        keys_ptr,
        flat_ptr,
        start,
        tl.minimum(start + SPAN, end),
        tl.load(tallies_ptr + tl.program_id(0)),
        tl.load(ties_ptr + tl.program_id(0)) - tl.load(ties_ptr),
        tl.load(search_ptr + _LOW).to(tl.int32),
        tl.load(search_ptr + _WANT),
        BLOCK_K,
    )


@dataclass(frozen=True)
class _Plan:
    """What the sizes alone decide: entries a group, and how many candidates there is room for."""

    group: int
    capacity: int


def _plan(numel: int, k: int) -> _Plan:
    group = _SPARSE_GROUP if _SPARSE_K * k <= numel else _DENSE_GROUP
    # If more groups than this reach the bound, its entries may need more than that room.
    nearly_all = 8 * k * group > 7 * numel
    return _Plan(group, numel if nearly_all else min(numel, _ROOM * k + _SPARE_ROOM))


@dataclass(frozen=True)
class _State:
    """Views of one int64 tensor of zeros: the head, and what each search has found so far."""

    head: Tensor
    of_groups: Tensor
    of_candidates: Tensor

    @classmethod
    def zeros(cls, device: torch.device) -> _State:
        words = torch.zeros(_HEAD_WORDS + 2 * _SEARCH_WORDS, dtype=torch.int64, device=device)
        return cls(*words.split([_HEAD_WORDS, _SEARCH_WORDS, _SEARCH_WORDS]))

    def read(self) -> tuple[int, int, int]:
        """Flaw, candidates, chosen; the only place where the host waits for the device."""
        flaw, candidates, chosen = self.head[:3].tolist()
        return flaw, candidates, chosen


def select_top(sums: Tensor, weight: Tensor | None, num_examples: int, k: int) -> Tensor:
    """See `ops.select_top`."""
    # A kernel sees the memory of a negated view, not that it is negated.
    sums = sums.detach().resolve_neg().contiguous().flatten()
    if weight is not None:
        weight = weight.detach().to(sums.device).resolve_neg().contiguous().flatten()
    numel, k = sums.numel(), min(k, sums.numel())
    if numel == 0:
        return torch.empty(0, dtype=torch.int64, device=sums.device)
    with on_device(sums.device):
        return _select(sums, weight, num_examples, k, _plan(numel, k))


def _select(sums: Tensor, weight: Tensor | None, num_examples: int, k: int, plan: _Plan) -> Tensor:
    numel, divisor = sums.numel(), float(num_examples)
    matrix = (sums, sums if weight is None else weight, numel)
    read = {"HAS_WEIGHT": weight is not None, "GROUP": plan.group, **_LAUNCH}
    state = _State.zeros(sums.device)
    tiles = triton.cdiv(numel, _TILE)
    maxima = torch.empty(tiles * _TILE // plan.group, dtype=torch.int32, device=sums.device)
    _maxima_kernel[(tiles,)](maxima, state.head, *matrix, BLOCK_G=_TILE // plan.group, **read)
    if k == 0:
        flaw, _, _ = state.read()
        if flaw:
            raise _not_finite_error(sums, weight, numel - flaw)
        return torch.empty(0, dtype=torch.int64, device=sums.device)

    for search_round in range(_BOUND_ROUNDS):
        _narrow(state.of_groups, state.head, maxima, k, search_round, divisor)
    spans = triton.cdiv(len(maxima), _SPAN)
    offsets = torch.empty(spans, dtype=torch.int64, device=sums.device)
    reached = torch.empty(spans, dtype=torch.int32, device=sums.device)
    groups = torch.empty_like(maxima)
    reread = {"BLOCK_G": _BLOCK_K // plan.group, "SPAN": _SPAN, **read}
    _count_kernel[(spans,)](
        offsets,
        reached,
        groups,
        maxima,
        state.of_groups,
        state.head,
        *matrix,
        len(maxima),
        BLOCK_K=_BLOCK_K,
        BLOCK_S=_BLOCK_S,
        **reread,
    )

    def gather_and_finish(capacity: int) -> Tensor:
        keys = torch.empty(capacity, dtype=torch.int32, device=sums.device)
        flat = torch.empty(capacity, dtype=torch.int64, device=sums.device)
        lists = (offsets, reached, groups, state.of_groups)
        _gather_kernel[(spans,)](keys, flat, *lists, *matrix, capacity, divisor, **reread)
        return _finish(keys, flat, state, k)

    chosen = gather_and_finish(plan.capacity)
    flaw, candidates, num_chosen = state.read()
    if flaw:
        raise _not_finite_error(sums, weight, numel - flaw)
    if candidates > plan.capacity:
        state.of_candidates.zero_()
        chosen = gather_and_finish(candidates)
        _, _, num_chosen = state.read()
    return chosen[:num_chosen]


def _finish(keys: Tensor, flat: Tensor, state: _State, k: int) -> Tensor:
    """int64 [k], the chosen flat indices first; their number goes into the head of the state."""
    out = torch.empty(k, dtype=torch.int64, device=flat.device)
    capacity, head, search = len(flat), state.head, state.of_candidates
    if capacity <= _ONE_PROGRAM:
        _finish_kernel[(1,)](out, keys, flat, head, capacity, k, BLOCK_K=_BLOCK_K, **_LAUNCH)
        return out
    for search_round in range(_ROUNDS.value):
        _narrow(search, head, keys, k, search_round, None)
    spans = triton.cdiv(capacity, _SPAN)
    tallies = torch.empty(2 * spans, dtype=torch.int64, device=flat.device)
    cut = {"SPAN": _SPAN, "BLOCK_K": _BLOCK_K, **_LAUNCH}
    _tally_kernel[(spans,)](tallies, keys, search, head, capacity, k, BLOCK_S=_BLOCK_S, **cut)
    _emit_kernel[(spans,)](out, tallies, keys, flat, search, head, capacity, **cut)
    return out


def _narrow(
    search: Tensor,
    head: Tensor,
    keys: Tensor,
    k: int,
    search_round: int,
    divisor: float | None,
) -> None:
    """One round of the search among group maxima, or without `divisor` among candidates."""
    _narrow_kernel[(triton.cdiv(len(keys), _SPAN),)](
        search,
        head,
        keys,
        len(keys),
        k,
        search_round,
        1.0 if divisor is None else divisor,
        CANDIDATES=divisor is None,
        SPAN=_SPAN,
        BLOCK_K=_BLOCK_K,
        **_LAUNCH,
    )


def _not_finite_error(sums: Tensor, weight: Tensor | None, first: int) -> ValueError:
    # Infinity and NaN stay what they are when they are divided by n.
    value = sums[first] if weight is None else sums[first] * weight[first].float().abs()
    return ValueError(
        f"importance must be finite, got {float(value)} at flat index {first}; "
        "check the losses and the model's weights"
    )
