"""What `fastdean estimate` is asked."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any

from fastdean.jobs import options
from fastdean.jobs.options import SOURCE_HELP, Help
from fastdean.wording.granularity import checked_granularity

_UNITS = {"": 1, "b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12}
_UNITS |= {"kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}
_SIZE = re.compile(r"([\d.]+(?:e\+?\d+)?)\s*([kmgt]?i?b?)", re.IGNORECASE)
# No memory is that small: a number below it lacks its unit.
_LEAST_BYTES = 100_000
_MOST_RANKS, _MOST_EXAMPLES = 1_000_000, 10_000_000


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
