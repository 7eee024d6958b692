"""What a window of a sweep holds of one batch, beside the sums of its targets.

By the shapes of the weights (needed_memory.py), before anything runs, so that a budget that is too
small is refused then. A test compares it with what a sweep really holds, which is less: budgets
keep a margin above the estimate. Layers that hand on more than one stream of the hidden size may
hold more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from fastdean.coupling.layers.needed_memory import ModelMemory, Rows
from fastdean.coupling.sums.accumulators import split_by_memory
from fastdean.coupling.targets.target import Target
from fastdean.coupling.workloads.workload import Workload
from fastdean.models.ranks.distributed import Ranks

# Of the estimate, what a budget must leave besides: it may be a tenth too low.
MARGIN = 1.1


@dataclass(frozen=True)
class WindowMemory:
    """Bytes that each window with targets holds of its largest batch."""

    model: ModelMemory
    rows: Rows

    @classmethod
    def of(
        cls, model: nn.Module, layers: Sequence[nn.Module], works: Sequence[Workload], ranks: Ranks
    ) -> WindowMemory:
        """For the batches of these data sets; the same on all ranks."""
        rows = Rows(
            batch=ranks.highest(max(work.most_rows for work in works)),
            targets=ranks.highest(max(work.most_targets for work in works)),
            all=ranks.highest(sum(work.all_rows for work in works)),
            longest=ranks.highest(max(work.longest for work in works)),
        )
        return cls(ModelMemory.of(model, layers), rows)

    def held(self, layer: int | None) -> int:
        """With the margin; None stands for what follows the layers."""
        return int(MARGIN * self.model.window(layer, self.rows, pairs=True))

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
        return split_by_memory(targets, size, memory_budget - self.held(targets[0].layer_index))

    def least(self, targets: Sequence[Target], size: Callable[[Sequence[Target]], int]) -> int:
        """The smallest budget that any of these targets can be scored under."""
        return max(
            size([target]) + self.held(target.layer_index)
            for whole in targets
            for target in whole.pieces(lambda _: False)
        )
