"""The job of `fastdean estimate`: what a scoring will need, before any weight is read.

From the model's configuration, on the meta device, and the lengths of the examples. Memory is the
estimate of `coupling/layers/needed_memory.py`, operations are counted, and time is stated only from
rates that somebody gave or that are measured here.
"""

from __future__ import annotations

from typing import Any

from fastdean.default_device import cpu_by_default
from fastdean.jobs.estimate.found import Estimate
from fastdean.jobs.estimate.job import EstimateJob
from fastdean.jobs.estimate.notes import notes, quantised, unrunnable


@cpu_by_default
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
    from fastdean.jobs.estimate.machine import Machine
    from fastdean.jobs.estimate.orders import Orders
    from fastdean.jobs.estimate.planned import Planned
    from fastdean.jobs.estimate.windows import Windows

    planned = Planned.of(job)
    machine = Machine.of(job, planned.model)
    windows = Windows.of(job, planned)
    orders = Orders(job, planned, machine, windows)
    found = orders.all()
    if not found:
        raise next(iter(windows.refused.values()))
    memory, rows = planned.memory, planned.rows
    return Estimate(
        model={
            "class": type(planned.model).__name__,
            "parameters": planned.covered["model_parameters"],
            "dtype": str(planned.dtype).removeprefix("torch."),
            "layers": len(planned.layers),
        },
        targets={
            "matrices": len(planned.targets),
            "weights": planned.covered["scored_parameters"],
        },
        work={
            "sets": job.sets,
            "examples_of_a_rank": len(planned.lengths),
            "tokens_of_a_rank": rows.all,
            "target_tokens_of_the_largest_batch": rows.targets,
            "tokens_of_the_largest_batch": rows.batch,
            "batches_of_a_rank": planned.batches,
        },
        machine={
            "device": "GPU" if machine.on_gpu else "CPU",
            "memory_bytes": machine.memory,
            "ranks": planned.ranks,
            "ranks_of_a_model": planned.split.ranks,
            "flops": machine.rates[0],
            "bandwidth": machine.rates[1],
            "rates": "measured" if job.measure else "given" if any(machine.rates) else None,
        },
        memory={
            "base": machine.base,
            "weights": memory.weights,
            "largest_layer": max((layer.weights for layer in memory.layers), default=0),
            "sums": windows.every,
            "largest_layer_sums": max(windows.sums.values()),
            "states": memory.states(rows.all),
            "one_batch": memory.batch(rows),
            "one_window": max(memory.window(k, rows) for k in (None, *range(len(planned.layers)))),
            "scores_kept": planned.results_bytes,
        },
        orders=found,
        notes=[
            *(f"Not {order}: {error}." for order, error in windows.refused.items()),
            *quantised(planned.model),
            *unrunnable(planned.model),
            *notes(
                job,
                planned.ranks,
                machine.on_gpu,
                planned.covered,
                planned.dense,
                sum(target.by_example for target in planned.targets),
                any(machine.rates),
            ),
        ],
    )
