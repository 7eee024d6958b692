"""`NeuronMask`: which weights are suppressed, their original values, and by how much; on disk too.

The originals identify the model: a mask is applied only to a model that holds them.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fastdean.files import storage
from fastdean.files.declared import (
    Anything,
    Lists,
    Maps,
    Maybe,
    Real,
    Record,
    Unfit,
    Whole,
    brief,
    require,
    unfit,
)
from fastdean.masks import edits
from fastdean.masks.cards import coupled_sets, mask_card
from fastdean.masks.entries import MaskEntry, checked_scale, suppressed
from fastdean.masks.summary import TABLE, MaskSummary, check_table, rows_from_names
from fastdean.wording.granularity import stored_granularity
from fastdean.wording.mendable import InputTypeError

__all__ = ["MaskEntry", "MaskSummary", "NeuronMask"]

# What `save_pretrained` writes.
_CONFIG = Record(
    {
        "scale": Real(),
        "shapes": Maps(Lists(Whole(), most=8)),
        "manifest": Maps(Anything()),
        "table": Maybe(TABLE),
    }
)
_ADVICE = "copy or save it again"

_OPERATIONS = {"|": MaskEntry.union, "&": MaskEntry.intersection, "-": MaskEntry.difference}


class NeuronMask:
    """A set of weights with their original values, and the factor that suppresses them.

    Args:
        entries: parameter name -> MaskEntry, names as in `model.named_parameters()`. Entries
            without a weight are dropped.
        scale: what the originals are multiplied by where the mask is applied; 0 switches the
            weights off, 0.5 halves them. Computed in float32 (float64 for float64 parameters).
        manifest: where the mask comes from; JSON-serialisable. Its keys "rule" and "ratio" are
            shown by `repr`; where "granularity" is "unit", the table counts units.
        table: one row per candidate matrix, in order, with the columns `summary.TABLE_COLUMNS`, as
            counted by `couple`: "first" and "second" are the candidates of the two attributes,
            "coupled" those in both, "removed" the coupled ones that matter for general examples,
            "kept" what this mask holds; optionally "weights", how many weights these are (default:
            "kept"). Only `summary` and `repr` read it.
    Raises:
        TypeError, ValueError: an argument of another form, or rows that contradict the entries.

    Two masks are equal if they hold the same weights, originals and scale; where they come from
    does not count. Not thread-safe.
    """

    def __init__(
        self,
        entries: Mapping[str, MaskEntry],
        *,
        scale: float = 0.0,
        manifest: Mapping[str, Any] | None = None,
        table: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        for name, entry in entries.items():
            if not isinstance(name, str) or not isinstance(entry, MaskEntry):
                raise InputTypeError(
                    "entries must map parameter names to MaskEntry, got "
                    f"{type(name).__name__} -> {type(entry).__name__}"
                )
        self._entries = {name: entry for name, entry in entries.items() if len(entry)}
        self._scale = checked_scale(scale)
        self._manifest = dict(manifest or {})
        self._table = None if table is None else [dict(row) for row in table]
        if self._table is not None:
            check_table(self._table, self._counts())
        for name, entry in self._entries.items():
            if not bool(suppressed(entry.original, self._scale).isfinite().all()):
                raise ValueError(
                    f"scale must keep every value finite in {entry.dtype}, got {scale} for {name!r}"
                )

    @property
    def entries(self) -> dict[str, MaskEntry]:
        """Parameter name -> MaskEntry, a copy of the dictionary."""
        return dict(self._entries)

    @property
    def scale(self) -> float:
        """The factor on the originals."""
        return self._scale

    @property
    def manifest(self) -> dict[str, Any]:
        """Where the mask comes from, a copy."""
        return dict(self._manifest)

    @property
    def table(self) -> list[dict[str, Any]] | None:
        """The rows of the candidate matrices, a copy, or None."""
        return None if self._table is None else [dict(row) for row in self._table]

    @property
    def names(self) -> list[str]:
        """The parameters with at least one masked weight."""
        return list(self._entries)

    @property
    def nbytes(self) -> int:
        """Bytes of indices and originals."""
        return sum(entry.nbytes for entry in self._entries.values())

    def __len__(self) -> int:
        """The number of masked weights."""
        return sum(self._counts().values())

    def __repr__(self) -> str:
        text = f"{len(self)} weights"
        if self._table is not None and self._counted() == "units":
            text = f"{sum(row['kept'] for row in self._table)} units ({text})"
        text += f" in {len(self._entries)}"
        if self._table is not None:
            text += f" of {len(self._table)}"
        text += f" matrices, scale={self._scale:g}"
        for key in ("rule", "ratio"):
            if key in self._manifest:
                text += f", {key}={brief(self._manifest[key])}"
        return f"NeuronMask({text})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, NeuronMask):
            return NotImplemented
        return self is other or (
            self._scale == other._scale
            and self._entries.keys() == other._entries.keys()
            and all(entry.equals(other._entries[name]) for name, entry in self._entries.items())
        )

    def __or__(self, other: NeuronMask) -> NeuronMask:
        """The weights in either mask. ValueError unless scales, shapes and originals agree."""
        return self._combined("|", other)

    def __and__(self, other: NeuronMask) -> NeuronMask:
        """The weights in both masks. ValueError unless scales, shapes and originals agree."""
        return self._combined("&", other)

    def __sub__(self, other: NeuronMask) -> NeuronMask:
        """The weights in this mask only. ValueError unless scales, shapes and originals agree."""
        return self._combined("-", other)

    def with_scale(self, scale: float) -> NeuronMask:
        """The same weights with another factor: 0 off, between 0 and 1 partial suppression."""
        return NeuronMask(self._entries, scale=scale, manifest=self._manifest, table=self._table)

    def summary(self) -> MaskSummary:
        """Counts per layer, per module and in total; `str()` of it is an aligned table."""
        table = rows_from_names(self._counts()) if self._table is None else self._table
        # A mask that was made by other means does not say.
        spares = self._manifest.get("general") != []
        return MaskSummary.of(table, self._counted(), self._scale, spares)

    def apply_(self, model: nn.Module, *, impl: str | None = None) -> nn.Module:
        """Write original * scale over the masked weights of `model`, in place; returns the model.

        A mask that is active already (this one or an equal one) changes nothing. On a model whose
        weights hold the masked values from the start, as one loaded from a patched checkpoint
        does, nothing is written and the mask counts as active. A model in another dtype than the
        mask's is edited where every original rounds to the value found, and one warning says so.

        Of a model that FSDP2 (`fully_shard`) shards, each rank edits the weights that it has. All
        ranks call it, as `restore_` and `applied`, and if one refuses, none writes.

        Args:
            model: the module whose parameters the names mean; wrappers of torch.compile and
                DistributedDataParallel are looked through.
            impl: the implementation of the mask operations of `ops`; None picks by device.
        Raises:
            ValueError: a parameter that is missing, of another shape, offloaded, quantised or
                sharded otherwise, or that holds other values than the originals.
            RuntimeError: weights under an active mask were changed by something else; as with the
                other errors, nothing is written.
        """
        edits.apply_(model, self, impl=impl)
        return model

    def restore_(self, model: nn.Module) -> nn.Module:
        """Write back what the masked weights were before `apply_`, in place; returns the model.

        Works without a preceding `apply_` where the model holds exactly the masked values, and
        changes nothing where it holds the originals.

        Raises:
            RuntimeError: another mask was applied later (restore that one first), or the weights
                were changed since. Nothing is written.
            ValueError: as for `apply_`.
        """
        edits.restore_(model, self)
        return model

    def applied(
        self, model: nn.Module, *, impl: str | None = None
    ) -> AbstractContextManager[nn.Module]:
        """Apply on entry and undo on exit, also after an exception; yields the model.

        Only what was applied on entry is undone: a mask that was active before stays active.

        Raises: as `apply_` on entry and `restore_` on exit.
        """
        return edits.applied(model, self, impl=impl)

    def save_pretrained(
        self,
        path: str | os.PathLike,
        *,
        overwrite: bool = False,
        push_to_hub: bool = False,
        repo_id: str | None = None,
    ) -> Path:
        """Write the mask as a folder of JSON and safetensors, atomically; returns its path.

        Args:
            path: a new or empty folder, or an earlier mask with `overwrite=True`.
            push_to_hub: also upload it, to `repo_id` or else to the folder's name.
        Raises: as `storage.write_folder`.
        """
        config = {
            "scale": self._scale,
            "shapes": {name: list(entry.shape) for name, entry in self._entries.items()},
            "manifest": self._manifest,
            "table": self._table,
        }
        tensors = {}
        for name, entry in self._entries.items():
            tensors[f"{name}.index"] = entry.index
            tensors[f"{name}.original"] = entry.original
        folder = storage.write_folder(path, config, tensors, kind="mask", overwrite=overwrite)
        if push_to_hub:
            self._push(folder, repo_id or folder.name)
        return folder

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo_id: str | os.PathLike,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> NeuronMask:
        """Read a mask from a folder or from the hub, and validate all of it.

        Raises: as `storage.resolve` and `storage.read_folder`; ValueError for a folder whose
        configuration is no mask's, or whose parts contradict each other; the text names the file
        and the field.
        """
        folder = storage.resolve(path_or_repo_id, revision=revision, token=token, kind="mask")
        config, tensors = storage.read_folder(folder, kind="mask")
        require(config, _CONFIG, folder / storage.CONFIG_NAME, advice=_ADVICE)
        return _from_parts(folder, config, tensors)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str | None = None,
    ) -> str:
        """Upload the mask with a short model card; returns the address of the commit."""
        with tempfile.TemporaryDirectory() as scratch:
            folder = self.save_pretrained(Path(scratch) / "mask")
            return self._push(
                folder, repo_id, private=private, token=token, commit_message=commit_message
            )

    def _push(
        self, folder: Path, repo_id: str, *, commit_message: str | None = None, **options: Any
    ) -> str:
        card = mask_card(
            repo_id,
            described=repr(self),
            scale=self._scale,
            summary=str(self.summary()),
            sets=coupled_sets(self._manifest),
        )
        message = commit_message or f"Upload {self!r}"
        return storage.push_folder(
            folder, repo_id, commit_message=message, card_text=card, **options
        )

    def _counts(self) -> dict[str, int]:
        return {name: len(entry) for name, entry in self._entries.items()}

    def _counted(self) -> str:
        """What the table counts; without one there is nothing but weights to count."""
        granularity = stored_granularity(self._manifest.get("granularity"))
        by_unit = self._table is not None and granularity == "unit"
        return "units" if by_unit else "weights"

    def _combined(self, sign: str, other: NeuronMask) -> NeuronMask:
        if not isinstance(other, NeuronMask):
            return NotImplemented
        if self._scale != other._scale:
            raise ValueError(
                f"masks must have the same scale to be combined, got {self._scale:g} and "
                f"{other._scale:g}; use with_scale on one of them"
            )
        entries = {}
        for name, either in {**self._entries, **other._entries}.items():
            left = self._entries.get(name, either.empty())
            right = other._entries.get(name, either.empty())
            left.require_same_originals(right, name)
            entries[name] = _OPERATIONS[sign](left, right)
        manifest = {"operation": sign, "operands": [self._manifest, other._manifest]}
        return NeuronMask(entries, scale=self._scale, manifest=manifest)


def _from_parts(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> NeuronMask:
    """The mask of a folder's configuration and tensors, whose values are not checked yet."""
    expected = [f"{name}.{part}" for name in config["shapes"] for part in ("index", "original")]
    if odd := sorted({*expected} ^ tensors.keys()):
        found = "another tensor" if odd[0] in tensors else "no such tensor"
        raise unfit(folder, repr(odd[0]), "a part of the mask", found, _ADVICE)
    entries = {}
    for name, shape in config["shapes"].items():
        try:
            entries[name] = MaskEntry(
                tensors[f"{name}.index"], tensors[f"{name}.original"], tuple(shape)
            )
        except (TypeError, ValueError) as error:
            raise _contradicts(folder, f"an entry for {name!r}", error) from error
    try:
        return NeuronMask(
            entries, scale=config["scale"], manifest=config["manifest"], table=config["table"]
        )
    except ValueError as error:
        raise _contradicts(folder, "a whole mask", error) from error


def _contradicts(folder: Path, what: str, error: Exception) -> Unfit:
    return unfit(folder, "", what, f"one that contradicts itself ({error})", _ADVICE)
