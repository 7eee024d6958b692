"""The record as a page of the documentation."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from benchmarks.architectures.classes import KINDS
from benchmarks.architectures.record import OUTCOMES, outcome, remarks

_TITLES = {"causal": "Causal", "masked": "Masked", "seq2seq": "Encoder-decoder"}
_TOP = """\
# Architectures

<!-- Made by `python -m benchmarks.architectures --page`. -->

Every language model class of transformers {version} that can be built tiny (random weights, 32
features, a layer or two of each kind), scored and compared with plain autograd of the whole model
in float64, one example and one backward pass at a time. Each is scored four times in fp32:
`target_modules` "mlp" and "all", `order` "batches" and "layers".

{counts}

- **exact**: every matrix of all four is within 1e-5 of the plain loop, by norm (or, where fp32
  autograd itself is off by more, within twice of that). "loop in fp32": the model itself cannot run
  in float64.
- **partly**: exact in some of the four, refused in the others, with the reason. Where all four are
  refused, everything that has a name is tried as well (`target_modules=".*"`).
- **refused**: FastDEAN says in one line why it gives no scores.
- **not built**: no tiny model of the class, or it computes nothing from tokens alone.

"Left to names" are the groups of a layer's parameters that "all" does not score; most can be
[scored by name](guide/score.md#models). Encoder-decoder classes are scored with `loss_fn`.

`make test-slow` holds this page against the installed transformers. With another version,
`python -m benchmarks.architectures` in a checkout shows what comes of its classes, and
`--only llama` of some.
"""


def page(record: Mapping[str, Any]) -> str:
    """Markdown."""
    results = record["classes"]
    counts = dict.fromkeys(OUTCOMES, 0)
    for result in results.values():
        counts[outcome(result)] += 1
    number = ", ".join(f"**{n} {each}**" for each, n in counts.items() if n)
    top = _TOP.format(version=record["transformers"], counts=f"{len(results)} classes: {number}.")
    return top + "".join(_section(kind, results) for kind in KINDS)


def _section(kind: str, results: Mapping[str, Any]) -> str:
    rows = sorted(name for name in results if name.partition("/")[0] == kind)
    if not rows:
        return ""
    lines = [f"\n## {_TITLES[kind]}\n", "| model type | class | outcome | left to names | |"]
    lines.append("|---|---|---|---|---|")
    for name in rows:
        result = results[name]
        left = ", ".join(result.get("left", {}))
        loop = [f"loop in {result['loop']}"] if "loop" in result else []
        said = "; ".join([*loop, *remarks(result)]).replace("refused: ", "")
        said = re.sub(r"([\\|*_<>\[\]`])", r"\\\1", said)
        cells = [name.partition("/")[2], result.get("class", ""), outcome(result), left, said]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
