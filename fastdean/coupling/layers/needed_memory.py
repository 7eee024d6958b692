"""How much memory a job needs, by the shapes of its weights and batches, before anything runs.

The one estimate: it chooses the order (order.py), is what a budget is held against, with a margin
(window_memory.py), and what `fastdean estimate` prints. A token row of a layer keeps the inputs and
outputs of the layer's matrices, which is what autograd and the hooks keep of it to a tenth in gated
MLPs; norms in 16 bits keep a copy in fp32.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import exp

import torch
from torch import Tensor, nn

from fastdean.models.batch_size import matrices_of
from fastdean.models.experts.fused import chosen_experts
from fastdean.models.hooks import has_hooks
from fastdean.models.model_state import config_entry, text_config
from fastdean.models.ranks.sharded import units_of
from fastdean.models.ranks.shards import is_sharded

# Tensors as wide as what a layer returns that a backward window holds at its peak: a kept answer
# and the copy that the model is given, the layer's own copy, what it returns now and what it
# returned before, the gradients of its results and of its arguments, those added to an earlier
# layer's and their sum.
_HANDED_ON = 9
# Of each answer of a layer above the last: kept, and the copy that the model is given.
_ANSWER = 2
# Of what a layer keeps: that, and as much for the gradients that are on their way through it.
_IN_FLIGHT = 2
# Of each pair of tokens of an example and each head, in fp32, where attention makes products of all
# pairs (models/attention/segment_products.py); and one more with a soft-cap.
_PAIRS = 3
# Of each token, as wide as all heads and in fp32, what goes into these products and comes out, and
# the gradients of that.
_AROUND_PAIRS = 8
# The logits of a batch, and the gradient of the loss in them.
_LOGITS = 2
# Token rows of the short batch that the hooks are tried on.
TRIED_ROWS = 64
# Of the file around a row of the embedding, what the system brings in with it (a large page).
_AROUND_A_ROW = 2 << 20
# Of what batches, windows and states take on a CPU, what the allocator takes besides: pieces that
# were freed and are too small, or in the wrong place, to be used again. Measured with glibc:
# 0.1 to 0.5 of them, which is 2 to 9 % of the process.
ALLOCATOR = 0.3
# The largest piece of memory that glibc may keep after it was freed. Between gradients of weights
# small tensors come to lie in what the last one left, so that each takes new memory.
_KEPT_AFTER_FREE = 32 << 20


_FP32 = torch.float32.itemsize


@dataclass(frozen=True)
class Rows:
    """The batches of a rank, counted in token rows, padding included.

    Attributes:
        batch: of the largest batch.
        targets: of its rows, those whose logits are made.
        all: of all batches of all data sets.
        longest: of the longest example.
    """

    batch: int
    targets: int
    all: int
    longest: int


@dataclass(frozen=True)
class Peak:
    """The most that a job holds at a time, in bytes, and of what.

    Attributes:
        moment: when that is, in words.
        parts: name -> bytes; they add up to `total`.
    """

    moment: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def within(self, room: int | None, *, on_cpu: bool) -> Peak:
        """The same with as many states as there is room for, the others being elsewhere.

        Args:
            room: bytes for everything; None: without a bound.
            on_cpu: count what a CPU's allocator takes besides.
        """
        share = ALLOCATOR if on_cpu else 0.0
        passing = sum(self.parts.get(name, 0) for name in ("one batch", "one window"))
        parts = dict(self.parts)
        states = parts.get("states", 0)
        if room is not None and states:
            left = room - (self.total - states) - int(share * passing)
            states = parts["states"] = max(0, min(states, int(left / (1 + share))))
        if on_cpu:
            parts["allocator"] = int(share * (passing + states))
        return replace(self, parts=parts)


@dataclass(frozen=True)
class LayerMemory:
    """A decoder layer.

    Attributes:
        weights: bytes of its parameters; `offloaded`: of those that come in for its window.
        kept: bytes of a token row that the backward pass needs.
    """

    weights: int
    offloaded: int
    kept: int


@dataclass(frozen=True)
class ModelMemory:
    """A model, by the shapes of its weights.

    Attributes:
        weights: bytes of all parameters; `outside`: of those in no layer.
        head, embedding: bytes of these two, which may be one and the same; 0: there is none.
        width: bytes of a token row of what a layer returns.
        behind: bytes of a token row in the inputs and outputs of matrices outside of the layers,
            the head's left out.
        logits: bytes of the logits of a target row.
        pair: bytes of a pair of tokens where attention makes products of all pairs; `around`: of a
            token row beside these.
        watched: whether hooks hang on layers, which are then given what they returned.
        offloaded: bytes of parameters that are in memory only while they are in use.
        itemsize: bytes of a number in the layers.
        chosen: experts that a token goes through; None: all.
    """

    layers: tuple[LayerMemory, ...]
    weights: int
    outside: int
    head: int
    embedding: int
    width: int
    behind: int
    logits: int
    pair: int
    around: int
    watched: bool
    offloaded: int
    itemsize: int
    chosen: int | None = None

    @classmethod
    def of(cls, model: nn.Module, layers: Iterable[nn.Module]) -> ModelMemory:
        layers = list(layers)
        config = text_config(model)
        experts = chosen_experts(config)
        inside = {id(p) for layer in layers for p in layer.parameters()}
        head = _weight(model, "get_output_embeddings")
        embedding = _weight(model, "get_input_embeddings")
        outside = [w for w in matrices_of(model) if id(w) not in inside and w is not head]
        size = max((p.element_size() for layer in layers for p in layer.parameters()), default=0)
        heads = config_entry(config, "num_attention_heads") or 0
        hidden, per_head = (config_entry(config, name) for name in ("hidden_size", "head_dim"))
        if not isinstance(per_head, int):
            per_head = hidden // max(1, heads) if isinstance(hidden, int) else 0
        capped = config_entry(config, "attn_logit_softcapping") is not None
        # What tensor parallel splits stays split.
        gathered = bool(units_of(model))
        return cls(
            layers=tuple(
                LayerMemory(
                    weights=_bytes(layer.parameters()),
                    offloaded=_bytes(
                        p for p in layer.parameters() if p.is_meta or (gathered and is_sharded(p))
                    ),
                    kept=_kept(layer, experts),
                )
                for layer in layers
            ),
            weights=_bytes(model.parameters()),
            outside=_bytes(p for p in model.parameters() if id(p) not in inside),
            head=0 if head is None else head.nbytes,
            embedding=0 if embedding is None or embedding is head else embedding.nbytes,
            width=_width(model, layers),
            behind=sum(sum(weight.shape) * weight.element_size() for weight in outside),
            logits=0 if head is None else len(head) * head.element_size(),
            pair=_FP32 * heads * (_PAIRS + capped),
            around=_FP32 * heads * per_head * _AROUND_PAIRS,
            watched=any(map(has_hooks, layers)),
            offloaded=_bytes(p for p in model.parameters() if p.is_meta),
            itemsize=size,
            chosen=experts,
        )

    @property
    def kept(self) -> int:
        """Bytes that the backward pass needs of a token row, logits left out."""
        return sum(layer.kept for layer in self.layers) + self.behind

    def states(self, rows: int) -> int:
        """What all layers return for so many token rows."""
        return len(self.layers) * rows * self.width

    def batch(self, rows: Rows) -> int:
        """What one batch takes on its way through the whole model and back.

        At the end of the forward pass the most is kept; then come the gradients of the logits, or
        later those inside of a layer.
        """
        deepest = max((layer.kept for layer in self.layers), default=0)
        on_the_way = max(_LOGITS * self.logits * rows.targets, deepest * rows.batch)
        return rows.batch * self.kept + on_the_way

    def window(self, k: int | None, rows: Rows, pairs: bool = False) -> int:
        """What the window of layer k holds of one batch, backward; None: what follows the layers.

        Args:
            pairs: count products of all pairs of tokens, which fused attention does not make.
        """
        answers = len(self.layers) if self.watched else 1
        width = (_HANDED_ON + _ANSWER * (answers - 1)) * self.width
        if k is None:
            held = rows.batch * (width + _IN_FLIGHT * self.behind)
            return held + _LOGITS * self.logits * rows.targets
        # When attention has its turn, backward, what follows it in the layer is gone.
        kept = self.layers[k].kept
        of_pairs = self.pair * rows.longest + self.around if pairs else 0
        return rows.batch * (width + max(_IN_FLIGHT * kept, kept + of_pairs))

    def trial(self, rows: Rows, targets: Iterable[Tensor], weights: int, *, on_cpu: bool) -> Peak:
        """The peak of the trial of the hooks, which takes the gradient of each target's weight.

        Of stacked experts that of one after the other, of those that a token reaches.

        Args:
            targets: the weights of those that are tried; none where units are.
            weights: bytes of the weights that are in memory.
        """
        tried = min(TRIED_ROWS, 2 * rows.longest)
        reached = None if self.chosen is None else tried * self.chosen
        sizes = [size for weight in targets for size in _matrices(weight, reached)]
        # Each goes before the next comes, and is looked at in fp32.
        copy = 0 if self.itemsize == torch.float32.itemsize else 4 // max(1, self.itemsize)
        gradients = (1 + copy) * max(sizes, default=0)
        if on_cpu:
            gradients = max(gradients, sum(size for size in sizes if size < _KEPT_AFTER_FREE))
        batch = tried * (self.kept + _LOGITS * self.logits)
        parts = {"weights": weights, "gradients of weights": gradients, "one batch": batch}
        return Peak("the trial of the hooks", parts)

    def by_batches(self, rows: Rows, sums: int) -> Peak:
        """The peak of the passes of a job batch by batch whose sums at a time take `sums` bytes."""
        parts = {"weights": self.weights, "sums": sums, "one batch": self.batch(rows)}
        return Peak("a batch turns from forward to backward", parts)

    def by_layers(
        self,
        rows: Rows,
        sums: Mapping[int | None, int],
        *,
        streamed: bool = False,
        mapped: bool = False,
        kept_sums: int = 0,
        shards: int = 1,
    ) -> list[Peak]:
        """The moments of a job layer by layer that may be its peak, what layers return with them.

        Args:
            sums: bytes alive at a time, by the layer's position; None: behind the layers.
            streamed: weights come in for one layer at a time, from their files; `mapped`: as pages
                of the files, so that of those outside of the layers only what is touched counts.
            kept_sums: bytes of dense sums that stay until the end, those of `sums` among them.
            shards: over how many ranks FSDP2 has divided the weights. One layer is whole at a time,
                and all the time what is outside of the layers; of what is being gathered there is
                a second copy.
        """

        def moment(said: str, k: int | None, loss: bool, layers: int) -> Peak:
            weights = self.weights
            if streamed:
                outside = self.touched(rows.batch, loss=loss) if mapped else self.outside
                weights = outside + (0 if k is None else self.layers[k].weights)
            gathered = self.outside + (0 if k is None else self.layers[k].weights)
            parts = {
                "weights": -(-weights // shards),
                "gathered weights": gathered if shards > 1 else 0,
                "sums": max(kept_sums, sums.get(k, 0)),
                "states": layers * rows.all * self.width,
                "one window": self.window(k, rows),
            }
            return Peak(said, parts)

        def gathering(said: str, gathered: int, layers: int) -> Peak:
            parts = {
                "weights": -(-self.weights // shards),
                "gathered weights": gathered,
                "sums": kept_sums if layers else 0,
                "states": layers * rows.all * self.width,
            }
            return Peak(f"{said} is gathered", parts)

        found = [moment("the loss behind the layers", None, True, len(self.layers))]
        # Beside what this layer and those before it returned, the gradients of one layer's results.
        for k in range(len(self.layers)):
            found.append(moment(f"layer {k} backward", k, False, k + 2))
            if shards > 1:
                gathered = self.outside + 2 * self.layers[k].weights
                found.append(gathering(f"layer {k}", gathered, k + 2))
        if shards > 1:
            found.append(gathering("what is outside of the layers", 2 * self.outside, 0))
        return found

    def touched(self, rows: int, *, loss: bool) -> int:
        """Bytes outside of the layers that a window of so many rows touches in their files.

        The head with the loss alone; of the embedding the rows that are looked up, with what the
        system maps around each, were they spread at random.
        """
        size = self.embedding or self.head
        missed = exp(-rows * _AROUND_A_ROW / size) if size else 0.0
        table = int(size * (1 - missed))
        small = self.outside - self.head - self.embedding
        if not loss:
            return small + table
        return small + self.head + (table if self.embedding else 0)


def _weight(model: nn.Module, getter: str) -> Tensor | None:
    return getattr(getattr(model, getter, lambda: None)(), "weight", None)


def _bytes(parameters: Iterable[Tensor]) -> int:
    return sum({id(p): p.nbytes for p in parameters}.values())


def _matrices(weight: Tensor, reached: int | None) -> list[int]:
    """Bytes of the matrix, or of those of so many experts in a stack."""
    if weight.dim() != 3:
        return [weight.nbytes]
    number = weight.shape[0]
    return [weight.nbytes // max(1, number)] * min(number, number if reached is None else reached)


def _kept(layer: nn.Module, experts: int | None) -> int:
    """Bytes of one token in the inputs and outputs of every matrix, and in norms' copies.

    Of stacked experts, of those that a token goes through.
    """
    kept = 0
    for weight in layer.parameters():
        if weight.dim() == 2:
            kept += sum(weight.shape) * weight.element_size()
        elif weight.dim() == 3:
            count = min(experts or weight.shape[0], weight.shape[0])
            kept += count * sum(weight.shape[1:]) * weight.element_size()
    for module in layer.modules():
        scale = getattr(module, "weight", None)
        if not isinstance(scale, Tensor) or "norm" not in type(module).__name__.lower():
            continue
        if scale.dim() == 1 and scale.element_size() < torch.float32.itemsize:
            kept += scale.numel() * torch.float32.itemsize
    return kept


def _width(model: nn.Module, layers: Sequence[nn.Module]) -> int:
    """Bytes of one token in what a layer returns: the model's hidden size in its dtype."""
    matrices = [p for layer in layers for p in layer.parameters() if p.dim() > 1]
    hidden = config_entry(text_config(model), "hidden_size")
    if not isinstance(hidden, int):
        hidden = max((size for p in matrices for size in p.shape[-2:]), default=0)
    return hidden * max((p.element_size() for p in matrices), default=0)
