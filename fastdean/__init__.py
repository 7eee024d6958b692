"""FastDEAN: find, inspect and suppress the weights in which fairness and privacy are coupled.

Public names are loaded on first use: importing this package imports neither torch nor
transformers nor Triton.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastdean.checkpoint import patch_checkpoint
    from fastdean.collapse import (
        CollapseClasses,
        CollapseRegularizer,
        CollapseState,
        collapse_alignment_loss,
        collapse_metrics,
    )
    from fastdean.coupling import couple
    from fastdean.dependence import hsic
    from fastdean.masks import NeuronMask
    from fastdean.pipeline.calling import run
    from fastdean.scores import Scores
    from fastdean.scoring import score

    __version__: str

_HOME = {
    "CollapseClasses": "fastdean.collapse",
    "CollapseRegularizer": "fastdean.collapse",
    "CollapseState": "fastdean.collapse",
    "NeuronMask": "fastdean.masks",
    "Scores": "fastdean.scores",
    "collapse_alignment_loss": "fastdean.collapse",
    "collapse_metrics": "fastdean.collapse",
    "couple": "fastdean.coupling",
    "hsic": "fastdean.dependence",
    "patch_checkpoint": "fastdean.checkpoint",
    "run": "fastdean.pipeline.calling",
    "score": "fastdean.scoring",
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
    "hsic",
    "patch_checkpoint",
    "run",
    "score",
]


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
