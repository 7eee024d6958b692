"""Reproduce the first paper's table for one model, with controls, the price and five data seeds.

Prints what it will need, then scores, couples, answers, judges and measures; a second call goes on
where the first was killed. `table.md`, `results.json` and `report.html` in --out have the figures.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.command import above_zero, at_least_two, positive
from experiments.reproduce_spin import ahead, paper, steps, table
from experiments.reproduce_spin.steps import Study
from fastdean.cli.flags import in_flags
from fastdean.evaluation.ability import INSTALL, require_lm_eval
from fastdean.files.hub import ask_the_cache_where_unreachable
from fastdean.files.provenance import public_name
from fastdean.files.storage import held, write_json_atomic, write_text_atomic
from fastdean.jobs.answers.judging import asked_judge
from fastdean.jobs.estimate.estimating import estimate
from fastdean.jobs.folder import REPORT_FILE, RESULTS_FILE, TABLE_FILE
from fastdean.report import write_report
from fastdean.wording.printable import error_line


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = _parser()
    options = parser.parse_args(argv)
    ask_the_cache_where_unreachable()
    try:
        study = _study(options)
        # Refuses options that are out of range.
        steps.scoring_job(study, 0)
        rows = steps.read_sources(study)
        print("\n".join(needed(study, rows)), flush=True)
        steps.require_judges(study)
        ahead.require_possible(study, rows)
        if options.estimate:
            return 0
        steps.open_study(study, rows)
        with held(study.out, "out"):
            notes = steps.do(study, rows, progress=not options.quiet)
            command = shlex.join(["python", "-m", "experiments.reproduce_spin", *argv])
            _write(study, table.results(study, rows, notes, command))
    except (ValueError, RuntimeError, OSError) as error:
        flags = {each.dest: each.option_strings[-1] for each in parser._actions}
        print(f"error: {in_flags(error_line(error), flags)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def needed(study: Study, rows: Mapping[str, Sequence[Any]]) -> list[str]:
    """Memory of the scoring, and what there is to do; no time is known beforehand."""
    gpu = torch.cuda.is_available()
    there = {"gpu_memory": str(torch.cuda.get_device_properties(0).total_memory)} if gpu else {}
    found = estimate(
        study.model,
        examples=study.examples,
        sets=len(paper.SCORED),
        target_modules=paper.TARGET_MODULES,
        dtype=study.dtype,
        **there,
    )
    models = 1 + len(study.states())
    asked = {name: len(rows[name]) for name in paper.ASKED}
    answers = models * sum(asked.values())
    loaded = [each for each in map(asked_judge, study.judges) if each.template is not None]
    expected = [
        f"{name}: {count} questions, where the paper has {paper.SOURCES[name].rows}."
        for name, count in asked.items()
        if paper.SOURCES[name].rows not in (None, count)
    ]
    return [
        f"Memory to score: {found.verdict}",
        "Judges are loaded one after the other, after the model; their memory is not estimated.",
        f"Passes: {len(paper.SCORED)} sets x {study.examples} examples x {study.seeds} seeds = "
        f"{len(paper.SCORED) * study.examples * study.seeds} forward and backward; the running "
        f"text and {len(study.tasks)} tasks forward, {models} times at most.",
        f"Answers: {sum(asked.values())} questions x {models} models (as it came, and "
        f"{len(paper.EDITS)} edits of {study.seeds} seeds) = {answers}, of at most "
        f"{study.max_new_tokens} tokens.",
        f"Calls of judges: {answers} x {len(loaded)} = {answers * len(loaded)}.",
        "Time: not known; it has not been measured here.",
        *expected,
    ]


def _write(study: Study, found: dict[str, Any]) -> None:
    text = table.rendered(found)
    write_json_atomic(study.out / RESULTS_FILE, found)
    write_text_atomic(study.out / TABLE_FILE, text)
    write_report(table.page(found), study.out / REPORT_FILE)
    print(text)
    print(f"in {study.out}: {TABLE_FILE}, {RESULTS_FILE}, {REPORT_FILE}")


def _study(options: argparse.Namespace) -> Study:
    sources = {name: source.usual for name, source in paper.SOURCES.items()}
    if options.data is not None:
        own = {name: source.file for name, source in paper.SOURCES.items() if source.file}
        sources |= {name: f"{options.data}/{file}" for name, file in own.items()}
    sources |= dict(options.source)
    tasks = tuple(paper.TASKS if options.tasks is None else options.tasks)
    if options.tasks:
        require_lm_eval()
    elif tasks and find_spec("lm_eval") is None:
        print(f"General tasks are left out: lm-eval is not installed; {INSTALL}")
        tasks = ()
    judges = tuple(options.judge or paper.JUDGES)
    names = [asked_judge(each).name for each in judges]
    if len({*names}) < len(names):
        raise ValueError(f"judge must name each judge once, got {', '.join(names)}; leave one out")
    same = ("seeds", "examples", "ratio", "questions", "max_new_tokens", "window", "dtype")
    same += ("max_length", "skip_bad_rows", "min_k")
    out = Path("build/reproduce-spin") / public_name(options.model).replace("/", "--")
    return Study(
        options.model,
        options.out or out,
        sources,
        judges=judges,
        tasks=tasks,
        device=options.device,
        **{name: getattr(options, name) for name in same},
    )


def _named(text: str) -> tuple[str, str]:
    name, _, source = text.partition("=")
    if name not in paper.SOURCES or not source:
        raise argparse.ArgumentTypeError(
            f"must be NAME=SRC with a NAME of {', '.join(paper.SOURCES)}, got {text!r}"
        )
    return name, source


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m experiments.reproduce_spin",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", required=True, help="Hugging Face folder or hub id")
    add("--out", type=Path, help="default: build/reproduce-spin/MODEL")
    add("--data", metavar="FOLDER", help="src/data of the authors' repository: their very rows")
    said = f"rows of your own; again for another; NAME: {', '.join(paper.SOURCES)}"
    add("--source", type=_named, action="append", default=[], metavar="NAME=SRC", help=said)
    said = "NAME, FILE or either=MODEL, as in `fastdean judge`; again for another"
    add("--judge", action="append", help=f"{said}; default: {', '.join(paper.JUDGES)}")
    said = f"of lm-eval; none after it: none; default, if it is installed: {' '.join(paper.TASKS)}"
    add("--tasks", nargs="*", help=said)
    add("--seeds", type=positive, default=paper.SEEDS)
    add("--examples", type=positive, default=paper.EXAMPLES, help="of each scored set")
    add("--ratio", type=above_zero, default=paper.RATIO)
    add("--questions", type=positive, help="at most so many of each set, to try the command out")
    add("--max-new-tokens", type=positive, default=paper.MAX_NEW_TOKENS)
    add(
        "--window",
        type=at_least_two,
        help="tokens, of the perplexity; default: 2048, or the positions",
    )
    said = "tokens; longer scored rows are cut; default: they are refused"
    add("--max-length", type=at_least_two, help=said)
    said = "leave out rows that cannot be scored and questions too long to answer, and count them"
    add("--skip-bad-rows", action="store_true", help=said)
    add("--min-k", type=positive, default=0, help="weights of each matrix in a top set, at least")
    add("--dtype", default="auto", help="of the model")
    add("--device", help="of the model and its judges")
    add("--estimate", action="store_true", help="say what it needs, and do nothing")
    add("--quiet", action="store_true", help="no progress bars")
    return parser


if __name__ == "__main__":
    sys.exit(main())
