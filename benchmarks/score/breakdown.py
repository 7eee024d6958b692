"""Where the time of a run goes, by kind of operation.

On a CPU the time is that of torch's operations themselves, and the rest (Python, the autograd
engine, the profiler itself) is "outside operations". On CUDA it is that of what ran on the device,
and the rest is "device idle". A kind is a name of torch operations: "abs + add" also holds the
model's residual additions. fastdean's own kernels are known by their names. The profiler slows a
run of many small operations down: read shares from here, never seconds.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.autograd import DeviceType

from benchmarks.harness.profile import Launch, launches, profiled

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
}
OTHER = "other operations"
OUTSIDE = "outside operations"
IDLE = "device idle"


def group_of(launch: Launch) -> str:
    """The group of fastdean's kernels that it is one of, else that of its operation."""
    ours = _first_fitting(KERNEL_GROUPS, launch.kernel)
    return ours or _first_fitting(GROUPS, launch.operation or launch.kernel) or OTHER


def _first_fitting(groups: dict[str, str], name: str) -> str:
    return next((group for group, names in groups.items() if re.search(names, name)), "")


def profile(call: Callable[[], Any], device: torch.device) -> dict[str, float] | None:
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
