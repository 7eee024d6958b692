"""Masks: one toggle, applying and restoring in turn, on the MLP matrices of Qwen2-7B in bf16.

What a server does between two requests. 22 to 33 weights of every matrix, as the ratio 5e-7 selects
them. Bytes: every index and every new value read, every value written. The other weights are left
as the allocator gives them: on a CPU they are then never touched, and cost no memory.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from benchmarks.harness.cases import Case, Contender, implementation
from fastdean.masks import MaskEntry, NeuronMask
from fastdean.ops import zero_at_

SHAPES = ((18944, 3584), (18944, 3584), (3584, 18944))  # gate, up, down
LAYERS = (28, 4)
TOY_SHAPES, TOY_LAYERS = ((48, 32), (48, 32), (32, 48)), (2,)
COUNTS = range(22, 34)
DTYPE = torch.bfloat16
# What full boolean masks may take on a CPU; they touch every weight besides.
_MOST_MASK_BYTES_ON_CPU = 1 << 30


def cases(toy: bool) -> Iterator[Case]:
    for layers in TOY_LAYERS if toy else LAYERS:
        yield case(TOY_SHAPES if toy else SHAPES, layers)


def case(shapes: Sequence[tuple[int, int]], layers: int) -> Case:
    matrices = [shape for _ in range(layers) for shape in shapes]
    counts = [COUNTS[i % len(COUNTS)] for i in range(len(matrices))]
    numel = sum(rows * columns for rows, columns in matrices)
    rows, columns = shapes[0]

    def too_many_masks(device: torch.device) -> str:
        too_many = device.type == "cpu" and numel > _MOST_MASK_BYTES_ON_CPU
        took = f"its masks and the weights they touch take {3 * numel / 1e9:.0f} GB"
        return took if too_many else ""

    # A toggle leaves Python's state changed too, which a graph would not.
    exact = {"tolerance": 0.0, "capturable": False}
    ours = {**exact, "prepare": _cleaned}
    loops = {"prepare": _with_boolean_masks, "refusal": too_many_masks, **exact}
    return Case(
        "mask",
        f"{len(matrices)} matrices of {rows} x {columns}, {sum(counts)} weights",
        "bf16",
        settings={
            "matrices": len(matrices),
            "rows": rows,
            "columns": columns,
            "weights": sum(counts),
        },
        operations=sum(counts),
        bytes=sum(counts) * (8 + 2 * DTYPE.itemsize),
        inputs=partial(_made, matrices, counts),
        expected=expected,
        error=share_wrong,
        contenders=(
            implementation("write_at_", "native", _toggled, **ours),
            implementation("zero_at_", "native", _zeroed, "native, zeros only", **ours),
            implementation("write_at_", "reference", _toggled, **ours),
            Contender("index_fill_ loop", _index_loop, **ours),
            Contender("boolean masks", _boolean_loop, **loops),
        ),
    )


def _made(
    matrices: Sequence[tuple[int, int]], counts: Sequence[int], generator: torch.Generator
) -> SimpleNamespace:
    """The weights, flat indices [M] on their device, the values there; the same as model and mask.

    `masked`: whether the next toggle restores.
    """
    device = generator.device
    seed = torch.randint(1 << 62, (), generator=generator, device=device)
    places = random.Random(int(seed))
    model = nn.ModuleList(nn.Module() for _ in range(len(matrices) // 3))
    made = SimpleNamespace(weights=[], indices=[], originals=[], model=model, masked=False)
    entries = {}
    for i, ((rows, columns), count) in enumerate(zip(matrices, counts, strict=True)):
        weight = torch.empty(rows, columns, dtype=DTYPE, device=device)
        index = torch.tensor(sorted(places.sample(range(rows * columns), count)), device=device)
        original = torch.randn(count, generator=generator, device=device).to(DTYPE)
        weight.view(-1)[index] = original
        name = ("gate", "up", "down")[i % 3]
        model[i // 3].register_parameter(name, nn.Parameter(weight, requires_grad=False))
        entries[f"{i // 3}.{name}"] = MaskEntry(index.cpu(), original.cpu(), (rows, columns))
        made.weights.append(weight)
        made.indices.append(index)
        made.originals.append(original)
    made.mask = NeuronMask(entries)
    return made


def _places(inputs: SimpleNamespace) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(the flat weight, its indices, the values there) of each matrix."""
    flat = (weight.view(-1) for weight in inputs.weights)
    return zip(flat, inputs.indices, inputs.originals, strict=True)


def expected(inputs: SimpleNamespace) -> Tensor:
    """What the first toggle leaves at the masked places."""
    return torch.zeros_like(torch.cat(inputs.originals))


def share_wrong(result: SimpleNamespace, expected: Tensor) -> float:
    """Share of the masked places that hold other bits."""
    found = torch.cat([weight[index] for weight, index, _ in _places(result)])
    return float((found.view(torch.int16) != expected.view(torch.int16)).double().mean())


def _cleaned(inputs: SimpleNamespace) -> SimpleNamespace:
    """As `_made` made them, whatever the contender before has left."""
    for weight, index, original in _places(inputs):
        weight[index] = original
    inputs.masked = False
    return inputs


def _toggled(impl: str, inputs: SimpleNamespace) -> SimpleNamespace:
    # By the variable: restoring takes no argument for the implementation.
    before = os.environ.get("FASTDEAN_IMPL", "")
    os.environ["FASTDEAN_IMPL"] = impl
    try:
        if inputs.masked:
            inputs.mask.restore_(inputs.model)
        else:
            inputs.mask.apply_(inputs.model, impl=impl)
    finally:
        os.environ["FASTDEAN_IMPL"] = before
    inputs.masked = not inputs.masked
    return inputs


def _zeroed(impl: str, inputs: SimpleNamespace) -> SimpleNamespace:
    """Zeros to all matrices by one call of the op, on CUDA one launch; never back."""
    zero_at_(inputs.weights, inputs.indices, impl=impl)
    return inputs


def _index_loop(inputs: SimpleNamespace) -> SimpleNamespace:
    """The least that torch can do; checks nothing."""
    for weight, index, original in _places(inputs):
        if inputs.masked:
            weight.index_copy_(0, index, original)
        else:
            weight.index_fill_(0, index, 0)
    inputs.masked = not inputs.masked
    return inputs


def _with_boolean_masks(inputs: SimpleNamespace) -> tuple[SimpleNamespace, list[Tensor]]:
    masks = []
    for weight, index in zip(inputs.weights, inputs.indices, strict=True):
        masks.append(torch.zeros_like(weight, dtype=torch.bool))
        masks[-1].view(-1)[index] = True
    return _cleaned(inputs), masks


def _boolean_loop(operands: tuple[SimpleNamespace, list[Tensor]]) -> SimpleNamespace:
    """One boolean mask of a weight's size for each, as the published code keeps them."""
    inputs, masks = operands
    for weight, mask, original in zip(inputs.weights, masks, inputs.originals, strict=True):
        if inputs.masked:
            weight.masked_scatter_(mask, original)
        else:
            weight.masked_fill_(mask, 0)
    inputs.masked = not inputs.masked
    return inputs
