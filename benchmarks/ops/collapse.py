"""The collapse-alignment loss and its gradient for the weight: forward and backward of one batch.

Words of real text are far from equally frequent, so that one case draws its classes by Zipf's law;
the others draw them evenly.

"native" and "torch" make new sums, as the functional operation does; contenders "in place" add the
batch to a state, as the regulariser does from step to step. Bytes: the labelled rows, the weight
and the sums read once, the new sums and the gradient written: the floor of the functional form, and
all are compared with it. The one-hot construction of the published code, over a whole vocabulary,
is timed in one of the smallest cases alone: it is hundreds of times slower already there.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.cases import Case, Contender, compiled, implementation, norm_error
from fastdean.collapse import CollapseState, collapse_alignment_loss
from fastdean.ops import collapse_alignment, reference

# The largest first: what matters most, where a run ends early.
TOKENS, FEATURES, SHARES, CLASSES = (16384, 2048), (4096, 768), (0.2, 1.0, 0.01), (287, 8192)
TOY_SIZE = (60, 12, 7, 0.5)
_ZIPF = (2048, 768, 287, 0.2)
_ONE_HOT = {_ZIPF, TOY_SIZE}
STATISTIC = "std"
# Of SmolLM2; the listed classes are its first rows.
VOCABULARY = 49152

Result = tuple[Tensor, Tensor, Tensor]


def cases(toy: bool) -> Iterator[Case]:
    sizes = itertools.product(TOKENS, FEATURES, SHARES, CLASSES)
    for tokens, features, share, classes in [(60, 12, 0.5, 7)] if toy else sizes:
        yield case(tokens, features, classes, share)
    yield case(*(TOY_SIZE if toy else _ZIPF), labels="zipf")


def case(tokens: int, features: int, classes: int, share: float, labels: str = "uniform") -> Case:
    """`labels`: how the classes are drawn, "uniform" or "zipf", the c-th as often as 1 / c."""
    labelled = round(share * tokens)
    matrix = classes * features

    def make(generator: torch.Generator) -> SimpleNamespace:
        """features fp32 [N, D], labels int64 [N], weight [K, D]; the state's sums [K, D], counts
        [K]. Every class has been seen before."""
        options = {"generator": generator, "device": generator.device}
        frequency = torch.ones(classes, device=generator.device)
        if labels == "zipf":
            frequency /= torch.arange(1, classes + 1, device=generator.device)
        drawn = frequency.multinomial(tokens, replacement=True, generator=generator)
        drawn[torch.randperm(tokens, **options)[labelled:]] = -1
        return SimpleNamespace(
            features=torch.randn(tokens, features, **options),
            labels=drawn,
            weight=torch.randn(classes, features, **options),
            sums=torch.randn(classes, features, **options),
            counts=torch.randint(1, 9, (classes,), **options).double(),
        )

    op, in_place, compiles = "collapse_alignment", {"prepare": _with_copies}, {"compiled": True}
    contenders = [
        implementation(op, "native", _ours),
        implementation(op, "reference", _ours),
        implementation(op, "native", _ours_in_place, "native, in place", prepare=_with_state),
        # The reference's formula, differentiated by autograd instead of by its own backward.
        Contender("torch", _differentiated(_expression)),
        Contender("torch, in place", _differentiated(_in_place), **in_place),
    ]
    size = (tokens, features, classes, share)
    if labels == "uniform":
        run, other = (_differentiated(compiled(each)) for each in (_expression, _in_place))
        contenders += [
            Contender("torch.compile", run, **compiles),
            Contender("torch.compile, in place", other, **compiles, **in_place),
        ]
    if labels == "uniform" and size in _ONE_HOT:
        contenders.append(Contender("one-hot", _differentiated(_published)))
    return Case(
        "collapse",
        f"{tokens} tokens, {share:.0%} labelled, {features} features, {classes} classes"
        + (", Zipf" if labels == "zipf" else ""),
        "fp32",
        settings={
            "tokens": tokens,
            "features": features,
            "classes": classes,
            "labelled": labelled,
            "labels": labels,
            "statistic": STATISTIC,
        },
        # A row is added; sums are scaled, centred, multiplied three times, and scaled and
        # subtracted for the gradient.
        operations=labelled * features + 13 * matrix,
        bytes=4 * labelled * features + 16 * matrix + 8 * tokens,
        inputs=make,
        expected=expected,
        error=largest_error,
        contenders=tuple(contenders),
    )


def expected(inputs: SimpleNamespace) -> Result:
    """(loss, gradient of the weight, new sums) in float64, by torch's own differentiation."""
    rows = inputs.labels >= 0
    labels, features = inputs.labels[rows], inputs.features[rows].double()
    sums = inputs.sums.double().index_add(0, labels, features)
    counts = inputs.counts + labels.bincount(minlength=len(inputs.counts))
    weight = inputs.weight.double().requires_grad_()
    loss = _loss(weight, sums, counts)
    (gradient,) = torch.autograd.grad(loss, weight)
    return loss.detach(), gradient, sums


