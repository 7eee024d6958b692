"""The definitions, computed the slow and obvious way in float64, without the package's numerics."""

from __future__ import annotations

import copy

import torch

IGNORE = -100


def example_loss(model, input_ids, labels, shift, inputs=None):
    """Mean cross-entropy over the target tokens of one example, in nats.

    inputs: what else the model is given, name -> [T].
    """
    rows = {"input_ids": input_ids, **(inputs or {})}
    outputs = model(**{name: row.unsqueeze(0) for name, row in rows.items()})
    logits = (outputs[0] if isinstance(outputs, tuple) else outputs.logits)[0]
    if shift:
        logits, labels = logits[:-shift], labels[shift:]
    kept = labels != IGNORE
    # In float64 for fp32 models too: torch's fp32 softmax over 49k logits is off by 1e-5 on a CPU.
    log_probs = logits[kept].double().log_softmax(-1)
    return -log_probs.gather(1, labels[kept].unsqueeze(1)).mean()


def weight_importance(model, examples, names, shift=1, dtype=torch.float64):
    """name -> |W| * mean over examples of |dL/dW|, one example per backward pass.

    examples: (input_ids, labels) or (input_ids, labels, inputs), see `example_loss`.
    """
    model = copy.deepcopy(model).to(dtype).eval()
    weights = {name: model.get_parameter(name) for name in names}
    sums = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for input_ids, labels, *inputs in examples:
        loss = example_loss(model, input_ids, labels, shift, *inputs)
        gradients = torch.autograd.grad(loss, list(weights.values()))
        for name, gradient in zip(weights, gradients, strict=True):
            sums[name] += gradient.abs()
    return {name: sums[name] * weights[name].detach().abs() / len(examples) for name in names}


def unit_importance(model, examples, modules, shift=1):
    """module name -> mean over examples of |sum_t a_tj dL/da_tj|, one example per backward pass."""
    model = copy.deepcopy(model).double().eval()
    sums = {}
    for input_ids, labels in examples:
        inputs = {}

        def keep(name, inputs=inputs):
            def hook(module, args):
                args[0].retain_grad()
                inputs[name] = args[0]

            return hook

        handles = [model.get_submodule(n).register_forward_pre_hook(keep(n)) for n in modules]
        example_loss(model, input_ids, labels, shift).backward()
        for handle in handles:
            handle.remove()
        for name, a in inputs.items():
            value = (a * a.grad).detach().flatten(0, -2).sum(0).abs()
            sums[name] = sums.get(name, 0) + value
    return {name: total / len(examples) for name, total in sums.items()}


def top_k(values, k):
    """Indices of the k largest positive values, ties to the lowest index, ascending."""
    flat = values.flatten().tolist()
    order = sorted((i for i, v in enumerate(flat) if v > 0), key=lambda i: (-flat[i], i))
    return sorted(order[:k])


def norm_error(value, reference):
    """||value - reference|| / ||reference||; never passes on NaN."""
    value, reference = value.double(), reference.double()
    return float((value - reference).norm() / reference.norm())
