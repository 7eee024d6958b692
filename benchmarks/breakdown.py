"""Where the time of a run goes, by kind of operation.

Grouped by the name of the torch operation, so a kind is what it says plus what looks like it: "abs
+ add" also holds the model's residual additions, and an unfused attention's softmax counts under
"softmax + loss". What no operation accounts for (Python, the autograd engine, the profiler itself)
is "outside operations". The profiler slows a run of many small operations down: read shares from
here, never seconds.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from timing import synchronize

GROUPS = {
    "attention": r"attention|flash|aten::(bmm|baddbmm)$",
    "matmul": r"aten::(mm|addmm|matmul|linear)$",
    "softmax + loss": r"softmax|nll_loss|cross_entropy|logsumexp",
    "abs + add": r"aten::(abs|add)_?$",
    "copies + casts": r"aten::(copy_|_to_copy|to|clone|contiguous|cat|index_select|zero_|fill_)$",
}
OTHER = "other operations"
OUTSIDE = "outside operations"


def group_of(operation: str) -> str:
    """The group of a torch operation, such as "aten::mm"; the first that fits."""
    return next((group for group, names in GROUPS.items() if re.search(names, operation)), OTHER)


def profile(call: Callable[[], Any], device: torch.device) -> dict[str, float]:
    """Run once under torch's profiler; group -> share of the wall time, largest first."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
        start = time.perf_counter()
        call()
        synchronize(device)
        wall = time.perf_counter() - start
    attribute = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    # Kernels are listed beside the operations that launched them: counting both would count twice.
    operations = (
        e for e in profiler.key_averages() if e.device_type == torch.autograd.DeviceType.CPU
    )
    return shares(((e.key, getattr(e, attribute) / 1e6) for e in operations), wall)


def shares(operations: Iterable[tuple[str, float]], wall: float) -> dict[str, float]:
    """(operation, its own seconds) -> group -> share of `wall` seconds, largest first."""
    seconds = dict.fromkeys([*GROUPS, OTHER], 0.0)
    for name, own in operations:
        seconds[group_of(name)] += own
    seconds[OUTSIDE] = max(0.0, wall - sum(seconds.values()))
    total = sum(seconds.values())
    return {group: s / total for group, s in sorted(seconds.items(), key=lambda item: -item[1])}


def render(breakdown: dict[str, float]) -> str:
    width = max(map(len, breakdown))
    return "\n".join(f"  {group:<{width}}  {share:6.1%}" for group, share in breakdown.items())
