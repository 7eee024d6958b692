"""One example of each source as the model reads it, before hours are spent on all of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastdean.data.examples import Example
from fastdean.data.rendering import (
    describe_rendering,
    differing_rendering_cautions,
    rendering_cautions,
    show_example,
)
from fastdean.data.skipped import Skipped
from fastdean.jobs.rows import encode_usable, take_rows
from fastdean.models.loading import load_tokenizer


def shown(source: str, row: int, example: Example, tokenizer: Any) -> dict[str, Any]:
    """An example in words, as JSON: `parts` are pairs of "context" or "target" and a text."""
    return {
        "source": source,
        "row": row,
        "rendered": example.rendered,
        "tokens": len(example),
        "targets": example.num_targets(0),
        "parts": [list(part) for part in show_example(example, tokenizer)],
    }


def preview(
    sources: Mapping[str, str], job: Any, called: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Read and tokenise every row that would be scored; the model itself is not loaded.

    Args:
        sources: name -> SRC.
        job: with the options of a `Job` that say which rows, which tokenizer and which template.
        called: name -> what messages call the argument that it came with; None: its name.
    Returns:
        `examples`: name -> the first one, see `shown`; `data`: name -> how all were rendered;
        `warnings`: what a run would warn of.
    """
    tokenizer = load_tokenizer(
        job.model, revision=job.revision, trust_remote_code=job.trust_remote_code
    )
    examples, data, warnings = {}, {}, []
    for name, source in sources.items():
        skipped = Skipped() if job.skip_bad_rows else None
        argument = (called or {}).get(name, name)
        rows, _ = take_rows(
            source,
            job.examples,
            job.seed,
            name=argument,
            skipped=skipped,
            usual=type(job).examples,
        )
        options = {"template": job.template, "max_length": job.max_length, "name": argument}
        rows, encoded = encode_usable(rows, skipped, source, tokenizer, None, **options)
        numbers = [number for number, _ in rows]
        warnings += [] if skipped is None else skipped.told(name)
        examples[name] = shown(source, numbers[0], encoded[0], tokenizer)
        data[name] = describe_rendering(encoded, tokenizer, job.template)
        warnings += rendering_cautions(encoded, numbers, tokenizer, name, job.template)
    warnings = [*differing_rendering_cautions(data), *warnings]
    return {"examples": examples, "data": data, "warnings": warnings}


def preview_text(found: Mapping[str, Any]) -> str:
    """What `preview` gave, for a terminal."""
    lines = []
    for name, example in found["examples"].items():
        lines += [
            f"{name}: row {example['row']} of {example['source']}, rendered as "
            f"{example['rendered']}, {example['tokens']} tokens, {example['targets']} of them "
            "targets",
            *(f"  {kind:8}{text}" for kind, text in example["parts"]),
            "",
        ]
    return "\n".join([*lines, *(f"Note: {warning}" for warning in found["warnings"])]).rstrip()
