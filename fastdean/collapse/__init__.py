"""Neural collapse of a language model on chosen words: measured, and used as a regulariser.

Source: Collapsed language models promote fairness (arXiv 2410.04472).
"""

from __future__ import annotations

from fastdean.collapse.alignment import CollapseState, collapse_alignment_loss
from fastdean.collapse.classes import CollapseClasses, LeftOut
from fastdean.collapse.controls import frequency_matched_control, random_control
from fastdean.collapse.labels import Shift, default_shift, position_labels
from fastdean.collapse.metrics import CollapseMetrics, Metric, NearestMean
from fastdean.collapse.moments import ClassMoments
from fastdean.collapse.passes import collapse_metrics, nearest_mean_agreement
from fastdean.collapse.regularizer import CollapseRegularizer
from fastdean.collapse.representations import Representations
from fastdean.collapse.trainer import trainer_class
from fastdean.collapse.words import WORD_LISTS, read_word_groups

__all__ = [
    "WORD_LISTS",
    "ClassMoments",
    "CollapseClasses",
    "CollapseMetrics",
    "CollapseRegularizer",
    "CollapseState",
    "LeftOut",
    "Metric",
    "NearestMean",
    "Representations",
    "Shift",
    "collapse_alignment_loss",
    "collapse_metrics",
    "default_shift",
    "frequency_matched_control",
    "nearest_mean_agreement",
    "position_labels",
    "random_control",
    "read_word_groups",
    "trainer_class",
]
