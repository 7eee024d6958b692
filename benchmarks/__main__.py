"""Measure fastdean: `python -m benchmarks RUN`, where RUN is one of these.

`kernels` times each operation by itself at the shapes of Qwen2-7B, against plain torch and a floor.
`score` times several ways to the same sums, taking turns in one process: `published`, the released
procedure on a few layers, extrapolated to all; `loop`, the best plain loop; `vmap`, that is
`torch.func.vmap` of `grad`, with --vmap and where memory allows; and `fastdean`.
`sweep` shows how `fastdean.score` grows with tokens, examples, model and number of scored weights.
`agreement` counts how much of the fp32 selection survives in bf16, and whether `fastdean.score`
selects what the plain loop does.
`patch` times `fastdean.patch_checkpoint` on a checkpoint of random values against `cp` of its
files, and counts its memory.
`regularizer` times training steps with and without the collapse regulariser, and
`collapse_metrics` against its forward passes.

All run the tests of what they measure first, and measure nothing when one fails. `table` and `plot`
show what they have recorded:

    python -m benchmarks table --op score --into docs/performance.md
    python -m benchmarks plot --op sweep --out sweep.png
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
