"""The first paper's settings, each with its source, and what is added to them here.

[paper] DEAN, arXiv 2410.16672, also SPIN, ACL 2025 (acl-long.590). [code] github.com/ChnQ/SPIN at
d708d83. [ours] neither says it, or both do otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass

EXAMPLES = 128  # of each set. [code] README, --nsamples
SEEDS = 5  # 0 to 4, of the shuffled rows. [paper] 0 alone; the others are [ours]
RATIO = 5e-7  # [code] README, --p and --q; the ratio of each model in Table 1 is not published
TARGET_MODULES = "mlp"  # [code] README, --target_module
TEMPLATE = "published"  # of scored rows, tok(prompt) ++ tok(response)[1:]. [code] utils.py
ANSWER_TEMPLATE = "raw"  # the question by itself. [code] eval_salad.py
MAX_NEW_TOKENS = 64  # greedy. [code] eval_salad.py
# The first is [code] eval_salad.py, in words of this project; the second [ours], for agreement.
JUDGES = ("md-judge-v0.1", "qwen3guard-gen")
# [paper] general ability; the name of GPQA's variant and the shots of each are lm-eval's, [ours].
TASKS = ("hellaswag", "race", "mmlu", "gpqa_main_zeroshot", "openbookqa", "boolq")


@dataclass(frozen=True)
class Source:
    """Rows of one purpose.

    Attributes:
        usual: a SRC, see `fastdean.data.load_rows`.
        file: what the authors' folder src/data calls its own; None: it has none.
        rows: how many the authors took or have; None: not known, or of no use.
        category: of SALAD, which rows of `usual` are taken.
    """

    usual: str
    file: str | None = None
    rows: int | None = None
    category: str | None = None


_SALAD = "OpenSafetyLab/Salad-Data::config=base_set"
SCORED = ("fairness", "privacy", "general")
ASKED = ("salad_fairness", "salad_privacy", "benign")
SOURCES = {
    # [code] README, --dataset: safe answers of BeaverTails 330k; the preset selects its own rows.
    "fairness": Source("beavertails:fairness", "beaver_train330k_fairness_safe_1k.csv"),
    "privacy": Source("beavertails:privacy", "beaver_train330k_privacy_safe_1k.csv"),
    # [code] alpaca_cleaned without rows on safety; the preset keeps those.
    "general": Source("alpaca-cleaned", "alpaca_cleaned_no_safety_train.csv"),
    # [code] eval_salad.py. Which of SALAD's categories its files hold is not published: [ours].
    "salad_fairness": Source(
        _SALAD, "salad_fairness.csv::prompt=questions", 2165, "O2: Unfair Representation"
    ),
    "salad_privacy": Source(
        _SALAD, "salad_privacy.csv::prompt=questions", 657, "O9: Privacy Infringement"
    ),
    # [ours] Benign prompts that sound harmful: the paper shows no test of over-refusal.
    "benign": Source("embedded:benign"),
    # [code] eval_ppl.py: the test part, joined by empty lines, in windows that do not overlap.
    "text": Source("Salesforce/wikitext::config=wikitext-2-raw-v1,split=test"),
}


@dataclass(frozen=True)
class Edit:
    """Which weights are set to zero.

    Attributes:
        about: as the table calls it.
        rule: see `fastdean.couple`.
        sets: first and second.
        spares: whether the general set's are left alone.
    """

    about: str
    rule: str
    sets: tuple[str, str] = ("fairness", "privacy")
    spares: bool = True


COUPLED, RANDOM = "coupled", "random"
EDITS = {
    # [paper] (fairness and privacy) without general.
    COUPLED: Edit("coupled, as the paper defines it", "paper"),
    # [code] SPIN.py compares positions of two lists, privacy's first as in its README.
    "released": Edit("the released code's rule", "released", ("privacy", "fairness")),
    # Controls, [ours].
    RANDOM: Edit("as many random weights", "random"),
    "fairness": Edit("fairness alone", "first"),
    "privacy": Edit("privacy alone", "second"),
    "unspared": Edit("coupled, general not spared", "paper", spares=False),
}

# [paper] Table 1, awareness of fairness and privacy, and perplexity; by the end of a model's name.
PUBLISHED = {
    "Qwen2-7B-Instruct": {
        "origin": (0.6684, 0.7412, 6.439),
        "DEAN": (0.7497, 0.8447, 6.510),
    },
    "Mistral-7B-Instruct-v0.2": {
        "origin": (0.6231, 0.6636, 5.062),
        "DEAN": (0.6342, 0.7154, 5.089),
    },
    "vicuna-7b-v1.5": {
        "origin": (0.5501, 0.3760, 6.334),
        "DEAN": (0.5778, 0.4414, 6.350),
    },
    "Llama-2-7b-chat-hf": {
        "origin": (0.7386, 0.7504, 7.083),
        "DEAN": (0.7746, 0.8432, 7.131),
    },
}
