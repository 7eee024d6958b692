"""One `patch_checkpoint` in a process of its own.

`python -m benchmarks.patch.once SOURCE MASK OUT` prints the fields of a `Sample` as a JSON object.
Seconds are those of the call alone, without the interpreter's start, the imports and reading the
mask. `process_peak_bytes` holds all of those,
`peak_bytes` what was held during the call above what was held just before. Besides the package it
imports nothing that takes memory.
"""

from __future__ import annotations

import json
import sys
import time

import fastdean
from benchmarks.harness import memory


def main(source: str, mask_folder: str, out: str) -> None:
    mask = fastdean.NeuronMask.from_pretrained(mask_folder)
    # Named here because the package imports the function's module on first use.
    patch = fastdean.patch_checkpoint
    peak_so_far = memory.peak_bytes()
    held = memory.Held()
    start = time.perf_counter()
    patch(source, mask, out)
    seconds = time.perf_counter() - start
    peak = memory.peak_bytes()
    measured = {
        "seconds": seconds,
        "process_peak_bytes": None if peak is None else max(peak, peak_so_far),
        "peak_bytes": held.added_bytes(),
    }
    print(json.dumps(measured))


if __name__ == "__main__":
    main(*sys.argv[1:])
