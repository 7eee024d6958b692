"""ASE: stereotype words off the gender direction, with elastic weight consolidation.

    L = MLM + sum over the stereotype words of |h . g| + 0.5 * EWC
    g = (male - female) / ||male - female||,  male = sum of h over the tokens of the male words
    EWC = sum over the parameters of F * (theta - theta*)^2

h is the last representation at the last piece of a stereotype word. g is a constant, from the
weights before training, without dropout, and from the words of each list read as one text; both
lists have the same number of words, so that sums will do. The terms are summed over a batch. theta*
are the weights before training. F is the mean over batches of the squared gradient of the MLM loss
of the training text at theta*, a diagonal of the empirical Fisher information.

Source: the ASE row of arXiv 2410.04472 and its released code, with elastic weight consolidation of
arXiv 1612.00796. docs/methods.md lists the departures from the code.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

ELASTIC_WEIGHT = 0.5


def gender_direction(female: Tensor, male: Tensor) -> Tensor:
    """g of the module's docstring: a unit vector [D] without gradient.

    Args:
        female, male: [F, D] and [M, D], F and M >= 1: the representations of the tokens of equally
            many words.
    Raises:
        ValueError: other shapes, or equal sums, which have no direction.
    """
    shapes = [list(rows.shape) for rows in (female, male)]
    if any(len(shape) != 2 or not shape[0] for shape in shapes) or shapes[0][1] != shapes[1][1]:
        raise ValueError(
            f"female and male must have shapes [F, D] and [M, D] with at least one row, got "
            f"{shapes[0]} and {shapes[1]}; give the representations of words such as she and he"
        )
    difference = male.detach().sum(0) - female.detach().sum(0)
    length = difference.norm()
    if not length > 0:
        raise ValueError(
            "female must differ from male, got representations of equal sums; give other words"
        )
    return difference / length


def stereotype_loss(hidden: Tensor, direction: Tensor) -> Tensor:
    """sum over N of |h . g|, a scalar; 0 for N = 0.

    Args:
        hidden: [N, D], the representations of stereotype words.
        direction: [D], of unit length.
    """
    return (hidden @ direction).abs().sum()


def diagonal_fisher(
    losses: Iterable[Tensor], parameters: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Mean over the losses of each parameter's squared gradient, in the parameters' dtype.

    Args:
        losses: scalars, at least one; an iterator need keep only one graph alive.
        parameters: name -> a tensor that requires a gradient; 0 where a loss does not depend on it.
    """
    importance = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    count = 0
    for loss in losses:
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for total, gradient in zip(importance.values(), gradients, strict=True):
            if gradient is not None:
                total += gradient.square()
        count += 1
    if count == 0:
        raise ValueError(
            "losses must hold at least one loss, got none; give the loss of at least one batch"
        )
    return {name: total / count for name, total in importance.items()}


def elastic_loss(
    parameters: Mapping[str, Tensor],
    start: Mapping[str, Tensor],
    importance: Mapping[str, Tensor],
) -> Tensor:
    """EWC of the module's docstring: a scalar.

    Args:
        parameters, start, importance: theta, theta* and F by name; equal names and shapes.
    Raises:
        ValueError: names that differ.
    """
    if not parameters.keys() == start.keys() == importance.keys():
        odd = sorted((parameters.keys() ^ start.keys()) | (parameters.keys() ^ importance.keys()))
        raise ValueError(
            f"parameters, start and importance must have the same names, got {odd[0]!r} in some "
            "only; give every trained parameter in each"
        )
    terms = [
        (importance[name] * (parameter - start[name]).square()).sum()
        for name, parameter in parameters.items()
    ]
    return torch.stack(terms).sum()


def ase_loss(
    masked_lm: Tensor,
    hidden: Tensor,
    direction: Tensor,
    elastic: Tensor,
    *,
    elastic_weight: float = ELASTIC_WEIGHT,
) -> Tensor:
    """masked_lm + stereotype_loss(hidden, direction) + elastic_weight * elastic, a scalar.

    Args:
        masked_lm, elastic: scalars, see `bec.masked_lm_loss` and `elastic_loss`.
        hidden, direction: see `stereotype_loss`.
    """
    return masked_lm + stereotype_loss(hidden, direction) + elastic_weight * elastic
