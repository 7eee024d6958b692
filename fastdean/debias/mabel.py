"""MABEL: entailment pairs against their gender-swapped copies.

    L = contrastive + 0.05 * alignment + 0.1 * MLM

With p_i, h_i the representations of a premise and its hypothesis, p'_i, h'_i those of the swapped
copies, and s(a, b) = cos(a, b) / 0.05:

    contrastive = mean over i, and over (p, h) and (p', h'), of
                  -log exp s(p_i, h_i) / sum over j of (exp s(p_i, h_j) + exp s(p_i, h'_j))
    alignment   = mean over i of, in the form
                  "published":  sum over j of (s(p_i, h_j) - s(p'_i, h'_j))^2
                  "paper":      (cos(p_i, h_i) - cos(p'_i, h'_i))^2
    MLM         = `bec.masked_lm_loss` of the four sentences

"published" is the released code, which trained the authors' models; "paper" is the term as the
paper describes it, 1 / T^2 = 400 times smaller and more. As in the code, the swapped copy of an
example's own hypothesis is among its negatives.

Source: arXiv 2210.14975 and its released code, with the figures of the MABEL row of arXiv
2410.04472. docs/methods.md lists the departures from the code.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastdean.debias.forms import Form, require_form

TEMPERATURE = 0.05
ALIGNMENT_WEIGHT = 0.05
MLM_WEIGHT = 0.1


def contrastive_loss(
    premises: Tensor,
    hypotheses: Tensor,
    swapped_premises: Tensor,
    swapped_hypotheses: Tensor,
    *,
    temperature: float = TEMPERATURE,
) -> Tensor:
    """The contrastive term of the module's docstring, a scalar.

    Args:
        premises, hypotheses, swapped_premises, swapped_hypotheses: [B, D]; row i of each belongs
            to example i. No row may be all zero.
        temperature: above 0.
    Raises:
        ValueError: shapes that differ, or a temperature that is not positive.
    """
    sentences = (premises, hypotheses, swapped_premises, swapped_hypotheses)
    _check(sentences, temperature)
    p, h, p_swapped, h_swapped = (nn.functional.normalize(rows, dim=1) for rows in sentences)
    own = torch.arange(len(p), device=p.device)
    original = torch.cat([p @ h.T, p @ h_swapped.T], dim=1) / temperature
    swapped = torch.cat([p_swapped @ h_swapped.T, p_swapped @ h.T], dim=1) / temperature
    return nn.functional.cross_entropy(torch.cat([original, swapped]), own.repeat(2))


def alignment_loss(
    premises: Tensor,
    hypotheses: Tensor,
    swapped_premises: Tensor,
    swapped_hypotheses: Tensor,
    *,
    form: Form = "published",
    temperature: float = TEMPERATURE,
) -> Tensor:
    """The alignment term of the module's docstring, a scalar.

    Args:
        premises, hypotheses, swapped_premises, swapped_hypotheses: see `contrastive_loss`.
        form: "published" or "paper".
        temperature: above 0; "paper" has none.
    """
    sentences = (premises, hypotheses, swapped_premises, swapped_hypotheses)
    _check(sentences, temperature)
    if require_form(form) == "published":
        p, h, p_swapped, h_swapped = (nn.functional.normalize(rows, dim=1) for rows in sentences)
        difference = (p @ h.T - p_swapped @ h_swapped.T) / temperature
        return difference.square().sum(1).mean()
    original = nn.functional.cosine_similarity(premises, hypotheses, dim=1)
    swapped = nn.functional.cosine_similarity(swapped_premises, swapped_hypotheses, dim=1)
    return (original - swapped).square().mean()


def mabel_loss(
    premises: Tensor,
    hypotheses: Tensor,
    swapped_premises: Tensor,
    swapped_hypotheses: Tensor,
    masked_lm: Tensor,
    *,
    form: Form = "published",
    temperature: float = TEMPERATURE,
    alignment_weight: float = ALIGNMENT_WEIGHT,
    mlm_weight: float = MLM_WEIGHT,
) -> Tensor:
    """contrastive + alignment_weight * alignment + mlm_weight * masked_lm, a scalar.

    Args:
        premises, hypotheses, swapped_premises, swapped_hypotheses: see `contrastive_loss`.
        masked_lm: scalar, the loss of masked language modelling on the same sentences.
        form: of the alignment term.
    """
    sentences = (premises, hypotheses, swapped_premises, swapped_hypotheses)
    contrast = contrastive_loss(*sentences, temperature=temperature)
    alignment = alignment_loss(*sentences, form=form, temperature=temperature)
    return contrast + alignment_weight * alignment + mlm_weight * masked_lm


def _check(sentences: Sequence[Tensor], temperature: float) -> None:
    shapes = [tuple(rows.shape) for rows in sentences]
    if len(shapes[0]) != 2 or len(set(shapes)) > 1:
        raise ValueError(
            f"premises, hypotheses and their swapped copies must have one shape [B, D], got "
            f"{shapes}; give one row per example in each"
        )
    if not temperature > 0:
        raise ValueError(
            f"temperature must be above 0, got {temperature}; {TEMPERATURE} is the published one"
        )
