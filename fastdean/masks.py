"""`NeuronMask`: which weights are suppressed, what they were, and how to undo it bit for bit.

A mask names weights by parameter and flat row-major index, and carries their original values. The
originals are the model's identity: a mask is applied only where they are what the model holds.
Every edit is all or nothing, and active masks are remembered per model, so that nested edits undo
in order. The memory is a dictionary of this module; it is not thread-safe.
"""

from __future__ import annotations

import math
import os
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdean import ops, storage

EDITABLE_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
TABLE_COLUMNS = (
    "name",
    "layer",
    "module",
    "numel",
    "k",
    "first",
    "second",
    "coupled",
    "removed",
    "kept",
)
_SUMS = ("first", "second", "coupled", "removed", "kept")
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
# Name components that a wrapper adds and that no checkpoint has.
_WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}


@dataclass(frozen=True, eq=False)
class MaskEntry:
    """The masked weights of one parameter.

    Args:
        index: int64 [M], flat row-major indices, strictly ascending, on the CPU.
        original: [M], the values there, in the parameter's dtype, finite, on the CPU.
        shape: the parameter's shape.
    Raises:
        TypeError, ValueError: anything else.
    """

    index: Tensor
    original: Tensor
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(int(size) for size in self.shape))
        _check_tensor("index", self.index, (torch.int64,))
        _check_tensor("original", self.original, EDITABLE_DTYPES)
        if self.original.shape != self.index.shape:
            raise ValueError(
                f"original must have one value per index ({len(self)}), got {len(self.original)}"
            )
        if len(self) and not bool((self.index[1:] > self.index[:-1]).all()):
            raise ValueError("index must be strictly ascending, got another order; sort it")
        if len(self) and not 0 <= int(self.index[0]) <= int(self.index[-1]) < self.numel:
            raise ValueError(
                f"index must be within 0..{self.numel - 1} for shape {list(self.shape)}, "
                f"got {int(self.index[0])}..{int(self.index[-1])}"
            )
        if not bool(self.original.isfinite().all()):
            raise ValueError("original must be finite, got NaN or infinity; check the model")

    def __len__(self) -> int:
        return self.index.numel()

    @property
    def numel(self) -> int:
        """Elements of the parameter."""
        return math.prod(self.shape)

    @property
    def dtype(self) -> torch.dtype:
        """The parameter's dtype."""
        return self.original.dtype

    def equals(self, other: MaskEntry) -> bool:
        """Whether both address the same weights and hold the same bits."""
        return (
            self.shape == other.shape
            and self.dtype == other.dtype
            and torch.equal(self.index, other.index)
            and bool(same_bits(self.original, other.original).all())
        )

    def take(self, keep: Tensor) -> MaskEntry:
        """The entry restricted to where `keep` (bool [M]) holds."""
        return MaskEntry(self.index[keep], self.original[keep], self.shape)

    def merged(self, other: MaskEntry) -> MaskEntry:
        """The union with an entry of the same parameter whose originals agree."""
        index, place = torch.cat([self.index, other.index]).unique(return_inverse=True)
        original = torch.empty(index.shape, dtype=self.dtype)
        original[place] = torch.cat([self.original, other.original])
        return MaskEntry(index, original, self.shape)


