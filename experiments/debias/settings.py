"""What the second paper trained with, method by method, and which data it is measured on.

Each value stands with its source: a file of the released code (github.com/Xujxyang/Fairness-NC-main
unless another repository is named), or "ours" where none is published. The paper is arXiv
2410.04472. Where this package does something else, `departures` says so; docs/methods.md has those
of the losses and measures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from fastdean.evaluation.classifier import HeadCourse


class Sourced(NamedTuple):
    value: Any
    source: str


@dataclass(frozen=True)
class Training:
    """One method's settings; `data`: sources, or None where no hub id is known."""

    strength: Sourced
    learning_rate: Sourced
    epochs: Sourced
    batch_size: Sourced
    accumulation: Sourced
    max_length: Sourced
    data: Sourced
    departures: tuple[str, ...] = ()

    def values(self) -> dict[str, Any]:
        return {name: entry.value for name, entry in vars(self).items() if name != "departures"}


_ONE = Sourced(1, "no accumulation in the script")
_BEC, _ASE, _MABEL = "bec/code/main_nc.py", "ase/finetune_both_nc.py", "mabel/training/run.sh"
_ADEPT = "adept/scripts/debias.sh"
# The parquet form that the hub makes of a data set with a script, which is not run any more.
_GAP = "google-research-datasets/gap::revision=refs/convert/parquet,text=Text"

PUBLISHED: dict[str, Training] = {
    "bec": Training(
        strength=Sourced(100.0, f"{_BEC}: loss + 100 * loss_nc3"),
        learning_rate=Sourced(2e-5, _BEC),
        epochs=Sourced(3, _BEC),
        batch_size=Sourced(16, _BEC),
        accumulation=_ONE,
        max_length=Sourced(128, f"ours; {_BEC}: the power of two that holds the longest sentence"),
        data=Sourced((_GAP,), f"{_BEC}: a file of GAP's texts, flipped; which part is not said"),
        departures=("whole GAP texts and their swapped copies; the code has sentences, flipped",),
    ),
    "mabel": Training(
        strength=Sourced(10.0, f"{_MABEL}: the name of its output folder"),
        learning_rate=Sourced(5e-5, _MABEL),
        epochs=Sourced(2, _MABEL),
        batch_size=Sourced(96, f"{_MABEL}: 24 on each of 4 GPUs; model_nc.py contrasts all"),
        accumulation=_ONE,
        max_length=Sourced(128, _MABEL),
        data=Sourced(
            ("stanfordnlp/snli", "nyu-mll/multi_nli"),
            "princeton-nlp/MABEL, README: pairs of SNLI and MNLI, processed",
        ),
        departures=("fp32; the script trains in fp16", "pairs and copies are made here, not read"),
    ),
    "ase": Training(
        strength=Sourced(100.0, f"{_ASE}: loss + 100 * loss_nc3"),
        learning_rate=Sourced(2e-5, _ASE),
        epochs=Sourced(5, _ASE),
        batch_size=Sourced(6, _ASE),
        accumulation=_ONE,
        max_length=Sourced(164, _ASE),
        data=Sourced(
            ("uclanlp/wino_bias",), "README: WinoBias; NLPlab-skku/BERT-ASE has it processed"
        ),
        departures=(
            "WinoBias is trained on and measured on, as in the paper: that column says little",
            "with the term the code leaves out all of ASE but masked tokens; here it is added",
        ),
    ),
    "adept": Training(
        strength=Sourced(5.0, "adept/debias.py: loss + 5 * loss_nc3"),
        learning_rate=Sourced(5e-4, _ADEPT),
        epochs=Sourced(10, _ADEPT),
        batch_size=Sourced(32, _ADEPT),
        accumulation=Sourced(4, _ADEPT),
        max_length=Sourced(128, _ADEPT),
        data=Sourced(None, "README: News-Commentary v15, data.statmt.org/news-commentary/v15"),
        departures=(
            "all weights are trained; the script trains them or a prompt alone, as it is told",
            "class means gather over the training; the code starts them anew each epoch",
        ),
    ),
    # None is published for decoders: BEC's data, ours else.
    "causal": Training(
        strength=Sourced(10.0, "ours: none is published for causal models"),
        learning_rate=Sourced(2e-5, "ours: BEC's"),
        epochs=Sourced(3, "ours: BEC's"),
        batch_size=Sourced(16, "ours: BEC's"),
        accumulation=_ONE,
        max_length=Sourced(128, "ours"),
        data=Sourced((_GAP,), "ours: BEC's"),
    ),
}
# All four: next-token labels, whatever the model; masked tokens of a text are of no class here.
SHIFT = Sourced("published", "process_batch in all four: h[:, :-1] with ids[:, 1:]")
WARMUP = Sourced(0.0, "num_warmup_steps=0 in bec, ase; Trainer's and adept's default")
SEEDS = Sourced(5, "ours; the code has one each (42, 21)")

