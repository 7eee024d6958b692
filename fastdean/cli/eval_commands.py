"""The commands that measure what an edit costs: `eval`, and lm-eval's own with a mask."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fastdean.cli.options import Overwrite, Quiet, out_option
from fastdean.cli.running import command, command_line, tell
from fastdean.jobs.evaluation.job import EvalJob
from fastdean.wording.printable import one_line

app = typer.Typer()


@app.command("eval")
@command(resumable=True, names={"path_or_repo_id": "mask", "path": "mask"})
def evaluate(
    job: EvalJob,
    out: Annotated[
        Path | None,
        out_option(
            "Run folder for the page, the figures and each item's scores, or of the same job to "
            "resume it; needs none."
        ),
    ] = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> dict[str, Any]:
    """Measure a model without a mask and with it, on one load, item by item.

    General ability by tasks of lm-eval (`pip install 'lm-eval[hf]'`), the price of an edit by
    `--bias over_refusal` and `--bias gender_facts`. Changes are of the same items; all of them are
    one family of tests, with Holm's p-values. Run the same command again to resume.

    Example: `fastdean eval --model Qwen/Qwen2-7B-Instruct --mask run/mask --tasks hellaswag,boolq
    --bias over_refusal --out price/`
    """
    from fastdean.jobs.evaluation.evaluating import run, table
    from fastdean.report import verdict_line

    results = run(job, out, command=command_line(), overwrite=overwrite, progress=not quiet)
    tell(one_line(verdict_line(results)))
    tell(table(results["measures"]))
    if out is not None:
        tell(f"  report  {out / 'report.html'}\n  figures {out / 'results.json'}")
    return results


@app.command(
    "lm-eval",
    # Every word is lm-eval's, --help too.
    context_settings={
        "allow_extra_args": True,
        "ignore_unknown_options": True,
        "help_option_names": [],
    },
)
@command(keeps_stdout=True)
def lm_eval(context: typer.Context) -> None:
    """Run lm-eval's own command, to which the model `fastdean` is known: `hf` with a mask.

    Example: `fastdean lm-eval --model fastdean --model_args pretrained=my-model,mask=run/mask
    --tasks hellaswag`
    """
    from fastdean.evaluation.ability import require_lm_eval

    require_lm_eval()
    from lm_eval.__main__ import cli_evaluate

    import fastdean.jobs.evaluation.lm_eval_model  # noqa: F401

    before = sys.argv
    sys.argv = ["lm-eval", *context.args]
    try:
        cli_evaluate()
    finally:
        sys.argv = before
