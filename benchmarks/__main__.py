"""Measure fastdean: `python -m benchmarks RUN`, from the root of a checkout.

All runs pass the tests of what they measure first, and measure nothing when one fails. `table` and,
of whole runs, `plot` show what they have recorded:

    python -m benchmarks kernels --op mask
    python -m benchmarks table --op mask --into docs/performance.md
    python -m benchmarks plot --op sweep --out sweep.png

`python -m benchmarks RUN --help` says what a run measures and takes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from benchmarks import patch, regularizer
from benchmarks.harness import command
from benchmarks.ops import run as kernels
from benchmarks.ops.table import operation_table
from benchmarks.score import agreement, growth, mixture, orders, streamed, sweep
from benchmarks.score import run as score

_WITH_A_TABLE = {
    "score": score,
    "sweep": sweep,
    "orders": orders,
    "growth": growth,
    "streamed": streamed,
    "mixture": mixture,
    "agreement": agreement,
    "patch": patch,
    "regularizer": regularizer,
}
BENCHMARKS = _WITH_A_TABLE | {"kernels": kernels}
# By the operation that the results file is named after.
TABLES = {name: module.TABLE for name, module in _WITH_A_TABLE.items()}
TABLES |= {op: operation_table(op) for op in kernels.OPERATIONS}
PICTURES = {"score": score.picture, "sweep": sweep.picture, "growth": growth.picture}


def main(argv: Sequence[str] | None = None) -> int:
    return command.main("-m benchmarks", __doc__, BENCHMARKS, TABLES, PICTURES, argv)


if __name__ == "__main__":
    sys.exit(main())
