"""Three data sets scored in one order, in a process of its own.

`python -m benchmarks.score.order_once OPTIONS`, these as a JSON object, prints one: seconds and
memory of the call above the loaded model, and the work that the order cannot avoid.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

from benchmarks.harness.session import timed
from benchmarks.score import subject
from benchmarks.score.work import score_case
from fastdean.coupling.scoring import score_sets
from fastdean.coupling.targets import find_targets
from fastdean.data.examples import Example

_SETS, _WARM_UP = 3, 2


def main(given: str) -> None:
    options = argparse.Namespace(**json.loads(given))
    for name in ("gguf", "rows"):
        path = getattr(options, name)
        setattr(options, name, None if path is None else Path(path))
    device = torch.device(options.device)
    loaded = subject.load_subject(options, "fp32")
    examples = loaded.examples(_SETS * options.examples)
    # One row of each set in turn.
    sets = {str(i): examples[i::_SETS] for i in range(_SETS)}
    with tempfile.TemporaryDirectory(prefix="fastdean-states-", dir=options.folder) as folder:
        wanted = {
            "order": options.order,
            "states": folder if options.files else "device",
            "keep_top": options.keep_top,
            "target_modules": options.targets,
            "progress": False,
        }

        def run(chosen: dict[str, list[Example]]) -> None:
            score_sets(loaded.model, chosen, **wanted)

        # What is asked of a model once, and what torch loads on first use.
        run({name: each[:_WARM_UP] for name, each in sets.items()})
        sample = timed(lambda: run(sets), device)
    work = _work(loaded.model, examples, options)
    tokens = sum(len(example) for example in examples)
    print(json.dumps({**vars(sample), **work, "tokens": tokens, "name": loaded.name}))


def _work(
    model: nn.Module, examples: list[Example], options: argparse.Namespace
) -> dict[str, object]:
    """As `score`'s; by layers a forward more through every layer, and every weight read twice."""
    case = score_case(model, examples, target_modules=options.targets, contenders=())
    operations, read = case.operations, case.bytes
    if options.order == "layers":
        again = sum(target.weight.numel() for target in find_targets(model, "all"))
        operations += 2 * again * case.settings["tokens"]
        read += again * next(model.parameters()).element_size()
    shapes = [vars(shape) for shape in case.shapes]
    return {"operations": operations, "bytes": read, "shapes": shapes}


if __name__ == "__main__":
    main(sys.argv[1])
