"""The options that several commands share, each with its help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastdean.cli.running import tell
from fastdean.files.atomic import real_place

SOURCE_HELP = (
    "a .csv, .tsv, .json, .jsonl or .parquet file, a hub id, or a preset (beavertails:fairness, "
    "beavertails:privacy, each also :unsafe; alpaca-cleaned; embedded:fairness, embedded:privacy, "
    "embedded:general, embedded:debias, embedded:debias:pairs). Columns and splits are mapped "
    "behind '::', as in org/name::split=train,prompt=question,response=answer"
)


def out_path(text: str | Path) -> Path:
    """The path of `--out`; nothing at all would be taken for the current folder."""
    if not str(text):
        tell("fastdean: --out must be a path, got ''; name the folder or file to write")
        raise typer.Exit(2)
    path = Path(text)
    # `new/../other` is `other`, also while there is no `new`.
    return real_place(path, "out") if ".." in path.parts else path


Model = Annotated[
    str, typer.Option(help="Hugging Face folder, hub id or .gguf file.", show_default=False)
]
Revision = Annotated[
    str | None, typer.Option(help="Branch, tag or commit of a model from the hub.")
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run the Python code that comes with the model's files; without it such a model is "
        "refused.",
    ),
]
Ratio = Annotated[
    float | None,
    typer.Option(
        help="Share of each matrix's entries in a top set [default: 5e-7, for units 1e-3]."
    ),
]
Rule = Annotated[
    str, typer.Option(help="paper, released, or a control: first, second, union, random.")
]
Granularity = Annotated[str, typer.Option(help="weight, or neuron for the units of the MLPs.")]
Targets = Annotated[
    str,
    typer.Option(
        "--target-modules",
        help="mlp, self_attn, all, ends of names (q_proj,v_proj), or a regular expression.",
    ),
]
Examples = Annotated[
    int | None, typer.Option(help="Rows of each source to score, shuffled by --seed.")
]
Template = Annotated[
    str | None,
    typer.Option(
        help="Of prompt and response: raw (one after the other), chat (the tokenizer's template), "
        "or published [default: raw]. Messages always take the chat template, text takes none."
    ),
]
SkipBadRows = Annotated[
    bool,
    typer.Option(
        "--skip-bad-rows",
        help="Leave out rows that cannot be read or encoded, and count them, rather than refuse "
        "the first.",
    ),
]
Preview = Annotated[
    bool,
    typer.Option(
        "--preview", help="Show one example of each source as the model would read it, and end."
    ),
]
MaxLength = Annotated[int | None, typer.Option(help="Cut examples to this many tokens.")]
TokensPerBatch = Annotated[
    int | None, typer.Option(help="Tokens in one forward pass [default: by device].")
]
MemoryBudget = Annotated[
    float | None, typer.Option(help="GB the sums may take; more passes if they need more.")
]
Deterministic = Annotated[
    bool, typer.Option("--deterministic", help="Torch's strict deterministic mode.")
]
Dtype = Annotated[
    str, typer.Option(help="auto, float32, bfloat16 or float16; or fp32, bf16, fp16.")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, or auto to spread over GPUs.")]
Seed = Annotated[int, typer.Option(help="Of shuffles, controls, permutations and bootstraps.")]
MinK = Annotated[int, typer.Option(help="At least this many candidates in every matrix.")]
Scale = Annotated[
    float, typer.Option(help="What the selected weights are multiplied by; 0 zeroes them.")
]
Scope = Annotated[str, typer.Option(help="matrix, or model for one top set over all matrices.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace a folder that FastDEAN wrote earlier.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the result to stdout as JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bars.")]
