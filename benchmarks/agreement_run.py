"""`run.py agreement`: how much of a selection survives another dtype or implementation."""

from __future__ import annotations

import argparse

import records
from agreement import measure_agreement
from progress import Budget
from records import AgreementRecord, Environment
from score_run import examples_in
from subject import load_subject


def run_agreement(
    options: argparse.Namespace, environment: Environment, budget: Budget, gate: str
) -> int:
    """Append how alike the loop and fastdean in fp32, and fastdean in bf16, select."""
    subject = load_subject(options, "fp32")
    examples = subject.examples(examples_in(options, "bf16"))
    for reference, other, ratio, result in measure_agreement(
        subject.model, examples, options.targets
    ):
        row = AgreementRecord(
            op="agreement",
            case=f"{subject.name}, {options.targets}",
            reference=reference,
            impl=other,
            model=subject.name,
            examples=len(examples),
            tokens=sum(len(example) for example in examples),
            ratio=ratio,
            gate=gate,
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
    return 0