class NeuronMask:
    """A set of weights with their original values, and the factor that suppresses them.

    Args:
        entries: parameter name -> MaskEntry, names as in `model.named_parameters()`. Entries
            without a weight are dropped.
        scale: what the originals are multiplied by where the mask is applied; 0 switches the
            weights off, 0.5 halves them. Computed in float32 (float64 for float64 parameters).
        manifest: where the mask comes from; JSON-serialisable. Its keys "rule" and "ratio" are
            shown by `repr`.
        table: one row per candidate matrix, in order, with the columns `TABLE_COLUMNS`, as counted
            by `couple`: "first" and "second" are the candidates of the two attributes, "coupled"
            those in both, "removed" the coupled ones that matter for general examples, "kept" what
            this mask holds. Only `summary` reads it.
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
                raise TypeError(
                    "entries must map parameter names to MaskEntry, got "
                    f"{type(name).__name__} -> {type(entry).__name__}"
                )
        self._entries = {name: entry for name, entry in entries.items() if len(entry)}
        self._scale = _checked_scale(scale)
        self._manifest = dict(manifest or {})
        self._table = None if table is None else [dict(row) for row in table]
        if self._table is not None:
            _check_table(self._table, self._entries)
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
        return sum(
            entry.index.nbytes + entry.original.nbytes for entry in self._entries.values()
        )

    def __len__(self) -> int:
        """The number of masked weights."""
        return sum(len(entry) for entry in self._entries.values())

    def __repr__(self) -> str:
        where = f"{len(self._entries)}"
        if self._table is not None:
            where += f" of {len(self._table)}"
        text = f"{len(self)} weights in {where} matrices, scale={self._scale:g}"
        for key in ("rule", "ratio"):
            if key in self._manifest:
                text += f", {key}={self._manifest[key]!r}"
        return f"NeuronMask({text})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, NeuronMask):
            return NotImplemented
        return self is other or (
            self._scale == other._scale
            and self._entries.keys() == other._entries.keys()
            and all(entry.equals(other._entries[name]) for name, entry in self._entries.items())
        )

    __hash__ = None

    def __or__(self, other: NeuronMask) -> NeuronMask:
        """The weights in either mask. ValueError unless scales, shapes and originals agree."""
        if not isinstance(other, NeuronMask):
            return NotImplemented
        _check_combinable(self, other)
        entries = dict(self._entries)
        for name, entry in other._entries.items():
            entries[name] = entries[name].merged(entry) if name in entries else entry
        return self._combined("|", other, entries)

    def __and__(self, other: NeuronMask) -> NeuronMask:
        """The weights in both masks. ValueError unless scales, shapes and originals agree."""
        if not isinstance(other, NeuronMask):
            return NotImplemented
        _check_combinable(self, other)
        entries = {
            name: entry.take(torch.isin(entry.index, other._entries[name].index))
            for name, entry in self._entries.items()
            if name in other._entries
        }
        return self._combined("&", other, entries)

    def __sub__(self, other: NeuronMask) -> NeuronMask:
        """The weights in this mask only. ValueError unless scales, shapes and originals agree."""
        if not isinstance(other, NeuronMask):
            return NotImplemented
        _check_combinable(self, other)
        entries = dict(self._entries)
        for name, entry in other._entries.items():
            if name in entries:
                entries[name] = entries[name].take(~torch.isin(entries[name].index, entry.index))
        return self._combined("-", other, entries)

    def with_scale(self, scale: float) -> NeuronMask:
        """The same weights with another factor: 0 off, between 0 and 1 partial suppression."""
        return NeuronMask(self._entries, scale=scale, manifest=self._manifest, table=self._table)

    def summary(self) -> MaskSummary:
        """Counts per layer, per module and in total; `str()` of it is an aligned table."""
        rows = self._table if self._table is not None else self._rows_from_names()
        return MaskSummary(
            rows=_aggregate(rows, "layer"),
            modules=_aggregate(rows, "module"),
            total=_sum_rows({"layer": "total"}, rows),
        )

    def apply_(self, model: nn.Module, *, impl: str | None = None) -> nn.Module:
        """Write original * scale over the masked weights of `model`, in place; returns the model.

        A mask that is active already (this one or an equal one) changes nothing. On a model whose
        weights hold the masked values from the start, as one loaded from a patched checkpoint
        does, nothing is written and the mask counts as active.

        Args:
            model: the module whose parameters the names mean; wrappers of torch.compile and
                DistributedDataParallel are looked through.
            impl: the implementation of `ops.zero_at_`; None picks by device.
        Raises:
            ValueError: a parameter that is missing, of another shape or dtype, offloaded or
                quantised, or that holds other values than the originals.
            RuntimeError: weights under an active mask were changed by something else.
            Nothing is written in either case.
        """
        self._apply(model, impl)
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
        root = _unwrap(model)
        parameters = _parameters(root)
        stack = _ACTIVE.get(root, [])
        _drop_undone(stack, parameters)
        active = self._find(stack)
        if active is not None:
            _undo(stack, active, parameters)
        else:
            self._restore_unrecorded(stack, parameters)
        return model

    @contextmanager
    def applied(self, model: nn.Module, *, impl: str | None = None) -> Iterator[nn.Module]:
        """Apply on entry and undo on exit, also after an exception; yields the model.

        Only what was applied on entry is undone: a mask that was active before stays active.

        Raises: as `apply_` on entry and `restore_` on exit.
        """
        root = _unwrap(model)
        application = self._apply(model, impl)
        try:
            yield model
        finally:
            stack, parameters = _ACTIVE.get(root, []), _parameters(root)
            if application is not None:
                _drop_undone(stack, parameters)
            if application in stack:
                if application.wrote:
                    _undo(stack, application, parameters)
                else:
                    stack.remove(application)

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

        Raises: as `storage.resolve` and `storage.read_folder`; ValueError for a folder whose parts
        contradict each other.
        """
        folder = storage.resolve(path_or_repo_id, revision=revision, token=token, kind="mask")
        config, tensors = storage.read_folder(folder, kind="mask")
        try:
            return _from_parts(config, tensors)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"path must hold a whole mask, got {str(folder)!r} with inconsistent contents "
                f"({error}); save it again"
            ) from error

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

    def _push(self, folder: Path, repo_id: str, **options: Any) -> str:
        message = options.pop("commit_message", None) or f"Upload {self!r}"
        return storage.push_folder(
            folder, repo_id, commit_message=message, card_text=_card(self, repo_id), **options
        )

    def _combined(
        self, sign: str, other: NeuronMask, entries: Mapping[str, MaskEntry]
    ) -> NeuronMask:
        manifest = {"operation": sign, "operands": [self._manifest, other._manifest]}
        return NeuronMask(entries, scale=self._scale, manifest=manifest)

    def _rows_from_names(self) -> list[dict[str, Any]]:
        unknown = dict.fromkeys(("first", "second", "coupled", "removed"))
        return [
            {**unknown, **_place_of(name), "kept": len(entry)}
            for name, entry in self._entries.items()
        ]

    def _find(self, stack: list[_Application]) -> _Application | None:
        return next((active for active in stack if active.mask == self), None)

    def _targets(self, parameters: Mapping[str, nn.Parameter]) -> list[_Part]:
        """What to write where, one part per tensor in memory, however many names it has."""
        merged: dict[tuple, tuple[str, MaskEntry]] = {}
        for name, entry in self._entries.items():
            parameter = _checked_parameter(parameters, name, entry.shape, entry.dtype)
            place = _place_in_memory(parameter)
            if place in merged:
                first_name, first = merged[place]
                _check_same_originals(name, first, entry)
                merged[place] = (first_name, first.merged(entry))
            else:
                merged[place] = (name, entry)
        return [
            _Part(name, entry.shape, entry.index, entry.original, self._suppress(entry))
            for name, entry in merged.values()
        ]

    def _suppress(self, entry: MaskEntry) -> Tensor:
        return suppressed(entry.original, self._scale)

    def _apply(self, model: nn.Module, impl: str | None) -> _Application | None:
        """Apply, and return the record of it; None if the mask was active already."""
        root = _unwrap(model)
        parameters = _parameters(root)
        stack = _ACTIVE.setdefault(root, [])
        _drop_undone(stack, parameters)
        targets = self._targets(parameters)
        current = _read(targets, parameters)
        base = _beneath(targets, current, stack, parameters)
        if self._find(stack) is not None:
            return None
        written = [part.written for part in targets]
        if not _all_same(base, [part.previous for part in targets]):
            if not (_all_same(base, written) and _all_same(current, written)):
                raise ValueError(_other_values(targets, base))
            application = _Application(self, targets, wrote=False)
            stack.append(application)
            return application
        parts = [
            _Part(part.name, part.shape, part.index, now, part.written)
            for part, now in zip(targets, current, strict=True)
        ]
        application = _Application(self, parts, wrote=True)
        stack.append(application)
        try:
            if self._scale == 0.0:
                tensors = [parameters[part.name] for part in parts]
                ops.zero_at_(tensors, [part.index for part in parts], impl=impl)
            else:
                _write(parts, written, parameters)
        except BaseException:
            stack.remove(application)
            _roll_back(parts, current, parameters)
            raise
        return application

    def _restore_unrecorded(
        self, stack: list[_Application], parameters: Mapping[str, nn.Parameter]
    ) -> None:
        targets = self._targets(parameters)
        current = _read(targets, parameters)
        if _all_same(current, [part.previous for part in targets]):
            return
        if stack:
            raise RuntimeError(_restore_first(stack[-1], self))
        _check_unchanged(targets, current)
        try:
            _write(targets, [part.previous for part in targets], parameters)
        except BaseException:
            _roll_back(targets, current, parameters)
            raise


