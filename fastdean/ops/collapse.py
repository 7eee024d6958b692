"""The collapse-alignment loss: how evenly, or how well, class means align with classifier rows.

With mu_c the mean of the features labelled c, mu_bar the unweighted mean of mu_c over the classes
seen, and m_c = mu_c - mu_bar, the loss is a statistic of cos_c = cos(w_c, m_c).

The operation takes the state's sums and counts and returns new ones. Its analytic backward is an
operation of its own. With s_c the derivative of the statistic by cos_c:

    dL/dw_c  = s_c (m_c / (|w_c| |m_c|) - cos_c w_c / |w_c|^2)
    dL/dm_c  = s_c (w_c / (|w_c| |m_c|) - cos_c m_c / |m_c|^2)
    dL/dmu_c = dL/dm_c - mean of dL/dm over the classes seen
    dL/dh_t  = dL/dmu_c / count_c                               for a position t labelled c

The forward returns the three factors of each class, so that the backward is one pass over the rows.

On a CPU, plain calls of compiled code take a shorter way to the same bits: without torch's custom
operation, whose bookkeeping takes longer than a small problem, and with the batch added to sums and
counts in place if the caller alone holds their memory.

Source: collapsed language models promote fairness (arXiv 2410.04472), (U)NC3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdean.ops._dispatch import choose
from fastdean.ops.memory import check_memory, check_surroundings, check_tensor
from fastdean.ops.ownership import nobody_looks_on
from fastdean.wording.mendable import InputTypeError

STATISTICS = ("std", "cv", "mean")

_HALVES = (torch.float32, torch.bfloat16, torch.float16)


def collapse_alignment(
    features: Tensor,
    labels: Tensor,
    weight: Tensor,
    sums: Tensor,
    counts: Tensor,
    *,
    decay: float = 1.0,
    statistic: str = "std",
    impl: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the loss, and the sums and counts that include this batch.

    Equivalent, where every class has been seen, no norm is 0 and nothing is forgotten, to:

        rows = labels >= 0
        sums = (decay * sums).index_add(0, labels[rows], features[rows].to(sums.dtype))
        counts = decay * counts + labels[rows].bincount(minlength=K)
        means = sums / counts[:, None]
        cosines = torch.cosine_similarity(weight, means - means.mean(0))
        loss = {"std": cosines.std(), "cv": cosines.std() / (cosines.mean() ** 2 + 1e-6) ** 0.5,
                "mean": 1 - cosines.mean()}[statistic]

    A class is seen if its count is above 0. One whose count has decayed below 2^-20 is forgotten:
    its sums and its count become 0. With fewer than two classes seen the loss is 0, and so are its
    gradients. A cosine with a row of `weight` that is 0, or with a class mean that differs from
    the centre by rounding at most (|m_c| <= 8 eps |mu_bar|, eps of the sums' dtype), is 0 and has
    no gradient. Where the standard deviation is 0, its gradient is. With at least two classes seen,
    a NaN in the features of a labelled row or in the weight of a class seen makes the loss NaN; one
    in features stays in the sums. The weight of a class not seen is not looked at.

    Args:
        features: [N, D] fp32, bf16 or fp16, or fp64 where everything else is fp64. Any strides.
        labels: int64 [N] on the device of `features`: the class, 0..K-1, or -1. Rows labelled -1
            count for nothing, whatever they hold.
        weight: [K, D], one row for each class; dtypes of `features`, not necessarily the same one.
        sums: fp32 [K, D], or fp64 if the features are. No gradient flows through it.
        counts: fp64 [K].
        decay: of `sums` and `counts` before the batch joins them; 1 keeps them, 0 drops them.
        statistic: of the cosines: "std", unbiased; "cv", std / sqrt(mean^2 + 1e-6); "mean", 1 -
            mean.
        impl: None (by device), "reference" or "native".
    Returns:
        (loss, sums, counts): a scalar in the dtype of `sums`, and new tensors without gradient.
        The loss has gradients for `weight` and `features`.
    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit together; on the CPU also labels
            out of range. On other devices, where looking at them would have to wait, such labels
            count as -1, the loss is NaN, and its gradients are 0.
    """
    loss, sums, counts, _ = collapse_alignment_step(
        features, labels, weight, sums, counts, decay, statistic, impl, donated=False
    )
    return loss, sums, counts


