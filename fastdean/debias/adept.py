"""ADEPT: neutral words equally near to every attribute, other representations preserved.

    L = 0.3 * bias + 0.7 * preservation
    P_a(n) = softmax over the neutral words n of -||h_n - prototype_a||^2 / (2 rho^2)
    JS(P, Q) = (KL(P, M) + KL(Q, M)) / 2  with  M = (P + Q) / 2
    preservation = mean over positions and features of (h - h_start)^2
    bias, of the attribute pairs a < b, in the form
        "published":  mean of JS(P_a, P_b) in bits; rho = 10
        "paper":      sum of JS(P_a, P_b) in nats; rho = sqrt(D)

prototype_a is the mean representation of the words of attribute a (here: female, male). "published"
is the released code, which also joins the features of all layers and has constant prototypes: the
caller gives them so. "paper" is the loss as the paper describes it, without a base or a rho; the
rho here keeps the exponents of the order of 1 behind a layer norm.

Source: arXiv 2211.05414 and its released code, with the weights of the ADEPT row of arXiv
2410.04472. docs/methods.md lists the departures from the code.
"""

from __future__ import annotations

import math
from itertools import combinations

import torch
from torch import Tensor

from fastdean.debias.forms import Form, require_form

PUBLISHED_RHO = 10.0
BIAS_WEIGHT = 0.3
PRESERVATION_WEIGHT = 0.7


def log_affinities(neutral: Tensor, prototypes: Tensor, *, rho: float | None = None) -> Tensor:
    """log P_a(n) of the module's docstring: [A, N].

    Args:
        neutral: [N, D], the representations of neutral words.
        prototypes: [A, D].
        rho: above 0; None: sqrt(D).
    Raises:
        ValueError: `rho` is not positive.
    """
    if rho is not None and not rho > 0:
        raise ValueError(f"rho must be above 0, got {rho}; leave it out for sqrt(D)")
    squared_rho = neutral.shape[1] if rho is None else rho**2
    distances = (prototypes[:, None] - neutral).square().sum(2)
    return torch.log_softmax(-distances / (2 * squared_rho), dim=1)


def js_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Jensen-Shannon divergence of two distributions in nats, a scalar in 0..log 2.

    Args:
        log_p, log_q: [N], logarithms of probabilities; finite.
    """
    log_m = torch.logaddexp(log_p, log_q) - torch.log(log_p.new_tensor(2.0))
    halves = (log_p.exp() * (log_p - log_m)).sum() + (log_q.exp() * (log_q - log_m)).sum()
    return halves / 2


def bias_loss(
    neutral: Tensor,
    prototypes: Tensor,
    *,
    form: Form = "published",
    rho: float | None = None,
) -> Tensor:
    """The bias term of the module's docstring, a scalar.

    0, with zero gradients, for fewer than two neutral words or attributes.

    Args:
        neutral, prototypes: see `log_affinities`.
        form: "published" or "paper".
        rho: above 0; None: the form's.
    """
    published = require_form(form) == "published"
    if rho is None and published:
        rho = PUBLISHED_RHO
    if neutral.shape[0] < 2 or prototypes.shape[0] < 2:
        return (neutral.sum() + prototypes.sum()) * 0.0
    log_p = log_affinities(neutral, prototypes, rho=rho)
    divergences = torch.stack([js_divergence(a, b) for a, b in combinations(log_p, 2)])
    return divergences.mean() / math.log(2) if published else divergences.sum()


def preservation_loss(hidden: Tensor, original: Tensor) -> Tensor:
    """Mean squared difference of [N, D] representations from those before training, a scalar."""
    if hidden.shape != original.shape:
        raise ValueError(
            f"original must have the shape of hidden, got {list(original.shape)} and "
            f"{list(hidden.shape)}; give the same positions of both models"
        )
    return (hidden - original).square().mean()


def adept_loss(
    neutral: Tensor,
    prototypes: Tensor,
    hidden: Tensor,
    original: Tensor,
    *,
    form: Form = "published",
    rho: float | None = None,
    bias_weight: float = BIAS_WEIGHT,
    preservation_weight: float = PRESERVATION_WEIGHT,
) -> Tensor:
    """bias_weight * bias_loss + preservation_weight * preservation_loss, a scalar.

    Args:
        neutral, prototypes, form, rho: see `bias_loss`.
        hidden, original: [N, D], all representations to keep, now and before training.
    """
    bias = bias_loss(neutral, prototypes, form=form, rho=rho)
    return bias_weight * bias + preservation_weight * preservation_loss(hidden, original)
