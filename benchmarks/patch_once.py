"""One `patch_checkpoint`, for a process of its own that imports nothing else.

Seconds and `peak_bytes` are those of the call alone; `process_peak_bytes` also holds the
interpreter, the imports and the mask.
"""

from __future__ import annotations

import time
from typing import Any

import fastdean
from benchmarks.harness import memory


def patched(source: str, mask_folder: str, out: str) -> dict[str, Any]:
    """The fields of a `Sample`."""
    mask = fastdean.NeuronMask.from_pretrained(mask_folder)
    # Named here because the package imports the function's module on first use.
    patch = fastdean.patch_checkpoint
    peaks, held = [memory.peak_bytes()], memory.Held()
    start = time.perf_counter()
    patch(source, mask, out)
    seconds = time.perf_counter() - start
    peaks.append(memory.peak_bytes())
    peak = None if None in peaks else max(peaks)
    return {"seconds": seconds, "process_peak_bytes": peak, "peak_bytes": held.added_bytes()}
