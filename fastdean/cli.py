"""The command line: arguments to calls, results to stdout, everything else to stderr.

Exit codes: 0 done; 1 a fault of FastDEAN (with a traceback); 2 the request cannot be carried out as given (one
line says why); 130 interrupted.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="fastdean",
    help=(
        "Find, inspect and suppress the weights of a language model in which fairness and privacy are coupled.\n\n"
        "Start with `fastdean demo`. The steps of `fastdean run` are also commands of their own: score, couple, "
        "apply, patch, report."
    ),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

SOURCE_HELP = (
    "a .csv, .json, .jsonl or .parquet file, a hub id, or a preset (beavertails:fairness, beavertails:privacy, each "
    "also :unsafe; alpaca-cleaned; embedded:fairness, embedded:privacy, embedded:general). Columns and splits are "
    "mapped behind '::', as in org/name::split=train,prompt=question,response=answer"
)

Model = Annotated[
    str, typer.Option(help="Hugging Face folder, hub id or .gguf file.", show_default=False)
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
    str, typer.Option("--target-modules", help="mlp, self_attn, all, or a regular expression.")
]
Examples = Annotated[
    int | None, typer.Option(help="Rows of each source to score, shuffled by --seed.")
]
Template = Annotated[
    str,
    typer.Option(help="raw (prompt then response), chat (the tokenizer's template), or published."),
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
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, or auto to spread over GPUs.")]
Seed = Annotated[int, typer.Option(help="Of shuffles, controls, permutations and bootstraps.")]
MinK = Annotated[int, typer.Option(help="At least this many candidates in every matrix.")]
Scope = Annotated[str, typer.Option(help="matrix, or model for one top set over all matrices.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace a folder that FastDEAN wrote earlier.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the result to stdout as JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bars.")]


def main() -> None:
    """Entry point of `fastdean` and `python -m fastdean`."""
    _quieten_libraries()
    app()


def _one_line_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Turn what a user can mend into one line and exit code 2."""

    @wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except (ValueError, TypeError, RuntimeError, OSError, MemoryError) as error:
            if os.environ.get("FASTDEAN_VERBOSITY", "").lower() == "debug" or _is_a_fault(error):
                raise
            text = " ".join(str(error).split()) or type(error).__name__
            typer.echo(f"fastdean: {text}", err=True)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            typer.echo(
                "fastdean: interrupted; finished parts are kept, run the same command to go on",
                err=True,
            )
            raise typer.Exit(130) from None

    return wrapped


def _is_a_fault(error: BaseException) -> bool:
    """A TypeError that none of our checks raised is a mistake of ours and deserves its traceback."""
    if not isinstance(error, TypeError):
        return False
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is None or "must" not in str(error)


