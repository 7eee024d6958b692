"""One pass of a model over batches, in its evaluation state and under a progress bar."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fastdean.data.batching import Batch
from fastdean.models.forward import attention_for
from fastdean.models.model_state import evaluation_state
from fastdean.wording.doing import titled


def rows_of_examples(
    model: nn.Module,
    batches: Sequence[Batch],
    rows_of: Callable[[Batch], Tensor],
    title: str,
    progress: bool,
    *,
    dim: int = 0,
) -> Tensor:
    """What `rows_of` gives for each batch's examples along `dim`, in the order of all examples."""
    from tqdm.auto import tqdm

    total = sum(batch.num_examples for batch in batches)
    found: Tensor | None = None
    with (
        evaluation_state(model),
        tqdm(total=total, desc=titled(title), unit="ex", disable=not progress) as bar,
    ):
        for batch in batches:
            with attention_for(model, batch):
                rows = rows_of(batch)
            if found is None:
                found = rows.new_zeros(*rows.shape[:dim], total, *rows.shape[dim + 1 :])
            found.index_copy_(dim, torch.tensor(batch.example_index), rows)
            bar.update(batch.num_examples)
    assert found is not None, "there is at least one batch"
    return found
