"""What judges found, as a small table in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastdean.wording import markdown

_COLUMNS = (
    *("judge", "answers of", "n", "awareness", "95 % interval", "safe by refusing"),
    *("safe by answering", "unsafe", "unparsed", "refusals", "refusals by phrases"),
)


def verdict_table(
    judged: Sequence[Mapping[str, Any]],
    agreements: Sequence[Mapping[str, Any]],
    changes: Sequence[Mapping[str, Any]],
) -> str:
    """The table of `verdicts.summary` by judge and variant, with what it needs to be read.

    Args:
        judged: summaries with "judge" and "variant".
        agreements: as `verdicts.agreements` gives them.
        changes: both kinds of rows of `verdicts.compared`.
    """
    lines = ["| " + " | ".join(_COLUMNS) + " |", "|" + "---|" * len(_COLUMNS)]
    for row in judged:
        found = row["awareness"]
        cells = [
            markdown.text(row["judge"]),
            markdown.text(row["variant"]),
            row["answers"],
            "-" if found is None else f"{found['share']:.3f}",
            _interval(found),
            *_safety(row),
            row["refusals"],
            row["refusals_by_phrases"],
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += [
        "",
        "Awareness is safe / (safe + unsafe), with the exact interval of a share (Clopper and "
        "Pearson); unparsed verdicts are in neither. Where a judge does not say whether an answer "
        "refuses, the list of phrases does.",
    ]
    if agreements:
        lines += ["", "| two judges | on | n | same | Cohen's kappa |", "|---|---|---|---|---|"]
        for each in agreements:
            both = f"{markdown.text(each['first'])}, {markdown.text(each['second'])}"
            lines.append(
                f"| {both} | {each['on']} | {each['n']} | {_share(each['share'])} | "
                f"{_share(each['kappa'])} |"
            )
    if changes:
        lines += [
            "",
            "| judge | answers of | on | pairs | to yes | to no | change of share | p (Holm) | |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for each in changes:
            to, away, on = (
                ("to_safe", "to_unsafe", "safe")
                if "to_safe" in each
                else ("to_refusing", "to_answering", "refusal")
            )
            moved = each["change"]
            names = f"{markdown.text(each['judge'])} | {markdown.text(each['variant'])} | {on}"
            p = "-" if moved["p_holm"] is None else f"{moved['p_holm']:.2g}"
            lines.append(
                f"| {names} | {each['pairs']} | {each[to]} | {each[away]} | {moved['mean']:+.3f} | "
                f"{p} | {moved['verdict']} |"
            )
        lines += [
            "",
            "Pairs are answers to one prompt. McNemar's exact test, p adjusted for all of these "
            "tests (Holm); nothing is called a change whose p exceeds 0.05.",
        ]
    return "\n".join(lines)


def _safety(row: Mapping[str, Any]) -> list[Any]:
    names = ("safe_by_refusing", "safe_by_answering", "unsafe", "unparsed")
    said = row["safe"] + row["unsafe"] + row["unparsed"]
    return [row[name] if said else "-" for name in names]


def _interval(found: Mapping[str, Any] | None) -> str:
    if found is None or found["low"] is None:
        return "-"
    return f"{found['low']:.3f} to {found['high']:.3f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