def largest_error(result: Result, right: Result) -> float:
    errors = [norm_error(value, exact) for value, exact in zip(result, right, strict=True)]
    # max() would drop a NaN that is not the first.
    return float(torch.tensor(errors).max())


def _differentiated(expression: Callable[..., Any]) -> Callable[[SimpleNamespace], Result]:
    """Of an expression that returns (loss, new sums)."""

    def run(inputs: SimpleNamespace) -> Result:
        weight = inputs.weight.detach().requires_grad_()
        loss, sums = expression(inputs.features, inputs.labels, weight, inputs.sums, inputs.counts)
        (gradient,) = torch.autograd.grad(loss, weight)
        return loss.detach(), gradient, sums

    return run


def _ours(impl: str, inputs: SimpleNamespace) -> Result:
    ours = partial(collapse_alignment, statistic=STATISTIC, impl=impl)
    return _differentiated(lambda *arguments: ours(*arguments)[:2])(inputs)


def _with_state(inputs: SimpleNamespace) -> tuple[SimpleNamespace, CollapseState]:
    """The inputs, and a state of its own with their sums and counts."""
    state = CollapseState(*inputs.sums.shape, device=inputs.sums.device)
    state.load_state_dict({**state.state_dict(), "sums": inputs.sums, "counts": inputs.counts})
    return inputs, state


def _ours_in_place(impl: str, operands: tuple[SimpleNamespace, CollapseState]) -> Result:
    inputs, state = operands

    def run(features: Tensor, labels: Tensor, weight: Tensor, *rest: Tensor) -> tuple:
        options = {"statistic": STATISTIC, "impl": impl}
        return collapse_alignment_loss(features, labels, weight, state, **options), state.sums

    return _differentiated(run)(inputs)


def _with_copies(inputs: SimpleNamespace) -> SimpleNamespace:
    copies = {"sums": inputs.sums.clone(), "counts": inputs.counts.clone()}
    return SimpleNamespace(**{**vars(inputs), **copies})


def _in_place(
    features: Tensor, labels: Tensor, weight: Tensor, sums: Tensor, counts: Tensor
) -> tuple[Tensor, Tensor]:
    """The batch joins sums and counts where they lie. Every class has been seen."""
    rows = (labels >= 0).nonzero().squeeze(1)
    known = labels[rows]
    sums.index_add_(0, known, features[rows])
    counts.index_add_(0, known, counts.new_ones(len(known)))
    return _loss(weight, sums, counts), sums


def _loss(weight: Tensor, sums: Tensor, counts: Tensor) -> Tensor:
    means = sums / counts.to(sums.dtype).unsqueeze(1)
    return torch.cosine_similarity(weight, means - means.mean(0)).std()


def _expression(*arguments: Tensor) -> tuple[Tensor, Tensor]:
    return reference.collapse_alignment(*arguments, 1.0, STATISTIC)[:2]


def _published(
    features: Tensor, labels: Tensor, weight: Tensor, sums: Tensor, counts: Tensor
) -> tuple[Tensor, Tensor]:
    """One-hot labels over the vocabulary, times the features; then the listed rows of the sums."""
    listed = len(weight)
    tokens = torch.where(labels >= 0, labels, VOCABULARY - 1)
    hot = torch.nn.functional.one_hot(tokens, VOCABULARY).to(features.dtype)
    sums = sums + (hot.T @ features)[:listed]
    return _loss(weight, sums, counts + hot.sum(0)[:listed]), sums
