"""The recorded times as a picture: `python benchmarks/plot.py --op score --out score.png`.

`score`: a panel for each device, case and dtype with a bar per implementation. `sweep`: how time
and tokens per second grow with each thing varied. An operation: its contenders over what its cases
vary. These show the floor. `debias`: collapse and bias against steps, a line per arm with the
spread of its seeds. Of each measurement the latest counts. Needs the extra `plot`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import records
from operations.catalogue import OPERATIONS
from plots.debias import draw_debias
from plots.operation import draw_operation
from plots.score import draw_score
from plots.sweep import draw_sweep
from shown import rows_to_show

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PICTURES: dict[str, Callable[[Sequence[records.Record]], Figure]] = {
    "score": draw_score,
    "sweep": draw_sweep,
    "debias": draw_debias,
    **dict.fromkeys(OPERATIONS, draw_operation),
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--op", choices=list(_PICTURES), default="score")
    parser.add_argument("--results", type=Path, default=records.RESULTS)
    parser.add_argument("--out", type=Path, help="default: the op's name, as PNG")
    options = parser.parse_args(argv)
    try:
        rows = rows_to_show(options.results, options.op)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    out = options.out or Path(f"{options.op}.png")
    _PICTURES[options.op](rows).savefig(out, format="png", dpi=150)
    return 0


if __name__ == "__main__":
    sys.exit(main())
