"""FastDEAN: find, inspect and suppress the weights in which fairness and privacy are coupled.

Public names are loaded on first use: importing this package imports neither torch nor
transformers nor Triton.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastdean.collapse import (
        CollapseClasses,
        CollapseRegularizer,
        CollapseState,
        collapse_alignment_loss,
        collapse_metrics,
    )
    from fastdean.coupling.results.scores import Scores
    from fastdean.coupling.scoring import score
    from fastdean.coupling.sets import couple
    from fastdean.evaluation.dependence import hsic
    from fastdean.jobs.calling import run
    from fastdean.jobs.estimate.estimating import estimate
    from fastdean.masks import NeuronMask
    from fastdean.masks.checkpoint import patch_checkpoint

    __version__: str

_HOME = {
    "CollapseClasses": "fastdean.collapse",
    "CollapseRegularizer": "fastdean.collapse",
    "CollapseState": "fastdean.collapse",
    "NeuronMask": "fastdean.masks",
    "Scores": "fastdean.coupling.results.scores",
    "collapse_alignment_loss": "fastdean.collapse",
    "collapse_metrics": "fastdean.collapse",
    "couple": "fastdean.coupling",
    "estimate": "fastdean.jobs.estimate.estimating",
    "hsic": "fastdean.evaluation.dependence",
    "patch_checkpoint": "fastdean.masks.checkpoint",
    "run": "fastdean.jobs.calling",
    "score": "fastdean.coupling.scoring",
}

__all__ = [
    "CollapseClasses",
    "CollapseRegularizer",
    "CollapseState",
    "NeuronMask",
    "Scores",
    "__version__",
    "collapse_alignment_loss",
    "collapse_metrics",
    "couple",
    "estimate",
    "hsic",
    "patch_checkpoint",
    "run",
    "score",
]

# Modules that were documented before they had rooms; imports from them keep working.
_MOVED = {"loading": "models.loading", "sources": "data.sources"}


def _stand_in(old: str, new: str) -> ModuleType:
    """A module `old` whose names are those of `new`, which is imported when one is asked for."""

    def found(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"module {old!r} has no attribute {name!r}")
        return getattr(importlib.import_module(new), name)

    module = ModuleType(old, f"Moved to `{new}`.")
    vars(module)["__getattr__"] = found
    return module


for _old, _new in _MOVED.items():
    globals()[_old] = sys.modules[f"fastdean.{_old}"] = _stand_in(
        f"fastdean.{_old}", f"fastdean.{_new}"
    )


def _installed_version() -> str:
    from importlib import metadata

    try:
        return metadata.version("fastdean")
    except metadata.PackageNotFoundError:
        # A source tree on PYTHONPATH: usable, and honest about having no release number.
        return "0+uninstalled"


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value: Any = _installed_version()
    elif name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
    else:
        raise AttributeError(f"module 'fastdean' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
