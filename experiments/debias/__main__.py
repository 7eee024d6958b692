"""Train a model with and without the collapse regulariser and with control words, over seeds.

`python -m experiments.debias run --method bec --model bert-base-uncased` makes the second
paper's table.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from benchmarks.harness import command
from experiments.debias import run


def main(argv: Sequence[str] | None = None) -> int:
    try:
        return command.main("-m experiments.debias", __doc__, {"run": run}, {}, {}, argv)
    except KeyboardInterrupt:
        print("interrupted; the same command with --resume goes on from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
