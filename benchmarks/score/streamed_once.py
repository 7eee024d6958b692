"""One streamed scoring in a process of its own; `streamed.py` says what is printed."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path

import fastdean
from benchmarks.harness.clock import elapsed
from benchmarks.harness.memory import peak_bytes, status_bytes
from benchmarks.score.streamed import examples_of

_BETWEEN_LOOKS = 0.02


class _Watch:
    """The most anonymous memory of this process, which the kernel keeps no peak of."""

    def __init__(self) -> None:
        self.most = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._over.wait(_BETWEEN_LOOKS):
            self.most = max(self.most, status_bytes("RssAnon") or 0)

    def end(self) -> None:
        self._over.set()
        self._thread.join()


def main(given: str) -> None:
    import torch

    asked = json.loads(given)
    examples = examples_of(asked["examples"], asked["shape"])
    found: list[fastdean.Scores] = []

    def run() -> None:
        options = {"keep_top": asked["keep_top"], "progress": False, "order": "layers"}
        found.append(fastdean.score(Path(asked["folder"]), examples, **options))

    watch = _Watch()
    seconds = elapsed(run, torch.device("cpu"))
    watch.end()
    order = found[0].manifest["order"]
    said = {
        "seconds": seconds,
        "peak_bytes": peak_bytes(),
        "peak_anonymous_bytes": watch.most,
        "bytes_read": order["bytes_of_weights_read"],
        "tokens": sum(len(example) for example in examples),
    }
    print(json.dumps(said))


if __name__ == "__main__":
    main(sys.argv[1])