@dataclass(frozen=True)
class MaskSummary:
    """Counts of a mask: `rows` per layer, `modules` per module name, `total` over all.

    Each row has "layer" (int, None outside of layers) or "module", "matrices", "first", "second",
    "coupled", "removed" and "kept"; counts that the mask does not know are None. `str()` gives the
    rows of the layers and the total as an aligned table.
    """

    rows: list[dict[str, Any]]
    modules: list[dict[str, Any]]
    total: dict[str, Any]

    def __str__(self) -> str:
        head = ("layer", "matrices", *_SUMS)
        body = [[_cell(row[column]) for column in head] for row in [*self.rows, self.total]]
        widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
        return "\n".join(
            "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
            for line in [head, *body]
        )


def suppressed(original: Tensor, scale: float, dtype: torch.dtype | None = None) -> Tensor:
    """`original * scale`, computed in float32 (float64 for float64), rounded once to `dtype`.

    Args:
        original: [M], a dtype of `EDITABLE_DTYPES`.
        dtype: of the result; None is that of `original`.
    Returns:
        [M]; at scale 0 positive zeros throughout, for negative originals too.
    """
    dtype = dtype or original.dtype
    if scale == 0.0:
        return torch.zeros(original.shape, dtype=dtype)
    wide = torch.promote_types(original.dtype, torch.float32)
    return original.to(wide).mul(scale).to(dtype)


