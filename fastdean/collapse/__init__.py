"""Neural collapse of a language model on chosen words: measured, and used as a regulariser.

Source: Collapsed language models promote fairness (arXiv 2410.04472).
"""

from __future__ import annotations

from fastdean.collapse.alignment import CollapseState, collapse_alignment_loss
from fastdean.collapse.moments import ClassMoments
from fastdean.collapse.representations import Representations

__all__ = ["ClassMoments", "CollapseState", "Representations", "collapse_alignment_loss"]
