"""Whether `score()` goes batch by batch or layer by layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastdean.coupling.asked import Asked
from fastdean.coupling.layers.needed_memory import ALLOCATOR
from fastdean.coupling.layers.window_memory import MARGIN, WindowMemory
from fastdean.coupling.resuming.resumable import holds_job
from fastdean.coupling.sums.accumulators import sums_bytes
from fastdean.coupling.workloads.scorable import Scorable
from fastdean.models.available_memory import available_memory
from fastdean.models.ranks.distributed import Ranks
from fastdean.wording.log import logger


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


def require_room_for_dense(asked: Asked, dense: int, device: torch.device) -> None:
    """Without `keep_top` the sums of all targets are kept until the end, in whatever order.

    Args:
        dense: bytes of the sums of all targets, of all data sets.
    Raises:
        ValueError: "layers" is asked for, or "auto", and there is no room for them.
    """
    if asked.keep_top is not None or asked.order == "batches":
        return
    rooms = [_room_for_dense("layers", asked.memory_budget, device)]
    if asked.order == "auto":
        rooms.append(_room_for_dense("batches", asked.memory_budget, device))
    known = [room for room in rooms if room is not None]
    if len(known) < len(rooms) or dense <= max(known):
        return
    raise ValueError(
        f"keep_top must be given with order={asked.order!r} where the sums of all targets do not "
        f"fit into memory, got None with {dense:,} bytes of sums and room for {max(known):,}; pass "
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


def choose_order(
    asked: Asked,
    only: Order | None,
    sets: Sequence[Scorable],
    windows: WindowMemory,
    device: torch.device,
    ranks: Ranks,
) -> Order:
    """The order that is asked for; "auto" decides by memory, the same on all ranks.

    Args:
        only: by layers, for a model that has no other order.
        sets: the data sets, scored one after the other batch by batch.
        windows: what each window holds beside its sums.
    Raises:
        ValueError: "layers" is asked for, and `memory_budget` does not hold a window.
    """
    order = "layers" if only is not None else asked.order
    if order == "auto" and asked.resume is not None and ranks.agree(holds_job(asked.resume)):
        order = "layers"
    if order == "batches":
        return Order(False, "as asked for")
    budget = asked.memory_budget
    least = max(
        windows.least(scorable.targets, asked.together_bytes(scorable.holding, ranks))
        for scorable in sets
    )
    too_small = budget is not None and budget < least
    if order == "layers":
        if too_small:
            raise ValueError(
                f"memory_budget must be at least {least:,} with order='layers', for the sums of "
                f"one matrix and what its window holds of a batch of {windows.rows.batch:,} "
                f"tokens, got {budget:,}; raise it, lower tokens_per_batch or leave it out"
            )
        return only or Order(True, "as asked for")
    if too_small:
        return Order(False, f"memory_budget is less than the {_gb(least)} that a window takes")
    all_sums = asked.sums_bytes(ranks)
    if budget is not None and any(
        all_sums([target]) > budget for scorable in sets for target in scorable.targets
    ):
        return Order(True, "memory_budget holds what windows keep in place of sums, and no sums")
    with ranks.failing_together():
        chosen = _by_memory(asked, sets, windows, device, asked.sums_at_a_time(ranks))
    if ranks.agree(chosen.by_layers) != chosen.by_layers:
        chosen = Order(not chosen.by_layers, "as the first rank goes")
    if ranks.first:
        logger.info("order=%r: %s", chosen.name, chosen.why)
    return chosen


def _by_memory(
    asked: Asked,
    sets: Sequence[Scorable],
    windows: WindowMemory,
    device: torch.device,
    sums_at_a_time: int,
) -> Order:
    of_sets = [asked.kept_bytes(scorable.targets) for scorable in sets]
    if asked.keep_top is None:
        room = _room_for_dense("layers", asked.memory_budget, device)
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
    sums = max(of_sets) if asked.keep_top is not None else sum(of_sets)
    sums += (sums_at_a_time - 1) * max(of_sets)
    if asked.memory_budget is not None:
        sums = min(sums, asked.memory_budget)
    batch = windows.model.batch(windows.rows)
    said = f"{_gb(sums)} of sums and {_gb(batch)} for a batch"
    if sums + (1 + ALLOCATOR) * batch > free:
        return Order(True, f"{said} do not fit into {_gb(free)} of memory")
    return Order(False, f"{said} fit into {_gb(free)} of memory")


def reserved_bytes(
    asked: Asked, sets: Sequence[Scorable], windows: WindowMemory, ranks: Ranks
) -> int:
    """What a job layer by layer takes of memory at a time, besides what layers return.

    Of weights only those that are offloaded count, which come in: the next layer's too.
    """
    by_layer, every = sums_by_layer(sets, asked.granularity, asked.signs)
    sums = {k: asked.sums_at_a_time(ranks) * size for k, size in by_layer.items()}
    if asked.memory_budget is not None:
        sums = {k: min(size, asked.memory_budget) for k, size in sums.items()}
    model = windows.model
    held = [sums.get(k, 0) + windows.held(k) for k in (None, *range(len(model.layers)))]
    weights = 2 * max((layer.offloaded for layer in model.layers), default=0)
    # Without keep_top all sums are kept to the end.
    return max(held) + (every if asked.keep_top is None else 0) + int(MARGIN * weights)


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
