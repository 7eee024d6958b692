"""The commands of the second method: neural collapse, and debiasing that uses it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fastdean.cli.options import (
    SOURCE_HELP,
    Device,
    Dtype,
    Json,
    MaxLength,
    Model,
    Overwrite,
    Quiet,
    Revision,
    Seed,
    SkipBadRows,
    Template,
    TokensPerBatch,
    TrustRemoteCode,
    out_path,
)
from fastdean.cli.running import command, command_line, tell
from fastdean.wording.printable import one_line

app = typer.Typer()

Words = Annotated[
    str,
    typer.Option(
        help="gender, religion, ethnicity, or a file: .txt with a word a line, .json with "
        "{group: [words]}."
    ),
]
MultiPiece = Annotated[
    str, typer.Option(help="Words of several tokens: skip leaves them out, mean averages them.")
]
Control = Annotated[
    str | None,
    typer.Option(help="Take as many other words instead: random, or frequency (matched)."),
]
Shift = Annotated[
    str | None,
    typer.Option(
        help="Which token a representation stands for: next, same or published [default: by model]."
    ),
]
Features = Annotated[
    str, typer.Option(help="base (before the prediction head) or head (what enters it).")
]
Bias = Annotated[
    list[str] | None,
    typer.Option(
        help="A bias measure, as NAME or NAME=SRC: crows_pairs, stereoset, winobias, seat, "
        "bec_pro; may be repeated."
    ),
]
StartToken = Annotated[
    str,
    typer.Option(
        help="What a causal model's texts start from in the bias measures: auto, bos, eos, none, a "
        "token of the vocabulary, or its id."
    ),
]
RunOut = Annotated[
    Path,
    typer.Option(
        parser=out_path,
        metavar="PATH",
        help="Run folder, new or empty, or of the same job to resume it.",
    ),
]


@app.command()
@command(resumable=True, names={"groups": "words"})
def collapse(
    model: Model,
    text: Annotated[str, typer.Option(help=f"SRC of text to measure on: {SOURCE_HELP}.")],
    out: RunOut,
    words: Words = "gender",
    multi_piece: MultiPiece = "skip",
    control: Control = None,
    shift: Shift = None,
    features: Features = "base",
    bias: Bias = None,
    start_token: StartToken = "auto",
    examples: Annotated[
        int | None, typer.Option(help="Rows of the text to read, shuffled by --seed.")
    ] = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    skip_bad_rows: SkipBadRows = False,
    template: Template = None,
    max_length: MaxLength = None,
    tokens_per_batch: TokensPerBatch = None,
    dtype: Dtype = "auto",
    device: Device = None,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> dict[str, Any]:
    """Measure neural collapse on chosen words (NC1 to NC4, (U)NC3), and bias where asked.

    Prints the metrics and draws a report. A fifth of the text is held out for NC4.

    Example: `fastdean collapse --model HuggingFaceTB/SmolLM2-135M --text embedded:debias
    --words gender --bias bec_pro --out collapse/`
    """
    from fastdean.jobs.collapse import CollapseJob, run

    job = CollapseJob(
        model=model,
        text=text,
        words=words,
        revision=revision,
        trust_remote_code=trust_remote_code,
        multi_piece=multi_piece,
        control=control,
        shift=shift,
        features=features,
        bias=tuple(bias or ()),
        start_token=_start(start_token),
        examples=examples,
        skip_bad_rows=skip_bad_rows,
        template=template,
        max_length=max_length,
        tokens_per_batch=tokens_per_batch,
        dtype=dtype,
        device=device,
        seed=seed,
    )
    results = run(job, out, command=command_line(), overwrite=overwrite, progress=not quiet)
    tell(_closing_text(results, out))
    return results


@app.command()
@command(resumable=True, names={"groups": "words", "strength": "collapse_strength"})
def debias(
    model: Model,
    method: Annotated[
        str,
        typer.Option(
            help="causal (causal models), bec, mabel, ase (masked models) or adept (both).",
            show_default=False,
        ),
    ],
    out: RunOut,
    form: Annotated[
        str,
        typer.Option(
            help="Of the losses of mabel and adept: published (the released code) or paper."
        ),
    ] = "published",
    collapse_strength: Annotated[
        float,
        typer.Option(
            help="Of the collapse regulariser; published: bec and ase 100, mabel 10, adept 5. 0 "
            "trains without it."
        ),
    ] = 0.0,
    data: Annotated[
        str | None,
        typer.Option(help="SRC of rows to train on [default: the embedded ones of the method]."),
    ] = None,
    skip_bad_rows: SkipBadRows = False,
    text: Annotated[
        str | None,
        typer.Option(help="SRC to measure on [default: a quarter of the data, not trained on]."),
    ] = None,
    words: Words = "gender",
    multi_piece: MultiPiece = "skip",
    control: Control = None,
    statistic: Annotated[
        str, typer.Option(help="Of the cosines: std (published), cv or mean.")
    ] = "std",
    live_features: Annotated[
        bool,
        typer.Option(
            "--live-features",
            help="The regulariser's gradient reaches the whole model; with --mode window or batch.",
        ),
    ] = False,
    mode: Annotated[
        str, typer.Option(help="Of the class statistics: cumulative (published), window or batch.")
    ] = "cumulative",
    shift: Shift = None,
    features: Features = "base",
    steps: Annotated[int | None, typer.Option(help="Optimizer steps; or give --epochs.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the data [default: 3].")] = None,
    learning_rate: Annotated[float, typer.Option(help="The highest, after the warm-up.")] = 2e-5,
    batch_size: Annotated[int, typer.Option(help="Examples in one forward pass.")] = 16,
    accumulation: Annotated[int, typer.Option(help="Forward passes in one step.")] = 1,
    max_length: MaxLength = None,
    save_every: Annotated[
        int,
        typer.Option(
            help="Steps between checkpoints; the last two are kept until the model is saved."
        ),
    ] = 50,
    bias: Bias = None,
    start_token: StartToken = "auto",
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    tokens_per_batch: TokensPerBatch = None,
    dtype: Dtype = "float32",
    device: Device = None,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> dict[str, Any]:
    """Fine-tune a model to be less biased, with or without the collapse regulariser.

    Collapse, bias (`bec_pro` unless other measures are given) and perplexity are measured before
    and after. The folder's model/ is an ordinary Hugging Face folder with a model card.

    Example: `fastdean debias --model bert-base-uncased --method bec --collapse-strength 100
    --out debiased/`
    """
    from fastdean.jobs.debias import DebiasJob, run

    options = {} if not bias else {"bias": tuple(bias)}
    job = DebiasJob(
        model=model,
        method=method,
        form=form,
        collapse_strength=collapse_strength,
        data=data,
        skip_bad_rows=skip_bad_rows,
        text=text,
        words=words,
        multi_piece=multi_piece,
        control=control,
        statistic=statistic,
        live_features=live_features,
        mode=mode,
        shift=shift,
        features=features,
        revision=revision,
        trust_remote_code=trust_remote_code,
        steps=steps,
        epochs=epochs,
        learning_rate=learning_rate,
        batch_size=batch_size,
        accumulation=accumulation,
        max_length=max_length,
        save_every=save_every,
        tokens_per_batch=tokens_per_batch,
        start_token=_start(start_token),
        dtype=dtype,
        device=device,
        seed=seed,
        **options,
    )
    results = run(job, out, command=command_line(), overwrite=overwrite, progress=not quiet)
    tell(_closing_text(results, out))
    return results


def _start(text: str) -> str | int:
    """An id where it is written as one."""
    return int(text) if text.isascii() and text.isdigit() else text


def _closing_text(results: dict[str, Any], out: Path) -> str:
    from fastdean.jobs.folder import RESULTS_FILE

    states = list(next(iter(results["collapse"]["metrics"].values()))["values"])
    lines = [" ".join(["metric".ljust(24), *(state.rjust(12) for state in states)])]
    family = None
    for name, metric in results["collapse"]["metrics"].items():
        if name.partition("_")[0] != family:
            family = name.partition("_")[0]
            lines += [f"{_FAMILIES[family]}:"] if family in _FAMILIES else []
        cells = (_cell(metric["values"][state]).rjust(12) for state in states)
        lines.append(" ".join([f"  {one_line(name)}".ljust(24), *cells]))
    lines += [
        "_w: with the output embedding's rows in place of the words' means; cv: std / abs(mean). "
        f"Formulas: {RESULTS_FILE}.",
    ]
    lines += ["", *(f"  {one_line(sentence)}" for sentence in results["findings"])]
    lines += [f"  Note: {one_line(warning)}" for warning in results["warnings"]] + [""]
    lines += [f"  report  {out / 'report.html'}"]
    if "model" in results["files"]:
        lines += [f"  model   {out / 'model'}"]
    return "\n".join([*lines, f"  figures {out / 'results.json'}"])


# What the metrics of a family have in common, by the first part of their names.
_FAMILIES = {
    "nc1": "NC1, spread of a word over its contexts beside the words' distance (0: collapsed)",
    "nc2": "NC2, lengths and angles of the words' means (cv, std 0 and mean at target: collapsed)",
    "gnc2": "GNC2, how evenly the words' directions are spread (cv 0: collapsed)",
    "nc3": "NC3, alignment of the words' means with the output embedding (1: collapsed)",
    "unc3": "(U)NC3, how unlike that alignment is from word to word (0: all alike)",
    "nc4": "NC4, share of held-out tokens predicted as their nearest mean says (1: collapsed)",
}


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return "infinite" if value == "inf" else f"{value:.4g}"
