"""Top entries of the ranks' shares are those of the whole matrix."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

from fastdean.coupling.results.score_entry import ScoreEntry
from fastdean.coupling.results.scores import keep_entry
from fastdean.coupling.sums.reduction import Top, reduced_entry
from fastdean.models.ranks.distributed import Ranks

EXAMPLES = 3


class Summed:
    """An accumulator whose sums are those of all ranks already."""

    def __init__(self, sums, signed):
        self._tensors = [sums, signed]

    def tensors(self):
        return self._tensors

    def entry(self, weight):
        return ScoreEntry.of(self._tensors[0], weight, signed=self._tensors[1])


@dataclass(frozen=True)
class InTurn(Ranks):
    """One rank after the other in this process: what each gathers is kept, then given to each."""

    gathered: list = field(default_factory=list)

    class Wait(Exception):
        pass

    def reduce_shards_(self, tensors):
        # What other shares hold is nobody's business.
        for flat in (tensor.view(-1) for tensor in tensors):
            first, end = self.shard(len(flat))
            flat[:first] = flat[end:] = float("nan")

    def spread_shards_(self, tensors):
        raise AssertionError("all sums were sent")

    def gather(self, tensors):
        if len(self.gathered) < self.size:
            self.gathered.append(tensors)
            raise self.Wait
        return self.gathered


def of_ranks(sums, signed, weight, top, size):
    gathered, found = [], []
    for rank in 2 * list(range(size)):
        accumulator = Summed(sums.clone(), signed.clone())
        try:
            found.append(reduced_entry(accumulator, weight, InTurn(rank, size, gathered), top))
        except InTurn.Wait:
            continue
    return found


def with_ties(shape, seed):
    """Sums and weights of a few values each, many of them 0; of the first expert all."""
    generator = torch.Generator().manual_seed(seed)
    sums = torch.randint(0, 4, shape, generator=generator).float()
    weight = torch.randint(-2, 3, shape, generator=generator).float()
    sums[0] = 0
    return sums, -sums, weight


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize(
    "shape, stacked, scope, of, ratio",
    [
        ((7, 30), False, "expert", None, 0.04),
        ((7, 30), False, "expert", None, 0.001),
        ((5, 6, 11), True, "expert", None, 0.05),
        ((5, 6, 11), True, "tensor", None, 0.02),
        ((5, 6, 11), True, "tensor", 990, 0.01),
        ((11, 2, 9), True, "expert", None, 0.06),
        # A convolution's, and a norm's.
        ((40, 1, 4), False, "expert", None, 0.06),
        ((210,), False, "expert", None, 0.06),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_top_entries_of_shares_are_those_of_the_matrix(
    shape, stacked, scope, of, ratio, size, seed
):
    sums, signed, weight = with_ties(shape, seed)
    whole = ScoreEntry.of(sums.clone(), weight, signed=signed, stacked=stacked)
    expected = keep_entry("a", whole.scoped(scope), EXAMPLES, ratio, of)
    found = of_ranks(sums, signed, weight, Top(EXAMPLES, ratio, scope, stacked, of), size)
    assert len(found) == size
    for entry in found:
        for name, value in vars(expected).items():
            other = getattr(entry, name)
            same = torch.equal(other, value) if torch.is_tensor(value) else other == value
            assert same, name


def test_weights_with_strides_are_read_where_they_lie():
    sums, signed, weight = with_ties((8, 40), 1)
    strided = weight.t().contiguous().t()
    assert not strided.is_contiguous()
    top = Top(EXAMPLES, 0.05, "expert", stacked=False)
    one, other = (of_ranks(sums, signed, w, top, 3)[0] for w in (weight, strided))
    assert torch.equal(one.index, other.index) and torch.equal(one.weight, other.weight)


class AllThere(Ranks):
    """Ranks that all hold the sums over everybody's examples."""

    def reduce_shards_(self, tensors):
        pass

    spread_shards_ = reduce_shards_


def test_a_number_by_itself_has_no_shards():
    sums, signed, weight = torch.tensor(3.0), torch.tensor(-3.0), torch.tensor(2.0)
    top = Top(EXAMPLES, 0.5, "expert", stacked=False)
    entry = reduced_entry(Summed(sums, signed), weight, AllThere(1, 2), top)
    assert (entry.shape, float(entry.sums), float(entry.signed)) == ((), 3.0, -3.0)


def test_an_infinite_importance_is_named_by_its_place_in_the_matrix():
    sums, signed, weight = with_ties((8, 40), 1)
    weight[6, 3], sums[6, 3] = 1.0, float("inf")
    text = "^importance must be finite, got inf at flat index 243; check the losses"
    with pytest.raises(ValueError, match=text):
        of_ranks(sums, signed, weight, Top(EXAMPLES, 0.01, "expert", stacked=False), 2)
