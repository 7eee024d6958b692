"""What `score()` runs over: the loader's examples, read and dealt over the ranks."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastdean.coupling.workloads.custom_loss import CustomLoss, LossFunction
from fastdean.coupling.workloads.language_modelling import LanguageModelling
from fastdean.coupling.workloads.rank_blocks import Dealing, blocks_of_a_rank
from fastdean.coupling.workloads.workload import Workload
from fastdean.data.batching import require_tokens_per_batch
from fastdean.models.ranks.distributed import Ranks


def plan_workload(
    model: nn.Module,
    loader: Any,
    *,
    ranks: Ranks,
    loss_fn: LossFunction | None = None,
    skip_bad_rows: bool = False,
    deterministic: bool = False,
    **options: Any,
) -> Workload:
    """Read the loader and split its examples over the ranks; arguments as `score` takes them.

    Examples (of a `loss_fn` whole batches) are dealt into blocks of about as many tokens, one for
    each rank, and batches are made of a block's examples alone. With `deterministic` there are 16
    blocks on any number of ranks that divides 16, and a rank has as many as every other.

    Raises:
        ValueError, TypeError: as `score` does for its loader.
    """
    with ranks.running_together():
        # Before the loader is read.
        if options.get("tokens_per_batch") is not None:
            require_tokens_per_batch(options["tokens_per_batch"])
        work: Workload
        dealing = Dealing(ranks, blocks_of_a_rank(ranks, deterministic))
        if loss_fn is None:
            options |= {"dealing": dealing, "skip_bad_rows": skip_bad_rows}
            work = LanguageModelling.plan(model, loader, **options)
        elif skip_bad_rows:
            raise ValueError(
                "skip_bad_rows must be left out with loss_fn, whose batches are scored as they "
                "come, got True; leave bad rows out of the batches"
            )
        else:
            work = CustomLoss.plan(model, loader, loss_fn, dealing)
    _require_same_examples(work, ranks)
    return work


def _require_same_examples(work: Workload, ranks: Ranks) -> None:
    """Refuse loaders that already shard: most examples would never be scored."""
    digest = work.describe()["data"]["sha256"] if ranks.size > 1 else "0"
    if not ranks.hold_the_same(digest):
        raise ValueError(
            "loader must give every rank the same examples, got different ones; leave out the "
            "distributed sampler, score() splits the examples itself"
        )
