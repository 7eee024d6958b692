"""The collapse-alignment loss and its gradient for the weight: forward and backward of one batch.

Words of real text are far from equally frequent, so that one case draws its classes by Zipf's law;
the others draw them evenly.

"native" and "torch" make new sums, as the functional operation does. Contenders "in place" have a
state that takes the batch in where it lies, as the regulariser's does from step to step.

Bytes: the labelled rows, the weight and the sums read once, the new sums and the gradient written;
bound by memory. This is the floor of the functional form, and all are compared with it: in place,
the sums of classes without a row in the batch are not written. The one-hot construction of the
published code, over a whole vocabulary, is timed in one of the smallest cases alone: there it is
already hundreds of times slower than anything else.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.cases import Case, Compiled, Contender, implementation, norm_error
from fastdean.collapse import CollapseState, collapse_alignment_loss
from fastdean.ops import collapse_alignment, reference

OP = "collapse"
# The largest first: what matters most, where a run ends early.
TOKENS = (16384, 2048)
FEATURES = (4096, 768)
CLASSES = (287, 8192)
SHARES = (0.2, 1.0, 0.01)
TOY_SIZES = ((60, 12, 7, 0.5),)
_ZIPF = (2048, 768, 287, 0.2)
_ONE_HOT = {_ZIPF, *TOY_SIZES}
# Compiling takes longer than everything else of a case.
_COMPILED = {*((16384, 4096, classes, 0.2) for classes in CLASSES), *TOY_SIZES}
DTYPE = torch.float32
STATISTIC = "std"
# Of SmolLM2; the listed classes are its first rows.
VOCABULARY = 49152

Result = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Inputs:
    """features [N, D], labels int64 [N], weight [K, D]; the state's sums [K, D], counts fp64 [K].

    Every class has been seen before.
    """

    features: Tensor
    labels: Tensor
    weight: Tensor
    sums: Tensor
    counts: Tensor


def cases(toy: bool) -> Iterator[Case]:
    if toy:
        yield from itertools.starmap(case, TOY_SIZES)
    else:
        for tokens, features, share, classes in itertools.product(
            TOKENS, FEATURES, SHARES, CLASSES
        ):
            yield case(tokens, features, classes, share)
    yield case(*(TOY_SIZES[0] if toy else _ZIPF), labels="zipf")


def case(tokens: int, features: int, classes: int, share: float, labels: str = "uniform") -> Case:
    """`labels`: how the classes are drawn, "uniform" or "zipf", the c-th as often as 1 / c."""
    labelled = round(share * tokens)
    matrix = classes * features
    element = DTYPE.itemsize

    def make(generator: torch.Generator) -> Inputs:
        options = {"generator": generator, "device": generator.device}
        frequency = torch.ones(classes, device=generator.device)
        if labels == "zipf":
            frequency /= torch.arange(1, classes + 1, device=generator.device)
        drawn = frequency.multinomial(tokens, replacement=True, generator=generator)
        drawn[torch.randperm(tokens, **options)[labelled:]] = -1
        return Inputs(
            features=torch.randn(tokens, features, **options).to(DTYPE),
            labels=drawn,
            weight=torch.randn(classes, features, **options).to(DTYPE),
            sums=torch.randn(classes, features, **options),
            counts=torch.randint(1, 9, (classes,), **options).double(),
        )

    size = (tokens, features, classes, share)
    with_one_hot = labels == "uniform" and size in _ONE_HOT
    with_compiled = labels == "uniform" and size in _COMPILED
    one_hot_bytes = 4 * VOCABULARY * (tokens + 3 * features)
    return Case(
        op=OP,
        name=f"{tokens} tokens, {share:.0%} labelled, {features} features, {classes} classes"
        + (", Zipf" if labels == "zipf" else ""),
        dtype="fp32",
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
        bytes=(labelled * element + classes * (2 * element + 8)) * features + 8 * tokens,
        inputs=make,
        input_bytes=(tokens + classes) * features * element + 4 * matrix + 8 * (tokens + classes),
        expected=expected,
        error=largest_error,
        contenders=(
            implementation("collapse_alignment", "native", _ours("native")),
            implementation(
                "collapse_alignment", "reference", _ours("reference"), needs_bytes=40 * matrix
            ),
            implementation(
                "collapse_alignment",
                "native",
                _ours_in_place,
                name="native, in place",
                prepare=_with_state,
            ),
            Contender("torch", _torch, needs_bytes=40 * matrix),
            Contender(
                "torch, in place", _torch_in_place, prepare=_with_copies, needs_bytes=40 * matrix
            ),
            *(_compiled(matrix) if with_compiled else []),
            *([Contender("one-hot", _one_hot, needs_bytes=one_hot_bytes)] if with_one_hot else []),
        ),
    )


def _compiled(matrix: int) -> list[Contender]:
    options = {"needs_bytes": 40 * matrix, "compiled": True}
    in_place = compiled_expression(expression=_expression_in_place)
    return [
        Contender("torch.compile", compiled_expression(), **options),
        Contender("torch.compile, in place", in_place, prepare=_with_copies, **options),
    ]


def expected(inputs: Inputs) -> Result:
    """(loss, gradient of the weight, new sums) in float64, by torch's own differentiation."""
    rows = inputs.labels >= 0
    labels, features = inputs.labels[rows], inputs.features[rows].double()
    sums = inputs.sums.double().index_add(0, labels, features)
    counts = inputs.counts + labels.bincount(minlength=len(inputs.counts))
    means = sums / counts.unsqueeze(1)
    weight = inputs.weight.double().requires_grad_()
    loss = torch.cosine_similarity(weight, means - means.mean(0)).std()
    (gradient,) = torch.autograd.grad(loss, weight)
    return loss.detach(), gradient, sums


