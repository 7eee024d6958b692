"""What the ranks of a `torch.distributed` job do together; one rank when there is no job.

Inside `failing_together` every collective first asks whether all ranks have come so far. A rank
that fails anywhere answers that question and goes; the others, which expect it in some collective,
hear of it there. So all stay in step, and none waits for ever. A rank that is killed or hangs
answers nothing: it is named (`lost_ranks.py`). So is one that fails where the others may wait for
it inside of a model's layers, and cannot be asked.
"""

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastdean.models.ranks.lost_ranks import Words, is_of_a_collective, limit_collectives
from fastdean.wording.log import logger
from fastdean.wording.mendable import StateError
from fastdean.wording.numbers import require_real


@dataclass
class _Meeting:
    """Of this process, as its process group is.

    Attributes:
        depth: blocks of `failing_together` that are open.
        failure_is_known: whether all ranks know of a failure inside, or have a word of it.
        layers_meet: whether the model runs, and ranks wait for each other inside of it, too.
        words: what the ranks say of those that cannot be asked.
        in_step: when all ranks last met, by `time.monotonic`.
        timeout: how many seconds one waits for another at most.
        unlimit: puts the groups' own times back.
    """

    depth: int = 0
    failure_is_known: bool = False
    layers_meet: bool = False
    words: Words = field(default_factory=Words)
    in_step: float = 0.0
    timeout: float | None = None
    unlimit: Callable[[], None] | None = None

    def begin(self) -> None:
        """The outermost block begins."""
        self.failure_is_known = False
        self.words, self.in_step = Words(), time.monotonic()

    def end(self) -> None:
        """The outermost block has ended."""
        self.end_limit()
        self.words = Words()

    def end_limit(self) -> None:
        if self.unlimit is not None:
            self.unlimit()
        self.timeout = self.unlimit = None


_meeting = _Meeting()

