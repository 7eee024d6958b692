"""Where the time of a run goes, by kind of operation.

On a CPU the time is that of torch's operations themselves, and what none of them accounts for
(Python, the autograd engine, the profiler itself) is "outside operations". On CUDA it is that of
what ran on the device, and the rest is "device idle": launches that the host was late with, which
the profiler makes more of.

Grouped by the name of the torch operation, so a kind is what it says plus what looks like it: "abs
+ add" also holds the model's residual additions, and an unfused attention's softmax counts under
"softmax + loss". fastdean's own kernels are known by their names. The profiler slows a run of many
small operations down: read shares from here, never seconds.
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


def group_of(operation: str) -> str:
    """The group of a torch operation, such as "aten::mm"; the first that fits."""
    return _first_fitting(GROUPS, operation)


def group_of_launch(launch: Launch) -> str:
    """The group of fastdean's kernels that it is one of, else that of its operation."""
    ours = _first_fitting(KERNEL_GROUPS, launch.kernel)
    return group_of(launch.operation or launch.kernel) if ours == OTHER else ours


def _first_fitting(groups: dict[str, str], name: str) -> str:
    return next((group for group, names in groups.items() if re.search(names, name)), OTHER)


def profile(call: Callable[[], Any], device: torch.device) -> dict[str, float] | None:
    """Run once under torch's profiler; group -> share of the wall time, largest first.

    None on a CUDA device whose kernels the profiler does not see.
    """
    events, wall = profiled(call, device)
    if device.type == "cuda":
        launched = launches(events)
        return device_shares(launched, wall) if launched else None
    operations = (event for event in events if event.device_type == DeviceType.CPU)
    return shares(((event.key, event.self_cpu_time_total / 1e6) for event in operations), wall)


def shares(operations: Iterable[tuple[str, float]], wall: float) -> dict[str, float]:
    """(operation, its own seconds) -> group -> share of `wall` seconds, largest first."""
    spent = ((group_of(name), own) for name, own in operations)
    return _shares(spent, GROUPS, wall, OUTSIDE)


def device_shares(launched: Iterable[Launch], wall: float) -> dict[str, float]:
    """Group -> share of `wall` seconds, largest first."""
    spent = ((group_of_launch(launch), launch.seconds) for launch in launched)
    return _shares(spent, (*KERNEL_GROUPS, *GROUPS), wall, IDLE)


def _shares(
    spent: Iterable[tuple[str, float]], groups: Iterable[str], wall: float, rest: str
) -> dict[str, float]:
    seconds = dict.fromkeys([*groups, OTHER], 0.0)
    for group, own in spent:
        seconds[group] += own
    seconds[rest] = max(0.0, wall - sum(seconds.values()))
    total = sum(seconds.values())
    return {group: s / total for group, s in sorted(seconds.items(), key=lambda item: -item[1])}
