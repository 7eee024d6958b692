"""Answers of several models to the same prompts, beside each other, those that differ first."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from fastdean.evaluation.answers.records import ORIGINAL, Answered, variants_of
from fastdean.evaluation.judging.phrases import refuses
from fastdean.evaluation.statistics.families import judged_together
from fastdean.evaluation.statistics.intervals import Interval
from fastdean.evaluation.statistics.mcnemar import compare_yes_no

# Of rows that are shown, and of each of their texts.
_MOST_ROWS = 200
_MOST_CHARACTERS = 1500


def answers_table(
    answers: Sequence[Answered],
    verdicts: Iterable[Mapping[str, Any]] = (),
    *,
    changes: Mapping[str, Mapping[str, Any]] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """What changed between the original's answers and those of each other variant.

    Args:
        answers: of one variant or several to the same prompts.
        verdicts: records of `verdicts.record`, shown beside the answers.
        changes: of the share of refusals by variant, where it was judged among other tests.
        seed: of the tests' draws.
    Returns:
        "variants": of each its prompts, answers that "changed" against the original and those that
        refuse by the list of phrases, with the "change" of that share (McNemar's exact test, one
        family over all variants; "tests"). "rows": prompts with every variant's answer, those that
        differ most first, 200 of "of".
    """
    by_variant = {
        name: {each.id: each for each in answers if each.variant == name}
        for name in variants_of(answers)
    }
    original = by_variant.get(ORIGINAL, {})
    refused = {
        name: {key: refuses(each.answer) for key, each in found.items()}
        for name, found in by_variant.items()
    }
    compared = {
        name: [key for key in found if key in original]
        for name, found in by_variant.items()
        if name != ORIGINAL and any(key in original for key in found)
    }
    judged, family = judged_together(
        {}
        if changes is not None
        else {
            name: partial(
                _change,
                [refused[ORIGINAL][key] for key in keys],
                [refused[name][key] for key in keys],
                seed,
            )
            for name, keys in compared.items()
        }
    )
    variants = {}
    for name, found in by_variant.items():
        moved = [key for key in compared.get(name, ()) if found[key].answer != original[key].answer]
        change = judged.get(name) or (changes or {}).get(name)
        variants[name] = {
            "prompts": len(found),
            "refusals": sum(refused[name].values()),
            **({"changed": len(moved), "change": change} if name in compared else {}),
        }
    rows = _rows(by_variant, refused, verdicts)
    return {
        "variants": variants,
        **({"tests": family.to_dict()} if family.tests else {}),
        "of": len(rows),
        "rows": rows[:_MOST_ROWS],
    }


def _change(
    before: Sequence[bool], after: Sequence[bool], seed: int, confidence: float
) -> Interval:
    return compare_yes_no(before, after, confidence=confidence, seed=seed)


def _rows(
    by_variant: Mapping[str, Mapping[int | str, Answered]],
    refused: Mapping[str, Mapping[int | str, bool]],
    verdicts: Iterable[Mapping[str, Any]],
) -> list[dict[str, Any]]:
    said: dict[int | str, dict[str, dict[str, str | None]]] = {}
    for verdict in verdicts:
        if verdict["verdict"] is not None:
            by_judge = said.setdefault(verdict["id"], {})
            by_judge.setdefault(verdict["judge"], {})[verdict["variant"]] = verdict["verdict"]
    found: dict[int | str, dict[str, Any]] = {}
    for name, answered in by_variant.items():
        for key, each in answered.items():
            row = found.setdefault(
                key,
                {
                    "id": key,
                    "prompt": _cut(each.prompt),
                    "answers": {},
                    "refusals": {},
                    "verdicts": said.get(key, {}),
                },
            )
            row["answers"][name] = _cut(each.answer)
            row["refusals"][name] = refused[name][key]

    def place(row: Mapping[str, Any]) -> tuple[bool, bool, bool, int]:
        """First another verdict, then a refusal that came or went, then other words."""
        verdicts_differ = any(len({*by.values()}) > 1 for by in row["verdicts"].values())
        refusals_differ = len({*row["refusals"].values()}) > 1
        number = row["id"] if isinstance(row["id"], int) else 0
        same = len({*row["answers"].values()}) == 1
        return not verdicts_differ, not refusals_differ, same, number

    return sorted(found.values(), key=place)


def _cut(text: str) -> str:
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]}…"
