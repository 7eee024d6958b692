"""What an estimate measures here: two rates, and what Python and its libraries take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastdean.jobs.estimate.job import EstimateJob

# A product and a copy that are large enough to be timed, and take a fraction of a second.
_PRODUCT, _COPY_BYTES, _LEAST_SECONDS = 1024, 64 << 20, 0.2


def rates(job: EstimateJob, model: Any) -> tuple[float | None, float | None]:
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


def seconds(operations: float, read: int, rates: tuple[float | None, float | None]) -> float | None:
    """What no implementation can be faster than at these rates."""
    flops, bandwidth = rates
    found = [0.0 if flops is None else operations / flops]
    found.append(0.0 if bandwidth is None else read / bandwidth)
    return None if flops is None and bandwidth is None else max(found)


def base_bytes() -> int:
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
