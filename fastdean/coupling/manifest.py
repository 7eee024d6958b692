"""Where scores come from: the manifest that travels with them and with the masks made of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from fastdean.coupling.targets import Survey, Target
    from fastdean.coupling.trial import Scorable
    from fastdean.models.distributed import Ranks

_COUNTS = ("examples", "tokens", "target_tokens")
_SHA_BITS = 256


def score_manifest(
    model: nn.Module,
    targets: Sequence[Target],
    scorable: Scorable,
    scored: Collection[str],
    granularity: str,
    target_modules: str | Sequence[str],
    keep_top: float | None,
    ranks: Ranks,
    found: Survey,
) -> dict[str, Any]:
    """The manifest of a `score()`.

    Args:
        targets: the modules that were matched; `scored`: the parameters that have a score.
        found: the model's survey.
    """
    from fastdean.coupling.targets import coverage
    from fastdean.files.provenance import now, public_name, versions

    covered = coverage(model, targets, scored, found)
    name = getattr(getattr(model, "config", None), "_name_or_path", None) or ""
    in_text = isinstance(target_modules, str)
    optional = {
        "keep_top": keep_top,
        "loss_scale": None if scorable.scale is None else scorable.scale.factor,
        "one_example_per_batch": scorable.alone,
    }
    return {
        "created": now(),
        "model": {
            "name": public_name(name) or type(model).__name__,
            "class": type(model).__name__,
            "parameters": covered["model_parameters"],
            "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        },
        "granularity": granularity,
        "target_modules": target_modules if in_text else list(target_modules),
        "coverage": covered | {"left_out": scorable.left_out},
        "importance": "mean over examples of the per-example absolute value",
        "accumulation": "float32",
        "ranks": ranks.size,
        "versions": versions(),
        **scorable.work.describe(),
        **{key: value for key, value in optional.items() if value is not None},
    }


def examples_digest(digests: Iterable[bytes]) -> str:
    """One digest of a set of examples whatever their order: the sum of theirs modulo 2^256."""
    total = sum(int.from_bytes(digest, "big") for digest in digests) % (1 << _SHA_BITS)
    return f"{total:064x}"


def joined_manifests(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest of the sum of two scores."""
    joined = dict(first)
    data, other = first.get("data"), second.get("data")
    if data and other:
        joined["data"] = {
            **data,
            **{key: data[key] + other[key] for key in _COUNTS if key in data and key in other},
            "sha256": examples_digest(bytes.fromhex(d["sha256"]) for d in (data, other)),
            "sources": [*data.get("sources", []), *other.get("sources", [])],
            **_joined_rendering(data, other),
        }
        skipped = [each["skipped_rows"] for each in (data, other) if "skipped_rows" in each]
        if skipped:
            joined["data"]["skipped_rows"] = {
                "count": sum(each["count"] for each in skipped),
                "first": [row for each in skipped for row in each["first"]],
            }
    joined["joined_from"] = [
        *first.get("joined_from", [first.get("created")]),
        *second.get("joined_from", [second.get("created")]),
    ]
    return joined


def _joined_rendering(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """How the examples of both became tokens; what differs beside the counts is a list of both."""
    if not {"rendered"} <= first.keys() & second.keys():
        return {}
    counts = Counter(first["rendered"]) + Counter(second["rendered"])
    joined: dict[str, Any] = {"rendered": dict(sorted(counts.items()))}
    for key in ("template", "tokenizer"):
        if key in first and key in second and first[key] != second[key]:
            joined[key] = [first[key], second[key]]
    return joined
