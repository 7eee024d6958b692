"""Whether `score()` goes batch by batch or layer by layer."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastdean.coupling.accumulators import all_sums_bytes, sums_bytes
from fastdean.coupling.holding import together_bytes
from fastdean.coupling.needed_memory import ALLOCATOR
from fastdean.coupling.trial import Scorable
from fastdean.coupling.window_memory import MARGIN, WindowMemory
from fastdean.models.available_memory import available_memory
from fastdean.models.distributed import Ranks
from fastdean.wording.log import logger
from fastdean.wording.mendable import InputTypeError

ORDERS = ("auto", "batches", "layers")
# Where states may be, besides a folder.
PLACES = ("auto", "device", "host")
# Where somebody may want the states, in other words than ours.
_NO_FOLDERS = frozenset(("cpu", "cuda", "disk", "files", "gpu", "memory", "ram"))


@dataclass(frozen=True)
class Order:
    """The order of a job, and why.

    Attributes:
        by_layers: all batches through one layer before the next.
        why: in words, for the log and the manifest.
    """

    by_layers: bool
    why: str

    @property
    def name(self) -> str:
        return "layers" if self.by_layers else "batches"

    def described(self, states: Mapping[str, int] | None) -> dict[str, Any]:
        """For the manifest; `states`: the most bytes of states at a time, by where they were."""
        kept = {} if states is None else {"states": dict(states)}
        return {"by": self.name, "why": self.why, **kept}


def require_order(
    order: str, states: str | Path, states_budget: int | None, resume: str | Path | None
) -> None:
    """ValueError or TypeError unless `score` can take these."""
    if order not in ORDERS:
        raise ValueError(f"order must be one of {', '.join(ORDERS)}, got {order!r}")
    if not isinstance(states, str | os.PathLike):
        raise InputTypeError(
            f"states must be 'auto', 'device', 'host' or a folder, got {type(states).__name__}"
        )
    is_folder = states not in PLACES
    if is_folder:
        _require_folder("states", states, "'auto', 'device', 'host' or a folder")
    if states_budget is not None:
        if not isinstance(states_budget, int) or isinstance(states_budget, bool):
            raise InputTypeError(
                f"states_budget must be a number of bytes, got {type(states_budget).__name__}"
            )
        if states_budget < 0:
            raise ValueError(f"states_budget must be at least 0 bytes, got {states_budget}")
    if resume is not None:
        if not isinstance(resume, str | os.PathLike):
            raise InputTypeError(f"resume must be a folder, got {type(resume).__name__}")
        _require_folder("resume", resume, "a folder")
        if states != "auto":
            raise ValueError(
                f"states must be left out with resume, whose folder holds them, got {str(states)!r}"
            )
    if order == "batches":
        for name, given in (
            ("states", None if states in ("auto", "device") or is_folder else states),
            ("states_budget", states_budget),
            ("resume", resume),
        ):
            if given is not None:
                raise ValueError(
                    f"{name} must be left out with order='batches', which keeps none, got "
                    f"{str(given)!r}; use order='layers'"
                )


def _require_folder(name: str, path: str | Path, expected: str) -> None:
    folder = Path(path).expanduser()
    plain = str(path)
    if plain == "" or plain in _NO_FOLDERS or (folder.exists() and not folder.is_dir()):
        raise ValueError(
            f"{name} must be {expected}, got {plain!r}; write ./NAME for a folder of such a name"
        )


def require_streamable(order: str, keep_top: float | None, granularity: str) -> None:
    """ValueError unless a model whose weights stay in files can be scored like this."""
    if order == "batches":
        raise ValueError(
            "order must be 'layers' or 'auto' for a streamed model, got 'batches'; leave it out, "
            "or load the model first"
        )
    if keep_top is None and granularity == "weight":
        raise ValueError(
            "keep_top must be given for a streamed model, whose weights are gone when its scores "
            "are read, got None; pass keep_top=1e-3"
        )


def require_shardable(
    order: str, resume: str | Path | None, keep_top: float | None, granularity: str
) -> None:
    """ValueError unless a model whose weights are sharded over ranks can be scored like this."""
    if order == "batches":
        raise ValueError(
            "order must be 'layers' or 'auto' for a model sharded over ranks (FSDP2), got "
            "'batches'; leave it out, or load the model whole on every rank"
        )
    if resume is not None and keep_top is None and granularity == "weight":
        raise ValueError(
            "keep_top must be given with resume for a model sharded over ranks (FSDP2), whose "
            "weights are gone when a job goes on, got None; pass keep_top=1e-3"
        )


def require_room_for_dense(
    order: str,
    dense: int,
    keep_top: float | None,
    memory_budget: int | None,
    device: torch.device,
) -> None:
    """Without `keep_top` the sums of all targets are kept until the end, in whatever order.

    Args:
        dense: bytes of the sums of all targets, of all data sets.
    Raises:
        ValueError: "layers" is asked for, or "auto", and there is no room for them.
    """
    if keep_top is not None or order == "batches":
        return
    rooms = [_room_for_dense("layers", memory_budget, device)]
    if order == "auto":
        rooms.append(_room_for_dense("batches", memory_budget, device))
    known = [room for room in rooms if room is not None]
    if len(known) < len(rooms) or dense <= max(known):
        return
    raise ValueError(
        f"keep_top must be given with order={order!r} where the sums of all targets do not fit "
        f"into memory, got None with {dense:,} bytes of sums and room for {max(known):,}; pass "
        "keep_top=1e-3, which keeps each matrix's top 0.1 %"
    )


def _room_for_dense(by: str, memory_budget: int | None, device: torch.device) -> int | None:
    """Bytes that dense sums may take in an order; None where the system does not say."""
    if memory_budget is None:
        return available_memory(device)
    # Under a budget they go to the CPU as soon as they are complete.
    if by == "layers" and device.type == "cpu":
        return memory_budget
    return available_memory(torch.device("cpu"))


def order_in_teams(
    order: str, resume: str | Path | None, keep_top: float | None, granularity: str
) -> str:
    """The order of a job on a model that tensor parallel splits.

    "auto" is batch by batch, and layer by layer where the job may be resumed.

    Raises:
        ValueError: dense scores of weights are to be resumed.
    """
    if resume is not None and keep_top is None and granularity == "weight":
        raise ValueError(
            "keep_top must be given with resume for a model that tensor parallel splits over "
            "ranks, of whose weights no rank has all, got None; pass keep_top=1e-3"
        )
    if order != "auto":
        return order
    return "batches" if resume is None else "layers"


def choose_order(
    order: str,
    sets: Sequence[Scorable],
    granularity: str,
    keep_top: float | None,
    memory_budget: int | None,
    windows: WindowMemory,
    device: torch.device,
    ranks: Ranks,
    signs: bool = False,
    sums_at_a_time: int = 1,
) -> Order:
    """What `order` asks for; "auto" decides by memory, the same on all ranks.

    Args:
        sets: the data sets, scored one after the other batch by batch.
        memory_budget: bytes that the sums may take at a time, or None.
        windows: what each window holds beside its sums.
        signs: whether sums are kept with their signs too.
        sums_at_a_time: how many sums of a target live at a time.
    Raises:
        ValueError: "layers" is asked for, and `memory_budget` does not hold a window.
    """
    if order == "batches":
        return Order(False, "as asked for")
    least = max(
        windows.least(
            scorable.targets, together_bytes(scorable.holding, granularity, signs, sums_at_a_time)
        )
        for scorable in sets
    )
    too_small = memory_budget is not None and memory_budget < least
    if order == "layers":
        if too_small:
            raise ValueError(
                f"memory_budget must be at least {least:,} with order='layers', for the sums of "
                f"one matrix and what its window holds of a batch of {windows.rows.batch:,} "
                f"tokens, got {memory_budget:,}; raise it, lower tokens_per_batch or leave it out"
            )
        return Order(True, "as asked for")
    if too_small:
        return Order(False, f"memory_budget is less than the {_gb(least)} that a window takes")
    all_sums = all_sums_bytes(granularity, signs, sums_at_a_time)
    if memory_budget is not None and any(
        all_sums([target]) > memory_budget for scorable in sets for target in scorable.targets
    ):
        return Order(True, "memory_budget holds what windows keep in place of sums, and no sums")
    with ranks.failing_together():
        chosen = _by_memory(
            windows, sets, granularity, keep_top, memory_budget, device, signs, sums_at_a_time
        )
    if ranks.agree(chosen.by_layers) != chosen.by_layers:
        chosen = Order(not chosen.by_layers, "as the first rank goes")
    if ranks.first:
        logger.info("order=%r: %s", chosen.name, chosen.why)
    return chosen


def _by_memory(
    windows: WindowMemory,
    sets: Sequence[Scorable],
    granularity: str,
    keep_top: float | None,
    memory_budget: int | None,
    device: torch.device,
    signs: bool,
    sums_at_a_time: int,
) -> Order:
    of_sets = [all_sums_bytes(granularity, signs)(scorable.targets) for scorable in sets]
    if keep_top is None:
        room = _room_for_dense("layers", memory_budget, device)
        if room is not None and sum(of_sets) > room:
            return Order(
                False, f"keep_top is None, and {_gb(sum(of_sets))} of sums do not fit by layers"
            )
    if windows.model.offloaded:
        return Order(True, "some weights are offloaded, and a layer's are brought in once")
    free = available_memory(device)
    if free is None:
        return Order(False, "the system does not say how much memory there is")
    # One data set after the other; without keep_top the sums of the earlier ones stay.
    sums = max(of_sets) if keep_top is not None else sum(of_sets)
    sums += (sums_at_a_time - 1) * max(of_sets)
    if memory_budget is not None:
        sums = min(sums, memory_budget)
    batch = windows.model.batch(windows.rows)
    said = f"{_gb(sums)} of sums and {_gb(batch)} for a batch"
    if sums + (1 + ALLOCATOR) * batch > free:
        return Order(True, f"{said} do not fit into {_gb(free)} of memory")
    return Order(False, f"{said} fit into {_gb(free)} of memory")


def reserved_bytes(
    windows: WindowMemory,
    sets: Sequence[Scorable],
    granularity: str,
    memory_budget: int | None,
    dense: bool,
    signs: bool = False,
    sums_at_a_time: int = 1,
) -> int:
    """What a job layer by layer takes of memory at a time, besides what layers return.

    Of weights only those that are offloaded count, which come in: the next layer's too.

    Args:
        dense: whether all sums are kept to the end.
        signs: whether they are kept with their signs too.
        sums_at_a_time: how many sums of a target live at a time.
    """
    by_layer, every = sums_by_layer(sets, granularity, signs)
    sums = {k: sums_at_a_time * size for k, size in by_layer.items()}
    if memory_budget is not None:
        sums = {k: min(size, memory_budget) for k, size in sums.items()}
    model = windows.model
    held = [sums.get(k, 0) + windows.held(k) for k in (None, *range(len(model.layers)))]
    weights = 2 * max((layer.offloaded for layer in model.layers), default=0)
    return max(held) + (every if dense else 0) + int(MARGIN * weights)


def sums_by_layer(
    sets: Iterable[Scorable], granularity: str, signs: bool = False
) -> tuple[dict[int | None, int], int]:
    """Bytes of the sums of one layer, by its position, and of all sums of all sets.

    In a window the sums of one data set live at a time.
    """
    most: Counter[int | None] = Counter()
    every = 0
    for scorable in sets:
        of_set: Counter[int | None] = Counter()
        for target in scorable.targets:
            of_set[target.layer_index] += sums_bytes(target, granularity, signs)
        every += sum(of_set.values())
        most |= of_set
    return dict(most), every


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
