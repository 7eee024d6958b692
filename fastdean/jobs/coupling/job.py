"""What the main job, and the scoring of one data set, are asked to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastdean.jobs import options
from fastdean.jobs.options import SOURCE_HELP, Help
from fastdean.wording.granularity import checked_granularity

DATA_SETS = ("fairness", "privacy", "general")

# Ratios at which the overlap of the sets is shown; scores keep as much as the largest needs.
_CURVE = {
    "weight": (1e-6, 2e-6, 5e-6, 1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3),
    "unit": (1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1),
}


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is asked for; two runs with equal jobs give equal results.

    Attributes:
        model, revision, trust_remote_code: see `loading.load_model`.
        fairness, privacy, general: see `sources.load_rows`.
        ratio: share of a matrix's entries in each top set; None: 5e-7 for weights, 1e-3 for units.
        rule, scope, min_k, signs: see `coupling.couple`.
        examples: rows of each source that are scored; None: all.
        eval_examples: rows, of other prompts than these where there are any, that are measured on.
        memory_budget: in bytes; it, order and states: see `fastdean.score`.
    Raises:
        ValueError, TypeError: an option out of range; raised here rather than after hours of work.
    """

    model: options.Model
    fairness: Annotated[str, Help(f"SRC of fairness rows: {SOURCE_HELP}.")]
    privacy: Annotated[str, Help("SRC of privacy rows.")]
    general: Annotated[str, Help("SRC of general instruction rows, to be spared.")]
    revision: options.Revision = None
    trust_remote_code: options.TrustRemoteCode = False
    ratio: options.Ratio = None
    rule: options.Rule = "paper"
    examples: options.Examples = 128
    eval_examples: Annotated[
        int, Help("Other rows of each source to measure on; 0 measures nothing.")
    ] = 64
    granularity: options.Granularity = "weight"
    target_modules: options.TargetModules = "mlp"
    scope: options.Scope = "matrix"
    min_k: options.MinK = 0
    signs: options.Signs = "any"
    scale: options.Scale = 0.0
    skip_bad_rows: options.SkipBadRows = False
    template: options.Template = None
    max_length: options.MaxLength = None
    tokens_per_batch: options.TokensPerBatch = None
    memory_budget: options.MemoryBudget = None
    order: options.Order = "auto"
    states: options.States = "auto"
    deterministic: options.Deterministic = False
    dtype: options.Dtype = "auto"
    device: options.Device = None
    seed: options.Seed = 0

    def __post_init__(self) -> None:
        options.require_numbers(self)
        # Not above: the command line reads the fields before it loads torch.
        from fastdean.coupling.agreement import SIGNS, require_rule_for
        from fastdean.coupling.order import ORDERS
        from fastdean.coupling.sets import RULES, SCOPES
        from fastdean.masks.entries import checked_scale
        from fastdean.models.loading import dtype_name

        object.__setattr__(self, "granularity", checked_granularity(self.granularity))
        for name, allowed in (
            ("rule", tuple(RULES)),
            ("scope", SCOPES),
            ("signs", SIGNS),
            ("order", ORDERS),
        ):
            options.require_one_of(self, name, allowed)
        require_rule_for(self.signs, self.rule)
        options.require_template(self)
        if not 0 < self.effective_ratio <= 1:
            raise ValueError(f"ratio must be above 0 and at most 1, got {self.ratio}")
        options.require_at_least(self, min_k=0, eval_examples=0, examples=1, seed=0)
        if self.min_k and self.scope == "model":
            raise ValueError(
                f"min_k must be 0 with scope='model', where no matrix has a share of its own, got "
                f"{self.min_k}"
            )
        checked_scale(self.scale)
        # One name, so that a job in bf16 is the job in bfloat16.
        object.__setattr__(self, "dtype", dtype_name(self.dtype))

    @property
    def effective_ratio(self) -> float:
        from fastdean.coupling.sets import DEFAULT_RATIO

        return DEFAULT_RATIO[self.granularity] if self.ratio is None else self.ratio

    @property
    def curve(self) -> list[float]:
        """The ratios at which the overlap is shown, the job's own among them."""
        return sorted({*_CURVE[self.granularity], self.effective_ratio})


@dataclass(frozen=True, kw_only=True)
class ScoreJob:
    """What is scored; see `fastdean.score` and `Job`.

    Raises:
        ValueError: an option out of range; raised here rather than after the model is loaded.
    """

    model: options.Model
    data: Annotated[str, Help(f"SRC: {SOURCE_HELP}.")]
    revision: options.Revision = None
    trust_remote_code: options.TrustRemoteCode = False
    examples: options.Examples = 128
    granularity: options.Granularity = "weight"
    target_modules: options.TargetModules = "mlp"
    keep_top: Annotated[
        float, Help("Keep only this share of each matrix; 1 keeps all, with its size.")
    ] = 1e-3
    signs: Annotated[
        bool, Help("Keep the signs of the effects too, for `couple --signs`; takes more memory.")
    ] = False
    skip_bad_rows: options.SkipBadRows = False
    template: options.Template = None
    max_length: options.MaxLength = None
    tokens_per_batch: options.TokensPerBatch = None
    memory_budget: options.MemoryBudget = None
    order: options.Order = "auto"
    states: options.States = "auto"
    deterministic: options.Deterministic = False
    dtype: options.Dtype = "auto"
    device: options.Device = None
    seed: options.Seed = 0

    def __post_init__(self) -> None:
        options.require_numbers(self)
        from fastdean.coupling.order import ORDERS
        from fastdean.coupling.scores import check_keep_top

        object.__setattr__(self, "granularity", checked_granularity(self.granularity))
        options.require_one_of(self, "order", ORDERS)
        options.require_template(self)
        options.require_at_least(self, examples=1, seed=0)
        check_keep_top(self.keep_top)
