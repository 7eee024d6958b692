"""Causal language modelling on counterfactual text.

    L = mean over the tokens t > 0 that are no padding of  -log p(token_t | tokens before t)

The causal counterpart of BEC (`bec.py`), chosen here: arXiv 2410.04472 leaves the base objective of
decoder-only models open. Every token counts, of original and swapped text.
"""

from __future__ import annotations

from torch import Tensor, nn


def causal_loss(logits: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Mean cross-entropy of the next tokens, in nats: a scalar, at least fp32.

    Args:
        logits: [B, T, V]; row t predicts token t + 1.
        input_ids: int64 [B, T].
        attention_mask: [B, T], 1 on tokens and 0 on padding, which may stand on either side.
    Returns:
        0, with zero gradients, where no text has two tokens.
    """
    predicted = attention_mask[:, 1:].bool() & attention_mask[:, :-1].bool()
    targets = input_ids[:, 1:][predicted]
    return mean_cross_entropy(logits[:, :-1][predicted], targets)


def mean_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over N of -log softmax(logits)[target], a scalar; 0, with zero gradients, for N = 0.

    Args:
        logits: [N, V]; half precision is computed in fp32.
        targets: int64 [N].
    """
    wide = logits if logits.element_size() > 4 else logits.float()
    total = nn.functional.cross_entropy(wide, targets, reduction="sum")
    return total / max(1, targets.numel())
