"""Train a model with and without the collapse regulariser and with control words, over seeds.

`python -m experiments.debias run` measures collapse, fluency and bias of each arm after the tests
of what it takes. `python -m experiments.debias table --into docs/performance.md` shows what it has
recorded.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from benchmarks.harness import command
from experiments.debias import run, table

TABLES = {"debias": table.TABLE}


def main(argv: Sequence[str] | None = None) -> int:
    return command.main("-m experiments.debias", __doc__, {"run": run}, TABLES, {}, argv)


if __name__ == "__main__":
    sys.exit(main())
