"""The collapse-alignment loss, with class statistics that go on from batch to batch."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fastdean.files.declared import Anything, Filled, Real, Record, Text, require
from fastdean.models.ranks.distributed import Ranks
from fastdean.ops.collapse import collapse_alignment_step
from fastdean.ops.ownership import held_alone
from fastdean.wording.mendable import InputTypeError
from fastdean.wording.numbers import require_real

Mode = Literal["cumulative", "window", "batch"]

STATE_ADVICE = "save the whole state as state_dict() gives it"
_WINDOW_DECAY = 0.99
_FIXED_DECAY = {"cumulative": 1.0, "batch": 0.0}


class CollapseState:
    """Sums and counts of the features of each class.

    With every batch: sums = decay * sums + the batch's, counts likewise, where decay is 1 in mode
    "cumulative" (all positions since the start, as published), 0 in mode "batch" (this batch
    alone), and `decay` in mode "window": a position's weight halves every log(1/2) / log(decay)
    batches, 69 at 0.99. A class whose count has decayed below 2^-20 is forgotten.

    Not a module, which would be cast with the model and overwritten by the first rank's.

    Args:
        num_classes, num_features: K and D.
        mode: "cumulative", "window" or "batch".
        decay: of mode "window" only, above 0 and below 1; None: 0.99.
        dtype: torch.float32, or torch.float64 for features and weights in fp64.
        device: of features and weight.
    Attributes:
        sums: [K, D] in `dtype`. A later batch never writes into a tensor that was read from here.
        counts: fp64 [K]; exact while they are whole numbers.
    Raises:
        ValueError, TypeError: for the arguments.
    """

    def __init__(
        self,
        num_classes: int,
        num_features: int,
        *,
        mode: Mode = "cumulative",
        decay: float | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        if num_classes < 1 or num_features < 1:
            raise ValueError(
                "num_classes and num_features must be at least 1, "
                f"got {num_classes} and {num_features}; give K and D of the classes' weight [K, D]"
            )
        if dtype not in (torch.float32, torch.float64):
            raise InputTypeError(
                f"dtype must be torch.float32 or torch.float64, got {dtype}; features in half "
                "precision have their sums in float32"
            )
        self.mode = mode
        self.decay = _decay_of(mode, decay)
        self._lock = threading.RLock()
        sums = torch.zeros(num_classes, num_features, dtype=dtype, device=device)
        counts = torch.zeros(num_classes, dtype=torch.float64, device=device)
        self._sums, self._counts, self._alone = sums, counts, True
        self._loans: dict[str, weakref.ref[Tensor]] = {}

    # The next batch is added in place to tensors that nobody else has. So a reader gets another
    # tensor of the same memory; while it or a graph lives, the next batch goes into new memory.
    @property
    def sums(self) -> Tensor:
        return self._lent("_sums")

    @sums.setter
    def sums(self, sums: Tensor) -> None:
        self._sums, self._alone = sums, False

    @property
    def counts(self) -> Tensor:
        return self._lent("_counts")

    @counts.setter
    def counts(self, counts: Tensor) -> None:
        self._counts, self._alone = counts, False

    def _lent(self, name: str) -> Tensor:
        with self._locked():
            tensor = getattr(self, name)
            if not self._alone:
                return tensor
            if torch.compiler.is_compiling():
                return tensor.detach()
            # The same one as long as a reader has it.
            known = self._loans.get(name)
            lent = None if known is None else known()
            if lent is None:
                lent = tensor.detach()
                self._loans[name] = weakref.ref(lent)
            return lent

    def _take(self, sums: Tensor, counts: Tensor, *, alone: bool) -> None:
        """Replace sums and counts; `alone`: nobody else has the new ones."""
        self._alone = False
        if sums is not self._sums or counts is not self._counts:
            self._loans = {}
        self._sums, self._counts = sums, counts
        self._alone = alone

    def _locked(self) -> AbstractContextManager[object]:
        """Keeps threads apart that read and write in place; compiled code never writes in place."""
        return nullcontext() if torch.compiler.is_compiling() else self._lock

    def _join(
        self, features: Tensor, labels: Tensor, weight: Tensor, statistic: str, impl: str | None
    ) -> Tensor:
        """Add a batch, and return its loss."""
        with self._locked():
            donated = (
                self._alone
                and not torch.compiler.is_compiling()
                and held_alone(self._sums, self._counts)
            )
            loss, sums, counts, alone = collapse_alignment_step(
                features,
                labels,
                weight,
                self._sums,
                self._counts,
                self.decay,
                statistic,
                impl,
                donated=donated,
            )
            self._take(sums, counts, alone=alone)
        return loss

    def __getstate__(self) -> dict[str, Any]:
        state = {**vars(self), "_sums": self.sums, "_counts": self.counts, "_loans": {}}
        del state["_lock"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        # The copier may have given these very tensors to others, or share their memory.
        vars(self).update(state, _lock=threading.RLock(), _alone=False)

    def __repr__(self) -> str:
        num_classes, num_features = self.sums.shape
        return (
            f"CollapseState({num_classes}, {num_features}, mode={self.mode!r}, "
            f"decay={self.decay}, dtype={self.sums.dtype}, device={str(self.sums.device)!r})"
        )

    def reset(self) -> None:
        """Forget every position seen so far."""
        # New tensors: a backward pass may still need the old ones.
        self._take(torch.zeros_like(self._sums), torch.zeros_like(self._counts), alone=True)

    def to(self, device: torch.device | str) -> CollapseState:
        """Move sums and counts there, in place; returns the state, as a module does."""
        sums, counts = self._sums.to(device), self._counts.to(device)
        self._take(sums, counts, alone=self._alone)
        return self

    def __add__(self, other: CollapseState) -> CollapseState:
        """The state of both histories, to one rounding of the sums.

        Raises: ValueError if the two differ in mode, decay, shape or dtype.
        """
        if not isinstance(other, CollapseState):
            return NotImplemented
        self._check_kind(other.state_dict(), "the other state")
        total = self.like()
        total.sums = self.sums + other.sums.to(self.sums.device)
        total.counts = self.counts + other.counts.to(self.counts.device)
        return total

    def summed_across_ranks(self) -> CollapseState:
        """A new state, the sum of all ranks', the same on each. All ranks must call it."""
        total = self.like()
        total.sums, total.counts = self.sums.clone(), self.counts.clone()
        Ranks.current().sum_([total.sums, total.counts])
        return total

    def state_dict(self) -> dict[str, Any]:
        """sums and counts (not copies), mode and decay."""
        return {
            "sums": self.sums,
            "counts": self.counts,
            "mode": self.mode,
            "decay": self.decay,
        }

    def load_state_dict(self, stored: Mapping[str, Any]) -> None:
        """Restore a saved state, on this one's device.

        Raises: ValueError if an entry is missing or damaged, or mode, decay, shape or dtype differ.
        """
        require(stored, _stored_kind(len(self.counts)), "stored", advice=STATE_ADVICE)
        self._check_kind(stored, "stored")
        device = self.sums.device
        sums, counts = (stored[name].to(device, copy=True) for name in ("sums", "counts"))
        self._take(sums, counts, alone=True)

    def like(self) -> CollapseState:
        """An empty state with the same mode, decay, shape, dtype and device."""
        decay = self.decay if self.mode == "window" else None
        return CollapseState(
            *self.sums.shape,
            mode=self.mode,
            decay=decay,
            dtype=self.sums.dtype,
            device=self.sums.device,
        )

    def _check_kind(self, stored: Mapping[str, Any], name: str) -> None:
        expected, found = _kind(self.state_dict()), _kind(stored)
        if found != expected:
            raise ValueError(f"{name} must be of kind {expected}, got {found}; make one like it")


