"""The work of a rank: examples in batches, products, and what other ranks send."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING, Any

from fastdean.jobs.estimate.job import EstimateJob

if TYPE_CHECKING:
    from fastdean.coupling.sums.holding import Holding
    from fastdean.coupling.targets.target import Target
    from fastdean.jobs.estimate.split import Split


def lengths_of(job: EstimateJob, ranks: int) -> list[tuple[int, int]]:
    """(tokens, target tokens) of each example of the first rank, set after set."""
    if job.data is None:
        tokens = 128 if job.tokens_per_example is None else job.tokens_per_example
        if job.max_length is not None:
            tokens = min(tokens, job.max_length)
        each = [(tokens, tokens - 1)] * -(-job.examples // ranks)
        return each * job.sets
    from fastdean.jobs.rows import encode_rows, take_rows
    from fastdean.models.loading import load_tokenizer

    tokenizer = load_tokenizer(
        job.model,
        revision=job.revision,
        trust_remote_code=job.trust_remote_code,
        known=True,
    )
    usual = EstimateJob.examples
    chosen, _ = take_rows(job.data, job.examples, job.seed, name="data", usual=usual)
    found = encode_rows(
        chosen,
        job.data,
        tokenizer,
        None,
        template=job.template,
        max_length=job.max_length,
        name="data",
    )
    mine = [(len(example), example.num_targets(1)) for example in found][::ranks]
    return mine * job.sets


def batched(
    model: Any, job: EstimateJob, lengths: Sequence[tuple[int, int]], blocks: int, device: Any
) -> tuple[Any, int]:
    """The batches that the examples make, packed in their order, and how many these are.

    Args:
        blocks: of how many blocks the rank makes the sums; a batch has examples of one.
    """
    from fastdean.coupling.layers.needed_memory import Rows
    from fastdean.models.batch_size import tokens_per_batch_of

    most = job.tokens_per_batch or tokens_per_batch_of(model, device)
    of_a_set = len(lengths) // job.sets
    largest, targets, batches = 0, 0, 0
    sets = [lengths[first : first + of_a_set] for first in range(0, len(lengths), of_a_set)]
    for of_block in (of_set[block::blocks] for of_set in sets for block in range(blocks)):
        tokens = predicted = 0
        for length, count in of_block:
            if not tokens or tokens + length > most:
                batches += 1
                tokens = predicted = 0
            tokens, predicted = tokens + length, predicted + count
            largest, targets = max(largest, tokens), max(targets, predicted)
    everything = sum(length for length, _ in lengths)
    longest = max(length for length, _ in lengths)
    return Rows(largest, targets, everything, longest), batches


def _used(weight: Any, experts: int | None, ranks: int) -> float:
    """Entries of a weight that a token meets: of stacked experts, of those it goes through.

    Args:
        ranks: over which the experts of a token are spread.
    """
    if weight.dim() < 3:
        return weight.numel()
    count = min(experts or len(weight) * ranks, len(weight) * ranks) / ranks
    return count * prod(weight.shape[1:])


def operations_of(
    model: Any,
    layers: Sequence[Any],
    targets: Sequence[Any],
    lengths: Sequence[tuple[int, int]],
    job: EstimateJob,
    split: Split,
) -> dict[str, float]:
    """FLOP of each part; matrices, and attention's products of all pairs of an example's tokens."""
    from fastdean.models.batch_size import matrices_of
    from fastdean.models.experts.fused import chosen_experts
    from fastdean.models.model_state import config_entry, text_config

    config = text_config(model)
    tokens = sum(length for length, _ in lengths)
    predicted = sum(count for _, count in lengths)
    pairs = sum(length * length for length, _ in lengths)
    experts = chosen_experts(config)
    heads = config_entry(config, "num_attention_heads") or 0
    hidden = config_entry(config, "hidden_size") or 0
    width = config_entry(config, "v_head_dim") or config_entry(config, "head_dim")
    width = width or (hidden // heads if heads else 0)
    stacked = [p for layer in layers for p in layer.parameters() if p.dim() == 3]
    head = getattr(getattr(model, "get_output_embeddings", lambda: None)(), "weight", None)
    plain = sum(weight.numel() for weight in matrices_of(model) if weight is not head)
    used = sum(_used(p, experts, split.of_experts) for p in stacked)
    of_head = 0 if head is None else 2.0 * head.numel() * predicted
    products = 2.0 * (plain + used) * tokens
    # Q K^T and P V forward; backward dV, dP, dQ, dK, and Q K^T again.
    attention = 2.0 * heads / split.of_attention * width * pairs * len(layers)
    hooked = [target for target in targets if not target.by_example]
    by_example = [target for target in targets if target.by_example]
    if job.granularity == "weight":
        importance = (
            2.0 * tokens * sum(_used(target.weight, experts, split.of_experts) for target in hooked)
        )
        # A gradient of each example, its absolute value, and the sum.
        importance += 3.0 * len(lengths) * sum(target.weight.numel() for target in by_example)
    else:
        importance = 2.0 * tokens * sum(target.num_inputs for target in targets)
    forward = products + 2 * attention
    # Batches of one example have passes of their own, beside those of the hooks.
    times = bool(hooked) + bool(by_example)
    return {
        "forward": times * (forward + of_head),
        "recomputed_forward": times * forward,
        "backward": times * (products + of_head + 5 * attention),
        "importance": importance,
    }


def holding(
    targets: Sequence[Target], job: EstimateJob, tokens: int, keep_top: float | None
) -> Holding | None:
    """Of which targets a window may keep inputs and gradients; None: of none.

    Matrices of one module that take as many inputs are counted as given the same ones.

    Args:
        tokens: rows of one data set.
    """
    from fastdean.coupling.sums.holding import Holding, Pair

    one_process = job.gpus in (None, 1) and job.gpu_memory is None and not job.deterministic
    if keep_top is None or job.granularity != "weight" or not one_process:
        return None
    sources: dict[tuple[str, int], int] = {}
    pairs = {}
    for target in targets:
        if not target.stacked and not target.by_example:
            of = (target.name.rpartition(".")[0], target.num_inputs)
            source = sources.setdefault(of, len(sources))
            pairs[target.parameter] = Pair(target.weight.dtype, True, source)
    return Holding(tokens, job.examples, keep_top, pairs)


def received_bytes_of(
    targets: Sequence[Target], job: EstimateJob, ranks: int, keep_top: float | None
) -> dict[str, int]:
    """Bytes of sums and candidates that a rank receives, whatever the order."""
    from fastdean.coupling.sums.reduction import Top, received_bytes

    found = Counter({"sums": 0, "candidates": 0})
    for target in targets:
        by_unit = job.granularity == "unit"
        shape = target.weight.shape
        top = None if keep_top is None else Top(job.examples, keep_top, "expert", target.stacked)
        summed = target.num_inputs if by_unit else target.weight.numel()
        sums, candidates = received_bytes(shape, summed, ranks, top)
        found.update({"sums": job.sets * sums, "candidates": job.sets * candidates})
    return dict(found)
