"""What a mask changes in a checkpoint's files, found and compared before a byte is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from fastdean.files.safetensors import (
    DTYPES,
    THROUGH_THE_MODEL,
    StoredTensor,
    read_values,
)
from fastdean.masks.entries import MaskEntry, same_bits, suppressed
from fastdean.masks.mask import NeuronMask
from fastdean.models.experts.fused_tensors import FusedTensor, fused_tensors


@dataclass(frozen=True)
class Edit:
    """An entry of the mask, or an expert's part of it, and its tensor in a file.

    Attributes:
        stored_name: of the tensor, with a star where experts lie in a tensor each.
    """

    name: str
    entry: MaskEntry
    tensor: StoredTensor
    stored_name: str


def check_places(source: Path, out: Path) -> None:
    if not source.is_dir():
        advice = "pass the folder it lies in" if source.exists() else "download the model first"
        advice = THROUGH_THE_MODEL if source.suffix == ".gguf" else advice
        raise ValueError(
            f"source must be a local folder of a checkpoint, got {str(source)!r}, which is "
            f"{'a file' if source.exists() else 'not a folder'}; {advice}"
        )
    if out == source or source in out.parents or out in source.parents:
        raise ValueError(
            f"out must be a folder outside of source, got {str(out)!r} for source {str(source)!r}; "
            "choose another"
        )


def planned_edits(
    source: Path, mask: NeuronMask, stored: Mapping[str, StoredTensor]
) -> dict[str, list[Edit]]:
    """File name -> its edits, after checking names, shapes, dtypes and values of all of them."""
    named = tensors_named(stored)
    fused = fused_in(source, mask, stored, named)
    edits: list[Edit] = []
    unmapped: list[str] = []
    taken: dict[str, str] = {}
    for name, entry in mask.entries.items():
        if name in fused:
            found = fused[name]
            shared = next((t.name for part in found.parts for t in part if t.name in taken), None)
            reason = found.reason
            if shared is not None:
                reason = f"{taken[shared]!r} of the mask means {shared!r}, too"
            if reason:
                unmapped.append(f"{name!r} ({reason})")
                continue
            taken.update((t.name, name) for part in found.parts for t in part)
            edits.extend(Edit(name, part, t, found.name) for part, t in parts_of(entry, found))
            continue
        tensors, reason = _locate(source, entry, named(name))
        shared = next((tensor.name for tensor in tensors if tensor.name in taken), None)
        if shared is not None:
            reason = f"{taken[shared]!r} of the mask means the same tensor, {shared!r}"
        if reason:
            unmapped.append(f"{name!r} ({reason})")
            continue
        taken.update((tensor.name, name) for tensor in tensors)
        edits.extend(Edit(name, entry, tensor, tensor.name) for tensor in tensors)
    if unmapped:
        more = f" and {len(unmapped) - 3} more" if len(unmapped) > 3 else ""
        raise ValueError(
            f"mask must name tensors of the checkpoint, got {len(unmapped)} of {len(mask.names)} "
            f"that {str(source)!r} does not have: {'; '.join(unmapped[:3])}{more}; "
            f"{THROUGH_THE_MODEL}"
        )
    grouped: dict[str, list[Edit]] = {}
    for edit in edits:
        _check_values(source, edit, mask.scale)
        grouped.setdefault(edit.tensor.file_name, []).append(edit)
    return dict(sorted(grouped.items()))


def fused_in(
    folder: Path,
    mask: NeuronMask,
    stored: Mapping[str, StoredTensor],
    named: Callable[[str], list[StoredTensor]],
) -> dict[str, FusedTensor]:
    """Of stacked parameters that the files hold otherwise, the tensors that they are made of."""
    wanted = {
        name: entry.shape
        for name, entry in mask.entries.items()
        if len(entry.shape) == 3 and not any(t.shape == entry.shape for t in named(name))
    }
    return fused_tensors(folder, stored, wanted) if wanted else {}


def parts_of(entry: MaskEntry, fused: FusedTensor) -> Iterator[tuple[MaskEntry, StoredTensor]]:
    """The entry's part in each tensor that holds some of it."""
    local = fused.local(entry.index, entry.shape)
    for tensor, here in fused.places(entry.index, entry.shape):
        yield MaskEntry(local[here], entry.original[here], tensor.shape), tensor


def _shorter_names(name: str) -> Iterator[str]:
    """`name` without one, two, ... leading components, up to the first layer number."""
    parts = name.split(".")
    for start in range(1, len(parts)):
        if parts[start - 1].isdigit():
            return
        yield ".".join(parts[start:])


def tensors_named(stored: Mapping[str, StoredTensor]) -> Callable[[str], list[StoredTensor]]:
    """A function that gives the tensors that a parameter's name may mean, whatever their shapes."""
    longer: dict[str, list[StoredTensor]] = {}
    for name, tensor in stored.items():
        for shorter in _shorter_names(name):
            longer.setdefault(shorter, []).append(tensor)

    def named(name: str) -> list[StoredTensor]:
        if name in stored:
            return [stored[name]]
        shorter = [stored[other] for other in _shorter_names(name) if other in stored]
        return shorter + longer.get(name, [])

    return named


def _locate(
    source: Path, entry: MaskEntry, named: list[StoredTensor]
) -> tuple[list[StoredTensor], str]:
    """Those of the tensors of a parameter's name that it means, or none and the reason.

    More than one only where all hold the originals: copies of one tensor under several names.
    """
    if not named:
        return [], "no tensor of that name: renamed or fused in the file"
    fitting = [tensor for tensor in named if tensor.shape == entry.shape]
    if not fitting:
        return [], f"shape {list(entry.shape)} in the mask, {list(named[0].shape)} in the file"
    if len(fitting) > 1 and not all(_holds_originals(source, entry, each) for each in fitting):
        names = " or ".join(repr(tensor.name) for tensor in fitting[:3])
        return [], f"not unique: {names}"
    return fitting, ""


def _holds_originals(source: Path, entry: MaskEntry, tensor: StoredTensor) -> bool:
    if tensor.dtype not in DTYPES:
        return False
    with open(source / tensor.file_name, "rb", buffering=0) as file:
        return _count_other(read_values(file, tensor, entry.index), entry) == 0


def _count_other(values: Tensor, entry: MaskEntry) -> int:
    """How many values differ from the originals, rounded to the dtype of the values."""
    return int((~same_bits(values, entry.original.to(values.dtype))).sum())


def _check_values(source: Path, edit: Edit, scale: float) -> None:
    tensor = edit.tensor
    if tensor.dtype not in DTYPES:
        raise ValueError(
            f"source must hold {tensor.name!r} as one of {', '.join(DTYPES)}, got {tensor.dtype} "
            f"(quantised) in {tensor.file_name!r}; use a checkpoint that is not quantised"
        )
    with open(source / tensor.file_name, "rb", buffering=0) as file:
        other = _count_other(read_values(file, tensor, edit.entry.index), edit.entry)
    if other:
        raise ValueError(
            f"source must be the model that the mask was made on, got {tensor.name!r} in "
            f"{tensor.file_name!r}, which holds other values than the mask's originals at {other} "
            f"of {len(edit.entry)} places: another model or already patched"
        )
    if not bool(suppressed(edit.entry.original, scale, DTYPES[tensor.dtype]).isfinite().all()):
        raise ValueError(
            f"mask must keep every value finite, got scale {scale:g} for {tensor.name!r} stored as "
            f"{tensor.dtype}; use a smaller scale"
        )
