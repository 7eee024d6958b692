"""What runs on a CUDA device, by torch's profiler: names and seconds of kernels and copies.

Seconds are those of the work itself, without the gaps between two launches; work on two streams at
a time counts twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent

from benchmarks.harness.clock import elapsed


class Launch(NamedTuple):
    """One piece of work on the device, or several of one name.

    Attributes:
        operation: the torch operation that started it; "" if none did, or nobody can tell.
        kernel: its name, or what kind of copy it is.
    """

    operation: str
    kernel: str
    seconds: float


def profiled(call: Callable[[], Any], device: torch.device) -> tuple[list[FunctionEvent], float]:
    """(what torch's profiler saw of one call, its wall seconds), all that it started finished."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
        wall = elapsed(call, device)
    return list(profiler.events()), wall


def launches(events: Sequence[FunctionEvent]) -> list[Launch]:
    """Everything that ran on the device, each piece once; empty where the profiler cannot see it.

    A kernel that torch did not launch, such as Triton's, may be listed under whatever operation
    happened to run, or under none: its name is what tells.
    """
    # Marked ranges are listed among the device's events, on top of the kernels that they span.
    ranges = {event.name for event in events if event.is_user_annotation}
    started = [
        Launch(event.name, kernel.name, kernel.duration / 1e6)
        for event in events
        # Legacy: without access to the device's clock, spans of nested operations.
        if event.device_type == DeviceType.CPU and not event.is_legacy
        for kernel in event.kernels
        if kernel.name not in ranges
    ]
    left: Counter[str] = Counter()
    for event in events:
        if event.device_type == DeviceType.CUDA and event.name not in ranges:
            left[event.name] += event.time_range.elapsed_us() / 1e6
    for launch in started:
        left[launch.kernel] -= launch.seconds
    # Differences of sums: what is less than a nanosecond is rounding.
    return started + [Launch("", name, each) for name, each in left.items() if each > 1e-9]


def device_seconds(call: Callable[[], Any], device: torch.device) -> float | None:
    """What the device is busy for in one call; None where the profiler cannot tell or fails."""
    try:
        events, _ = profiled(call, device)
    except RuntimeError:
        return None
    return sum(launch.seconds for launch in launches(events)) or None
