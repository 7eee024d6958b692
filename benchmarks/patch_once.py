"""One `patch_checkpoint` in a process of its own.

`python -m benchmarks.patch_once SOURCE MASK OUT` prints the fields of a `Sample` as a JSON object.
Seconds and `peak_bytes` are those of the call alone; `process_peak_bytes` also holds the
interpreter, the imports and the mask.
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
    peaks, held = [memory.peak_bytes()], memory.Held()
    start = time.perf_counter()
    patch(source, mask, out)
    seconds = time.perf_counter() - start
    peaks.append(memory.peak_bytes())
    peak = None if None in peaks else max(peaks)
    found = {"seconds": seconds, "process_peak_bytes": peak, "peak_bytes": held.added_bytes()}
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
