"""Which weights: every weight's importance on examples, and the weights that two sets share."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastdean.coupling.results.scores import Scores
    from fastdean.coupling.scoring import score, score_sets
    from fastdean.coupling.sets import couple, overlap

# Loaded on use: who reads scores does not pay for what it takes to make them. No module may have
# the name of one of these functions, which would mean one or the other by who was imported first.
_HOME = {
    "Scores": "fastdean.coupling.results.scores",
    "couple": "fastdean.coupling.sets",
    "overlap": "fastdean.coupling.sets",
    "score": "fastdean.coupling.scoring",
    "score_sets": "fastdean.coupling.scoring",
}

__all__ = ["Scores", "couple", "overlap", "score", "score_sets"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fastdean.coupling' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
