"""How rows became tokens: counted for manifests, compared between data sets, shown to people.

Scores of two data sets that were rendered differently differ by their templates too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from fastdean.data.examples import IGNORE_INDEX, TOKENS, Example
from fastdean.wording.printable import one_line


def describe_rendering(examples: Sequence[Example], tokenizer: Any, template: str | None) -> dict:
    """For a manifest: the `template` asked for, `rendered` (kind -> examples) and `tokenizer`.

    Args:
        tokenizer: None where tokens were given; the template and it are then left out.
    """
    rendered = dict(sorted(Counter(example.rendered for example in examples).items()))
    if tokenizer is None:
        return {"rendered": rendered}
    return {"rendered": rendered, "template": template, "tokenizer": _public_name(tokenizer)}


def rendering_cautions(
    examples: Sequence[Example],
    numbers: Sequence[int],
    tokenizer: Any,
    name: str,
    template: str | None,
) -> list[str]:
    """Warnings about a data set's tokens: two BOS tokens, end tokens in prompts, unused templates.

    Args:
        numbers: of the examples' rows.
        template: that was asked for.
        name: of the data set.
    """
    bos = getattr(tokenizer, "bos_token_id", None)
    ends = {getattr(tokenizer, f"{kind}_token_id", None) for kind in ("eos", "sep")} - {None}
    doubled, ended = [], []
    for number, example in zip(numbers, examples, strict=True):
        ids = example.input_ids.tolist()
        if bos is not None and ids[:2] == [bos, bos]:
            doubled.append(number)
        prompt = int((example.labels == IGNORE_INDEX).cumprod(0).sum())
        # A chat template ends its turns as it likes; a lone first token is the start of the text.
        if example.rendered in ("raw", "published") and prompt > 1 and ids[prompt - 1] in ends:
            ended.append(number)
    said = []
    texts = sum(example.rendered == "text" for example in examples)
    if texts and template in ("chat", "published"):
        said.append(
            f"{name}: {texts} of {len(examples)} rows are plain text, to which the template "
            f"{template!r} does not apply."
        )
    if doubled:
        said.append(
            f"{name}: {len(doubled)} of {len(examples)} examples start with two "
            f"{tokenizer.bos_token!r} (first: row {doubled[0]}): the text holds one, and the "
            "tokenizer adds another."
        )
    if ended:
        said.append(
            f"{name}: {len(ended)} of {len(examples)} prompts end in an end token (first: row "
            f"{ended[0]}), which the tokenizer adds to every text: each response follows the end "
            "of a text."
        )
    return said


def differing_rendering_cautions(sets: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A sentence where data sets did not become tokens alike; none where they did.

    Args:
        sets: name -> what `describe_rendering` gave. Sets that do not say, and those given as
            tokens, are not compared.
    """
    kinds = {
        name: {kind: n for kind, n in (found.get("rendered") or {}).items() if kind != TOKENS}
        for name, found in sets.items()
    }
    known = {name: found for name, found in kinds.items() if found}
    if len({kind for found in known.values() for kind in found}) > 1:
        listed = "; ".join(
            f"{name} {', '.join(f'{kind} ({n})' for kind, n in found.items())}"
            for name, found in known.items()
        )
        return [
            f"The data sets did not become tokens alike: {listed}. What differs between their "
            "scores may be due to that."
        ]
    return []


def show_example(example: Example, tokenizer: Any) -> list[tuple[str, str]]:
    """An example as the model reads it: ("context" | "target", text) of one run of tokens each.

    Special tokens stand as they are written; what would steer a terminal is escaped.
    """
    tokens = zip(example.input_ids.tolist(), example.labels.tolist(), strict=True)
    shown = []
    for ignored, run in groupby(tokens, key=lambda token: token[1] == IGNORE_INDEX):
        ids = [token for token, _ in run]
        text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        shown.append(("context" if ignored else "target", one_line(text)))
    return shown


def _public_name(tokenizer: Any) -> str:
    """Of a folder the last part: manifests travel with masks."""
    name = str(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)
    path = Path(name)
    return path.resolve().name if path.is_absolute() or path.exists() else name