def same_bits(left: Tensor, right: Tensor) -> Tensor:
    """Elementwise bit equality of two tensors of one dtype and shape: -0.0 is not 0.0. bool [M]."""
    bits = _BITS[left.element_size()]
    return left.contiguous().view(bits) == right.contiguous().view(bits)


@dataclass(frozen=True, eq=False)
class _Part:
    """One parameter of an edit: where, what stands there without it, and what with it."""

    name: str
    shape: tuple[int, ...]
    index: Tensor
    previous: Tensor
    written: Tensor


@dataclass(frozen=True, eq=False)
class _Application:
    """An active mask. `wrote` is False where the model held the masked values from the start."""

    mask: NeuronMask
    parts: list[_Part]
    wrote: bool


# model -> its active masks, the latest last. Records name parameters and never hold them, so that
# a model can go, and `.to()` and reloading are seen.
_ACTIVE: weakref.WeakKeyDictionary[nn.Module, list[_Application]] = weakref.WeakKeyDictionary()


def _check_tensor(name: str, tensor: Any, dtypes: tuple[torch.dtype, ...]) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        expected = " or ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"{name} must be {expected}, got {tensor.dtype}")
    if tensor.dim() != 1 or tensor.device.type != "cpu":
        raise ValueError(
            f"{name} must be 1-D and on the CPU, got {tensor.dim()}-D on {tensor.device}"
        )


