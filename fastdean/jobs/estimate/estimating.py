"""The job of `fastdean estimate`: what a scoring will need, before any weight is read.

From the model's configuration, on the meta device, and the lengths of the examples. Memory is the
estimate of `coupling/layers/needed_memory.py`, operations are counted, and time is stated only from
rates that somebody gave or that are measured here.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import TYPE_CHECKING, Annotated, Any

from fastdean.jobs import options
from fastdean.jobs.options import SOURCE_HELP, Help
from fastdean.wording.granularity import checked_granularity
from fastdean.wording.printable import one_line

if TYPE_CHECKING:
    from fastdean.coupling.sums.holding import Holding
    from fastdean.coupling.targets.target import Target
    from fastdean.jobs.estimate.split import Split

_UNITS = {"": 1, "b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12}
_UNITS |= {"kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}
_SIZE = re.compile(r"([\d.]+(?:e\+?\d+)?)\s*([kmgt]?i?b?)", re.IGNORECASE)
# A product and a copy that are large enough to be timed, and take a fraction of a second.
_PRODUCT, _COPY_BYTES, _LEAST_SECONDS = 1024, 64 << 20, 0.2
# No memory is that small: a number below it lacks its unit.
_LEAST_BYTES = 100_000
_MOST_RANKS, _MOST_EXAMPLES = 1_000_000, 10_000_000
# Of a peak, what it may be off: a test compares it with processes.
_UNSURE = 0.1
# The least share of the parameters that is told: what does not round to 0 %.
_SAID = 0.005


def size_in_bytes(text: Any) -> int:
    """The bytes of "80GB", "16 GiB" or a number of bytes, which is not one that lacks its unit."""
    found = _SIZE.fullmatch(str(text).strip())
    try:
        size = float(found[1]) * _UNITS[found[2].lower()] if found else 0
    except (KeyError, ValueError):
        size = 0
    if not 0 < size < 1e18:
        raise ValueError(
            f"gpu_memory must be a size above 0 such as 80GB, got {text!r}; write it so"
        )
    if found and not found[2] and size < _LEAST_BYTES:
        raise ValueError(
            f"gpu_memory must be a size with its unit, got {text!r}, which are bytes; write "
            f"{found[1]}GB"
        )
    return int(size)


@dataclass(frozen=True, kw_only=True)
class EstimateJob:
    """What is estimated; options that `ScoreJob` has mean the same.

    Attributes:
        memory_budget: in bytes, as `fastdean.score` takes it.
        gpu_memory: bytes, or a text such as "80GB".
        flops, bandwidth: operations and bytes a second.
    Raises:
        ValueError, TypeError: an option out of range.
    """

    model: options.Model
    data: Annotated[
        str | None, Help(f"Take real lengths from SRC: {SOURCE_HELP}.", typed=str | None)
    ] = None
    examples: Annotated[int, Help("Examples of each data set.")] = 128
    tokens_per_example: Annotated[
        int | None, Help("Tokens of each example, where there is no --data [default: 128].")
    ] = None
    sets: Annotated[int, Help("Data sets that are scored.")] = 1
    keep_top: Annotated[
        float | None, Help("Share of each matrix that is kept; 1 keeps all sums.")
    ] = 1e-3
    target_modules: options.TargetModules = "mlp"
    granularity: options.Granularity = "weight"
    tokens_per_batch: options.TokensPerBatch = None
    memory_budget: options.MemoryBudget = None
    deterministic: options.Deterministic = False
    dtype: options.Dtype = "auto"
    gpus: Annotated[int | None, Help("GPUs, each with a rank; none: this machine's CPU.")] = None
    gpu_memory: Annotated[
        str | None, Help("Of each GPU, such as 80GB; says that the job runs on GPUs.")
    ] = None
    tensor_parallel: Annotated[
        int, Help("Ranks that hold one model together, split by its tp_plan.")
    ] = 1
    expert_parallel: Annotated[
        int,
        Help("Ranks that own whole experts, by the ep_plan: 1, or as many as --tensor-parallel."),
    ] = 1
    flops: Annotated[float | None, Help("Operations a second of a matrix product.")] = None
    bandwidth: Annotated[float | None, Help("Bytes a second that weights are read with.")] = None
    measure: Annotated[bool, Help("Measure both rates here, in a second.")] = False
    template: options.Template = None
    max_length: options.MaxLength = None
    revision: options.Revision = None
    trust_remote_code: options.TrustRemoteCode = False
    seed: options.Seed = 0

    def __post_init__(self) -> None:
        options.require_numbers(self)
        from fastdean.coupling.results.scores import check_keep_top
        from fastdean.models.loading import dtype_name

        object.__setattr__(self, "granularity", checked_granularity(self.granularity))
        object.__setattr__(self, "dtype", dtype_name(self.dtype))
        options.require_template(self)
        options.require_at_least(
            self, examples=1, tokens_per_example=2, sets=1, tokens_per_batch=1, gpus=1, seed=0
        )
        options.require_at_least(self, tensor_parallel=1, expert_parallel=1, max_length=2)
        self._require_countable()
        if (self.gpus or 1) % self.tensor_parallel:
            raise ValueError(
                f"tensor_parallel must divide gpus, got {self.tensor_parallel} of "
                f"{self.gpus or 1}; pass gpus={self.tensor_parallel} or a multiple of it"
            )
        if self.expert_parallel not in (1, self.tensor_parallel):
            raise ValueError(
                "expert_parallel must be 1 or as tensor_parallel, got "
                f"{self.expert_parallel} with {self.tensor_parallel}; scoring knows no other"
            )
        check_keep_top(self.keep_top)
        for name in ("flops", "bandwidth"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name} must be a number above 0, got {value:g}; leave it out")
            if value is not None and self.measure:
                raise ValueError(
                    f"{name} must be left out with measure=True, which measures it, got {value:g}"
                )
        if self.data is not None and self.tokens_per_example is not None:
            raise ValueError(
                "tokens_per_example must be left out with data, whose lengths are taken, got "
                f"{self.tokens_per_example}"
            )
        if self.gpu_memory is not None:
            size_in_bytes(self.gpu_memory)
        elif self.gpus is not None:
            raise ValueError(
                f"gpu_memory must come with gpus, got gpus={self.gpus} alone; pass --gpu-memory "
                "80GB"
            )
        if self.measure and self.gpu_memory is not None:
            raise ValueError(
                "measure must be left out with gpu_memory, since only this machine's CPU is "
                "measured, got True; pass flops and bandwidth of the GPU"
            )

    def _require_countable(self) -> None:
        """Every example is put into a batch, and every rank is dealt some."""
        if (self.gpus or 1) > _MOST_RANKS:
            raise ValueError(
                f"gpus must be at most {_MOST_RANKS:,}, got {self.gpus:,}; no job has more"
            )
        if self.examples * self.sets > _MOST_EXAMPLES:
            raise ValueError(
                f"examples must be at most {_MOST_EXAMPLES:,} in all sets together, got "
                f"{self.examples * self.sets:,}; estimate fewer, operations and states grow with "
                "their number"
            )


@dataclass(frozen=True)
class OrderEstimate:
    """One way to go about a job, of one rank.

    Attributes:
        order: "batches" or "layers"; `weights`: "resident", "streamed", or "sharded" over the ranks
            (FSDP2).
        fits: whether the peak fits; None: it is not known how much memory there is.
        passes: how often every batch goes through the model, by layers through the layer with the
            most of them backward, where `memory_budget` does not hold all sums.
        peak_bytes: the most memory at a time; `parts` adds up to it, at the `moment`.
        states: bytes of what layers return and of one layer's gradients, by where they would be.
        operations: "forward", "recomputed_forward", "backward" and "importance" (FLOP).
        weights_read_bytes: from memory, by all passes; `files_read_bytes`: from files.
        received: bytes that come from other ranks, about as many as go to them: of "sums", of
            "candidates" for the top entries, of "weights" that are sharded, and of "activations"
            and their gradients, which tensor parallel adds up over the ranks of a model.
        seconds: at least, from the rates; None without rates.
    """

    order: str
    weights: str
    fits: bool | None
    passes: int
    peak_bytes: int
    moment: str
    parts: dict[str, int]
    states: dict[str, int]
    operations: dict[str, float]
    weights_read_bytes: int
    files_read_bytes: int
    received: dict[str, int]
    seconds: float | None


@dataclass(frozen=True)
class Estimate:
    """What a scoring needs. Bytes and FLOP; a multiplication and an addition are two operations.

    Attributes:
        model: its class, parameters, dtype and layers; `targets`: scored matrices and weights.
        work: examples, tokens and batches of a rank.
        machine: device, memory in bytes, ranks, and the rates.
        memory: bytes of weights, one layer's weights, all sums, a layer's sums, states of all
            layers, one batch, one window, and the base, which is Python with its libraries.
        orders: "batches", "layers", "layers, streamed", and of several ranks "layers, sharded";
            with tensor parallel the first two.
        notes: what is not counted or not divided, in sentences.
    """

    model: dict[str, Any]
    targets: dict[str, int]
    work: dict[str, int]
    machine: dict[str, Any]
    memory: dict[str, int]
    orders: dict[str, OrderEstimate]
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries, lists, strings and numbers."""
        return asdict(self)

    @property
    def verdict(self) -> str:
        """Which order fits where, in one line."""
        machine = self.machine
        if machine["memory_bytes"] is None:
            return "The system does not say how much memory there is."
        fitting = [name for name, each in self.orders.items() if each.fits]
        others = [name for name, each in self.orders.items() if not each.fits]
        where = f"{_gb(machine['memory_bytes'])} of {machine['device']} memory"

        def named(names: Sequence[str]) -> str:
            peaks = (
                f'"{name}" ({_gb(self.orders[name].peak_bytes)}{self._left(name)})'
                for name in names
            )
            return ", ".join(peaks)

        if not fitting:
            return f"Nothing fits into {where}: {named(others)}."
        rest = f"; too large: {named(others)}" if others else ""
        return f"Into {where} fit: {named(fitting)}{rest}."

    def _left(self, name: str) -> str:
        """What an order that fits leaves, where that is less than the estimate may be off."""
        each, there = self.orders[name], self.machine["memory_bytes"]
        elsewhere = {place: size for place, size in each.states.items() if place != "device"}
        if not each.fits:
            return ""
        if elsewhere:
            ((place, size),) = elsewhere.items()
            return f", no room left: {_gb(size)} of states go to {place}"
        left = there - each.peak_bytes
        if left >= _UNSURE * each.peak_bytes:
            return ""
        return f", {_gb(left)} left, and it may be {_UNSURE:.0%} more"

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def estimate(model: str, **asked: Any) -> Estimate:
    """What scoring a model will need: memory, operations, time; no weight is read.

    Args:
        model: a Hugging Face folder (its config.json is enough), a hub id or a preset.
        asked: `data` or `tokens_per_example`, `examples`, `sets`, `keep_top`, `target_modules`,
            `granularity`, `dtype`, `tokens_per_batch`, `memory_budget` (bytes), `deterministic`,
            `gpus`, `gpu_memory` ("80GB" or bytes), `tensor_parallel`, `expert_parallel`, `flops`,
            `bandwidth`, `measure`, and what says how rows become tokens, as in the command
            `fastdean estimate`.
    Returns:
        An `Estimate`; `to_dict()` is what `--json` prints, and its text is the command's table.
    Raises:
        ValueError, TypeError: the model's configuration cannot be read, or an option is wrong.
    """
    size = asked.get("gpu_memory")
    if size is not None:
        asked["gpu_memory"] = str(size)
    return run(EstimateJob(model=model, **asked))


