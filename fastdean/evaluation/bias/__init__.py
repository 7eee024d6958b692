"""Measures of social bias, each figure with its noise and by category.

What a number means depends on how sentences are scored, which is said in every function and in the
notes of every result. None of these measures certifies that a model is fair.
"""

from fastdean.evaluation.bias.bbq import BBQ, bbq
from fastdean.evaluation.bias.bec_pro import TEMPLATES, bec_pro, bec_pro_rows
from fastdean.evaluation.bias.bias_nli import BiasNLI, bias_nli, nli_rows
from fastdean.evaluation.bias.crows_pairs import crows_pairs
from fastdean.evaluation.bias.gender_facts import gender_facts
from fastdean.evaluation.bias.result import BiasResult
from fastdean.evaluation.bias.seat import seat
from fastdean.evaluation.bias.stereoset import StereoSet, stereoset
from fastdean.evaluation.bias.winobias import WinoBias, winobias

__all__ = [
    "BBQ",
    "TEMPLATES",
    "BiasNLI",
    "BiasResult",
    "StereoSet",
    "WinoBias",
    "bbq",
    "bec_pro",
    "bec_pro_rows",
    "bias_nli",
    "crows_pairs",
    "gender_facts",
    "nli_rows",
    "seat",
    "stereoset",
    "winobias",
]