@app.command()
@_one_line_errors
def demo(
    out: Annotated[Path, typer.Option(help="Run folder.")] = Path("fastdean-demo"),
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Run the main job on a small real model and the embedded rows (a few minutes on a CPU).

    Scores 32 fairness, 32 privacy and 32 general examples on SmolLM2-135M-Instruct, couples them at ratio
    1e-5, zeroes the coupled weights and measures what that changed.
    """
    from fastdean.loading import DEMO_MODEL
    from fastdean.pipeline import Job

    job = Job(
        model=DEMO_MODEL,
        fairness="embedded:fairness",
        privacy="embedded:privacy",
        general="embedded:general",
        ratio=1e-5,
        examples=32,
        eval_examples=32,
    )
    _run_job(job, out, overwrite, quiet, as_json)


@app.command()
@_one_line_errors
def run(
    model: Model,
    fairness: Annotated[str, typer.Option(help=f"SRC of fairness rows: {SOURCE_HELP}.")],
    privacy: Annotated[str, typer.Option(help="SRC of privacy rows.")],
    general: Annotated[str, typer.Option(help="SRC of general instruction rows, to be spared.")],
    out: Annotated[
        Path, typer.Option(help="Run folder, new or empty, or of the same job to resume it.")
    ],
    ratio: Ratio = None,
    rule: Rule = "paper",
    examples: Examples = 128,
    eval_examples: Annotated[
        int, typer.Option(help="Other rows of each source to measure on.")
    ] = 64,
    granularity: Granularity = "weight",
    target_modules: Targets = "mlp",
    scope: Scope = "matrix",
    min_k: MinK = 0,
    scale: Annotated[
        float, typer.Option(help="What the coupled weights are multiplied by; 0 zeroes them.")
    ] = 0.0,
    template: Template = "raw",
    max_length: MaxLength = None,
    tokens_per_batch: TokensPerBatch = None,
    memory_budget: MemoryBudget = None,
    deterministic: Deterministic = False,
    dtype: Dtype = "auto",
    device: Device = None,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Score three data sets, couple, mask, measure before and after, and report: the whole job.

    Margins need rows with an `unsafe` response beside the safe one. Works under torchrun: the examples are split
    over the ranks. Run the same command again to resume.

    Example: `fastdean run --model Qwen/Qwen2-7B-Instruct --fairness beavertails:fairness --privacy
    beavertails:privacy --general alpaca-cleaned --ratio 5e-7 --out run/`
    """
    from fastdean.pipeline import Job

    job = Job(
        model=model,
        fairness=fairness,
        privacy=privacy,
        general=general,
        ratio=ratio,
        rule=rule,
        granularity=granularity,
        target_modules=target_modules,
        scope=scope,
        min_k=min_k,
        scale=scale,
        examples=examples,
        eval_examples=eval_examples,
        template=template,
        max_length=max_length,
        tokens_per_batch=tokens_per_batch,
        memory_budget=_bytes(memory_budget),
        deterministic=deterministic,
        dtype=dtype,
        device=device,
        seed=seed,
    )
    _run_job(job, out, overwrite, quiet, as_json)


@app.command()
@_one_line_errors
def score(
    model: Model,
    data: Annotated[str, typer.Option(help=f"SRC: {SOURCE_HELP}.")],
    out: Annotated[Path, typer.Option(help="Folder for the scores.")],
    examples: Examples = 128,
    granularity: Granularity = "weight",
    target_modules: Targets = "mlp",
    keep_top: Annotated[
        float | None,
        typer.Option(help="Keep only this share of each matrix; 1 keeps all, with its size."),
    ] = 1e-3,
    template: Template = "raw",
    max_length: MaxLength = None,
    tokens_per_batch: TokensPerBatch = None,
    memory_budget: MemoryBudget = None,
    deterministic: Deterministic = False,
    dtype: Dtype = "auto",
    device: Device = None,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Score every target weight of a model on one data set and save the scores."""
    from fastdean.loading import load_model
    from fastdean.scoring import score as score_model
    from fastdean.sources import load_rows, sample_rows

    _check_new(out, overwrite, "scores")
    rows, _ = sample_rows(load_rows(data), examples, seed)
    with _process_group():
        loaded, tokenizer = load_model(model, dtype=dtype, device=device)
        scores = score_model(
            loaded,
            rows,
            tokenizer=tokenizer,
            granularity=granularity,
            target_modules=target_modules,
            keep_top=None if keep_top == 1 else keep_top,
            template=template,
            max_length=max_length,
            tokens_per_batch=tokens_per_batch,
            memory_budget=_bytes(memory_budget),
            deterministic=deterministic,
            progress=not quiet,
        )
        if not _first_rank():
            return
        scores.manifest["data"]["sources"] = [data]
        scores.save_pretrained(out, overwrite=overwrite)
    _tell(f"{scores!r}\nwritten to {out}")
    _emit(as_json, {"out": str(out), **scores.manifest})


@app.command()
@_one_line_errors
def couple(
    first: Annotated[Path, typer.Option(help="Scores on the first awareness set (fairness).")],
    second: Annotated[Path, typer.Option(help="Scores on the second awareness set (privacy).")],
    out: Annotated[Path, typer.Option(help="Folder for the mask.")],
    general: Annotated[
        list[Path] | None,
        typer.Option(help="Scores on general examples, to be spared; may be repeated."),
    ] = None,
    ratio: Ratio = None,
    rule: Rule = "paper",
    scope: Scope = "matrix",
    min_k: MinK = 0,
    scale: Annotated[
        float, typer.Option(help="What the weights are multiplied by; 0 zeroes them.")
    ] = 0.0,
    seed: Seed = 0,
    model: Annotated[
        str | None, typer.Option(help="The scored model: needed for units and for the rule random.")
    ] = None,
    dtype: Dtype = "auto",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Select the coupled weights from saved scores and save them as a mask."""
    from fastdean.coupling import couple as couple_scores
    from fastdean.loading import load_model
    from fastdean.scores import Scores

    _check_new(out, overwrite, "mask")
    loaded = None if model is None else load_model(model, dtype=dtype, device="cpu")[0]
    mask = couple_scores(
        Scores.from_pretrained(first),
        Scores.from_pretrained(second),
        general=[Scores.from_pretrained(path) for path in general or []],
        ratio=ratio,
        rule=rule,
        scope=scope,
        min_k=min_k,
        seed=seed,
        model=loaded,
    ).with_scale(scale)
    mask.save_pretrained(out, overwrite=overwrite)
    _tell(f"{mask.summary()}\n{mask!r}\nwritten to {out}")
    _emit(as_json, {"out": str(out), "weights": len(mask), "table": mask.table})


@app.command()
@_one_line_errors
def apply(
    model: Model,
    mask: Annotated[str, typer.Option(help="Mask folder or hub id.")],
    out: Annotated[Path, typer.Option(help="Folder for the edited model.")],
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Load a model, apply a mask, and save it as an ordinary Hugging Face folder.

    For a checkpoint of safetensors, `fastdean patch` does the same without loading the model.
    """
    from fastdean.loading import load_model
    from fastdean.masks import NeuronMask
    from fastdean.storage import new_folder

    found = NeuronMask.from_pretrained(mask)
    with new_folder(out, name="out") as folder:
        loaded, tokenizer = load_model(model, dtype=dtype, device="cpu")
        found.apply_(loaded)
        loaded.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        _verify_saved(folder, found)
    _tell(f"{found!r} applied; the model is in {out}")
    _emit(as_json, {"out": str(out), "weights": len(found)})


@app.command()
@_one_line_errors
def patch(
    checkpoint: Annotated[Path, typer.Option(help="Local Hugging Face folder with safetensors.")],
    mask: Annotated[str, typer.Option(help="Mask folder or hub id.")],
    out: Annotated[Path, typer.Option(help="Folder for the patched copy.")],
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Copy a checkpoint and edit the masked values in its files, without loading the model."""
    from fastdean.checkpoint import patch_checkpoint
    from fastdean.masks import NeuronMask

    result = patch_checkpoint(
        checkpoint, NeuronMask.from_pretrained(mask), out, overwrite=overwrite
    )
    _tell(
        f"{result.values_edited} values edited in {len(result.files_edited)} files; the copy is in {out}"
    )
    _emit(
        as_json,
        {
            "out": str(out),
            "values_edited": result.values_edited,
            "files_edited": list(result.files_edited),
        },
    )


@app.command()
@_one_line_errors
def report(
    run_folder: Annotated[Path, typer.Argument(help="Run folder, or its results.json.")],
    out: Annotated[
        Path | None, typer.Option(help="HTML file [default: report.html in the folder].")
    ] = None,
    as_json: Json = False,
) -> None:
    """Draw the report of a run again from its results."""
    from fastdean.report import write_report

    file = run_folder / "results.json" if run_folder.is_dir() else run_folder
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"run_folder must hold a results.json of a finished run, got {str(file)!r}: {error}"
        ) from None
    target = file.parent / "report.html" if out is None else out
    write_report(results, target)
    _tell(f"written to {target}")
    _emit(as_json, {"out": str(target)})


@app.command()
@_one_line_errors
def info(as_json: Json = False) -> None:
    """Print versions, devices, and which implementation of each operation would run, and why not the others."""
    from fastdean.info import collect, render

    found = collect()
    if as_json:
        _emit(True, found)
    else:
        typer.echo(render(found))


def _run_job(job: Any, out: Path, overwrite: bool, quiet: bool, as_json: bool) -> None:
    from fastdean.pipeline import run as run_job

    with _process_group():
        results = run_job(
            job, out, command=_command_line(), overwrite=overwrite, progress=not quiet
        )
    if results:
        _tell(_closing_text(results, out))
        _emit(as_json, results)


def _closing_text(results: dict[str, Any], out: Path) -> str:
    from fastdean.masks import NeuronMask

    mask = NeuronMask.from_pretrained(out / "mask")
    lines = [str(mask.summary()), ""]
    lines += [f"  {sentence}" for sentence in results["findings"]]
    lines += [f"  Note: {warning}" for warning in results["warnings"]]
    lines += [
        "",
        f"  report  {out / 'report.html'}",
        f"  mask    {out / 'mask'}",
        f"  figures {out / 'results.json'}",
    ]
    return "\n".join(lines)


def _command_line() -> str:
    return shlex.join(["fastdean", *sys.argv[1:]])


def _bytes(gigabytes: float | None) -> int | None:
    return None if gigabytes is None else int(gigabytes * 1e9)


def _check_new(out: Path, overwrite: bool, kind: str) -> None:
    """Before hours of work, not after: the folder must be free."""
    if overwrite:
        return
    from fastdean.storage import check_free

    check_free(out.expanduser(), overwrite=False, may_replace=lambda folder: False, name="out")


def _verify_saved(folder: Path, mask: Any) -> None:
    """Read the masked values back from the saved files; a silent difference must not leave this process."""
    from fastdean.checkpoint import verify_checkpoint

    verify_checkpoint(folder, mask)


def _process_group() -> Any:
    """The process group of a torchrun job, taken down again on exit; nothing in a single process."""
    from contextlib import contextmanager

    @contextmanager
    def group():
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            yield
            return
        import torch

        backend = "nccl" if torch.cuda.is_available() else "gloo"
        if backend == "nccl":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        torch.distributed.init_process_group(backend)
        try:
            yield
        finally:
            torch.distributed.destroy_process_group()

    return group()


def _first_rank() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def _tell(text: str) -> None:
    if _first_rank():
        typer.echo(text, err=True)


def _emit(wanted: bool, result: dict[str, Any]) -> None:
    if wanted:
        typer.echo(json.dumps(result, indent=2, ensure_ascii=False, default=str))


def _quieten_libraries() -> None:
    """Their advice about loading is for programmers; ours to a user must not drown in it."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
