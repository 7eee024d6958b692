"""Debiasing: counterfactual text, the losses of five methods, and the loop that trains with them.

Source: the base methods of "Collapsed language models promote fairness" (arXiv 2410.04472).
"""

from __future__ import annotations

from fastdean.debias.adept import adept_loss
from fastdean.debias.ase import ase_loss, diagonal_fisher, elastic_loss, gender_direction
from fastdean.debias.bec import MaskedTokens, mask_tokens, masked_lm_loss
from fastdean.debias.card import Effect, model_card
from fastdean.debias.causal import causal_loss
from fastdean.debias.counterfactual import augment, counterfactual, irreversible_words
from fastdean.debias.mabel import alignment_loss, contrastive_loss, mabel_loss
from fastdean.debias.objectives import METHODS
from fastdean.debias.saving import save_model
from fastdean.debias.training import fine_tune

__all__ = [
    "METHODS",
    "Effect",
    "MaskedTokens",
    "adept_loss",
    "alignment_loss",
    "ase_loss",
    "augment",
    "causal_loss",
    "contrastive_loss",
    "counterfactual",
    "diagonal_fisher",
    "elastic_loss",
    "fine_tune",
    "gender_direction",
    "irreversible_words",
    "mabel_loss",
    "mask_tokens",
    "masked_lm_loss",
    "model_card",
    "save_model",
]
