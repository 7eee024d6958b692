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

import benchmarks.ops.run as ops
import benchmarks.ops.table as ops_table
import benchmarks.score.run as score
from benchmarks import patch, regularizer
from benchmarks.harness import command
from benchmarks.harness.command import Benchmark
from benchmarks.score import agreement, subject, sweep

BENCHMARKS = {
    "score": Benchmark(
        "time several ways to the same scores",
        score.add_options,
        score.run,
        score.tests,
        tables={"score": score.TABLE},
        pictures={"score": score.picture},
    ),
    "kernels": Benchmark(
        "time every operation by itself",
        ops.add_options,
        ops.run,
        ops.tests,
        ops.require_measurable,
        tables={op: ops_table.operation_table(op) for op in ops.OPERATIONS},
        pictures=dict.fromkeys(ops.OPERATIONS, ops_table.picture),
    ),
    "sweep": Benchmark(
        "how the time of fastdean.score grows",
        sweep.add_options,
        sweep.run,
        score.tests,
        tables={"sweep": sweep.TABLE},
        pictures={"sweep": sweep.picture},
    ),
    "agreement": Benchmark(
        "bf16 against fp32, fastdean against the loop",
        subject.add_options,
        agreement.run,
        score.tests_of_agreement,
        tables={"agreement": agreement.TABLE},
    ),
    "patch": Benchmark(
        "time patch_checkpoint against cp of the same files",
        patch.add_options,
        patch.run,
        patch.tests,
        patch.require_room,
        tables={"patch": patch.TABLE},
    ),
    "regularizer": Benchmark(
        "time training steps with and without the collapse regulariser",
        regularizer.add_options,
        regularizer.run,
        regularizer.tests,
        tables={"regularizer": regularizer.TABLE},
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    return command.main("-m benchmarks", __doc__, BENCHMARKS, argv)


if __name__ == "__main__":
    sys.exit(main())
