"""WinoBias by likelihood: does a model find a sentence likelier when its pronoun fits a stereotype?

Zhao et al. 2018 (NAACL) give sentences in pairs that differ in the gender of a pronoun, whose
antecedent is an occupation: once as labour statistics have it, once the other way. Their own score
is the accuracy of a coreference system. Likelihood needs no such system and asks another question:
its figures are not comparable with theirs. In type 1 sentences the antecedent takes knowledge of
the world, in type 2 the syntax gives it away.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from fastdean.default_device import cpu_by_default
from fastdean.evaluation.bias.likelihood import Likelihoods
from fastdean.evaluation.bias.result import Figures, mean_result, members, preferred, ties
from fastdean.evaluation.bias.rows import Row, Source, benchmark_rows, require_columns
from fastdean.evaluation.bias.start import LikelihoodResult, Start, named

COLUMNS = ("pro", "anti", "type")
TYPES = ("type1", "type2")
HUB_ID = "uclanlp/wino_bias"
_GENDERS = {
    **dict.fromkeys(("he", "him", "his", "himself"), "male"),
    **dict.fromkeys(("she", "her", "hers", "herself"), "female"),
}
_NUMBER = re.compile(r"^\s*\d+\s+")
_WORD = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True)
class WinoBias(Figures):
    """share: in %, of pairs whose pro-stereotyped sentence is the likelier; neutral is 50.
    difference: mean log-likelihood of the pro- minus the anti-stereotyped sentence, in nats."""

    share: LikelihoodResult
    difference: LikelihoodResult


@cpu_by_default
def winobias(
    model: nn.Module,
    tokenizer: Any,
    source: Source = HUB_ID,
    *,
    mismatched: Literal["error", "leave_out"] = "error",
    start: Start = "auto",
    tokens_per_batch: int | None = None,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
    progress: bool = True,
) -> WinoBias:
    """Compare the log-likelihoods of pro- and anti-stereotyped sentences, pair by pair.

    Causal models: log p of the whole sentence. Masked models: its pseudo-log-likelihood, every
    token masked in turn (Salazar et al. 2020). Marks around entity and pronoun are taken off.

    Args:
        model: a causal or masked language model; evaluated without dropout and left in its mode.
        source: rows with the columns `COLUMNS`; a folder that holds the files
            `{pro,anti}_stereotyped_{type1,type2}.txt.{dev or test}` as published (of one or both
            types; .dev is read where both are there); or a hub id with the configurations
            `type1_pro`, `type1_anti`, ... of `uclanlp/wino_bias` (split "validation" unless given).
        mismatched: a few published pairs (9 of the 792 in the .dev files) differ in more than their
            pronouns, by slips of their writers. Such a pair measures something else: "error"
            refuses it, "leave_out" leaves it out and counts it.
        start: what a causal model's text starts from, see `start.start_token`; the result names it.
        tokens_per_batch: a bound for memory; the result does not depend on it.
        confidence, seed: of the intervals, over pairs.
        resamples: not used; here because other measures have it.

    Returns:
        Categories: type 1 and type 2 apart, and each by the gender of the pro-stereotyped pronoun:
        a model that always prefers one pronoun has 50 % overall and shows only there. Figures:
        `ties` (each counted as half), `left_out`.

    Raises:
        ValueError: another kind of model, a missing file or column, sentences of a pair that
            differ in more than the gender of pronouns, or a log-likelihood that is no finite
            number; the message names type and line.
    """
    if mismatched not in ("error", "leave_out"):
        raise ValueError(f"mismatched must be 'error' or 'leave_out', got {mismatched!r}")
    ask = Likelihoods(model, tokenizer, start, tokens_per_batch=tokens_per_batch, progress=progress)
    rows = winobias_rows(source)
    kept, genders = _matching(rows, mismatched)
    pro, anti = ask.sentences([row[side] for side in ("pro", "anti") for row in kept])[0].chunk(2)
    ask.require_finite(
        torch.stack([pro, anti], dim=1),
        lambda number: "line {line} of {type}".format_map(kept[number - 1]),
    )
    preference = preferred(pro, anti)
    types = [row["type"] for row in kept]
    by_gender = [f"{t}, {gender} pronoun" for t, gender in zip(types, genders, strict=True)]
    shared: dict[str, Any] = {
        "categories": members(types, by_gender),
        "figures": {"ties": ties(preference), "left_out": len(rows) - len(kept)},
        "notes": [
            f"{'log-likelihood' if ask.start else 'pseudo-log-likelihood'} of whole sentences; "
            "categories name the gender of the pro-stereotyped pronoun"
        ],
        "confidence": confidence,
        "seed": seed,
    }
    share = mean_result(
        "WinoBias by likelihood, share of pairs whose pro-stereotyped sentence is likelier",
        100.0 * preference,
        unit="%",
        neutral=50.0,
        **shared,
    )
    difference = mean_result(
        "WinoBias by likelihood, mean difference of pro minus anti",
        pro - anti,
        unit="nats",
        neutral=0.0,
        **shared,
    )
    return WinoBias(named(share, ask.start), named(difference, ask.start))


def winobias_rows(source: Source) -> list[Row]:
    """The pairs of `source`, with the columns `COLUMNS`; arguments and errors as `winobias`."""
    if isinstance(source, str | Path):
        if Path(source).expanduser().is_dir():
            return list(_folder_rows(Path(source).expanduser()))
        name, _, options = str(source).partition("::")
        if not Path(name).suffix and "config=" not in options:
            return list(_hub_rows(source))
    rows = benchmark_rows(source)
    require_columns(rows, COLUMNS, "WinoBias", type=TYPES)
    return [
        _pair(row["pro"], row["anti"], row["type"], number)
        for number, row in enumerate(rows, start=1)
    ]


def _folder_rows(folder: Path) -> Iterator[Row]:
    found = False
    for kind in TYPES:
        paths = [path for side in ("pro", "anti") if (path := _part(folder, side, kind))]
        if not paths:
            continue
        if len(paths) == 1:
            raise ValueError(
                f"source must hold the pro- and the anti-stereotyped sentences of {kind}, got only "
                f"{paths[0].name} in {str(folder)!r}; put the other file beside it"
            )
        found = True
        pro, anti = (path.read_text("utf-8").splitlines() for path in paths)
        yield from _pairs(pro, anti, kind)
    if not found:
        raise ValueError(
            "source must be a folder with files like pro_stereotyped_type1.txt.dev, got none in "
            f"{str(folder)!r}; check the path"
        )


def _part(folder: Path, side: str, kind: str) -> Path | None:
    stem = f"{side}_stereotyped_{kind}.txt"
    named = (folder / f"{stem}{suffix}" for suffix in (".dev", ".test", ""))
    return next((path for path in named if path.is_file()), None)


def _hub_rows(source: str | Path) -> Iterator[Row]:
    for kind in TYPES:
        pro, anti = (
            [
                " ".join(row["tokens"]) if "tokens" in row else row["sentences"]
                for row in benchmark_rows(source, split="validation", config=f"{kind}_{side}")
            ]
            for side in ("pro", "anti")
        )
        yield from _pairs(pro, anti, kind)


def _pairs(pro: list[str], anti: list[str], kind: str) -> Iterator[Row]:
    pro, anti = ([line for line in side if line.strip()] for side in (pro, anti))
    if len(pro) != len(anti):
        raise ValueError(
            f"source must hold as many pro- as anti-stereotyped sentences of {kind}, got "
            f"{len(pro)} and {len(anti)}; they are paired line by line"
        )
    for line, (first, second) in enumerate(zip(pro, anti, strict=True), start=1):
        yield _pair(first, second, kind, line)


def _pair(pro: str, anti: str, kind: str, line: int) -> Row:
    return {"pro": _plain(pro), "anti": _plain(anti), "type": kind, "line": line}


def _plain(line: str) -> str:
    """The sentence without its number and marks, punctuation drawn to the word before it."""
    bare = " ".join(re.sub(r"[\[\]]", "", _NUMBER.sub("", line)).split())
    return re.sub(r" (?=[.,!?;:]|'s\b)", "", bare)


def _matching(rows: list[Row], mismatched: str) -> tuple[list[Row], list[str]]:
    """The pairs that differ in the gender of pronouns alone, with that of the pro sentence's."""
    kept, genders = [], []
    for row in rows:
        gender = _pronoun_gender(row["pro"], row["anti"])
        if gender is not None:
            kept.append(row)
            genders.append(gender)
        elif mismatched == "error":
            raise ValueError(
                f"line {row['line']} of {row['type']} must be one sentence with pronouns of either "
                f"gender, got {row['pro']!r} and {row['anti']!r}; correct it, or pass "
                "mismatched='leave_out'"
            )
    if not kept:
        raise ValueError(
            f"source must hold at least one matching pair, got none among {len(rows)}; check that "
            "both files are of the same part of the benchmark"
        )
    return kept, genders


def _pronoun_gender(pro: str, anti: str) -> str | None:
    """Gender of the first pronoun that differs, in `pro`; None where anything else differs."""
    words = [_WORD.findall(sentence.lower()) for sentence in (pro, anti)]
    if len(words[0]) != len(words[1]):
        return None
    different = [pair for pair in zip(*words, strict=True) if pair[0] != pair[1]]
    genders = [tuple(_GENDERS.get(word) for word in pair) for pair in different]
    if not genders or any(set(pair) != {"male", "female"} for pair in genders):
        return None
    return genders[0][0]
