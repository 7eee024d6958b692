"""What a window of a sweep holds of one batch, beside the sums of its targets.

By the shapes of the weights, before anything runs, so that a budget that is too small is refused
then. A test compares it with what a sweep really holds, which is less. Layers that hand on more
than one stream of the hidden size may hold more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from fastdean.coupling.accumulators import split_by_memory
from fastdean.coupling.targets import Target
from fastdean.models.forward import matrices_of
from fastdean.models.hooks import has_hooks
from fastdean.models.model_state import text_config

# Tensors as wide as what a layer returns that a backward window holds at its peak: a kept answer
# and the copy that the model is given, the layer's own copy, what it returns now and what it
# returned before, the gradients of its results and of its arguments, those added to an earlier
# layer's and their sum.
_HANDED_ON = 9
# Of each answer of a layer above the last: kept, and the copy that the model is given.
_ANSWER = 2
# Of the inputs and outputs of the matrices: what autograd keeps of functions between them, and the
# gradients that are on their way.
_KEPT = 2
# Of each pair of tokens of an example and each head, where attention makes products of all pairs.
_PAIRS = 3


@dataclass(frozen=True)
class WindowMemory:
    """Bytes that each window with targets holds of its largest batch, by the layer's position.

    Attributes:
        held: None stands for what follows the layers.
    """

    rows: int
    held: Mapping[int | None, int]

    @classmethod
    def of(
        cls, model: nn.Module, layers: Sequence[nn.Module], rows: int, longest: int
    ) -> WindowMemory:
        """For batches of `rows` token rows at most, and examples of at most `longest`."""
        config = text_config(model)
        experts = getattr(config, "num_experts_per_tok", None)
        inside = {id(p) for layer in layers for p in layer.parameters()}
        outside = [w for w in matrices_of(model) if id(w) not in inside]
        width = _width(model, layers)
        # Whoever watches a layer is given what it returned, so that every answer is brought.
        answers = len(layers) if any(map(has_hooks, layers)) else 1
        handed_on = (_HANDED_ON + _ANSWER * (answers - 1)) * width
        size = max((p.element_size() for layer in layers for p in layer.parameters()), default=0)
        pairs = _PAIRS * size * longest * (getattr(config, "num_attention_heads", None) or 0)
        held: dict[int | None, int] = {
            k: rows * (handed_on + pairs + _KEPT * _activations(layer, experts))
            for k, layer in enumerate(layers)
        }
        behind = sum(sum(weight.shape) * weight.element_size() for weight in outside)
        held[None] = rows * (handed_on + _KEPT * behind)
        return cls(rows, held)

    def split(
        self,
        targets: Sequence[Target],
        size: Callable[[Sequence[Target]], int],
        memory_budget: int | None,
    ) -> list[list[Target]]:
        """Targets of one window in groups whose sums fit into `memory_budget` beside the batch.

        Args:
            size: what targets take that are summed together, in bytes.
        """
        if memory_budget is None or not targets:
            return [list(targets)]
        return split_by_memory(targets, size, memory_budget - self.held[targets[0].layer_index])

    def least(self, targets: Sequence[Target], size: Callable[[Sequence[Target]], int]) -> int:
        """The smallest budget that any of these targets can be scored under."""
        return max(size([target]) + self.held[target.layer_index] for target in targets)


def _activations(layer: nn.Module, experts: int | None) -> int:
    """Bytes of one token in the inputs and outputs of every matrix.

    Of stacked experts, of those that a token goes through.
    """
    sizes = []
    for weight in layer.parameters():
        if weight.dim() == 2:
            sizes.append(sum(weight.shape) * weight.element_size())
        elif weight.dim() == 3:
            count = min(experts or weight.shape[0], weight.shape[0])
            sizes.append(count * sum(weight.shape[1:]) * weight.element_size())
    return sum(sizes)


def _width(model: nn.Module, layers: Sequence[nn.Module]) -> int:
    """Bytes of one token in what a layer returns: the model's hidden size in its dtype."""
    matrices = [p for layer in layers for p in layer.parameters() if p.dim() > 1]
    hidden = getattr(text_config(model), "hidden_size", None)
    if not isinstance(hidden, int):
        hidden = max((size for p in matrices for size in p.shape[-2:]), default=0)
    return hidden * max((p.element_size() for p in matrices), default=0)
