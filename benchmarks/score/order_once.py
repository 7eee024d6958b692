"""Three data sets scored in one order, in a process of its own.

`python -m benchmarks.score.order_once ASKED` prints the fields of a `Sample` as a JSON object.
ASKED is one too: the `checkpoint`, the file of the `sets`, the `device`, whether the model is
`streamed`, and the `options` of `score_sets`. Nothing is timed but the call of it. Its peak memory
is above the loaded model; of a streamed one above what was held before the checkpoint was opened.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.harness.clock import elapsed
from benchmarks.harness.memory import Held
from fastdean.coupling.scoring import score_sets
from fastdean.data.examples import Example
from fastdean.models.loading import stream_model

_WARM_UP = 2


def main(given: str) -> None:
    asked = json.loads(given)
    device, checkpoint = torch.device(asked["device"]), asked["checkpoint"]
    sets = {
        name: [Example(*map(torch.tensor, example)) for example in each]
        for name, each in json.loads(Path(asked["sets"]).read_text("utf-8")).items()
    }

    def opened() -> Any:
        """In the dtype of the checkpoint."""
        if asked["streamed"]:
            return stream_model(checkpoint, device=str(device))
        return AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto").to(device).eval()

    def run(chosen: dict[str, list[Example]]) -> None:
        score_sets(model, chosen, **asked["options"], progress=False)

    model = opened()
    # What is asked of a model once, and what torch loads on first use.
    first = next(iter(sets))
    run({first: sets[first][:_WARM_UP]})
    if asked["streamed"]:
        model = None
        held = Held(device)
        model = opened()
    else:
        held = Held(device)
    seconds = elapsed(lambda: run(sets), device)
    print(json.dumps({"seconds": seconds, "peak_bytes": held.added_bytes()}))


if __name__ == "__main__":
    main(sys.argv[1])
