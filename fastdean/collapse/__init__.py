"""Neural collapse of a language model on chosen words: measured, and used as a regulariser.

Source: Collapsed language models promote fairness (arXiv 2410.04472).
"""

from __future__ import annotations

from fastdean.collapse.alignment import CollapseState, collapse_alignment_loss

__all__ = ["CollapseState", "collapse_alignment_loss"]