NLI_HEAD = Sourced(
    HeadCourse(epochs=2, learning_rate=5e-5, batch_size=64, max_length=64),
    "princeton-nlp/MABEL, benchmark/extrinsic/nli/train.py",
)
GLUE_HEAD = Sourced(
    HeadCourse(epochs=3, learning_rate=2e-5, batch_size=32, max_length=128),
    "princeton-nlp/MABEL, README: run_glue.py",
)

# What the paper has of a method with the term (README); without it by MABEL's own README.
FIGURES: Mapping[tuple[str, str], str] = {
    ("mabel", "StereoSet ICAT"): "74.55 with the term, 73.98 without",
    ("ase", "StereoSet ICAT"): "73.37 with the term",
    ("bec", "StereoSet ICAT"): "72.38 with the term",
}


@dataclass(frozen=True)
class Measured:
    """What a measure reads.

    Attributes:
        source: a hub id; "" where rows of our own stand in; None: a file or folder has to be given.
        what: what it is, for whoever has to find it.
        columns: what the paper calls the measure's figures, in their order.
        kinds: the models it can be taken of.
        also: another source that it needs, by name.
    """

    source: str | None
    what: str
    columns: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ("masked", "causal")
    also: str = ""


_BBQ = ("accuracy, ambiguous", "accuracy, clear", "bias, ambiguous", "bias, clear")
# In the order of the table's columns. WinoBias and SEAT have a column for each of their parts.
MEASURES: dict[str, Measured] = {
    "stereoset": Measured(
        "McGill-NLP/stereoset",
        "StereoSet, .json",
        tuple(f"StereoSet {c}" for c in ("LM", "SS", "ICAT")),
    ),
    "crows_pairs": Measured("nyu-mll/crows_pairs", "CrowS-Pairs, .csv", ("CrowS-Pairs",)),
    "winobias": Measured("uclanlp/wino_bias", "WinoBias, the folder of its files"),
    "seat": Measured(None, "SEAT, a folder of sent-weat6.jsonl and others (W4ngatang/sent-bias)"),
    "bec_pro": Measured("", "BEC-Pro, its file; else sentences of our own", ("BEC-Pro",)),
    "bias_nli": Measured(
        "",
        "Bias-NLI, its file; else sentences of our own",
        tuple(f"Bias-NLI {column}" for column in ("NN", "FN", "T:0.5")),
        ("masked",),
        also="snli",
    ),
    "glue": Measured(
        "nyu-mll/glue", "GLUE, a folder of TASK-train and TASK-validation", kinds=("masked",)
    ),
    "bbq": Measured(
        "oskarvanderwal/bbq",
        "BBQ, .jsonl",
        tuple(f"BBQ {column}" for column in (*_BBQ, "accuracy, stereotype right")),
        ("causal",),
    ),
}
SNLI = Measured("stanfordnlp/snli", "SNLI's training rows, for the head of Bias-NLI")
