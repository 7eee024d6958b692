"""The commands: arguments to calls."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

import fastdean
from fastdean.cli.flags import naming
from fastdean.cli.options import Json, Overwrite, Preview, Quiet, out_option
from fastdean.cli.running import command, command_line, is_first_rank, process_group, tell
from fastdean.jobs import options
from fastdean.jobs.coupling.job import Job, ScoreJob
from fastdean.jobs.estimate.job import EstimateJob
from fastdean.jobs.options import Help
from fastdean.wording.printable import one_line, printable

EXIT_CODES = (
    "Exit codes: 0 done; 1 a fault of FastDEAN, with a traceback; 2 the request cannot be carried "
    "out as given, one line on stderr says why; 129 terminal closed; 130 interrupted; 143 "
    "terminated. FASTDEAN_VERBOSITY (debug, info, warning, error) sets what is told on stderr; "
    "debug shows the traceback of every error."
)

app = typer.Typer(
    name="fastdean",
    help=(
        "Find, inspect and suppress the weights of a language model in which fairness and privacy "
        "are coupled.\n\n"
        "Start with `fastdean demo`. The steps of `fastdean run` are also commands of their own: "
        "score, couple, apply, patch, report.\n\n"
        "`fastdean answer` has a model answer prompts with and without masks, `fastdean judge` has "
        "judges judge the answers.\n\n"
        "`fastdean collapse` measures neural collapse on chosen words, `fastdean debias` trains "
        "with it as a regulariser."
    ),
    epilog=EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(fastdean.__version__)
        raise typer.Exit


@app.callback()
def everything(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print it, and end."),
    ] = False,
) -> None:
    pass


@app.command()
@command(resumable=True)
def demo(
    out: Annotated[Path, out_option("Run folder.")] = Path("fastdean-demo"),
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> dict[str, Any] | None:
    """Run the main job on a small real model and the embedded rows (3 to 5 minutes on 2 cores).

    Scores 32 fairness, 32 privacy and 32 general examples on SmolLM2-135M-Instruct, couples them at
    ratio 1e-5, zeroes the coupled weights and measures what that changed.

    Example: `fastdean demo --out demo/`
    """
    # Read once, when torch is loaded: threads that wait spinning slow down a shared machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

    from fastdean.models.loading import DEMO_MODEL

    job = Job(
        model=DEMO_MODEL,
        fairness="embedded:fairness",
        privacy="embedded:privacy",
        general="embedded:general",
        ratio=1e-5,
        examples=32,
        eval_examples=32,
    )
    return _run_job(job, out, overwrite, quiet)


@app.command()
@command(resumable=True)
def run(
    job: Job,
    out: Annotated[
        Path | None,
        out_option(
            "Run folder, new or empty, or of the same job to resume it; --preview needs none."
        ),
    ] = None,
    preview: Preview = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> dict[str, Any] | None:
    """Score data sets, couple, mask, measure before and after, and report: the whole job.

    The sets are fairness, privacy and general, or any that `--set NAME=SRC` names; `--couple A,B`
    and `--general C,D` then say which are coupled and which are spared. Margins need rows with an
    `unsafe` response beside the safe one. Works under torchrun: the examples are split over the
    ranks. Run the same command again to resume.

    Example: `fastdean run --model Qwen/Qwen2-7B-Instruct --fairness beavertails:fairness --privacy
    beavertails:privacy --general alpaca-cleaned --ratio 5e-7 --out run/`

    Example: `fastdean run --model my-model --set toxic=toxic.csv --set leaks=leaks.csv --set
    chat=alpaca-cleaned --set code=code.csv --couple toxic,leaks --general chat,code --out run/`
    """
    if preview:
        sets = job.data_sets
        called = {name: sets.argument(name) for name in sets.sources}
        return _preview(sets.sources, job, called)
    return _run_job(job, _given(out), overwrite, quiet)


def _is_kept(typed: Mapping[str, Any]) -> bool:
    """Whether a scoring that was stopped left in its folder how far it came."""
    from fastdean.coupling.resuming.resumable import holds_job

    return typed.get("out") is not None and holds_job(typed["out"])


@app.command()
@command(resumable=_is_kept)
def score(
    job: ScoreJob,
    out: Annotated[Path | None, out_option("Folder for the scores; not needed to preview.")] = None,
    preview: Preview = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> dict[str, Any] | None:
    """Score every target weight of a model on one data set and save the scores.

    Example: `fastdean score --model Qwen/Qwen2-7B-Instruct --data beavertails:privacy
    --out privacy/`
    """
    from fastdean.coupling.results.expert_load import load_line
    from fastdean.jobs.coupling.scoring import run as run_score

    if preview:
        return _preview({"data": job.data}, job)
    out = _given(out)
    with process_group():
        scores = run_score(job, out, overwrite=overwrite, progress=not quiet)
    if scores is None:
        return None
    load = load_line(scores.expert_load)
    tell("\n".join([repr(scores), *([load] if load else []), f"written to {out}"]))
    return {"out": str(out), **scores.manifest}


@app.command()
@command(reads=score)
def couple(
    first: Annotated[str, Help("Scores on the first awareness set (fairness).")],
    second: Annotated[str, Help("Scores on the second awareness set (privacy).")],
    out: Annotated[Path, out_option("Folder for the mask.")],
    general: Annotated[
        list[str] | None, Help("Scores on general examples, to be spared; may be repeated.")
    ] = None,
    ratio: options.Ratio = None,
    rule: options.Rule = "paper",
    scope: options.Scope = "matrix",
    expert_scope: Annotated[
        str | None,
        Help(
            "Of fused experts, what the ratio is a share of: expert, of each expert by itself, or "
            "tensor, of all experts of a layer together [default: as they were scored]."
        ),
    ] = None,
    min_k: options.MinK = 0,
    signs: options.Signs = "any",
    scale: options.Scale = 0.0,
    seed: options.Seed = 0,
    model: Annotated[
        str | None, Help("The scored model: needed for units and for the rule random.")
    ] = None,
    unit_weights: Annotated[
        str,
        Help(
            "Of a selected unit: down, its column of the down projection, or all, also its rows of "
            "gate and up and their biases."
        ),
    ] = "down",
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    dtype: options.Dtype = "auto",
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> dict[str, Any]:
    """Select the coupled weights from saved scores and save them as a mask.

    Example: `fastdean couple --first fairness/ --second privacy/ --general general/ --ratio 5e-7
    --out mask/`
    """
    from fastdean.coupling.results.scores import Scores
    from fastdean.coupling.sets import couple as couple_scores
    from fastdean.files.storage import holds_only
    from fastdean.jobs.folder import require_free
    from fastdean.models.loading import load_model

    require_free(out, overwrite, lambda folder: holds_only(folder, "mask"), "a mask")
    if revision is not None and model is None:
        raise ValueError(
            f"revision must come with model, whose revision it is, got {revision!r} alone; "
            "pass --model too"
        )
    given = [("first", first), ("second", second), *(("general", path) for path in general or [])]
    scores = []
    for option, path in given:
        with naming(path_or_repo_id=option, path=option):
            scores.append(Scores.from_pretrained(path))
    loaded = None
    if model is not None:
        loaded, _ = load_model(
            model,
            dtype=dtype,
            device="cpu",
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
    mask = couple_scores(
        *scores[:2],
        general=scores[2:],
        ratio=ratio,
        rule=rule,
        scope=scope,
        expert_scope=expert_scope,
        min_k=min_k,
        seed=seed,
        signs=signs,
        model=loaded,
        unit_weights=unit_weights,
    ).with_scale(scale)
    with naming(path="out"):
        mask.save_pretrained(out, overwrite=overwrite)
    tell(f"{mask.summary()}\n{mask!r}\nwritten to {out}")
    if not quiet:
        tell(f"nothing is measured yet; {_to_measure(model or 'MODEL', str(out))}")
    return {"out": str(out), "weights": len(mask), "table": mask.table}


@app.command()
@command(names={"path_or_repo_id": "mask", "path": "mask"})
def apply(
    model: options.Model,
    mask: Annotated[str, Help("Mask folder or hub id.")],
    out: Annotated[Path, out_option("Folder for the edited model.")],
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    dtype: options.Dtype = "auto",
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> dict[str, Any]:
    """Load a model, apply a mask, and save it as an ordinary Hugging Face folder with a card.

    Licence files come along, and the model's own card as README.source.md.

    For a checkpoint of safetensors, `fastdean patch` does the same without loading the model.

    Example: `fastdean apply --model Qwen/Qwen2-7B-Instruct --mask run/mask --out edited/`
    """
    from fastdean.jobs.edit import editing

    found, edited = editing.apply(
        model,
        mask,
        out,
        revision=revision,
        trust_remote_code=trust_remote_code,
        dtype=dtype,
        command=command_line(),
        overwrite=overwrite,
    )
    value = "zero" if found.scale == 0 else "as the mask makes them"
    said = "applied" if edited else f"changed nothing: all {len(found)} values are {value} already"
    tell(f"{found!r} {said}; the model is in {out}")
    if not quiet:
        tell(_to_measure(model, mask))
    return {
        "out": str(out),
        "weights": len(found),
        "values_edited": len(found) if edited else 0,
    }


@app.command()
@command(names={"path_or_repo_id": "mask", "path": "mask", "source": "checkpoint"})
def patch(
    checkpoint: Annotated[str, Help("Hugging Face folder with safetensors, or hub id.")],
    mask: Annotated[str, Help("Mask folder or hub id.")],
    out: Annotated[Path, out_option("Folder for the patched copy.")],
    revision: options.Revision = None,
    overwrite: Overwrite = False,
    follow_links: Annotated[
        bool, Help("Copy what links lead to outside of the checkpoint.")
    ] = False,
    quiet: Quiet = False,
) -> dict[str, Any]:
    """Copy a checkpoint and edit the masked values in its files, without loading the model.

    The copy gets a card; that of the checkpoint then is called README.source.md.

    Example: `fastdean patch --checkpoint Qwen2-7B-Instruct/ --mask run/mask --out edited/`
    """
    from fastdean.jobs.edit import editing

    result = editing.patch(
        checkpoint,
        mask,
        out,
        revision=revision,
        command=command_line(),
        overwrite=overwrite,
        follow_links=follow_links,
    )
    files = len(result.files_edited)
    tell(
        f"{result.values_edited} values edited in {files} {'file' if files == 1 else 'files'}; "
        f"the copy is in {out}"
    )
    for name in result.unpatched_files:
        tell(f"fastdean: {one_line(name)} holds weights too and was copied unedited")
    if not quiet:
        tell(_to_measure(checkpoint, mask))
    return {
        "out": str(out),
        "values_edited": result.values_edited,
        "files_edited": list(result.files_edited),
        "unpatched_files": list(result.unpatched_files),
    }


@app.command()
@command()
def report(
    run_folder: Annotated[str, typer.Argument(help="Run folder, or its results.json.")],
    out: Annotated[
        Path | None, out_option("HTML file [default: report.html in the folder].")
    ] = None,
) -> dict[str, Any]:
    """Draw the report of a run again from its results, and its Markdown card.

    Example: `fastdean report run/`
    """
    from fastdean.jobs.folder import CARD_FILE
    from fastdean.report import is_report, read_results, write_card, write_report

    if out is not None and out.exists() and not is_report(out):
        raise ValueError(
            f"out must be a new file or an earlier report, got {str(out)!r}, which FastDEAN did "
            "not write; choose another"
        )
    place = Path(run_folder)
    file = place / "results.json" if place.is_dir() else place
    results = read_results(file)
    target = file.parent / "report.html" if out is None else out
    write_report(results, target)
    if out is None:
        write_card(results, file.parent / CARD_FILE)
    tell(f"written to {target}")
    return {"out": str(target)}


@app.command()
@command()
def estimate(job: EstimateJob) -> dict[str, Any]:
    """Say what scoring a model will need, before any weight is read: memory, operations, time.

    From the model's configuration and example counts alone; a folder with a config.json will do.

    Example: `fastdean estimate --model Qwen/Qwen2-7B-Instruct --examples 128 --gpu-memory 80GB`
    """
    from fastdean.jobs.estimate.estimating import run as run_estimate

    found = run_estimate(job)
    tell(str(found))
    return found.to_dict()


@app.command()
def info(as_json: Json = False) -> None:
    """Print versions, devices, and which implementation of each operation would run and why.

    Example: `fastdean info --json`
    """
    from fastdean.info import collect, render

    found = collect()
    typer.echo(printable(json.dumps(found, indent=2) if as_json else render(found)))


def _to_measure(model: str, mask: str) -> str:
    """Which commands say what an edit changed."""
    words = ("--bias", "over_refusal", "--bias", "gender_facts", "--bias", "bec_pro")
    typed = shlex.join(["fastdean", "eval", "--model", model, "--mask", mask, *words])
    return (
        f"to measure what the mask changes and costs: {typed} (ability too: --tasks "
        "hellaswag,boolq); margins and perplexity: `fastdean run`, where it couples"
    )


def _preview(
    sources: dict[str, str], job: Any, called: dict[str, str] | None = None
) -> dict[str, Any] | None:
    from fastdean.jobs.preview import preview, preview_text

    found = preview(sources, job, called)
    tell(preview_text(found))
    return found if is_first_rank() else None


def _run_job(job: Any, out: Path, overwrite: bool, quiet: bool) -> dict[str, Any] | None:
    from fastdean.jobs import run as run_job

    with process_group():
        results = run_job(job, out, command=command_line(), overwrite=overwrite, progress=not quiet)
    if not results:
        return None
    tell(_closing_text(results, out))
    return results


def _closing_text(results: dict[str, Any], out: Path) -> str:
    from fastdean.coupling.results.expert_load import load_line
    from fastdean.masks import NeuronMask
    from fastdean.report import verdict_line

    mask = NeuronMask.from_pretrained(out.expanduser() / "mask")
    lines = [str(mask.summary()), "", f"  {one_line(verdict_line(results))}", ""]
    lines += [f"  {one_line(sentence)}" for sentence in results["findings"]]
    loads = results.get("expert_load") or {}
    lines += [f"  Experts on {one_line(name)}: {load_line(rows)}." for name, rows in loads.items()]
    lines += [f"  Note: {one_line(warning)}" for warning in results["warnings"]]
    lines += [
        "",
        f"  report  {out / 'report.html'}",
        f"  mask    {out / 'mask'}",
        f"  figures {out / 'results.json'}",
    ]
    return "\n".join(lines)


def _given(out: Path | None) -> Path:
    if out is None:
        raise ValueError("out must be a path, got none; name the folder to write")
    return out