def collapse_alignment_loss(
    features: Tensor,
    labels: Tensor,
    weight: Tensor,
    state: CollapseState,
    *,
    statistic: str = "std",
    detach_features: bool = True,
    impl: str | None = None,
) -> Tensor:
    """Measure how unevenly, or how badly, class means align with the rows of `weight`: a scalar.

    With mu_c the mean of the features labelled c in `state`, this batch included, and mu_bar the
    unweighted mean of mu_c over the classes seen: a statistic of cos(w_c, mu_c - mu_bar) over these
    classes. The published regulariser, times its strength, is the default. See
    `ops.collapse_alignment` for what holds at the edges: fewer than two classes, norms of 0.

    Args:
        features: [N, D] last-layer representations; fp32, bf16 or fp16, or fp64 with a state and a
            weight in fp64. Any strides.
        labels: int64 [N], the class of each row, 0..K-1, or -1: such rows are ignored.
        weight: [K, D], one row of the output embedding for each class.
        state: every call adds the batch to it, also without gradients.
        statistic: "std" (published, unbiased: least when all cosines are equal, whatever they are),
            "cv" (std / sqrt(mean^2 + 1e-6)) or "mean" (1 - mean: least when all are 1).
        detach_features: True, as published: only `weight` has a gradient. False: the features of
            this batch have one too, exact through means and centre.
        impl: None (by device), "reference" or "native".
    Returns:
        A scalar, fp32 or fp64. 0 with zero gradients while fewer than two classes have been seen.
    Raises:
        ValueError, TypeError: the arguments do not fit together; on the CPU also labels out of
            range (elsewhere the loss is then NaN, because looking would have to wait); or
            `detach_features=False` with a state of mode "cumulative".
    Source:
        Collapsed language models promote fairness (arXiv 2410.04472), (U)NC3.
    """
    check_live(detach_features, state.mode)
    features = features.detach() if detach_features else features
    return state._join(features, labels, weight, statistic, impl)