def collapse_alignment_step(
    features: Tensor,
    labels: Tensor,
    weight: Tensor,
    sums: Tensor,
    counts: Tensor,
    decay: float,
    statistic: str,
    impl: str | None,
    *,
    donated: bool,
) -> tuple[Tensor, Tensor, Tensor, bool]:
    """`collapse_alignment`, which may add the batch to donated `sums` and `counts` in place.

    It then returns these. A call that raises leaves them unchanged.

    Args:
        donated: the caller alone holds `sums` and `counts`, and does not need their values again.
    Returns:
        (loss, sums, counts, alone): `alone` if nobody but the caller holds the returned sums and
            counts; the graph of the loss has tensors of its own with their memory.
    """
    given = {"features": features, "labels": labels, "weight": weight}
    given |= {"sums": sums, "counts": counts}
    _check_tensors(given)
    _check_settings(decay, statistic)
    if nobody_looks_on(*given.values()):
        chosen = choose("collapse_alignment", features.device, impl, features.dtype)
        if chosen.name == "native" and features.device.type == "cpu":
            run = chosen.callable
            results = _plain_step(
                features, labels, weight, sums, counts, float(decay), statistic, run, donated
            )
            return *results, True
    loss, sums, counts, _, _ = _forward(*given.values(), float(decay), statistic, impl)
    return loss, sums, counts, False


def _plain_step(
    features: Tensor,
    labels: Tensor,
    weight: Tensor,
    sums: Tensor,
    counts: Tensor,
    decay: float,
    statistic: str,
    native_forward: Callable[..., tuple[Tensor, ...]],
    donated: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, sums, counts) by compiled code on the CPU; the arguments have passed their checks."""
    _check_memory(features=features, labels=labels, weight=weight, sums=sums, counts=counts)
    # A graph keeps no tensor that was made in inference mode.
    in_place = donated and not any(
        each.is_inference() or not each.is_contiguous() for each in (sums, counts)
    )

    def run() -> tuple[Tensor, ...]:
        try:
            return native_forward(
                features, labels, weight, sums, counts, decay, statistic, in_place=in_place
            )
        except IndexError:
            # Compiled code checks every label; this finds the one to name.
            _check_labels(labels, len(sums))
            raise

    if torch.is_grad_enabled() and (features.requires_grad or weight.requires_grad):
        results: list[Tensor] = []
        loss = _PlainStep.apply(features, labels, weight, run, results)
        return loss, results[0], results[1]
    loss, new_sums, new_counts, _, _ = run()
    return loss, new_sums, new_counts


class _PlainStep(torch.autograd.Function):
    """Joins the backward to what `run` computes; `results` receives sums and counts."""

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        labels: Tensor,
        weight: Tensor,
        run: Callable[[], tuple[Tensor, ...]],
        results: list[Tensor],
    ) -> Tensor:
        loss, sums, counts, centre, factors = run()
        results += sums, counts
        # Tensors of the graph's own, so that others see that it holds the memory.
        kept = sums.detach(), counts.detach()
        ctx.save_for_backward(labels, weight, *kept, centre, factors)
        ctx.set_materialize_grads(False)
        ctx.features_dtype = features.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return (None,) * 5
        saved = ctx.saved_tensors
        run: Callable[..., tuple[Tensor, Tensor]] = collapse_alignment_backward
        impl: tuple[str, ...] = ("native",)
        # With gradients enabled, torch's operation must refuse second derivatives.
        if nobody_looks_on(grad_loss, *saved) and not torch.is_grad_enabled():
            labels, weight = saved[:2]
            # The caller holds these too; the rest is the graph's own.
            _check_memory(labels=labels, weight=weight)
            run, impl = choose("collapse_alignment_backward", weight.device, "native").callable, ()
        return *_gradients(ctx, grad_loss, run, *impl), None, None


def _gradients(
    ctx: Any, grad_loss: Tensor, run: Callable[..., tuple[Tensor, Tensor]], *impl: str | None
) -> tuple[Tensor | None, None, Tensor | None]:
    """For features, labels and weight."""
    needs_features, _, needs_weight = ctx.needs_input_grad[:3]
    grad_weight, grad_features = run(
        grad_loss, *ctx.saved_tensors, ctx.features_dtype, needs_weight, needs_features, *impl
    )
    return grad_features if needs_features else None, None, grad_weight if needs_weight else None


@torch.library.custom_op(
    "fastdean::collapse_alignment",
    mutates_args=(),
    schema="(Tensor features, Tensor labels, Tensor weight, Tensor sums, Tensor counts, "
    "float decay, str statistic, str? impl) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _forward(
    features: Tensor,
    labels: Tensor,
    weight: Tensor,
    sums: Tensor,
    counts: Tensor,
    decay: float,
    statistic: str,
    impl: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, sums [K, D], counts [K], centre [D], factors [3, K]), all but counts in one dtype."""
    # A call through torch.ops comes here directly.
    given = {"features": features, "labels": labels, "weight": weight}
    given |= {"sums": sums, "counts": counts}
    _check_tensors(given)
    _check_settings(decay, statistic)
    # Only here, because a compiled graph has neither memory nor values.
    check_surroundings()
    _check_memory(**given)
    _check_labels(labels, len(sums))
    run = choose("collapse_alignment", features.device, impl, features.dtype).callable
    return run(**given, decay=decay, statistic=statistic)


