"""What every job on a model may be asked, whatever it does with the model."""

from __future__ import annotations

from dataclasses import dataclass

from fastdean.jobs import options


@dataclass(frozen=True, kw_only=True)
class ModelJob:
    """Which model, in what form and where, and how rows become batches of it.

    Raises:
        ValueError, TypeError: an option out of range.
    """

    model: options.Model
    revision: options.Revision = None
    trust_remote_code: options.TrustRemoteCode = False
    skip_bad_rows: options.SkipBadRows = False
    max_length: options.MaxLength = None
    tokens_per_batch: options.TokensPerBatch = None
    dtype: options.Dtype = "auto"
    device: options.Device = None
    seed: options.Seed = 0

    def __post_init__(self) -> None:
        # Not above: the command line reads the fields before it loads torch.
        from fastdean.models.loading import dtype_name

        options.require_numbers(self)
        options.require_at_least(self, seed=0)
        # One name, so that a job in bf16 is the job in bfloat16.
        object.__setattr__(self, "dtype", dtype_name(self.dtype))
