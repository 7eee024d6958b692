"""What runs in a call, by torch's profiler: pieces of work, and the share of each kind.

On a CUDA device seconds are those of kernels and copies themselves, without the gaps between two
launches, and what is left of a run is "device idle"; work on two streams at a time counts twice.
On a CPU they are those of torch's operations, and what is left (Python, the autograd engine, the
profiler itself) is "outside operations". A kind is a name of torch operations: "abs + add" also
holds the model's residual additions. fastdean's own kernels are known by their names. The profiler
slows a run of many small operations down: read shares from here, never seconds.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent

from benchmarks.harness.clock import elapsed

GROUPS = {
    "attention": r"attention|flash|aten::(bmm|baddbmm)$",
    "matmul": r"aten::(mm|addmm|matmul|linear)$",
    "softmax + loss": r"softmax|nll_loss|cross_entropy|logsumexp",
    "abs + add": r"aten::(abs|add)_?$",
    "copies + casts": (
        r"aten::(copy_|_to_copy|to|clone|contiguous|cat|index_select|zero_|fill_)$|^Mem(cpy|set)"
    ),
}
KERNEL_GROUPS = {
    "importance kernel": r"^_importance_kernel",
    "unit kernels": r"^_unit_\w+_kernel",
    "selection kernels": r"^_(maxima|narrow|count|gather|finish|tally|emit)_kernel",
    "fused kernels": r"^_(tiles|signed)_kernel",
}
OTHER = "other operations"
OUTSIDE = "outside operations"
IDLE = "device idle"


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


def group_of(launch: Launch) -> str:
    """The group of fastdean's kernels that it is one of, else that of its operation."""
    ours = _first_fitting(KERNEL_GROUPS, launch.kernel)
    return ours or _first_fitting(GROUPS, launch.operation or launch.kernel) or OTHER


def _first_fitting(groups: dict[str, str], name: str) -> str:
    return next((group for group, names in groups.items() if re.search(names, name)), "")


def shares_of(call: Callable[[], Any], device: torch.device) -> dict[str, float] | None:
    """Run once under torch's profiler; group -> share of the wall time, largest first.

    None on a CUDA device whose kernels the profiler does not see.
    """
    events, wall = profiled(call, device)
    if device.type == "cuda":
        launched = launches(events)
        return shares(launched, wall, IDLE) if launched else None
    operations = (event for event in events if event.device_type == DeviceType.CPU)
    launched = [Launch(each.key, "", each.self_cpu_time_total / 1e6) for each in operations]
    return shares(launched, wall, OUTSIDE)


def shares(spent: Iterable[Launch], wall: float, rest: str) -> dict[str, float]:
    """Group -> share of `wall` seconds, largest first; `rest`: what the remainder is called."""
    groups = (*(KERNEL_GROUPS if rest == IDLE else ()), *GROUPS, OTHER)
    seconds = dict.fromkeys(groups, 0.0)
    for launch in spent:
        seconds[group_of(launch)] += launch.seconds
    seconds[rest] = max(0.0, wall - sum(seconds.values()))
    total = sum(seconds.values())
    return {group: s / total for group, s in sorted(seconds.items(), key=lambda item: -item[1])}
