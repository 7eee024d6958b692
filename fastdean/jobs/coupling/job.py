"""What the main job, and the scoring of one data set, are asked to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from fastdean.jobs import options
from fastdean.jobs.coupling.data_sets import DATA_SETS, DataSets
from fastdean.jobs.model_job import ModelJob
from fastdean.jobs.options import SOURCE_HELP, Help, read_names, read_ratios, read_sets
from fastdean.wording.granularity import checked_granularity
from fastdean.wording.mendable import InputTypeError

__all__ = ["DATA_SETS", "Job", "ScoreJob"]

# Ratios at which the overlap of the sets is shown; scores keep as much as the largest needs.
_CURVE = {
    "weight": (1e-6, 2e-6, 5e-6, 1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3),
    "unit": (1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1),
}


@dataclass(frozen=True, kw_only=True)
class ScoringJob(ModelJob):
    """How data sets are scored; see `fastdean.score`.

    Raises:
        ValueError, TypeError: an option out of range.
    """

    examples: options.Examples = 128
    granularity: options.Granularity = "weight"
    target_modules: options.TargetModules = "mlp"
    expert_scope: options.ExpertScope = "expert"
    template: options.Template = None
    memory_budget: options.MemoryBudget = None
    order: options.Order = "auto"
    states: options.States = "auto"
    deterministic: options.Deterministic = False
    rank_timeout: options.RankTimeout = None

    def __post_init__(self) -> None:
        # Not above: the command line reads the fields before it loads torch.
        from fastdean.coupling.asked import ORDERS
        from fastdean.coupling.results.scores import EXPERT_SCOPES
        from fastdean.models.ranks.distributed import check_rank_timeout

        super().__post_init__()
        object.__setattr__(self, "granularity", checked_granularity(self.granularity))
        options.require_one_of(self, "order", ORDERS)
        options.require_one_of(self, "expert_scope", EXPERT_SCOPES)
        options.require_template(self)
        options.require_at_least(self, examples=1)
        check_rank_timeout(self.rank_timeout)


@dataclass(frozen=True, kw_only=True)
class Job(ScoringJob):
    """What is asked for; two runs with equal jobs give equal results.

    Attributes:
        model, revision, trust_remote_code: see `loading.load_model`.
        fairness, privacy, general: see `sources.load_rows`; three sets of these names, of which the
            first two are coupled and the third is spared.
        sets: any number of sets instead, name -> SRC; all are scored and measured.
        couple: the names of the two that are coupled; with `sets`.
            `general` then names those that are spared, none where it is left out. Names may stand
            in one text, separated by commas.
        ratio: share of a matrix's entries in each top set; None: 5e-7 for weights, 1e-3 for units.
        rule, scope, min_k, signs: see `coupling.couple`.
        examples: rows of each source that are scored; None: all.
        eval_examples: rows, of other prompts than these where there are any, that are measured on.
        general_grid: ratios of the general sets alone, at which masks of the same rule and ratio
            are measured beside the job's own; None: no others.
        bias: measures taken without and with each mask, "name" or "name=SRC": see
            `jobs.bias.asked.MEASURES`.
        start_token: of their likelihoods, see `evaluation.bias.start.start_token`.
        bias_template: of their prompts, see `evaluation.over_refusal`; None: by the tokenizer.
        answers: measured prompts of each set that the model answers; at most `eval_examples`.
        memory_budget: in bytes; it, order, states and rank_timeout: see `fastdean.score`.
    Raises:
        ValueError, TypeError: an option out of range; raised here rather than after hours of work.
    """

    fairness: Annotated[str | None, Help(f"SRC of fairness rows: {SOURCE_HELP}.")] = None
    privacy: Annotated[str | None, Help("SRC of privacy rows.")] = None
    general: Annotated[
        str | Sequence[str] | None,
        Help(
            "SRC of general instruction rows, to be spared; with --set the names of the sets to "
            "spare, separated by commas.",
            typed=list[str] | None,
            read=read_names,
            metavar="SRC|NAMES",
        ),
    ] = None
    sets: Annotated[
        Mapping[str, str] | None,
        Help(
            "A data set of any name, instead of the three above; once for each of them.",
            typed=list[str] | None,
            read=read_sets,
            metavar="NAME=SRC",
            flag="--set",
        ),
    ] = None
    couple: Annotated[
        str | Sequence[str] | None,
        Help(
            "With --set, the two sets to couple, separated by a comma.",
            typed=list[str] | None,
            read=read_names,
            metavar="NAME,NAME",
        ),
    ] = None
    ratio: options.Ratio = None
    rule: options.Rule = "paper"
    eval_examples: Annotated[
        int, Help("Other rows of each source to measure on; 0 measures nothing.")
    ] = 64
    general_grid: Annotated[
        Sequence[float] | None,
        Help(
            "Measure masks of other general ratios too, the price against what is spared: ratios "
            "such as 1e-5,1e-4,1e-3. Each takes a measurement, as a control does; above 1e-3 "
            "(units 1e-1) all scores keep more, see estimate --keep-top.",
            typed=str | None,
            read=read_ratios,
            metavar="RATIO,RATIO",
        ),
    ] = None
    bias: options.Bias = ()
    start_token: options.StartToken = "auto"
    bias_template: options.BiasTemplate = None
    answers: Annotated[
        int,
        Help(
            "Measured prompts of each set that the model answers, without a mask and with each, 64 "
            "tokens at most; how many refuse is counted by phrases. Takes minutes on a CPU."
        ),
    ] = 0
    scope: options.Scope = "matrix"
    min_k: options.MinK = 0
    signs: options.Signs = "any"
    scale: options.Scale = 0.0

    def __post_init__(self) -> None:
        self.data_sets  # noqa: B018  checked here
        # Not above: the command line reads the fields before it loads torch.
        from fastdean.coupling.selection.agreement import SIGNS, require_rule_for
        from fastdean.coupling.sets import RULES, SCOPES
        from fastdean.jobs.bias import asked as bias_asked
        from fastdean.masks.entries import checked_scale

        super().__post_init__()
        object.__setattr__(self, "bias", tuple(self.bias))
        bias_asked.check(self.bias, self.start_token, self.bias_template)
        options.require_one_of(self, "rule", tuple(RULES))
        options.require_one_of(self, "scope", SCOPES)
        options.require_one_of(self, "signs", SIGNS)
        require_rule_for(self.signs, self.rule)
        if not 0 < self.effective_ratio <= 1:
            raise ValueError(f"ratio must be above 0 and at most 1, got {self.ratio}")
        options.require_at_least(self, min_k=0, eval_examples=0, answers=0)
        if self.answers > self.eval_examples:
            raise ValueError(
                f"answers must be at most eval_examples, {self.eval_examples}, got {self.answers}; "
                "they answer prompts that are measured on"
            )
        if self.general_grid is not None:
            object.__setattr__(self, "general_grid", self._checked_grid())
        if self.min_k and self.scope == "model":
            raise ValueError(
                f"min_k must be 0 with scope='model', where no matrix has a share of its own, got "
                f"{self.min_k}"
            )
        checked_scale(self.scale)

    @property
    def data_sets(self) -> DataSets:
        return DataSets.of(self.fairness, self.privacy, self.general, self.sets, self.couple)

    def asked(self) -> dict[str, Any]:
        """The options as plain values, the same for the same sets in either form."""
        found, sets = options.plain_options(self), self.data_sets
        if sets.are_the_three:
            found |= sets.sources
            del found["sets"], found["couple"]
        else:
            del found["fairness"], found["privacy"]
            found |= {"sets": dict(sets.sources), "couple": list(sets.coupled)}
            found["general"] = list(sets.spared)
        return found

    @property
    def measures(self) -> bool:
        """Whether anything is measured with the masks."""
        return bool(self.eval_examples or self.bias or self.answers)

    @property
    def effective_ratio(self) -> float:
        from fastdean.coupling.sets import DEFAULT_RATIO

        return DEFAULT_RATIO[self.granularity] if self.ratio is None else self.ratio

    def _checked_grid(self) -> tuple[float, ...]:
        """The ratios of the grid, ascending and each once."""
        given = self.general_grid
        if isinstance(given, str) or not isinstance(given, Sequence) or not given:
            raise InputTypeError(
                f"general_grid must be ratios, got {given!r}; pass a list such as [1e-5, 1e-4]"
            )
        for ratio in given:
            options.require_real("general_grid", ratio)
            if not 0 < ratio <= 1:
                raise ValueError(
                    f"general_grid must hold ratios above 0 and at most 1, got {ratio}; leave it "
                    "out"
                )
        if not self.data_sets.spared:
            raise ValueError(
                f"general_grid must be left out where no set is spared, got {list(given)}; name "
                "one with general"
            )
        return tuple(sorted({float(ratio) for ratio in given}))

    @property
    def curve(self) -> list[float]:
        """The ratios at which the overlap is shown, the job's own among them."""
        return sorted({*_CURVE[self.granularity], self.effective_ratio})


@dataclass(frozen=True, kw_only=True)
class ScoreJob(ScoringJob):
    """What is scored; see `fastdean.score` and `Job`.

    Raises:
        ValueError: an option out of range; raised here rather than after the model is loaded.
    """

    data: Annotated[str, Help(f"SRC: {SOURCE_HELP}.")]
    keep_top: Annotated[
        float | None, Help("Keep only this share of each matrix; 1 keeps all, with its size.")
    ] = 1e-3
    signs: Annotated[
        bool, Help("Keep the signs of the effects too, for couple's --signs; takes more memory.")
    ] = False

    def __post_init__(self) -> None:
        from fastdean.coupling.results.scores import check_keep_top

        super().__post_init__()
        check_keep_top(self.keep_top)
