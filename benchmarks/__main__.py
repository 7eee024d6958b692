"""Measure fastdean: `python -m benchmarks RUN`, from the root of a checkout.

All runs pass the tests of what they measure first, and measure nothing when one fails. `table` and
`plot` show what they have recorded:

    python -m benchmarks kernels --op mask
    python -m benchmarks table --op mask --into docs/performance.md
    python -m benchmarks plot --op mask --out mask.png

`python -m benchmarks RUN --help` says what a run measures and takes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from benchmarks import patch, regularizer
from benchmarks.harness import command
from benchmarks.harness.command import Benchmark
from benchmarks.ops import run as kernels
from benchmarks.ops import table as kernels_table
from benchmarks.score import agreement, growth, orders, streamed, sweep
from benchmarks.score import run as score

_KERNELS = {op: kernels_table.operation_table(op) for op in kernels.OPERATIONS}
BENCHMARKS = {
    "score": Benchmark(
        "time several ways to the same scores",
        score,
        {"score": score.TABLE},
        {"score": score.picture},
    ),
    "kernels": Benchmark(
        "time every operation by itself",
        kernels,
        _KERNELS,
        dict.fromkeys(_KERNELS, kernels_table.picture),
    ),
    "sweep": Benchmark(
        "how the time of fastdean.score grows",
        sweep,
        {"sweep": sweep.TABLE},
        {"sweep": sweep.picture},
    ),
    "orders": Benchmark(
        "batch by batch against layer by layer, resident and streamed: time and memory",
        orders,
        {"orders": orders.TABLE},
    ),
    "growth": Benchmark(
        "how time and memory of both orders grow, resident and streamed",
        growth,
        {"growth": growth.TABLE},
        {"growth": growth.picture},
    ),
    "streamed": Benchmark(
        "a checkpoint larger than the memory it is scored in",
        streamed,
        {"streamed": streamed.TABLE},
    ),
    "agreement": Benchmark(
        "bf16 against fp32, fastdean against the loop", agreement, {"agreement": agreement.TABLE}
    ),
    "patch": Benchmark(
        "time patch_checkpoint against cp of the same files", patch, {"patch": patch.TABLE}
    ),
    "regularizer": Benchmark(
        "time training steps with and without the collapse regulariser",
        regularizer,
        {"regularizer": regularizer.TABLE},
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    return command.main("-m benchmarks", __doc__, BENCHMARKS, argv)


if __name__ == "__main__":
    sys.exit(main())
