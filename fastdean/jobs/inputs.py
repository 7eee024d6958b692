"""What a job reads beside its rows and its model, as digests.

What belongs to the model is in `fastdean.models.identity`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastdean.masks import NeuronMask
from fastdean.models.identity import json_digest

_CHUNK_BYTES = 1 << 20
# Of a mask's manifest, what `couple` was asked for.
_MADE_BY = (
    "rule",
    "ratio",
    "scope",
    "min_k",
    "granularity",
    "expert_scope",
    "unit_weights",
    "seed",
    "signs",
)


def benchmark_digests(asked: Sequence[str]) -> dict[str, str | None]:
    """By "bias NAME=SRC": SHA-256 of the file, or of the files of the folder, that SRC names.

    None for what is no file, such as a hub id, whose content costs a download to know.

    Args:
        asked: as `jobs.bias.asked.check` takes them.
    """
    sources = {entry: entry.partition("=")[2].partition("::")[0] for entry in asked}
    return {f"bias {entry}": path_digest(source) for entry, source in sources.items() if source}


def mask_digest(mask: NeuronMask) -> str:
    """Of the weights that a mask holds, their originals and its scale."""
    entries = {
        name: [entry.index.tolist(), entry.original.double().tolist()]
        for name, entry in mask.entries.items()
    }
    return json_digest([entries, mask.scale])


def described_mask(mask: NeuronMask) -> dict[str, Any]:
    """What results say of a mask: its size, how it was made, as far as it knows, and its digest."""
    known = {name: mask.manifest[name] for name in _MADE_BY if name in mask.manifest}
    return {"weights": len(mask), "scale": mask.scale, **known, "sha256": mask_digest(mask)}


def path_digest(source: str) -> str | None:
    """SHA-256 of a file, or of the files of a folder; None where there is none."""
    place = Path(source).expanduser()
    if not place.exists():
        return None
    files = [place] if place.is_file() else sorted(p for p in place.iterdir() if p.is_file())
    digest = hashlib.sha256()
    for path in files:
        digest.update(os.fsencode(path.name) + f" {path.stat().st_size} ".encode())
        with open(path, "rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
    return digest.hexdigest()