def check_live(detach_features: bool, mode: str) -> None:
    """Raise ValueError for features with a gradient in mode "cumulative"."""
    if not detach_features and mode == "cumulative":
        raise ValueError(
            "detach_features=False must come with a state of mode 'window' or 'batch', got "
            "'cumulative'; its means move by 1 / count of all positions ever seen, so the gradient "
            "of the features fades to nothing"
        )


def _decay_of(mode: str, decay: float | None) -> float:
    if mode not in get_args(Mode):
        raise ValueError(
            f"mode must be one of {', '.join(get_args(Mode))}, got {mode!r}; "
            "'cumulative' is the published one"
        )
    if mode != "window":
        if decay is not None:
            raise ValueError(
                f"decay must be left out in mode {mode!r}, got {decay}; use mode 'window'"
            )
        return _FIXED_DECAY[mode]
    if decay is not None:
        require_real("decay", decay)
    decay = _WINDOW_DECAY if decay is None else float(decay)
    if not 0 < decay < 1:
        raise ValueError(
            f"decay must be above 0 and below 1, got {decay}; modes 'cumulative' and 'batch' are "
            "those of 1 and 0"
        )
    return decay


def _stored_kind(num_classes: int) -> Record:
    """The form of `state_dict`, alone or inside a regulariser's."""
    sums = Filled(("torch.float32", "torch.float64"), (None, None), finite=True)
    return Record(
        {
            "sums": sums,
            "counts": Filled(("torch.float64",), (num_classes,), finite=True, least=0),
            "mode": Text(choices=get_args(Mode)),
            "decay": Real(least=0, most=1),
        },
        others=Anything(),
    )


def _kind(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Must be equal in states that are added or restored; shown in errors."""
    sums = stored["sums"]
    return {
        "mode": stored["mode"],
        "decay": float(stored["decay"]),
        "shape": tuple(sums.shape),
        "dtype": str(sums.dtype),
    }