# Numbers that are on their way at a time, of all ranks together: 64 MB.
_ON_THEIR_WAY = 1 << 24
# Seconds: process groups count milliseconds, and nanoseconds in 64 bits.
_SHORTEST_WAIT, _LONGEST_WAIT = 0.001, 1_000_000_000
# What launchers tell each process of how many there are: torchrun, SLURM, Open MPI, MPICH.
_PROCESSES = ("WORLD_SIZE", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
# Characters of a value that is shown.
_LONGEST_VALUE = 60


@dataclass(frozen=True)
class Ranks:
    """This process among its peers.

    Attributes:
        teams: of tensor parallel the ranks that hold one model together and are given the same
            examples, in the order of their blocks, equally many in each; empty where every rank
            holds a model of its own.
    """

    rank: int
    size: int
    teams: tuple[tuple[int, ...], ...] = field(default=(), kw_only=True)

    @classmethod
    def of_group(cls) -> Ranks:
        """This process in the default process group; alone where there is none."""
        if _group_exists():
            return cls(torch.distributed.get_rank(), torch.distributed.get_world_size())
        return cls(0, 1)

    @classmethod
    def current(cls) -> Ranks:
        """As `of_group`, with a warning where a launcher says that there are several processes."""
        if not _group_exists():
            _warn_of_launcher()
        return cls.of_group()

    @classmethod
    def require_alone(cls, job: str) -> None:
        """Raise ValueError in a process that has peers, for a job that does not share its work."""
        size = max(cls.of_group().size, int(os.environ.get("WORLD_SIZE", "1")))
        if size > 1:
            raise ValueError(
                f"{job} must run in one process, got {size}; start it without torchrun"
            )

    def described(self) -> str:
        """As in "4 ranks, 2 of which hold a model together"."""
        if not self.teams:
            return f"{self.size} ranks"
        return f"{self.size} ranks, {len(self.team)} of which hold a model together"

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def team(self) -> tuple[int, ...]:
        """The ranks that hold a model with this one; this one alone outside of teams."""
        return self.teams[self.share] if self.teams else (self.rank,)

    @property
    def teams_first(self) -> tuple[int, ...]:
        """The first rank of each team; all ranks outside of teams."""
        return tuple(team[0] for team in self.teams) or tuple(range(self.size))

    @property
    def shares(self) -> int:
        """Into how many shares the examples are split."""
        return len(self.teams) or self.size

    @property
    def share(self) -> int:
        """The number of this rank's share of the examples."""
        if not self.teams:
            return self.rank
        return next(number for number, team in enumerate(self.teams) if self.rank in team)

    @property
    def peers(self) -> tuple[int, ...]:
        """The ranks with the same weights, by their share of the examples; this one is of them."""
        if not self.teams:
            return tuple(range(self.size))
        place = self.team.index(self.rank)
        return tuple(team[place] for team in self.teams)

    def sum_(self, tensors: Sequence[Tensor], group: Any = None) -> None:
        """Replace each tensor by its sum over all ranks.

        Args:
            group: a process group of torch's, over whose ranks alone is summed; each rank calls it
                with one that it is in, or all with None.
        """
        if self.size == 1:
            return
        with self._together():
            for tensor in tensors:
                reachable = _reachable(tensor)
                sent = torch.distributed.all_reduce(reachable, group=group, async_op=True)
                _wait(sent, reachable.device)
                if reachable is not tensor:
                    tensor.copy_(reachable)

    def shard(self, numel: int, share: int | None = None) -> tuple[int, int]:
        """A rank's share of so many entries: its first one and the one past its last.

        Args:
            share: whose share of the examples has this number; None: this rank's.
        """
        share = self.share if share is None else share
        return numel * share // self.shares, numel * (share + 1) // self.shares

    def reduce_shards_(self, tensors: Sequence[Tensor]) -> None:
        """Replace this rank's `shard` of each tensor by its sum over its peers: all examples'.

        A reduce-scatter: of each entry that is another's a rank sends its own number, once. The
        numbers are added in pairs of neighbours, and these in pairs, on every backend and machine.
        The entries of the other shards are left as they are.

        Args:
            tensors: contiguous, of the same shapes on all peers.
        """
        if self.shares == 1:
            return
        with self._together():
            for flat in (tensor.view(-1) for tensor in tensors):
                for pieces in self._pieces(flat):
                    own = pieces[self.share]
                    own.copy_(_sum_in_pairs(self._exchanged(pieces)))

    def spread_shards_(self, tensors: Sequence[Tensor]) -> None:
        """Replace every peer's `shard` of each tensor by what that rank has in it."""
        if self.shares == 1:
            return
        with self._together():
            for flat in (tensor.view(-1) for tensor in tensors):
                for pieces in self._pieces(flat):
                    sent = pieces[self.share].new_zeros(self._longest(pieces))
                    sent[: len(pieces[self.share])] = pieces[self.share]
                    found = _gathered(sent, self.size)
                    for piece, peer in zip(pieces, self.peers, strict=True):
                        piece.copy_(found[peer][: len(piece)])

    def gather(self, tensors: Sequence[Tensor]) -> list[list[Tensor]]:
        """Such tensors of every rank, by rank; in one message, the widest dtypes first.

        Args:
            tensors: of the same shapes and dtypes on all ranks, by falling size of their dtypes.
        """
        if self.size == 1:
            return [list(tensors)]
        sent = torch.cat([tensor.contiguous().view(-1).view(torch.uint8) for tensor in tensors])
        with self._together():
            gathered = _gathered(sent, self.size)
        sizes = [tensor.nbytes for tensor in tensors]
        return [
            [
                part.clone().view(tensor.dtype).view(tensor.shape).to(tensor.device)
                for part, tensor in zip(found.split(sizes), tensors, strict=True)
            ]
            for found in gathered
        ]

    def gather_objects(self, value: Any) -> list[Any]:
        """What every rank gives, by rank; it must be small, and such that it can be pickled."""
        found = [value] * self.size
        with self.together():
            if self.size > 1:
                torch.distributed.all_gather_object(found, value)
        return found

    def require_same(self, whose: str, own: Mapping[str, Any], remedy: str) -> None:
        """Raise ValueError on all ranks where they have unlike values; all ranks call it.

        Else they would add up what does not belong together, or send each other tensors of unlike
        sizes, for which a process group ends the process.

        Args:
            whose: whose values they are, at the beginning of the error.
            own: name -> plain value, the same names on all ranks or others in the place of some.
        """
        if self.size == 1:
            return
        first, *others = self.gather_objects(dict(own))
        for rank, other in enumerate(others, 1):
            for name in (*first, *other):
                one, another = first.get(name, "none"), other.get(name, "none")
                if one != another:
                    raise ValueError(
                        f"{whose} must have the same {name} on all ranks, got {_shortened(one)} on "
                        f"rank 0 and {_shortened(another)} on rank {rank}; {remedy}"
                    )

    def limit_waiting(self, seconds: float | None) -> None:
        """Until the outermost `failing_together` ends, wait for no rank for longer than that."""
        if self.size == 1 or seconds is None:
            return
        assert _meeting.depth, "or it would not end"
        _meeting.end_limit()
        _meeting.timeout, _meeting.unlimit = seconds, limit_collectives(seconds)

    def _pieces(self, flat: Tensor) -> Iterator[list[Tensor]]:
        """A part of every peer's shard at a time, views of the tensor; the same steps on all."""
        shards = [flat[slice(*self.shard(len(flat), share))] for share in range(self.shares)]
        width = max(1, _ON_THEIR_WAY // self.shares)
        for start in range(0, self._longest(shards), width):
            yield [shard[start : start + width] for shard in shards]

    def _exchanged(self, pieces: Sequence[Tensor]) -> Tensor:
        """The peers' numbers for this rank's piece, [shares, numbers]; each gives its pieces."""
        peers = sorted(zip(self.peers, pieces, strict=True))
        sent = torch.cat([piece.to(_exchange_device(piece)) for _, piece in peers])
        # Of the other ranks of its team a rank gets nothing, and of their peers.
        sizes = [0] * self.size
        for peer, piece in peers:
            sizes[peer] = len(piece)
        own = len(pieces[self.share])
        from_whom = [own if rank in self.peers else 0 for rank in range(self.size)]
        received = sent.new_empty(self.shares * own)
        _wait(
            torch.distributed.all_to_all_single(received, sent, from_whom, sizes, async_op=True),
            sent.device,
        )
        by_rank = received.view(self.shares, own)
        order = sorted(self.peers)
        if order == list(self.peers):
            return by_rank
        return by_rank[[order.index(peer) for peer in self.peers]]

    def _longest(self, tensors: Sequence[Tensor]) -> int:
        """Entries of the longest, on all ranks: those of a team may have blocks of other sizes."""
        longest = max(map(len, tensors))
        return self.highest(longest) if self.teams else longest

    def highest(self, value: int) -> int:
        """The largest of the ranks' values, on every rank."""
        if self.size == 1:
            return value
        box = torch.tensor(value, device=_collective_device())
        with self._together():
            _all_highest(box)
            return int(box)

    def agree(self, decision: bool) -> bool:
        """The first rank's decision, on every rank."""
        return bool(self.highest(int(decision and self.first)))

    @contextmanager
    def failing_together(self, timeout: float | None = None) -> Iterator[None]:
        """If the block raises on one rank, raise on all: none waits for ever in a reduction.

        Blocks may lie in one another. Inside, ranks meet in the methods of this class alone, or
        within `together`.

        Args:
            timeout: as `limit_waiting` takes it.
        """
        if self.size == 1:
            yield
            return
        if _meeting.depth == 0:
            _meeting.begin()
        _meeting.depth += 1
        try:
            self.limit_waiting(timeout)
            yield
        except BaseException as error:
            # Told once: all ranks are on their way out by then.
            if not _meeting.failure_is_known:
                self._tell(error)
            raise
        else:
            self._meet(failed=False)
        finally:
            _meeting.depth -= 1
            if _meeting.depth == 0:
                _meeting.end()

    @contextmanager
    def running_together(self) -> Iterator[None]:
        """As `failing_together`, around runs of the model, in whose layers teams meet.

        A rank that fails there leaves a word of it: the others may wait inside of a layer. Their
        process group is of no use afterwards, unless all fail.
        """
        before, _meeting.layers_meet = _meeting.layers_meet, bool(self.teams)
        try:
            with self.failing_together():
                yield
        finally:
            _meeting.layers_meet = before

    def _tell(self, error: BaseException) -> None:
        """Have the other ranks hear of an error of this one, or say which of them it comes of."""
        if not _meeting.layers_meet and not is_of_a_collective(error):
            # What ended this one says more than that another is lost too.
            with suppress(RuntimeError):
                self._meet(failed=True)
            return
        # Others may wait inside of a layer, where they expect something else than a question: of
        # FSDP2 too, which gathers weights there, when a rank is lost.
        _meeting.failure_is_known = True
        words, limit = _meeting.words, _meeting.timeout
        words.explain(self.rank, self.size, limit, _meeting.in_step, error)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Around a collective of somebody else's, which all ranks enter."""
        if self.size == 1:
            yield
            return
        with self._together():
            yield

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Around a collective: raise if another rank has failed in a block that both are in, or is
        lost."""
        if _meeting.depth:
            self._meet(failed=False)
        with self._naming_lost():
            yield

    @contextmanager
    def _naming_lost(self) -> Iterator[None]:
        try:
            with _meeting.words.naming(self.rank, self.size, _meeting.timeout):
                yield
        except BaseException:
            # Of a group that has broken down nothing is asked again.
            _meeting.failure_is_known = True
            raise

    def _meet(self, *, failed: bool) -> None:
        """Tell the other ranks whether this one has failed; StateError if only others have."""
        # Who is interrupted here leaves without a word: the others may be a collective further.
        _meeting.failure_is_known = True
        said = [int(failed), _meeting.words.drawn(self.rank)]
        box = torch.tensor(said, device=_collective_device())
        with self._naming_lost():
            _wait(torch.distributed.all_reduce(box, async_op=True), box.device)
        count, number = box.tolist()
        _meeting.words.agreed(number)
        _meeting.in_step = time.monotonic()
        _meeting.failure_is_known = count > 0
        if _meeting.failure_is_known and not failed:
            raise StateError(
                f"every rank must finish its part of the work, got {count} of {self.size} "
                "that failed; see their own messages"
            )

    def all(self, value: bool) -> bool:
        """Whether it is true on every rank."""
        return value if self.size == 1 else not self.highest(int(not value))

    def hold_the_same(self, digest: str) -> bool:
        """Whether a hexadecimal digest is the same on every rank, by its first 60 bits."""
        if self.size == 1:
            return True
        value = int(digest[:15], 16)
        extremes = torch.tensor([value, -value], device=_collective_device())
        with self._together():
            _all_highest(extremes)
        highest, negated_lowest = extremes.tolist()
        return highest == -negated_lowest


@contextmanager
def failing_together() -> Iterator[None]:
    """`Ranks.failing_together` of the process group that there is then; decorates functions too."""
    with Ranks.of_group().failing_together():
        yield


def check_rank_timeout(seconds: float | None) -> None:
    """Raise TypeError or ValueError for what `Ranks.limit_waiting` cannot take."""
    if seconds is None:
        return
    require_real("rank_timeout", seconds, "a number of seconds above 0")
    if not 0 < seconds < math.inf:
        raise ValueError(
            f"rank_timeout must be a number of seconds above 0, got {seconds}; leave it out to "
            "wait as long as the process group does"
        )
    if not _SHORTEST_WAIT <= seconds <= _LONGEST_WAIT:
        raise ValueError(
            f"rank_timeout must be a number of seconds from {_SHORTEST_WAIT} to {_LONGEST_WAIT:,}, "
            f"got {seconds:g}; leave it out to wait as long as the process group does"
        )


def _shortened(value: Any) -> str:
    text = str(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."


def _warn_of_launcher() -> None:
    """Warn once where a launcher's variable says that this process, which has no group, has peers.

    Of SLURM it is no more than a sign: a script may start a single one of the tasks it may have.
    """
    for name in _PROCESSES:
        value = os.environ.get(name, "")
        if value.isdecimal() and int(value) > 1:
            _warn_once(
                f"{name} is {value} but torch.distributed is not initialised: every process does "
                "the whole work; start the processes with torchrun, or in a script of yours call "
                "torch.distributed.init_process_group() first"
            )
            return


@functools.cache
def _warn_once(text: str) -> None:
    logger.warning("%s", text)


def _group_exists() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _wait(work: Any, device: torch.device) -> None:
    _meeting.words.wait(work, device)


def _reachable(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of it where a process group of GPUs alone can reduce it."""
    return tensor.to(_collective_device()) if tensor.device.type == "cpu" else tensor


def _all_highest(tensor: Tensor) -> None:
    highest = torch.distributed.ReduceOp.MAX
    _wait(torch.distributed.all_reduce(tensor, op=highest, async_op=True), tensor.device)


def _gathered(sent: Tensor, ranks: int) -> Sequence[Tensor]:
    """What each rank sends, [N] on all of them, by rank."""
    reachable = sent.to(_exchange_device(sent))
    received = [torch.empty_like(reachable) for _ in range(ranks)]
    _wait(torch.distributed.all_gather(received, reachable, async_op=True), reachable.device)
    return received


def _sum_in_pairs(rows: Tensor) -> Tensor:
    """The sum of the rows, of neighbours and of neighbouring sums; `rows` is used up."""
    while len(rows) > 1:
        pairs = len(rows) // 2
        rows[0 : 2 * pairs : 2] += rows[1::2]
        rows = rows[0::2]
    return rows[0]


def _exchange_device(tensor: Tensor) -> torch.device:
    """Where the group can exchange such a tensor: gloo does so on the CPU alone."""
    backends = dict(part.split(":") for part in torch.distributed.get_backend_config().split(","))
    given = tensor.device.type
    if given == "cpu" and "cpu" not in backends:
        return torch.device("cuda", torch.cuda.current_device())
    if given != "cpu" and backends.get(given) in (None, "gloo"):
        return torch.device("cpu")
    return tensor.device


def _collective_device() -> str:
    return "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