def largest_error(result: Result, right: Result) -> float:
    errors = [norm_error(value, exact) for value, exact in zip(result, right, strict=True)]
    # max() would drop a NaN that is not the first.
    return float(torch.tensor(errors).max())


def _ours(impl: str) -> Callable[[Inputs], Result]:
    def run(inputs: Inputs) -> Result:
        weight = inputs.weight.detach().requires_grad_()
        loss, sums, _ = collapse_alignment(
            inputs.features,
            inputs.labels,
            weight,
            inputs.sums,
            inputs.counts,
            statistic=STATISTIC,
            impl=impl,
        )
        (gradient,) = torch.autograd.grad(loss, weight)
        return loss.detach(), gradient, sums

    return run


def _with_state(inputs: Inputs) -> tuple[Inputs, CollapseState]:
    """The inputs, and a state of its own with their sums and counts."""
    state = CollapseState(*inputs.sums.shape, device=inputs.sums.device)
    state.load_state_dict({**state.state_dict(), "sums": inputs.sums, "counts": inputs.counts})
    return inputs, state


def _ours_in_place(operands: tuple[Inputs, CollapseState]) -> Result:
    inputs, state = operands
    weight = inputs.weight.detach().requires_grad_()
    loss = collapse_alignment_loss(
        inputs.features, inputs.labels, weight, state, statistic=STATISTIC, impl="native"
    )
    (gradient,) = torch.autograd.grad(loss, weight)
    return loss.detach(), gradient, state.sums


def _with_copies(inputs: Inputs) -> Inputs:
    return replace(inputs, sums=inputs.sums.clone(), counts=inputs.counts.clone())


def _expression_in_place(
    features: Tensor, labels: Tensor, weight: Tensor, sums: Tensor, counts: Tensor
) -> tuple[Tensor, Tensor]:
    """The batch joins sums and counts where they lie. Every class has been seen."""
    rows = (labels >= 0).nonzero().squeeze(1)
    known = labels[rows]
    sums.index_add_(0, known, features[rows])
    counts.index_add_(0, known, counts.new_ones(len(known)))
    means = sums / counts.to(sums.dtype).unsqueeze(1)
    return torch.cosine_similarity(weight, means - means.mean(0)).std(), sums


def _torch_in_place(inputs: Inputs) -> Result:
    return _differentiated(_expression_in_place, inputs)


def _expression(
    features: Tensor, labels: Tensor, weight: Tensor, sums: Tensor, counts: Tensor
) -> tuple[Tensor, Tensor]:
    results = reference.collapse_alignment(features, labels, weight, sums, counts, 1.0, STATISTIC)
    return results[0], results[1]


def _differentiated(expression: Callable[..., Any], inputs: Inputs) -> Result:
    weight = inputs.weight.detach().requires_grad_()
    loss, sums = expression(inputs.features, inputs.labels, weight, inputs.sums, inputs.counts)
    (gradient,) = torch.autograd.grad(loss, weight)
    return loss.detach(), gradient, sums


def _torch(inputs: Inputs) -> Result:
    """The reference's formula, differentiated by autograd instead of by its own backward."""
    return _differentiated(_expression, inputs)


def compiled_expression(
    backend: str = "inductor", expression: Callable[..., Any] = _expression
) -> Callable[[Inputs], Result]:
    """`torch.compile` of the same."""
    compiled = Compiled(expression, lambda arguments: arguments, backend)
    return lambda inputs: _differentiated(lambda *arguments: compiled(arguments), inputs)


def _published(
    features: Tensor, labels: Tensor, weight: Tensor, sums: Tensor, counts: Tensor
) -> tuple[Tensor, Tensor]:
    """One-hot labels over the vocabulary, times the features; then the listed rows of the sums."""
    listed = len(weight)
    tokens = torch.where(labels >= 0, labels, VOCABULARY - 1)
    hot = torch.nn.functional.one_hot(tokens, VOCABULARY).to(features.dtype)
    sums = sums + (hot.T @ features)[:listed]
    counts = counts + hot.sum(0)[:listed]
    means = sums / counts.to(sums.dtype).unsqueeze(1)
    return torch.cosine_similarity(weight, means - means.mean(0)).std(), sums


def _one_hot(inputs: Inputs) -> Result:
    return _differentiated(_published, inputs)
