"""What an edit changed in a model, each figure with its noise."""

from fastdean.evaluation.bootstrap import Interval, bootstrap_interval, paired_bootstrap
from fastdean.evaluation.margins import (
    Margins,
    Pair,
    compare_margins,
    compare_shares,
    encode_pairs,
    response_margins,
)
from fastdean.evaluation.perplexity import (
    Perplexity,
    compare_perplexity,
    perplexity,
    perplexity_of_text,
)
from fastdean.evaluation.representations import (
    last_token_states,
    layer_dependence,
    prompts_only,
)

__all__ = [
    "Interval",
    "Margins",
    "Pair",
    "Perplexity",
    "bootstrap_interval",
    "compare_margins",
    "compare_perplexity",
    "compare_shares",
    "encode_pairs",
    "last_token_states",
    "layer_dependence",
    "paired_bootstrap",
    "perplexity",
    "perplexity_of_text",
    "prompts_only",
    "response_margins",
]
