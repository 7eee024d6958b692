"""Finished scores of matrices among the kept files of a job, and back.

The weights of dense scores are the model's own and are not written: they are found in the model
again, and compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from torch import Tensor

from fastdean.coupling.results.score_entry import ScoreEntry, fingerprint
from fastdean.coupling.resuming.kept_files import KeptFiles
from fastdean.coupling.sums.accumulators import sums_bytes
from fastdean.coupling.targets.target import Target
from fastdean.files.declared import Flag, Lists, Maybe, Record, Whole, require

_INDEX_BYTES = 8
_NOTE = Record(
    {
        "shape": Lists(Whole()),
        "unit_axis": Maybe(Whole()),
        "fingerprint": Whole(least=-(2**63)),
        "unseen": Lists(Whole()),
        "routed": Maybe(Lists(Whole())),
        "stacked": Flag(),
    }
)


def keep_entries(home: KeptFiles, number: int, entries: Mapping[str, ScoreEntry]) -> None:
    """Write entries of the data set of this number."""
    for parameter, entry in entries.items():
        found = {"sums": entry.sums, "index": entry.index, "signed": entry.signed}
        if _owns_weight(entry):
            found["weight"] = entry.weight
        note = {
            "shape": list(entry.shape),
            "unit_axis": entry.unit_axis,
            "fingerprint": entry.fingerprint,
            "unseen": list(entry.unseen),
            "routed": None if entry.routed is None else list(entry.routed),
            "stacked": entry.stacked,
        }
        tensors: dict[int | str, Tensor] = {k: t for k, t in found.items() if t is not None}
        home.keep(("entries", number, parameter), tensors, partial(dict, note))


def kept_entries(
    home: KeptFiles, number: int, targets: Sequence[Target], *, weights: bool
) -> dict[str, ScoreEntry]:
    """The entries that an earlier process wrote of the data set of this number.

    Args:
        weights: dense entries get the model's own; False of a streamed or sharded model, whose
            layers come and go, and of one that is split over ranks. Its units need none.
    Raises:
        ValueError: a weight of the model is not the one that was scored.
    """
    by_parameter = {target.parameter: target for target in targets}
    entries = {}
    for key, note, _ in list(home.notes("entries")):
        if key[1] != number:
            continue
        require(note, _NOTE, home.folder, where=repr(key[2]), advice="remove it to start again")
        found = home.bring(key)
        entry = ScoreEntry(
            sums=found["sums"],
            weight=found.get("weight"),
            index=found.get("index"),
            shape=tuple(note["shape"]),
            unit_axis=note["unit_axis"],
            fingerprint=note["fingerprint"],
            unseen=tuple(note["unseen"]),
            routed=None if note["routed"] is None else tuple(note["routed"]),
            stacked=note["stacked"],
            signed=found.get("signed"),
        )
        if weights and not _owns_weight(entry):
            weight = by_parameter[key[2].partition("[")[0]].materialised().detach()
            if fingerprint(weight) != entry.fingerprint:
                raise ValueError(
                    f"resume must be a folder of this job, got {str(home.folder.parent)!r} with "
                    f"one that differs in {key[2]}; choose another folder, or score the same model"
                )
            entry = ScoreEntry(**{**vars(entry), "weight": weight})
        entries[key[2]] = entry
    return entries


def entries_bytes(
    targets: Sequence[Target], granularity: str, keep_top: float | None, signs: bool
) -> int:
    """About what the entries of these targets take on a disk."""
    if keep_top is None:
        return sum(sums_bytes(target, granularity, signs) for target in targets)
    sums = sum(sums_bytes(target, granularity) for target in targets)
    each = (
        (8 if signs else 4)
        + _INDEX_BYTES
        + max((target.weight.element_size() for target in targets), default=0)
    )
    return int(keep_top * sums / 4 * each)


def _owns_weight(entry: ScoreEntry) -> bool:
    return entry.index is not None and entry.unit_axis is None
