"""Seconds of one call, also where it is so short that the clock itself matters.

On CUDA device events stand around replays of a graph that holds one call for every set of inputs:
no gap between launches, and no set still in the cache from the call before. What cannot be
captured runs between events as it is, gaps included. On a CPU the host's clock stands around the
same round of calls.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastdean.kernels import on_device

MIN_ROUNDS, MAX_ROUNDS = 5, 100
_WARM_UP_ROUNDS = 2
GRAPH, EVENTS, HOST = "graph replays", "events", "host clock"


@dataclass(frozen=True)
class Spread:
    """Median, 20th and 80th percentile."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        points = torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)
        return cls(*torch.tensor(values, dtype=torch.float64).quantile(points).tolist())

    @classmethod
    def of_ratios(cls, values: Sequence[float], others: Sequence[float]) -> Spread:
        """Of `value / other`, pair by pair: what took turns shared the machine's state."""
        return cls.of([value / other for value, other in zip(values, others, strict=True)])

    def record(self) -> dict[str, float]:
        """As the field `seconds` of a record."""
        return {"median_s": self.median, "p20_s": self.p20, "p80_s": self.p80}


@dataclass(frozen=True)
class Timing:
    """Seconds of one call over `rounds` rounds, each the mean of its calls; the fastest round's."""

    seconds: Spread
    fastest: float
    rounds: int
    timed_by: str


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def elapsed(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call, with everything it started on the device finished."""
    synchronize(device)
    start = time.perf_counter()
    result = call()
    synchronize(device)
    seconds = time.perf_counter() - start
    del result
    return seconds


def time_calls(
    calls: Sequence[Callable[[], Any]],
    device: torch.device,
    *,
    seconds: float,
    capturable: bool = True,
) -> Timing:
    """Time a round of `calls`, one for each set of inputs, for about `seconds` in all.

    Args:
        seconds: what the rounds are to take together; there are at least `MIN_ROUNDS` of them.
        capturable: whether a CUDA graph may be tried.
    """

    def launch() -> None:
        for call in calls:
            call()

    # Events and the graph's streams belong to the current device, which need not be this one.
    with on_device(device):
        for _ in range(_WARM_UP_ROUNDS):
            launch()
        synchronize(device)
        clock, timed_by = _host_clock, HOST
        if device.type == "cuda":
            clock, timed_by = _device_events, EVENTS
            graph = _captured(launch, device) if capturable else None
            if graph is not None:
                launch, timed_by = graph.replay, GRAPH
        estimate = max(min(clock(launch, 2)), 1e-9)
        rounds = min(MAX_ROUNDS, max(MIN_ROUNDS, int(seconds / estimate)))
        each = [elapsed / len(calls) for elapsed in clock(launch, rounds)]
    return Timing(Spread.of(each), min(each), rounds, timed_by)


def _host_clock(launch: Callable[[], Any], rounds: int) -> list[float]:
    ticks = [time.perf_counter()]
    for _ in range(rounds):
        launch()
        ticks.append(time.perf_counter())
    return [end - start for start, end in zip(ticks, ticks[1:], strict=False)]


def _device_events(launch: Callable[[], Any], rounds: int) -> list[float]:
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
    for start, end in events:
        start.record()
        launch()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in events]


def _captured(launch: Callable[[], Any], device: torch.device) -> torch.cuda.CUDAGraph | None:
    """One round as a graph; None where it cannot be captured."""
    if _waits_for_the_device(launch):
        return None
    gc.collect()  # freeing memory of the device while it is captured would end the capture
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    try:
        # Not torch.cuda.graph(): after a failure it would leave its own stream current.
        with torch.cuda.stream(stream):
            graph.capture_begin(pool=pool)
            try:
                launch()
            finally:
                graph.capture_end()
    except RuntimeError:
        torch.cuda.synchronize(device)
        index = torch.cuda.current_device() if device.index is None else device.index
        # What is left open of the pool lets every call of `empty_cache` raise.
        for end in (torch._C._cuda_endAllocateToPool, torch._C._cuda_releasePool):
            with contextlib.suppress(RuntimeError):
                end(index, pool)
        return None
    torch.cuda.current_stream(device).wait_stream(stream)
    return graph


def _waits_for_the_device(launch: Callable[[], Any]) -> bool:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        launch()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return False
