"""One `patch_checkpoint` in a process of its own: `python patch_once.py SOURCE MASK OUT`.

Prints a JSON object: `seconds` of the call alone, without the interpreter's start, the imports and
reading the mask; `process_peak_bytes`, the most this process ever held, all of those included;
`peak_bytes`, the most it held during the call above what it held just before. Bytes are null where
the system does not count them. Besides the package it imports nothing that takes memory.
"""

from __future__ import annotations

import json
import sys
import time

import resident

import fastdean


def main(source: str, mask_folder: str, out: str) -> None:
    mask = fastdean.NeuronMask.from_pretrained(mask_folder)
    # Named here because the package imports the function's module on first use.
    patch = fastdean.patch_checkpoint
    peak_so_far = resident.peak_bytes()
    held = resident.forget_peak()
    start = time.perf_counter()
    patch(source, mask, out)
    seconds = time.perf_counter() - start
    peak = resident.peak_bytes()
    measured = {
        "seconds": seconds,
        "process_peak_bytes": None if peak is None else max(peak, peak_so_far),
        "peak_bytes": None if peak is None or held is None else max(0, peak - held),
    }
    print(json.dumps(measured))


if __name__ == "__main__":
    main(*sys.argv[1:])
