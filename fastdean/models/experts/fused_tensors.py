"""Where the experts of a fused parameter lie in the files of a checkpoint that holds them apart.

By transformers' own rules of conversion, read backwards where they do nothing but stack the
matrices of all experts, and put those of several names (gate and up) behind each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdean.files.safetensors import StoredTensor
from fastdean.wording.bars import bars


@dataclass(frozen=True)
class FusedTensor:
    """The tensors that a stacked parameter [E, R, C] is made of.

    Attributes:
        parts: for each name (gate, up) the matrices of all experts, in order; each [R / len, C].
        reason: why they cannot be told apart, or "".
    """

    parts: tuple[tuple[StoredTensor, ...], ...] = ()
    reason: str = ""

    def places(self, index: Tensor, shape: Sequence[int]) -> Iterator[tuple[StoredTensor, Tensor]]:
        """Each tensor that holds some of these entries, and which of them, bool like `index`.

        Args:
            index: int64, flat indices of the parameter.
        """
        _, rows, columns = shape
        step = rows // len(self.parts)
        owners = index // (step * columns)
        for owner in owners.unique_consecutive().tolist():
            expert, part = divmod(owner, len(self.parts))
            yield self.parts[part][expert], owners == owner

    def local(self, index: Tensor, shape: Sequence[int]) -> Tensor:
        """Flat indices in the tensors that hold them."""
        return index % (shape[1] // len(self.parts) * shape[2])

    @property
    def name(self) -> str:
        """Of all the tensors, with a star for the expert."""
        kinds = (_starred([tensor.name for tensor in part]) for part in self.parts)
        return " and ".join(kinds)


def fused_tensors(
    folder: Path, stored: Mapping[str, StoredTensor], wanted: Mapping[str, tuple[int, ...]]
) -> dict[str, FusedTensor]:
    """What the files hold of these parameters, by name; without those that no rule speaks of.

    Only models whose code is in transformers have rules.

    Args:
        wanted: name of a stacked parameter -> its shape.
    """
    model = _blank_model(folder)
    if model is None:
        return {}
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    rules = list[Any](get_model_conversion_mapping(model))
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    state = model.state_dict()
    sources: dict[str, dict[str, list[StoredTensor]]] = {}
    for name in sorted(stored, key=dot_natural_key):
        of, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if of in wanted and pattern is not None:
            sources.setdefault(of, {}).setdefault(pattern, []).append(stored[name])
    return {
        name: _inverted(by_pattern[next(iter(found))], found, wanted[name])
        for name, found in sources.items()
    }


def _inverted(
    rule: Any, found: Mapping[str, list[StoredTensor]], shape: tuple[int, ...]
) -> FusedTensor:
    steps = [(type(op).__name__, getattr(op, "dim", None)) for op in rule.operations]
    patterns = rule.source_patterns
    stack, behind = ("MergeModulelist", 0), ("Concatenate", 1)
    if steps != ([stack] if len(patterns) == 1 else [stack, behind]):
        names = ", ".join(name for name, _ in steps)
        return FusedTensor(
            reason=f"made by {names} of the file's tensors, which is not undone here"
        )
    parts = tuple(tuple(found.get(pattern, ())) for pattern in patterns)
    number, rows, columns = shape
    matrix = (rows // len(parts), columns)
    whole = rows % len(parts) == 0 and all(
        len(part) == number and all(tensor.shape == matrix for tensor in part) for part in parts
    )
    if not whole:
        return FusedTensor(reason="made of other tensors than the file's")
    return FusedTensor(parts)


def _blank_model(folder: Path) -> Any:
    """The model of the folder's config.json without weights; None where that tells no model."""
    import transformers
    from transformers import AutoConfig

    from fastdean.models.layers.streaming import parameters_on_meta

    try:
        with bars(False):
            config = AutoConfig.from_pretrained(folder, local_files_only=True)
            of = getattr(transformers, (getattr(config, "architectures", None) or [""])[0], None)
            if of is None:
                return None
            with parameters_on_meta(), torch.device("meta"):
                return of(config)
    except (OSError, ValueError, KeyError):
        return None


def _starred(names: Sequence[str]) -> str:
    """One name for those that differ in one number."""
    parts = [name.split(".") for name in names]
    columns = zip(*parts, strict=True)
    return ".".join(each[0] if len(set(each)) == 1 else "*" for each in columns)
