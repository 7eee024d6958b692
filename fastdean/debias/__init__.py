"""Debiasing: counterfactual text.

Source: the base methods of "Collapsed language models promote fairness" (arXiv 2410.04472).
"""

from __future__ import annotations

from fastdean.debias.counterfactual import augment, counterfactual, irreversible_words

__all__ = ["augment", "counterfactual", "irreversible_words"]
