"""The loss of every target row: against float64, and how much memory it takes at a time."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from budget import assert_within_budget
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastdean.models.forward import target_losses

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def losses_of(logits, targets):
    return target_losses(logits, SimpleNamespace(targets=targets))


def random_logits(rows, vocabulary, dtype=torch.float32, scale=3.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocabulary, generator=generator) * scale
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    return logits.to(dtype).requires_grad_(True), targets


def with_gradient(logits, losses, weights):
    (losses * weights).sum().backward()
    gradient, logits.grad = logits.grad, None
    return losses.detach(), gradient


@pytest.mark.parametrize("scale", [0.0, 3.0, 80.0])
@pytest.mark.parametrize("shape", [(1, 1), (3, 97), (40, 50_001)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_losses_and_gradients_are_those_of_cross_entropy(dtype, shape, scale):
    logits, targets = random_logits(*shape, dtype, scale)
    weights = torch.linspace(0.5, 2.0, shape[0])
    loss, gradient = with_gradient(logits, losses_of(logits, targets), weights)
    assert loss.dtype == torch.float32 and gradient.dtype == dtype

    cross_entropy = torch.nn.functional.cross_entropy
    plain = cross_entropy(logits.float(), targets, reduction="none")
    plain_loss, plain_gradient = with_gradient(logits, plain, weights)
    exact_logits = logits.detach().double().requires_grad_(True)
    exact = cross_entropy(exact_logits, targets, reduction="none")
    exact_loss, exact_gradient = with_gradient(exact_logits, exact, weights.double())
    assert_within_budget(loss, plain_loss, exact_loss)
    # A double gradient of an fp32 loss is as exact as fp32.
    promised = torch.float32 if dtype == torch.float64 else dtype
    assert_within_budget(gradient, plain_gradient, exact_gradient, promised)


def test_a_row_is_the_same_wherever_it_stands():
    logits, targets = random_logits(60, 50_000)
    together = losses_of(logits, targets)
    alone = torch.cat([losses_of(logits[i : i + 1], targets[i : i + 1]) for i in (0, 20, 21, 59)])
    assert torch.equal(together[[0, 20, 21, 59]], alone)


@pytest.mark.parametrize(
    ("at", "value", "expected"),
    [(0, float("nan"), "nan"), (0, float("inf"), "nan"), (1, float("-inf"), "finite")],
)
def test_what_is_not_finite_shows_in_its_own_row_only(at, value, expected):
    logits, _ = random_logits(3, 5)
    with torch.no_grad():
        logits[1, at] = value
    losses = losses_of(logits, torch.tensor([0, 2, 0]))
    assert losses[[0, 2]].isfinite().all()
    assert bool(losses[1].isfinite()) == (expected == "finite")


class _Largest(TorchDispatchMode):
    """The bytes of the largest tensor that an operation made."""

    def __init__(self):
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        inputs = {id(t) for t in tree_leaves((args, kwargs or {}))}
        for made in tree_leaves(result):
            if isinstance(made, torch.Tensor) and id(made) not in inputs and not func.is_view:
                self.nbytes = max(self.nbytes, made.nbytes)
        return result


def test_no_fp32_copy_of_all_logits_is_made():
    logits, targets = random_logits(128, 50_000, torch.bfloat16)
    with _Largest() as forward:
        losses = losses_of(logits, targets)
    with _Largest() as backward:
        losses.sum().backward()
    assert forward.nbytes <= 4 * 2**20 < logits.nbytes
    assert backward.nbytes == logits.nbytes  # the gradient itself