@_forward.register_fake
def _forward_shapes(
    features: Tensor, labels: Tensor, weight: Tensor, sums: Tensor, counts: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _check_devices(features=features, labels=labels, weight=weight, sums=sums, counts=counts)
    num_classes, num_features = sums.shape
    return (
        sums.new_empty(()),
        sums.new_empty(num_classes, num_features),
        counts.new_empty(num_classes),
        sums.new_empty(num_features),
        sums.new_empty(3, num_classes),
    )


@torch.library.custom_op(
    "fastdean::collapse_alignment_backward",
    mutates_args=(),
    schema="(Tensor grad_loss, Tensor labels, Tensor weight, Tensor sums, Tensor counts, "
    "Tensor centre, Tensor factors, ScalarType features_dtype, bool needs_weight, "
    "bool needs_features, str? impl) -> (Tensor, Tensor)",
)
def collapse_alignment_backward(
    grad_loss: Tensor,
    labels: Tensor,
    weight: Tensor,
    sums: Tensor,
    counts: Tensor,
    centre: Tensor,
    factors: Tensor,
    features_dtype: torch.dtype,
    needs_weight: bool,
    needs_features: bool,
    impl: str | None,
) -> tuple[Tensor, Tensor]:
    """Gradients of the loss for `weight` [K, D] and the features [N, D]; empty if not needed.

    Args:
        grad_loss: scalar in the dtype of `sums`.
        sums, counts, centre, factors: what the forward returned.
        features_dtype: of the features, and so of their gradient.
    """
    given = {"labels": labels, "weight": weight, "sums": sums, "counts": counts}
    given |= {"grad_loss": grad_loss, "centre": centre, "factors": factors}
    _check_tensors(given, features_dtype)
    check_surroundings()
    _check_memory(**given)
    _check_labels(labels, len(sums))
    run = choose("collapse_alignment_backward", weight.device, impl, features_dtype).callable
    return run(
        **given,
        features_dtype=features_dtype,
        needs_weight=needs_weight,
        needs_features=needs_features,
    )


@collapse_alignment_backward.register_fake
def _backward_shapes(
    grad_loss: Tensor,
    labels: Tensor,
    weight: Tensor,
    sums: Tensor,
    counts: Tensor,
    centre: Tensor,
    factors: Tensor,
    features_dtype: torch.dtype,
    needs_weight: bool,
    needs_features: bool,
    impl: str | None,
) -> tuple[Tensor, Tensor]:
    _check_devices(labels=labels, weight=weight, sums=sums, counts=counts, factors=factors)
    num_classes, num_features = sums.shape
    weight_shape = (num_classes, num_features) if needs_weight else (0,)
    features_shape = (labels.shape[0], num_features) if needs_features else (0,)
    return weight.new_empty(weight_shape), weight.new_empty(features_shape, dtype=features_dtype)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    features, labels, weight, _, _, _, _, impl = inputs
    _, sums, counts, centre, factors = output
    ctx.mark_non_differentiable(sums, counts, centre, factors)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(labels, weight, sums, counts, centre, factors)
    ctx.features_dtype = features.dtype
    ctx.impl = impl


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * 8
    return *_gradients(ctx, grad_loss, collapse_alignment_backward, ctx.impl), *(None,) * 5


_forward.register_autograd(_backward, setup_context=_keep_for_backward)


def _check_settings(decay: float, statistic: str) -> None:
    if statistic not in STATISTICS:
        raise ValueError(
            f"statistic must be one of {', '.join(STATISTICS)}, got {statistic!r}; "
            "'std' is the published one"
        )
    if not 0 <= decay <= 1:
        raise ValueError(f"decay must be from 0 to 1, got {decay}; 1 forgets nothing")


def _check_tensors(given: dict[str, Tensor], features_dtype: torch.dtype | None = None) -> None:
    """Types, shapes, dtypes and devices of what the operation or its backward gets.

    Args:
        given: by name; the backward has no features, but `features_dtype`.
    """
    for name, value in given.items():
        check_tensor(name, value)
    labels, weight, sums, counts = (given[n] for n in ("labels", "weight", "sums", "counts"))
    features = given.get("features")
    if features is not None and features.dim() != 2:
        raise ValueError(
            f"features must be [N, D], got {list(features.shape)}; flatten batch and time first"
        )
    if sums.dim() != 2 or sums.numel() == 0:
        raise ValueError(
            f"sums must have at least one class and one feature, got {list(sums.shape)}; "
            "make them with fastdean.CollapseState"
        )
    num_classes, num_features = sums.shape
    if features is not None and features.shape[1] != num_features:
        raise ValueError(
            f"features must have the {num_features} columns of the state's sums, "
            f"got {list(features.shape)}; make the state for these features"
        )
    one_each = labels.dim() == 1 and (features is None or len(labels) == len(features))
    if not one_each or labels.dtype != torch.int64:
        raise ValueError(
            f"labels must be int64 [{'N' if features is None else len(features)}], a class or -1 "
            f"for each row of features, got {labels.dtype} {list(labels.shape)}"
        )
    if weight.shape != sums.shape:
        raise ValueError(
            f"weight must be {list(sums.shape)}, a row for each class, got {list(weight.shape)}; "
            "select the classes' rows first"
        )
    if counts.shape != sums.shape[:1] or counts.dtype != torch.float64:
        raise ValueError(
            f"counts must be torch.float64 [{num_classes}], got {counts.dtype} "
            f"{list(counts.shape)}; they are whole numbers only until they decay"
        )
    shapes = {"grad_loss": (), "centre": (num_features,), "factors": (3, num_classes)}
    for name, shape in shapes.items():
        kept = given.get(name)
        if kept is not None and (kept.shape != shape or kept.dtype != sums.dtype):
            raise ValueError(
                f"{name} must be {sums.dtype} {list(shape)}, got {kept.dtype} "
                f"{list(kept.shape)}; pass what the forward returned"
            )
    _check_dtypes(features_dtype if features is None else features.dtype, weight, sums)
    _check_devices(**given)


def _check_memory(**given: Tensor) -> None:
    for name, tensor in given.items():
        check_memory(name, tensor)


def _check_devices(**arguments: Tensor) -> None:
    devices = [each.device for each in arguments.values()]
    if any(device != devices[0] for device in devices):
        raise ValueError(
            f"{', '.join(arguments)} must be on one device, got "
            f"{', '.join(str(device) for device in devices)}; move them there"
        )


def _check_dtypes(features: torch.dtype | None, weight: Tensor, sums: Tensor) -> None:
    if features == weight.dtype == sums.dtype == torch.float64:
        return
    if features not in _HALVES or weight.dtype not in _HALVES or sums.dtype != torch.float32:
        raise InputTypeError(
            "features and weight must be float32, bfloat16 or float16 with sums in float32, or "
            f"all float64, got {features}, {weight.dtype} and {sums.dtype}; cast them or "
            "make the state with this dtype"
        )


def _check_labels(labels: Tensor, num_classes: int) -> None:
    if labels.device.type != "cpu" or labels.numel() == 0:
        return
    lowest, highest = (int(each) for each in labels.aminmax())
    if lowest < -1 or highest >= num_classes:
        raise ValueError(
            f"labels must lie in 0..{num_classes - 1}, or be -1, got "
            f"{lowest if lowest < -1 else highest}; -100 and the like become -1 with "
            "torch.where(labels < 0, -1, labels)"
        )
