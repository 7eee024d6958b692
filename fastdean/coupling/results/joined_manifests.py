"""The manifest of the sum of two scores."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from fastdean.coupling.results.expert_load import KEY, joined_loads
from fastdean.data.example_digests import examples_digest

_COUNTS = ("examples", "tokens", "target_tokens")


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
    joined.pop(KEY, None)
    if loads := joined_loads(first, second):
        joined[KEY] = loads
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
