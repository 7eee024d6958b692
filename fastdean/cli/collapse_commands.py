"""The commands of the second method: neural collapse, and debiasing that uses it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from fastdean.cli.options import Overwrite, Quiet, RunOut
from fastdean.cli.running import command, command_line, tell
from fastdean.jobs.collapse.job import CollapseJob, DebiasJob
from fastdean.wording.printable import one_line

app = typer.Typer()


@app.command()
@command(resumable=True, names={"groups": "words"})
def collapse(
    job: CollapseJob, out: RunOut, overwrite: Overwrite = False, quiet: Quiet = False
) -> dict[str, Any]:
    """Measure neural collapse on chosen words (NC1 to NC4, (U)NC3), and bias where asked.

    Prints the metrics and draws a report. A fifth of the text is held out for NC4.

    Example: `fastdean collapse --model HuggingFaceTB/SmolLM2-135M --text embedded:debias
    --words gender --bias bec_pro --out collapse/`
    """
    from fastdean.jobs.collapse.measuring import run

    results = run(job, out, command=command_line(), overwrite=overwrite, progress=not quiet)
    tell(_closing_text(results, out))
    return results


@app.command()
@command(resumable=True, names={"groups": "words", "strength": "collapse_strength"})
def debias(
    job: DebiasJob, out: RunOut, overwrite: Overwrite = False, quiet: Quiet = False
) -> dict[str, Any]:
    """Fine-tune a model to be less biased, with or without the collapse regulariser.

    Collapse, bias (`bec_pro` unless other measures are given) and perplexity are measured before
    and after. The folder's model/ is an ordinary Hugging Face folder with a model card.

    Example: `fastdean debias --model bert-base-uncased --method bec --collapse-strength 100
    --out debiased/`
    """
    from fastdean.jobs.collapse.training import run

    results = run(job, out, command=command_line(), overwrite=overwrite, progress=not quiet)
    tell(_closing_text(results, out))
    return results


def _closing_text(results: dict[str, Any], out: Path) -> str:
    from fastdean.jobs.folder import RESULTS_FILE
    from fastdean.report import verdict_line

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
    lines += ["", f"  {one_line(verdict_line(results))}", ""]
    lines += [*(f"  {one_line(sentence)}" for sentence in results["findings"])]
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
