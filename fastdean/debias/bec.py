"""BEC: masked language modelling on gender-swapped text.

    L = mean over the positions t in M of  -log p(token_t | text with M hidden)

M holds each token of the text with probability 0.15. Of M, 80 % are shown as the mask token, 10 %
as a random token and 10 % unchanged, as in BERT (arXiv 1810.04805). Chosen here, where the source
says nothing: original and swapped text are both trained on; a random token is uniform over the
vocabulary without its special tokens; tokens are drawn independently, so that a batch of few may
have none in M and a loss of 0.

Source: the BEC row of arXiv 2410.04472: lr 2e-5, 3 epochs, on GAP with genders swapped.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastdean.data.examples import IGNORE_INDEX
from fastdean.debias.causal import mean_cross_entropy
from fastdean.default_device import cpu_by_default

_SHOWN_AS_MASK = 0.8
_SHOWN_AS_RANDOM = 0.1


@dataclass(frozen=True)
class MaskedTokens:
    """A batch with hidden tokens.

    Attributes:
        input_ids: int64 [B, T], for the model.
        labels: int64 [B, T], the hidden token's id; -100 elsewhere.
    """

    input_ids: Tensor
    labels: Tensor


@cpu_by_default
def mask_tokens(
    input_ids: Tensor,
    may_hide: Tensor,
    *,
    mask_id: int,
    random_ids: Tensor,
    generator: torch.Generator,
    rate: float = 0.15,
) -> MaskedTokens:
    """Hide `rate` of the tokens, on the CPU; the same generator state gives the same choice.

    Args:
        input_ids: int64 [B, T].
        may_hide: bool [B, T]; False on special tokens and padding, which are never hidden.
        mask_id: the mask token.
        random_ids: int64 [W], W >= 1, to draw a random token from.
        generator: of the CPU; gives three draws of [B, T].
        rate: above 0 and at most 1.
    Raises:
        ValueError: `rate` is out of range or `random_ids` is empty.
    """
    if not 0 < rate <= 1:
        raise ValueError(
            f"rate must be above 0 and at most 1, got {rate}; 0.15 is the published one"
        )
    if random_ids.numel() == 0:
        raise ValueError(
            "random_ids must hold at least one token id, got none; give the vocabulary's ids "
            "without the special tokens"
        )
    shape = input_ids.shape
    hidden = (torch.rand(shape, generator=generator) < rate) & may_hide
    how = torch.rand(shape, generator=generator)
    drawn = random_ids[torch.randint(random_ids.numel(), shape, generator=generator)]
    shown = torch.where(hidden & (how < _SHOWN_AS_MASK), mask_id, input_ids)
    as_random = (how >= _SHOWN_AS_MASK) & (how < _SHOWN_AS_MASK + _SHOWN_AS_RANDOM)
    shown = torch.where(hidden & as_random, drawn, shown)
    return MaskedTokens(shown, torch.where(hidden, input_ids, IGNORE_INDEX))


def masked_lm_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of the hidden tokens, in nats: a scalar, at least fp32.

    Args:
        logits: [B, T, V]; row t predicts token t.
        labels: int64 [B, T]; -100 where nothing is predicted.
    Returns:
        0, with zero gradients, where nothing is hidden.
    """
    hidden = labels != IGNORE_INDEX
    return mean_cross_entropy(logits[hidden], labels[hidden])