def _checked_scale(scale: Any) -> float:
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale must be a number, got {type(scale).__name__}")
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")
    # So that -0.0 reads as the 0 that it does.
    return float(scale) + 0.0


def _check_table(table: list[dict[str, Any]], entries: Mapping[str, MaskEntry]) -> None:
    for row in table:
        missing = [column for column in TABLE_COLUMNS if column not in row]
        if missing:
            raise ValueError(
                f"table must have the columns {', '.join(TABLE_COLUMNS)}, got a row without "
                f"{missing[0]!r}"
            )
        held = len(entries[row["name"]]) if row["name"] in entries else 0
        if row["kept"] != held:
            raise ValueError(
                f"table must agree with entries, got kept={row['kept']} for {row['name']!r}, "
                f"which has {held} weights"
            )
    names = [row["name"] for row in table]
    if len(set(names)) != len(names) or not set(entries) <= set(names):
        raise ValueError(
            "table must have exactly one row per matrix, and one for every entry, got "
            f"{len(names)} rows of {len(set(names))} names for {len(entries)} entries"
        )


def _check_combinable(left: NeuronMask, right: NeuronMask) -> None:
    if left.scale != right.scale:
        raise ValueError(
            f"masks must have the same scale to be combined, got {left.scale:g} and "
            f"{right.scale:g}; use with_scale on one of them"
        )
    others = right.entries
    for name, entry in left.entries.items():
        if name in others:
            _check_same_originals(name, entry, others[name])


def _check_same_originals(name: str, left: MaskEntry, right: MaskEntry) -> None:
    if left.shape != right.shape or left.dtype != right.dtype:
        raise ValueError(
            f"masks must agree on the shape and dtype of {name!r}, got {list(left.shape)} "
            f"{left.dtype} and {list(right.shape)} {right.dtype}"
        )
    here, there, shared = _overlap(left.index, right.index)
    if not bool(same_bits(left.original[here], right.original[there]).all()):
        raise ValueError(
            f"masks must hold the same originals where both hold a weight, got others in {name!r} "
            f"({shared} shared weights); they were made on different models"
        )


def _overlap(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, int]:
    """Positions in two ascending index tensors of the indices that are in both, and how many."""
    here = torch.isin(left, right).nonzero().flatten()
    return here, torch.searchsorted(right, left[here]), here.numel()


def _place_of(name: str) -> dict[str, Any]:
    """Layer number and module name, read off a parameter's name."""
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    inner = parts[0 if number is None else number + 1 :]
    return {
        "layer": None if number is None else int(parts[number]),
        "module": ".".join(inner[:-1] or inner),
    }