def run(job: EstimateJob) -> Estimate:
    """Carry out the job; errors as `estimate`."""
    import torch

    from fastdean.coupling.layers.needed_memory import TRIED_ROWS, ModelMemory, Peak
    from fastdean.coupling.layers.window_memory import WindowMemory
    from fastdean.coupling.resuming.kept_entries import entries_bytes
    from fastdean.coupling.sums.accumulators import all_sums_bytes, split_by_memory, sums_bytes
    from fastdean.coupling.sums.block_sums import sums_at_a_time
    from fastdean.coupling.sums.holding import together_bytes
    from fastdean.coupling.targets.coverage import coverage
    from fastdean.coupling.targets.finding import find_targets
    from fastdean.coupling.workloads.rank_blocks import blocks_of_a_rank
    from fastdean.jobs.estimate.split import Split, Whole
    from fastdean.models.available_memory import available_memory
    from fastdean.models.layers.stacks import decoder_layers
    from fastdean.models.loading import described_model
    from fastdean.models.ranks.distributed import Ranks

    model = described_model(
        job.model,
        dtype=job.dtype,
        revision=job.revision,
        trust_remote_code=job.trust_remote_code,
    )
    layers = list(decoder_layers(model).values())
    targets = find_targets(model, job.target_modules, job.granularity)
    keep_top = None if job.keep_top == 1 else job.keep_top
    # What every rank has in the end, and is told of: of the whole model.
    results = job.sets * entries_bytes(targets, job.granularity, keep_top, signs=False)
    covered, dtype = coverage(model, targets), next(model.parameters()).dtype
    wholes = [Whole.of(target) for target in targets]
    split = Split.of(model, job.tensor_parallel, experts=job.expert_parallel > 1)
    if split.ranks > 1:
        targets = find_targets(model, job.target_modules, job.granularity)
    on_gpu = job.gpu_memory is not None
    device = torch.device("cuda" if on_gpu else "cpu")
    ranks = job.gpus or 1
    shares = ranks // split.ranks
    lengths = _lengths(job, shares)
    blocks = blocks_of_a_rank(Ranks(0, shares), job.deterministic)
    at_a_time = sums_at_a_time(blocks)
    rows, batches = _batched(model, job, lengths, blocks, device)
    memory = ModelMemory.of(model, layers)

    sums: Counter[int | None] = Counter()
    for target in targets:
        sums[target.layer_index] += sums_bytes(target, job.granularity)
    every = sum(sums.values())
    size = together_bytes(
        _holding(targets, job, rows.all // job.sets, keep_top), job.granularity, False, at_a_time
    )
    windows = WindowMemory(memory, rows)
    budget = job.memory_budget
    refused: dict[str, ValueError] = {}
    groups: list[list[Target]] = []
    in_layers: dict[int | None, list[list[Target]]] = {}
    try:
        together = all_sums_bytes(job.granularity, False, at_a_time)
        groups = split_by_memory(targets, together, budget)
    except ValueError as error:
        refused["batches"] = error
    try:
        in_layers = {k: windows.split(of, size, budget) for k, of in _by_layer(targets).items()}
    except ValueError as error:
        least = windows.least(targets, size)
        refused["layers"] = _too_small(budget, least, rows.batch) if budget else error
    in_windows = {k: max(map(size, parts)) for k, parts in in_layers.items()}
    base = 0 if on_gpu else _base()
    there = size_in_bytes(job.gpu_memory) if on_gpu else available_memory(device)
    if not on_gpu and there is not None:
        # What this process holds already is in the base.
        there += base

    lowest = min((t.layer_index for t in targets if t.layer_index is not None), default=len(layers))
    kinds = {
        tuple(map(tuple, (p.shape for p in layer.parameters()))): i
        for i, layer in reversed(list(enumerate(layers)))
    }
    operations = _operations(model, layers, targets, lengths, job, split)
    rates = _rates(job, model)
    orders: dict[str, OrderEstimate] = {}

    if split.ranks == 1:
        exchanged = _received(targets, job, ranks, keep_top)
    else:
        exchanged = {
            kind: job.sets * size
            for kind, size in split.received(
                targets, wholes, shares, job.examples, keep_top, job.granularity == "unit"
            ).items()
        }

    def add(
        name: str,
        peaks: Sequence[Peak],
        kept: int,
        read: int,
        files: int,
        passes: int,
        gathered: int = 0,
    ) -> None:
        fixed = {"base": base, "scores kept": kept}
        room = None if there is None else there - base - kept
        # What layers return goes elsewhere where there is no room for it.
        bounded = [peak.within(room, on_cpu=not on_gpu) for peak in peaks]
        peak = max(bounded, key=lambda each: each.total)
        # Of the moment with most of it.
        wanted, here = max(
            (before.parts.get("states", 0), after.parts.get("states", 0))
            for before, after in zip(peaks, bounded, strict=True)
        )
        places = {"device": here, "host or files" if on_gpu else "files": wanted - here}
        parts = {key: value for key, value in {**fixed, **peak.parts}.items() if value}
        total = sum(parts.values())
        order, _, weights = name.partition(", ")
        counted = dict(operations)
        taken: tuple[float, float, int]
        if order == "batches":
            counted["recomputed_forward"] = 0.0
            counted["forward"] *= passes
            counted["backward"] *= passes
            taken = (passes, passes, passes)
        else:
            counted["recomputed_forward"] *= repeated
            counted["backward"] *= repeated
            # The way to each window begins at the embedding.
            taken = (1 + repeated, repeated, len(layers) + 1 + sum(often.values()))
        predicted = sum(count for _, count in lengths)
        received = {**exchanged, "activations": split.added_up(rows.all, predicted, *taken)}
        received["weights"] = received.get("weights", 0) + gathered
        orders[name] = OrderEstimate(
            order=order,
            weights=weights or "resident",
            fits=None if there is None else total <= there,
            passes=passes,
            peak_bytes=total,
            moment=peak.moment,
            parts=parts,
            states={place: size for place, size in places.items() if size},
            operations=counted,
            weights_read_bytes=read,
            files_read_bytes=files,
            received={kind: size for kind, size in received.items() if size},
            seconds=_seconds(sum(counted.values()), read, rates),
        )

    # Units are tried without the gradients of their weights.
    by_weight = targets if job.granularity == "weight" else []
    weights = [target.weight for target in by_weight]
    dense = keep_top is None
    # Forward and backward, each batch.
    used = memory.weights - memory.embedding
    if "batches" not in refused:
        most_sums = max(map(together, groups))
        # Beside those of all sets what blocks take, of which one is the sums themselves.
        kept_sums = job.sets * every + most_sums - most_sums // at_a_time if dense else most_sums
        add(
            "batches",
            [
                memory.by_batches(rows, kept_sums),
                memory.trial(rows, weights, memory.weights, on_cpu=not on_gpu),
            ],
            0 if dense else results,
            2 * used * batches * len(groups),
            memory.weights,
            len(groups),
        )
    most_sums = max(in_windows.values(), default=0)
    kept_sums = job.sets * every + most_sums - most_sums // at_a_time if dense else 0
    again = sum(layer.weights for layer in memory.layers[lowest:])
    often = {k: len(in_layers.get(k, [])) or 1 for k in range(lowest, len(layers))}
    repeated = sum(n * memory.layers[k].weights for k, n in often.items()) / max(1, again)
    most = max(map(len, in_layers.values()), default=1)
    of_layers = sum(layer.weights for layer in memory.layers)
    read = int((2 * (used - of_layers) + of_layers + 2 * again * repeated) * batches)
    can_sweep = bool(layers) and "layers" not in refused
    if can_sweep:
        resident = memory.by_layers(rows, in_windows, kept_sums=kept_sums)
        tried = memory.trial(rows, weights, memory.weights, on_cpu=not on_gpu)
        add("layers", [*resident, tried], 0 if dense else results, read, memory.weights, most)
    if can_sweep and split.ranks == 1 and not (dense and job.granularity == "weight"):
        first = sorted(kinds.values())
        begun = sum(memory.layers[i].weights for i in first)
        outside = (
            memory.outside if on_gpu else memory.touched(2 * rows.longest + TRIED_ROWS, loss=True)
        )
        streamed = memory.by_layers(
            rows, in_windows, streamed=True, mapped=not on_gpu, kept_sums=kept_sums
        )
        of_first = [t.weight for t in by_weight if t.layer_index in first]
        tried = memory.trial(rows, of_first, begun + outside, on_cpu=not on_gpu)
        files = memory.outside + of_layers + again
        add("layers, streamed", [*streamed, tried], 0 if dense else results, read, files, most)
    if can_sweep and ranks > 1 and split.ranks == 1:
        first = sorted(kinds.values())
        begun = sum(memory.layers[i].weights for i in first)
        of_first = [t.weight for t in by_weight if t.layer_index in first]
        # The scores of dense sums need the whole weights once more.
        copies = sum(weight.nbytes for weight in weights) if dense else 0
        peaks = memory.by_layers(rows, in_windows, kept_sums=kept_sums, shards=ranks)
        held = -(-memory.weights // ranks) + memory.outside + begun
        peaks.append(memory.trial(rows, of_first, held, on_cpu=False))
        # For the trial, forward and backward; of all the others' shards.
        gathers = memory.outside + begun + of_layers + again
        add(
            "layers, sharded",
            peaks,
            copies if dense else results,
            read,
            memory.weights,
            most,
            gathers - gathers // ranks,
        )
    if not orders:
        raise next(iter(refused.values()))

    window = max(memory.window(k, rows) for k in (None, *range(len(layers))))
    return Estimate(
        model={
            "class": type(model).__name__,
            "parameters": covered["model_parameters"],
            "dtype": str(dtype).removeprefix("torch."),
            "layers": len(layers),
        },
        targets={"matrices": len(targets), "weights": covered["scored_parameters"]},
        work={
            "sets": job.sets,
            "examples_of_a_rank": len(lengths),
            "tokens_of_a_rank": rows.all,
            "target_tokens_of_the_largest_batch": rows.targets,
            "tokens_of_the_largest_batch": rows.batch,
            "batches_of_a_rank": batches,
        },
        machine={
            "device": "GPU" if on_gpu else "CPU",
            "memory_bytes": there,
            "ranks": ranks,
            "ranks_of_a_model": split.ranks,
            "flops": rates[0],
            "bandwidth": rates[1],
            "rates": "measured" if job.measure else "given" if any(rates) else None,
        },
        memory={
            "base": base,
            "weights": memory.weights,
            "largest_layer": max((layer.weights for layer in memory.layers), default=0),
            "sums": every,
            "largest_layer_sums": max(sums.values()),
            "states": memory.states(rows.all),
            "one_batch": memory.batch(rows),
            "one_window": window,
            "scores_kept": results,
        },
        orders=orders,
        notes=[
            *(f"Not {order}: {error}." for order, error in refused.items()),
            *_quantised(model),
            *_unrunnable(model),
            *_notes(
                job,
                ranks,
                on_gpu,
                covered,
                dense,
                sum(target.by_example for target in targets),
                any(rates),
            ),
        ],
    )


def _by_layer(targets: Sequence[Target]) -> dict[int | None, list[Target]]:
    found: dict[int | None, list[Target]] = {}
    for target in targets:
        found.setdefault(target.layer_index, []).append(target)
    return found


def _too_small(budget: int, least: int, tokens: int) -> ValueError:
    return ValueError(
        f"memory_budget must be at least {least:,} layer by layer, for the sums of one matrix and "
        f"what its window holds of a batch of {tokens:,} tokens, got {budget:,}; raise it or lower "
        "tokens_per_batch"
    )


def _holding(
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


def _lengths(job: EstimateJob, ranks: int) -> list[tuple[int, int]]:
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


def _received(
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


def _batched(
    model: Any, job: EstimateJob, lengths: Sequence[tuple[int, int]], blocks: int, device: Any
) -> tuple[Any, int]:
    """The batches that the examples make, packed in their order, and how many these are.

    Args:
        blocks: of how many blocks the rank makes the sums; a batch has examples of one.
    """
    from fastdean.coupling.layers.needed_memory import Rows
    from fastdean.models.forward import tokens_per_batch_of

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


def _operations(
    model: Any,
    layers: Sequence[Any],
    targets: Sequence[Any],
    lengths: Sequence[tuple[int, int]],
    job: EstimateJob,
    split: Split,
) -> dict[str, float]:
    """FLOP of each part; matrices, and attention's products of all pairs of an example's tokens."""
    from fastdean.models.experts.fused import chosen_experts
    from fastdean.models.forward import matrices_of
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


def _rates(job: EstimateJob, model: Any) -> tuple[float | None, float | None]:
    if not job.measure:
        return job.flops, job.bandwidth
    import torch

    dtype = next(model.parameters()).dtype
    left, right = (torch.ones(_PRODUCT, _PRODUCT, dtype=dtype) for _ in range(2))
    source = torch.ones(_COPY_BYTES, dtype=torch.uint8)
    target = torch.empty_like(source)
    product = _fastest(lambda: torch.mm(left, right))
    copied = _fastest(lambda: target.copy_(source))
    return 2.0 * _PRODUCT**3 / product, 2.0 * _COPY_BYTES / copied


def _fastest(call: Callable[[], Any]) -> float:
    """Seconds of the fastest of several calls."""
    import time

    found: list[float] = []
    while len(found) < 3 or sum(found) < _LEAST_SECONDS:
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return min(found)


def _seconds(
    operations: float, read: int, rates: tuple[float | None, float | None]
) -> float | None:
    """What no implementation can be faster than at these rates."""
    flops, bandwidth = rates
    found = [0.0 if flops is None else operations / flops]
    found.append(0.0 if bandwidth is None else read / bandwidth)
    return None if flops is None and bandwidth is None else max(found)


def _base() -> int:
    """What this process holds once it has scored a tiny model: Python, torch, transformers."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from fastdean.coupling.scoring import score
    from fastdean.data.examples import Example
    from fastdean.models.available_memory import resident_memory

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    with torch.random.fork_rng(devices=[]):
        tiny = LlamaForCausalLM(config).eval()
    ids = torch.arange(2, 10)
    for order in ("batches", "layers"):
        score(tiny, [Example(ids, ids)] * 2, keep_top=0.5, order=order, progress=False)
    return resident_memory() or 0


def _quantised(model: Any) -> list[str]:
    """A sentence on a checkpoint whose weights are counted as what they are not in its files."""
    asked = getattr(model.config, "quantization_config", None)
    if not asked:
        return []
    settings = asked if isinstance(asked, dict) else asked.to_dict()
    method = str(settings.get("quant_method") or "no name").split(".")[-1].lower()
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    return [
        f"The checkpoint's weights are quantised ({one_line(method)}), and counted in {dtype}: "
        "only weights that are no longer quantised once they are loaded can be scored."
    ]


def _notes(
    job: EstimateJob,
    ranks: int,
    on_gpu: bool,
    covered: dict[str, Any],
    dense: bool,
    by_example: int,
    timed: bool,
) -> list[str]:
    found = []
    if job.tensor_parallel > 1:
        owned = " and owns whole experts" if job.expert_parallel > 1 else ""
        found.append(
            f"Each of the {job.tensor_parallel} ranks of a model has its part of the weights that "
            f"the plan splits{owned}, with their sums, and all examples of the model's share."
        )
    elif ranks > 1:
        found.append(
            f"Each of the {ranks} ranks holds the whole model, all sums and its own batch; only "
            "examples, and what layers return for them, are divided. Of a model that FSDP2 shards "
            "the weights are divided too, but for one layer at a time and what is outside of the "
            "layers."
        )
    if on_gpu:
        found.append("What the GPU's driver and libraries take for themselves is not counted.")
    if dense:
        found.append("With keep_top 1 the sums of all data sets stay to the end.")
        if job.granularity == "weight":
            found.append("Weights cannot stay in their files then: streaming needs keep_top.")
    if by_example:
        verb = "is" if by_example == 1 else "are"
        found.append(
            f"{_counted(by_example, 'parameter')} {verb} scored by example: a forward and backward "
            "pass for each example, in a batch of its own, is counted beside the others."
        )
    unscorable = covered["unscorable"]
    share = sum(unscorable.values()) / max(1, covered["model_parameters"])
    # Routers alone are less than can be said in whole percents.
    if share >= _SAID:
        found.append(
            f"{share:.0%} of the parameters are in tensors that are not scored and have no sums, "
            f"such as {max(unscorable, key=unscorable.__getitem__)}."
        )
    if timed:
        found.append("Reading files takes the disk's time, which is in no figure.")
    return found


def _unrunnable(model: Any) -> list[str]:
    """A sentence where queries and keys, as attention usually pairs them, do not go together."""
    from fastdean.models.model_state import text_config

    config = text_config(model)
    heads, keys = (
        getattr(config, name, None) for name in ("num_attention_heads", "num_key_value_heads")
    )
    if not (isinstance(heads, int) and isinstance(keys, int)) or (keys > 0 and not heads % keys):
        return []
    return [
        f"The configuration's num_key_value_heads ({keys}) does not divide its num_attention_heads "
        f"({heads}): attention that shares keys among its queries cannot run like that."
    ]


def _counted(number: int, word: str, plural: str | None = None) -> str:
    return f"{number:,} {word if number == 1 else plural or f'{word}s'}"


def _gb(size: float) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.0f} MB"


def _time(seconds: float) -> str:
    for unit, name in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds:.2g} s"


def _lines(found: Estimate) -> list[str]:
    model, work, memory = found.model, found.work, found.memory
    head = ["", *(f"{name}" for name in found.orders)]
    table = [
        head,
        ["peak", *(_gb(each.peak_bytes) for each in found.orders.values())],
    ]
    names = list(dict.fromkeys(name for each in found.orders.values() for name in each.parts))
    for name in names:
        sizes = (each.parts.get(name) for each in found.orders.values())
        table.append([f"  {name}", *("-" if size is None else _gb(size) for size in sizes)])
    table.append(
        [
            "all states",
            *(
                "-"
                if not e.states
                else ", ".join(f"{_gb(size)} {place}" for place, size in e.states.items())
                for e in found.orders.values()
            ),
        ]
    )
    for name in ("forward", "recomputed_forward", "backward", "importance"):
        values = (each.operations[name] / 1e12 for each in found.orders.values())
        table.append([f"{name.replace('_', ' ')}, TFLOP", *(f"{v:,.3g}" for v in values)])
    for name, key in (("weights read", "weights_read_bytes"), ("of files", "files_read_bytes")):
        table.append([name, *(_gb(getattr(each, key)) for each in found.orders.values())])
    for kind in ("sums", "candidates", "weights", "activations"):
        received = [each.received.get(kind) for each in found.orders.values()]
        if any(received):
            table.append([f"{kind} of other ranks", *(_gb(n) if n else "-" for n in received)])
    if any(each.passes > 1 for each in found.orders.values()):
        table.append(["passes", *(str(each.passes) for each in found.orders.values())])
    if any(each.seconds is not None for each in found.orders.values()):
        times = (each.seconds for each in found.orders.values())
        table.append(["time, at least", *(_time(t or 0) for t in times)])
    widths = [max(len(row[i]) for row in table) for i in range(len(head))]
    # Where ranks hold a model together, sizes are those of a rank and counts those of the model.
    of_a_rank = " a rank" if found.machine["ranks_of_a_model"] > 1 else ""
    return [
        found.verdict,
        f"{model['class']}, {_counted(model['parameters'], 'parameter')} in {model['dtype']} "
        f"({_gb(memory['weights'])}{of_a_rank}), {_counted(model['layers'], 'layer')}; "
        f"{_counted(found.targets['matrices'], 'matrix', 'matrices')} scored "
        f"({_counted(found.targets['weights'], 'weight')}, "
        f"{_gb(memory['sums'])} of sums{of_a_rank}).",
        f"{work['sets']} x "
        f"{_counted(work['examples_of_a_rank'] // work['sets'], 'example')} a rank, "
        f"{_counted(work['tokens_of_a_rank'], 'token')} in "
        f"{_counted(work['batches_of_a_rank'], 'batch', 'batches')} of at most "
        f"{work['tokens_of_the_largest_batch']:,}.",
        "",
        *(
            "  ".join(
                cell.ljust(w) if i == 0 else cell.rjust(w)
                for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in table
        ),
        "",
        _moments(found),
        *found.notes,
    ]


def _moments(found: Estimate) -> str:
    """Of which moment the parts of each column are."""
    names: dict[str, list[str]] = {}
    for name, each in found.orders.items():
        names.setdefault(each.moment, []).append(f'"{name}"')
    said = "; ".join(f"{' and '.join(orders)}: {moment}" for moment, orders in names.items())
    return f"Each column has the parts of its own peak, when it is reached ({said})."
