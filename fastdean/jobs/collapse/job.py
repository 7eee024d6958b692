"""What the jobs `collapse` and `debias` are asked to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastdean.jobs import options
from fastdean.jobs.model_job import ModelJob
from fastdean.jobs.options import SOURCE_HELP, Help

_CONTROLS = ("random", "frequency")


@dataclass(frozen=True, kw_only=True)
class WordsJob(ModelJob):
    """Which words, which representations of them, and which measures of bias.

    Attributes:
        words, multi_piece: see `CollapseClasses.from_words`.
        control: None: the words themselves.
        shift, features: see `collapse_metrics`; None: by the model.
        bias: measures, "name" or "name=SRC": see `jobs.bias.asked.MEASURES`.
        start_token: of their likelihoods, see `evaluation.bias.start.start_token`.
        bias_template: of their prompts, see `evaluation.over_refusal`; None: by the tokenizer.
    Raises:
        ValueError, TypeError: an option out of range.
    """

    words: options.Words = "gender"
    multi_piece: options.MultiPiece = "skip"
    control: options.Control = None
    shift: options.Shift = None
    features: options.Features = "base"
    bias: options.Bias = ()
    start_token: options.StartToken = "auto"
    bias_template: options.BiasTemplate = None

    def _check(self, without_control: str) -> None:
        """What both jobs ask of these options, after their own."""
        # Not above: the command line reads the fields before it loads torch.
        from fastdean.collapse import read_word_groups
        from fastdean.jobs.bias import asked as bias_asked

        if self.control is not None and self.control not in _CONTROLS:
            raise ValueError(
                f"control must be one of {', '.join(_CONTROLS)}, got {self.control!r}; leave it "
                f"out {without_control}"
            )
        read_word_groups(self.words)
        bias_asked.check(self.bias, self.start_token, self.bias_template)


@dataclass(frozen=True, kw_only=True)
class CollapseJob(WordsJob):
    """What is measured; two jobs that are equal give equal results.

    Attributes:
        model, revision, trust_remote_code: see `loading.load_model`.
        text: see `sources.load_rows`; a fifth of its rows is held out for NC4.
        words, multi_piece: see `CollapseClasses.from_words`.
        control: None: the words themselves are measured.
        shift, features: see `collapse_metrics`; None: by the model.
        bias: measures, "name" or "name=SRC": see `jobs.bias.asked.MEASURES`.
        start_token: of their likelihoods, see `evaluation.bias.start.start_token`.
        bias_template: of their prompts, see `evaluation.over_refusal`; None: by the tokenizer.
        examples: rows of the text to read; None: all.
    Raises:
        ValueError: an option out of range.
    """

    text: Annotated[str, Help(f"SRC of text to measure on: {SOURCE_HELP}.")]
    examples: Annotated[int | None, Help("Rows of the text to read, shuffled by --seed.")] = None
    template: options.Template = None

    def __post_init__(self) -> None:
        super().__post_init__()
        options.require_template(self)
        options.require_at_least(self, examples=1)
        self._check("to measure the words themselves")


@dataclass(frozen=True, kw_only=True)
class DebiasJob(WordsJob):
    """What is trained and measured; two jobs that are equal give equal results on one machine.

    Attributes:
        model, revision, trust_remote_code: see `loading.load_model`.
        method, form: see `debias.fine_tune`.
        collapse_strength: of the regulariser; 0: it measures and changes nothing.
        data: rows to train on, see `debias.fine_tune`; None: those of the package.
        text: rows to measure collapse on; None: a quarter of `data`, which is then not trained on.
        words, multi_piece, control: of the classes, see `CollapseJob`.
        statistic, live_features, mode, shift, features: see `CollapseRegularizer`.
        steps, epochs, learning_rate, batch_size, accumulation: see `debias.fine_tune`.
        bias, start_token, bias_template: see `CollapseJob`.
        skip_bad_rows: of the rows that are trained on, those that cannot be read.
        dtype: AdamW's small steps round away in another than float32, and a warning says so.
        seed: also of masking and dropout.
    Raises:
        ValueError: an option out of range.
    """

    method: Annotated[
        str, Help("causal (causal models), bec, mabel, ase (masked models) or adept (both).")
    ]
    form: Annotated[
        str, Help("Of the losses of mabel and adept: published (the released code) or paper.")
    ] = "published"
    collapse_strength: Annotated[
        float,
        Help(
            "Of the collapse regulariser; published: bec and ase 100, mabel 10, adept 5. 0 "
            "trains without it."
        ),
    ] = 0.0
    data: Annotated[
        str | None, Help("SRC of rows to train on [default: the embedded ones of the method].")
    ] = None
    text: Annotated[
        str | None, Help("SRC to measure on [default: a quarter of the data, not trained on].")
    ] = None
    statistic: Annotated[str, Help("Of the cosines: std (published), cv or mean.")] = "std"
    live_features: Annotated[
        bool,
        Help("The regulariser's gradient reaches the whole model; with --mode window or batch."),
    ] = False
    mode: Annotated[
        str, Help("Of the class statistics: cumulative (published), window or batch.")
    ] = "cumulative"
    steps: Annotated[int | None, Help("Optimizer steps; or give --epochs.")] = None
    epochs: Annotated[int | None, Help("Passes over the data [default: 3].")] = None
    learning_rate: Annotated[float, Help("The highest, after the warm-up.")] = 2e-5
    batch_size: Annotated[int, Help("Examples in one forward pass.")] = 16
    accumulation: Annotated[int, Help("Forward passes in one step.")] = 1
    save_every: Annotated[
        int,
        Help("Steps between checkpoints; the last two are kept until the model is saved."),
    ] = 50
    bias: options.Bias = ("bec_pro",)
    dtype: options.Dtype = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        from fastdean.debias import METHODS
        from fastdean.debias.forms import require_form

        if self.method not in METHODS:
            raise ValueError(
                f"method must be one of {', '.join(METHODS)}, got {self.method!r}; 'bec' and "
                "'causal' are the plainest, for masked and for causal models"
            )
        require_form(self.form, self.method)
        self._check("to regularise the words themselves")
        if self.control is not None and self.collapse_strength == 0:
            raise ValueError(
                f"control must come with a collapse_strength above 0, got {self.control!r} and 0; "
                "without a term there are no words to control"
            )
        if self.live_features and self.mode == "cumulative":
            raise ValueError(
                "live_features must come with mode 'window' or 'batch', got 'cumulative'; the "
                "gradient of features fades in a mean over the whole training"
            )

    @property
    def source(self) -> str:
        if self.data is not None:
            return self.data
        return "embedded:debias:pairs" if self.method == "mabel" else "embedded:debias"
