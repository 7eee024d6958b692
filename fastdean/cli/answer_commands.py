"""The commands for answers: what a model says, and what judges say of it."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from fastdean.cli.options import Overwrite, Quiet, RunOut
from fastdean.cli.running import command, command_line, tell
from fastdean.jobs import options
from fastdean.jobs.answers.job import AnswerJob, Concurrency, JudgeJob, KeyFrom, ServerTimeout
from fastdean.jobs.options import Help
from fastdean.wording.printable import one_line

app = typer.Typer()


@app.command()
@command(resumable=True, names={"path_or_repo_id": "mask", "path": "mask"})
def answer(
    job: AnswerJob, out: RunOut, overwrite: Overwrite = False, quiet: Quiet = False
) -> dict[str, Any]:
    """Answer prompts greedily, with and without masks, or by a server, into answers.jsonl.

    Each line has the prompt's number as `id`, the `variant` that answered ("original", or a mask's
    name), `prompt` and `answer`. Run the same command again to resume.

    Example: `fastdean answer --model Qwen/Qwen2-7B-Instruct --prompts
    OpenSafetyLab/Salad-Data::config=base_set,prompt=question --mask run/mask --out answers/`
    """
    from fastdean.jobs.answers.answering import run
    from fastdean.report import verdict_line

    results = run(job, out, command=command_line(), overwrite=overwrite, progress=not quiet)
    lines = [
        f"  {one_line(name)}: {counts['answers']} answers, {counts['ended']} of them ended by the "
        f"model, {counts['empty']} empty"
        for name, counts in results["variants"].items()
    ]
    lines += [f"  answers {out / results['files']['answers']}", f"  report  {out / 'report.html'}"]
    tell("\n".join([one_line(verdict_line(results)), *lines]))
    return results


@app.command()
@command(resumable=True)
def judge(
    answers: Annotated[
        str,
        typer.Argument(help="answers.jsonl, its folder, or a table of `prompt` and `answer`."),
    ],
    judge: Annotated[
        list[str],
        Help(
            "phrases (refusals by a list of phrases), a template's name (wildguard, "
            "qwen3guard-gen, md-judge-v0.1, llama-guard, gpt-oss-safeguard) or a template's .json "
            "file; NAME=MODEL has another model, folder or server "
            "(NAME=http://localhost:8000/v1::model=SERVED) judge. May be repeated."
        ),
    ],
    out: RunOut,
    key_from: KeyFrom = None,
    concurrency: Concurrency = 8,
    server_timeout: ServerTimeout = None,
    tokens_per_batch: Annotated[
        int | None, Help("Tokens of one batch of a judge that is loaded [default: by device].")
    ] = None,
    trust_remote_code: options.TrustRemoteCode = False,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> dict[str, Any]:
    """Judge answers: awareness, refusals, what could not be parsed, and how judges agree.

    Every verdict is a line of verdicts.jsonl; report.html has the answers beside each other,
    table.md the table. Awareness is safe / (safe + unsafe). Run the same command again to resume.

    Example: `fastdean judge answers/ --judge wildguard --judge qwen3guard-gen --judge phrases
    --out verdicts/`
    """
    from fastdean.jobs.answers.judging import run
    from fastdean.report import verdict_line

    job = JudgeJob(
        answers=answers,
        judge=tuple(judge),
        key_from=key_from,
        concurrency=concurrency,
        server_timeout=server_timeout,
        tokens_per_batch=tokens_per_batch,
        trust_remote_code=trust_remote_code,
        dtype=dtype,
        device=device,
    )
    results = run(job, out, command=command_line(), overwrite=overwrite, progress=not quiet)
    files = results["files"]
    lines = [f"  {name:9}{out / files[name]}" for name in ("verdicts", "table")]
    notes = [f"  Note: {one_line(warning)}" for warning in results["warnings"]]
    lines += [f"  report   {out / 'report.html'}", f"  figures  {out / 'results.json'}"]
    tell("\n".join([results["table"], "", one_line(verdict_line(results)), "", *notes, *lines]))
    return results
