"""How far an edit moves a model's predictions on text, whether or not it predicts it less well."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fastdean.data.examples import Example
from fastdean.default_device import cpu_by_default
from fastdean.evaluation.perplexity import Perplexity
from fastdean.evaluation.statistics.intervals import Interval, mean_interval
from fastdean.models.forward import prepare_batches, target_logits, target_losses
from fastdean.models.model_state import evaluation_state, input_device, unwrap
from fastdean.wording.doing import titled

# fp32 logits of a vocabulary that are compared at a time.
_LOGITS_PER_BLOCK = 4_000_000


@dataclass(frozen=True, eq=False)
class Divergence:
    """KL divergence of an edited model from the one before, summed over each example's targets.

    kl_sums: float64 [n], nats.
    token_counts: int64 [n], targets of each example.
    """

    kl_sums: Tensor
    token_counts: Tensor

    @property
    def value(self) -> float:
        """Mean over tokens, in nats."""
        return float(self.kl_sums.sum() / self.token_counts.sum())


@cpu_by_default
def perplexity_and_divergence(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    edited: Callable[[], AbstractContextManager],
    tokens_per_batch: int | None = None,
    progress: bool = True,
) -> tuple[Perplexity, Divergence]:
    """The edited model's perplexity, and its KL divergence from the model as it is, in one pass.

    Equivalent, at each target t of an example:

        p = model(input_ids).logits[t - 1].softmax(-1)       # as the model is
        q = the same inside edited()
        (p * (p.log() - q.log())).sum()

    Each batch goes through both models, so that no logits are kept.

    Args:
        model: a causal language model, not edited.
        examples: as `perplexity` takes them.
        edited: a context in which the model is the edited one, such as `lambda:
            mask.applied(model)`. It is entered for each batch.

    Raises:
        ValueError: as `perplexity`.
    """
    from tqdm.auto import tqdm

    model = unwrap(model)
    batches = prepare_batches(model, examples, tokens_per_batch=tokens_per_batch)
    device = input_device(model)
    nll, kl = (torch.zeros(len(examples), dtype=torch.float64) for _ in range(2))
    counts = torch.zeros(len(examples), dtype=torch.int64)
    title = titled("perplexity and divergence")
    with (
        torch.no_grad(),
        evaluation_state(model),
        target_logits(model) as logits_at,
        tqdm(total=len(examples), desc=title, unit="ex", disable=not progress) as bar,
    ):
        for batch in batches:
            moved = batch.to(device)
            before = logits_at(moved)
            with edited():
                after = logits_at(moved)
            members = torch.tensor(batch.example_index)[batch.target_example]
            nll.index_add_(0, members, target_losses(after, moved).cpu().double())
            kl.index_add_(0, members, kl_of_logits(before, after).cpu().double())
            counts.index_add_(0, members, torch.ones_like(members))
            bar.update(batch.num_examples)
    return Perplexity(nll, counts), Divergence(kl, counts)


def kl_of_logits(before: Tensor, after: Tensor) -> Tensor:
    """KL(before || after) of each row of logits [M, V], in nats, fp32 [M].

    Summed as p (exp(-d) - 1 + d) with d = log p - log q, which adds sum q - sum p = 0: no term is
    negative, so that small divergences are not lost in rounding.
    """
    rows = max(1, _LOGITS_PER_BLOCK // before.shape[1])
    found = []
    for one, other in zip(before.split(rows), after.split(rows), strict=True):
        log_p, log_q = (logits.float().log_softmax(-1) for logits in (one, other))
        moved = log_p - log_q
        terms = log_p.exp() * (torch.expm1(-moved) + moved)
        # A token that was impossible counts by its new share alone.
        found.append(torch.where(log_p.isneginf(), log_q.exp(), terms).sum(-1))
    return torch.cat(found)


def divergence_interval(found: Divergence, *, confidence: float = 0.95, seed: int = 0) -> Interval:
    """Student's t interval of the mean per token, over examples; there is nothing to test.

    A divergence is never below zero, so that an end of the interval that would be is set to it.

    Raises:
        ValueError: a divergence that is NaN or infinite.
    """
    interval = mean_interval(
        found.kl_sums,
        weights=found.token_counts,
        no_effect=None,
        confidence=confidence,
        seed=seed,
    )
    return replace(interval, low=max(0.0, interval.low)) if interval.low < 0 else interval