def _aggregate(rows: list[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    groups: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row[key], []).append(row)
    return [_sum_rows({key: value}, group) for value, group in groups.items()]


def _sum_rows(head: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    sums = {
        column: None if any(row[column] is None for row in rows) else sum(r[column] for r in rows)
        for column in _SUMS
    }
    return {**head, "matrices": len(rows), **sums}


def _cell(value: Any) -> str:
    return "-" if value is None else str(value)


def _from_parts(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> NeuronMask:
    entries = {
        name: MaskEntry(tensors[f"{name}.index"], tensors[f"{name}.original"], tuple(shape))
        for name, shape in config["shapes"].items()
    }
    if len(tensors) != 2 * len(entries):
        raise ValueError(f"{len(tensors)} tensors for {len(entries)} parameters")
    return NeuronMask(
        entries, scale=config["scale"], manifest=config["manifest"], table=config["table"]
    )


def _card(mask: NeuronMask, repo_id: str) -> str:
    return f"""---
library_name: fastdean
tags:
- fastdean
- weight-mask
---
# {repo_id}

`{mask!r}`

A list of weights of a language model in which two safety-related attributes are coupled, with
their original values, after the method DEAN (arXiv 2410.16672). Applying it multiplies these
weights by {mask.scale:g}. The mask contains no model; it is applied only to the model that it was
made on, which it recognises by the original values.

```python
import fastdean

mask = fastdean.NeuronMask.from_pretrained("{repo_id}")
with mask.applied(model):
    ...                    # edited here, restored bit for bit afterwards
```

**Content warning.** The mask changes how a model behaves where safety matters, on fairness and
privacy among others, and not always for the better. Evaluate the edited model before any use.

```text
{mask.summary()}
```
"""


def _unwrap(model: nn.Module) -> nn.Module:
    """The module inside torch.compile's and data parallel wrappers."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while True:
        if "_orig_mod" in model._modules:
            model = model._modules["_orig_mod"]
        elif isinstance(model, wrappers):
            model = model.module
        else:
            return model


def _parameters(root: nn.Module) -> dict[str, nn.Parameter]:
    """All parameters under all their names, without the components that wrappers add."""
    return {
        ".".join(part for part in name.split(".") if part not in _WRAPPERS): parameter
        for name, parameter in root.named_parameters(remove_duplicate=False)
    }


def _checked_parameter(
    parameters: Mapping[str, nn.Parameter],
    name: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> nn.Parameter:
    if name not in parameters:
        raise ValueError(
            f"model must have a parameter {name!r}, got none of that name; "
            "load the model that the mask was made on"
        )
    parameter = parameters[name]
    if parameter.device.type == "meta":
        raise ValueError(
            f"model must hold {name!r} in memory, got a meta tensor (offloaded); "
            "load it without offloading, or use patch_checkpoint"
        )
    # A quantised subclass may report a floating dtype; only plain tensors have values to write.
    if parameter.dtype not in EDITABLE_DTYPES or type(parameter.data) is not Tensor:
        raise ValueError(
            f"model must hold {name!r} as plain floating-point values, got "
            f"{type(parameter.data).__name__} of {parameter.dtype} (quantised or sharded); "
            "load it without quantisation"
        )
    if tuple(parameter.shape) != shape:
        raise ValueError(
            f"model must have {name!r} of shape {list(shape)}, got {list(parameter.shape)}; "
            "load the model that the mask was made on"
        )
    if parameter.dtype != dtype:
        raise ValueError(
            f"model must have {name!r} in the mask's dtype {dtype}, got {parameter.dtype}; "
            f"load it with dtype={dtype}, or convert it back"
        )
    return parameter


def _place_in_memory(parameter: Tensor) -> tuple:
    """Equal for two tensors exactly if they are the same elements in the same order.

    A storage compares by identity, and holding it here keeps its identity from being reused.
    """
    return (
        parameter.untyped_storage(),
        parameter.storage_offset(),
        parameter.shape,
        parameter.stride(),
    )


def _read(parts: Sequence[_Part], parameters: Mapping[str, nn.Parameter]) -> list[Tensor]:
    """The values of the parts now, [M] each, on the CPU."""
    tensors = [
        _checked_parameter(parameters, part.name, part.shape, part.written.dtype) for part in parts
    ]
    return [value.cpu() for value in ops.gather_at(tensors, [part.index for part in parts])]


def _write(
    parts: Sequence[_Part], values: Sequence[Tensor], parameters: Mapping[str, nn.Parameter]
) -> None:
    tensors = [parameters[part.name] for part in parts]
    ops.write_at_(tensors, [part.index for part in parts], values)


def _roll_back(
    parts: Sequence[_Part], values: Sequence[Tensor], parameters: Mapping[str, nn.Parameter]
) -> None:
    """Undo a write that was cut short; one that never began is left alone."""
    if not _all_same(_read(parts, parameters), values):
        _write(parts, values, parameters)


def _all_same(left: Sequence[Tensor], right: Sequence[Tensor]) -> bool:
    return all(bool(same_bits(a, b).all()) for a, b in zip(left, right, strict=True))


def _drop_undone(stack: list[_Application], parameters: Mapping[str, nn.Parameter]) -> None:
    """Forget the latest masks whose weights already hold what restoring them would leave.

    This is what reloading a clean state dict over an edited model leads to.
    """
    for depth in range(len(stack)):
        latest = stack[depth:]
        if any(map(_changes_something, latest)) and _are_undone(latest, parameters):
            del stack[depth:]
            return


def _changes_something(active: _Application) -> bool:
    return not _all_same(
        [part.previous for part in active.parts], [part.written for part in active.parts]
    )


def _are_undone(latest: list[_Application], parameters: Mapping[str, nn.Parameter]) -> bool:
    """Whether the model holds what stood there before the first of `latest` was applied."""
    seen: dict[tuple, Tensor] = {}
    for active in latest:
        for part, values in zip(active.parts, _read(active.parts, parameters), strict=True):
            place = _place_in_memory(parameters[part.name])
            before = seen.get(place, part.index[:0])
            first = ~torch.isin(part.index, before)
            if not bool(same_bits(values[first], part.previous[first]).all()):
                return False
            seen[place] = torch.cat([before, part.index])
    return True


def _beneath(
    targets: Sequence[_Part],
    current: Sequence[Tensor],
    stack: Sequence[_Application],
    parameters: Mapping[str, nn.Parameter],
) -> list[Tensor]:
    """The values at the targets with every active mask thought away, [M] each."""
    base = {
        _place_in_memory(parameters[part.name]): (part, values.clone())
        for part, values in zip(targets, current, strict=True)
    }
    for active in reversed(stack):
        for part in active.parts:
            parameter = parameters.get(part.name)
            found = None if parameter is None else base.get(_place_in_memory(parameter))
            if found is None:
                continue
            _checked_parameter(parameters, part.name, part.shape, part.written.dtype)
            target, values = found
            here, there, _ = _overlap(target.index, part.index)
            _check_unchanged_values(part.name, values[here], part.written[there])
            values[here] = part.previous[there]
    return [values for _, values in base.values()]


def _undo(
    stack: list[_Application], active: _Application, parameters: Mapping[str, nn.Parameter]
) -> None:
    if stack[-1] is not active:
        raise RuntimeError(_restore_first(stack[-1], active.mask))
    current = _read(active.parts, parameters)
    _check_unchanged(active.parts, current)
    try:
        _write(active.parts, [part.previous for part in active.parts], parameters)
        stack.pop()
    except BaseException:
        _roll_back(active.parts, current, parameters)
        raise


def _check_unchanged(parts: Sequence[_Part], current: Sequence[Tensor]) -> None:
    for part, values in zip(parts, current, strict=True):
        _check_unchanged_values(part.name, values, part.written)


def _check_unchanged_values(name: str, values: Tensor, written: Tensor) -> None:
    changed = int((~same_bits(values, written)).sum())
    if changed:
        raise RuntimeError(
            f"model must hold what the mask wrote, got {changed} of {values.numel()} masked "
            f"weights of {name!r} changed since (training, loading or another edit); "
            "nothing was written, reload the model"
        )


def _other_values(targets: Sequence[_Part], base: Sequence[Tensor]) -> str:
    counts = {
        part.name: int((~same_bits(values, part.previous)).sum())
        for part, values in zip(targets, base, strict=True)
    }
    name, count = next((name, count) for name, count in counts.items() if count)
    matrices = sum(count > 0 for count in counts.values())
    size = next(part.index.numel() for part in targets if part.name == name)
    return (
        f"model must hold the mask's original values, got others at {count} of {size} masked "
        f"weights of {name!r} (in {matrices} of {len(counts)} matrices); it is another model, "
        "or its weights were changed"
    )


def _restore_first(later: _Application, mask: NeuronMask) -> str:
    return (
        f"masks must be restored in reverse order, got {mask!r} while {later.mask!r} was applied "
        "later; restore that one first"
    )
