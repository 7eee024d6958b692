"""What an edit changed in a model, each figure with its noise."""

from fastdean.evaluation.answers.generation import Answer, generate
from fastdean.evaluation.divergence import (
    Divergence,
    divergence_interval,
    perplexity_and_divergence,
)
from fastdean.evaluation.hidden_states import (
    last_token_states,
    layer_dependence,
    prompts_only,
)
from fastdean.evaluation.judging.agreement import Agreement, cohen_kappa
from fastdean.evaluation.judging.calling import judge
from fastdean.evaluation.judging.phrases import refuses
from fastdean.evaluation.judging.templates import JudgeTemplate, Verdict, read_template
from fastdean.evaluation.margins import (
    Margins,
    Pair,
    compare_margins,
    compare_shares,
    encode_pairs,
    margin_interval,
    response_margins,
)
from fastdean.evaluation.over_refusal import OverRefusal, over_refusal
from fastdean.evaluation.perplexity import (
    Perplexity,
    compare_perplexity,
    perplexity,
    perplexity_of_text,
)
from fastdean.evaluation.statistics.bootstrap import bootstrap_interval
from fastdean.evaluation.statistics.changes import change_between, change_of_distance
from fastdean.evaluation.statistics.families import Family, holm, judged_together
from fastdean.evaluation.statistics.intervals import (
    Interval,
    mean_interval,
    share_change_interval,
    share_interval,
)
from fastdean.evaluation.statistics.mcnemar import compare_yes_no
from fastdean.evaluation.statistics.power import detectable_change, detectable_share_change

__all__ = [
    "Agreement",
    "Answer",
    "Divergence",
    "Family",
    "Interval",
    "JudgeTemplate",
    "Margins",
    "OverRefusal",
    "Pair",
    "Perplexity",
    "Verdict",
    "bootstrap_interval",
    "change_between",
    "change_of_distance",
    "cohen_kappa",
    "compare_margins",
    "compare_perplexity",
    "compare_shares",
    "compare_yes_no",
    "detectable_change",
    "detectable_share_change",
    "divergence_interval",
    "encode_pairs",
    "generate",
    "holm",
    "judge",
    "judged_together",
    "last_token_states",
    "layer_dependence",
    "margin_interval",
    "mean_interval",
    "over_refusal",
    "perplexity",
    "perplexity_and_divergence",
    "perplexity_of_text",
    "prompts_only",
    "read_template",
    "refuses",
    "response_margins",
    "share_change_interval",
    "share_interval",
]
