"""How the tokens of a data set fell on the experts of a mixture, as counted while it was scored.

In a manifest the counts of a layer are one text, "12 0 7", an expert each: a list would take a line
each in the files, and a mixture has thousands of experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

from fastdean.files.declared import Kind, Lists, Maps, Misfit, Record, Text, brief
from fastdean.masks.summary import place_of
from fastdean.models.layers.blocks import FEED_FORWARD

if TYPE_CHECKING:
    from fastdean.coupling.results.score_entry import ScoreEntry
    from fastdean.coupling.targets.survey import Survey

KEY = "expert_load"
# In the names that every family gives to what the field calls shared experts.
_SHARED = "shared"


class _Counts:
    """Whole numbers in one text, separated by spaces."""

    def check(self, value: Any, where: str) -> None:
        if not isinstance(value, str) or not _are_counts(value.split()):
            raise Misfit(where, "a text of whole numbers", brief(value))


def _are_counts(parts: Sequence[str]) -> bool:
    return bool(parts) and all(p.isascii() and p.isdigit() and len(p) < 16 for p in parts)


# What a manifest holds under `KEY`.
LOAD: Kind = Maps(Record({"tokens": _Counts()}, optional={"shared": Lists(Text(longest=1000))}))


def described_load(scored: Mapping[str, ScoreEntry], found: Survey) -> dict[str, dict[str, Any]]:
    """Name of each module of experts -> how many tokens each of them was given, for a manifest.

    A token that goes to two experts counts at both. Padding does not count, but for batches of a
    `loss_fn`, whose padding nobody here knows.

    Args:
        found: the model's survey; of it the shared experts, which every token passes.
    """
    loads: dict[str, dict[str, Any]] = {}
    for name, entry in scored.items():
        module = name.rpartition(".")[0]
        # Its weights have been given the same tokens.
        if entry.routed is None or module in loads:
            continue
        shared = _shared_beside(module, found)
        loads[module] = {
            "tokens": " ".join(map(str, entry.routed[: _number_of_experts(module, found)])),
            **({"shared": shared} if shared else {}),
        }
    return loads


def _number_of_experts(module: str, found: Survey) -> int:
    """Those of which all weights are there: a stack may end in others, that hand tokens on."""
    stacks = (t for t in found.targets if t.stacked and t.name.rpartition(".")[0] == module)
    return min(target.weight.shape[0] for target in stacks)


def _shared_beside(experts: str, found: Survey) -> list[str]:
    """The feed-forward blocks that every token passes beside the experts.

    Those that lie in one module with the experts; and of the same layer those that say so, as a
    layer may add up both itself. Other blocks of it are the dense ones of a layer of several.
    """
    site = experts.rpartition(".")[0] + "."
    layer = next((name for name in found.layers if experts.startswith(f"{name}.")), None)
    blocks = dict.fromkeys(
        target.name.rpartition(".")[0]
        for target in (*found.targets, *found.others)
        if target.group == FEED_FORWARD and not target.stacked and target.weight.dim() > 1
    )

    def is_passed(block: str) -> bool:
        if block.startswith(site):
            return block != experts
        # A matrix of the module itself leads into or out of its experts.
        if layer is None or not block.startswith(f"{layer}.") or f"{block}." == site:
            return False
        return _SHARED in block.removeprefix(layer).lower()

    return [block for block in blocks if is_passed(block)]


def joined_loads(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The load over the examples of both manifests, of the modules that both have counts of."""
    one, other = first.get(KEY, {}), second.get(KEY, {})
    return {
        module: {**load, "tokens": " ".join(map(str, _sums(load, other[module])))}
        for module, load in one.items()
        if module in other and len(_counts(load)) == len(_counts(other[module]))
    }


def _sums(one: Mapping[str, Any], other: Mapping[str, Any]) -> Iterable[int]:
    return (a + b for a, b in zip(_counts(one), _counts(other), strict=True))


def _counts(load: Mapping[str, Any]) -> list[int]:
    return [int(number) for number in load["tokens"].split()]


def load_rows(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each layer with experts, as results hold it; none of a model without.

    `least`, `median` and `most` are an expert's share of the layer's routed tokens; `tokens` is how
    many these are, `counts` how many each expert got, `unseen` which experts got none.
    """
    rows = []
    for module, load in manifest.get(KEY, {}).items():
        counts = _counts(load)
        total = sum(counts)
        shares = [count / total for count in counts] if total else [0.0] * len(counts)
        unseen = [expert for expert, count in enumerate(counts) if not count]
        rows.append(
            {
                "name": module,
                "layer": place_of(module)["layer"],
                "experts": len(counts),
                "tokens": total,
                "least": min(shares),
                "median": median(shares),
                "most": max(shares),
                "number_unseen": len(unseen),
                "unseen": _ranges(unseen),
                "shared": load.get("shared", []),
                "counts": load["tokens"],
            }
        )
    return rows


def load_line(rows: Sequence[Mapping[str, Any]]) -> str:
    """All layers of a data set in one line; "" where there are none."""
    if not rows:
        return ""
    numbers = sorted({row["experts"] for row in rows})
    each = str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"
    unseen = sum(row["number_unseen"] for row in rows)
    layers = f"{len(rows)} layer{'' if len(rows) == 1 else 's'} of {each} experts"
    said = (
        f"{layers}: each got {min(r['least'] for r in rows):.1%} to "
        f"{max(r['most'] for r in rows):.1%} of its layer's routed tokens (median "
        f"{median(r['median'] for r in rows):.1%})"
    )
    said += f", {unseen} got none" if unseen else ""
    shared = sum(1 for row in rows if row["shared"])
    return said + (f"; shared experts in {shared} got every token" if shared else "")


def _ranges(numbers: Sequence[int]) -> str:
    """ "0, 3-5" of 0, 3, 4, 5."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in spans)
