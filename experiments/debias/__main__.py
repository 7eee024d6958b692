"""Train a model with and without the collapse regulariser and with control words, over seeds.

`python -m experiments.debias run` measures collapse, fluency and bias of each arm after the tests
of what it takes. `table` and `plot` show what it has recorded:

    python -m experiments.debias table --into docs/performance.md
    python -m experiments.debias plot --out debias.png
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from benchmarks.harness import command
from experiments.debias import run, table

TABLES, PICTURES = {"debias": table.TABLE}, {"debias": table.picture}


def main(argv: Sequence[str] | None = None) -> int:
    return command.main("-m experiments.debias", __doc__, {"run": run}, TABLES, PICTURES, argv)


if __name__ == "__main__":
    sys.exit(main())
