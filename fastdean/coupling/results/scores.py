"""`Scores`: how important every weight (or MLP unit) is to one set of examples.

What is stored are the parts: the fp32 sum over examples of per-example absolute gradients, the
weights they belong to, and the number of examples. Importance is their product over n, taken on
read, so that adding two runs costs one rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from fastdean.coupling.results.expert_load import KEY, LOAD, load_rows
from fastdean.coupling.results.joined_manifests import joined_manifests
from fastdean.coupling.results.score_entry import ScoreEntry
from fastdean.files.declared import (
    Anything,
    Exactly,
    Filled,
    Flag,
    Kind,
    Lists,
    Maps,
    Maybe,
    Places,
    Real,
    Record,
    Text,
    Whole,
    brief,
    require,
    unfit,
)
from fastdean.ops.reference import importance
from fastdean.wording.granularity import stored_granularity
from fastdean.wording.numbers import require_real

# What `keep_top` and a ratio are a share of, where one matrix stacks the weights of many experts.
EXPERT_SCOPES = ("expert", "tensor")

# What `save_pretrained` writes, and of an entry besides its `unit_axis`.
_CONFIG = Record(
    {
        "granularity": Text(choices=("weight", "unit", "neuron")),
        "num_examples": Whole(least=1),
        "keep_top": Maybe(Real(above=0, most=1)),
        "manifest": Record(optional={KEY: LOAD}, others=Anything()),
        "entries": Maps(Anything()),
    },
    # The scope of scores with experts.
    optional={"signs": Flag(), "expert_scope": Text(choices=EXPERT_SCOPES)},
)
_ENTRY: dict[str, Kind] = {
    "shape": Lists(Whole(least=1)),
    "fingerprint": Whole(least=-(2**63)),
}
_MATRIX = Lists(Whole(least=1), least=2, most=2)
# Of the stacked weights of experts.
_OF_EXPERTS: dict[str, Kind] = {
    **_ENTRY,
    "shape": Lists(Whole(least=1), least=3, most=3),
    "unseen": Lists(Whole()),
}
# What a manifest says of a model that tells it from another.
_OF_A_MODEL = ("name", "revision", "class", "parameters", "dtype")
_WEIGHTS = ("torch.float32", "torch.bfloat16", "torch.float16", "torch.float64")
_ADVICE = "save it again"


def keep_entry(
    name: str, entry: ScoreEntry, num_examples: int, ratio: float, of: int | None = None
) -> ScoreEntry:
    """The sparse entry of the top `ratio` of a matrix; a ValueError names it.

    Args:
        of: how many entries the ratio is a share of, where `entry` holds a part of them.
    """
    with naming_matrix(name):
        k = int(ratio * (entry.competing if of is None else of))
        return entry.keep(num_examples, min(k, entry.competing))


@contextmanager
def naming_matrix(name: str) -> Iterator[None]:
    """Inside, a ValueError begins with the matrix."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"scores of {name}: {error}") from None


def check_keep_top(keep_top: float | None) -> None:
    """Raise unless `keep_top` is None (dense) or a ratio above 0 and at most 1."""
    if keep_top is None:
        return
    require_real("keep_top", keep_top, "a ratio above 0 and at most 1")
    if not 0 < keep_top <= 1:
        raise ValueError(
            f"keep_top must be a ratio above 0 and at most 1, got {keep_top}; "
            "leave it out to keep every entry"
        )


def check_expert_scope(expert_scope: str) -> None:
    """Raise ValueError unless it is one of `EXPERT_SCOPES`."""
    if expert_scope not in EXPERT_SCOPES:
        raise ValueError(f"expert_scope must be 'expert' or 'tensor', got {expert_scope!r}")


def unseen_experts(entries: Mapping[str, ScoreEntry]) -> str:
    """Of how many experts' weights no token had a gradient, in words; "" if there are none."""
    stacked = [entry for entry in entries.values() if entry.num_experts]
    unseen = sum(len(entry.unseen) for entry in stacked)
    if not unseen:
        return ""
    total = sum(entry.num_experts - entry.weightless for entry in stacked)
    return f"{unseen} of {total} experts' weights unseen"


def _with_unseen(manifest: Mapping[str, Any], entries: Mapping[str, ScoreEntry]) -> dict[str, Any]:
    """The manifest with the experts that no token reached in these entries, if there are any."""
    unseen = {name: list(entry.unseen) for name, entry in entries.items() if entry.unseen}
    other = {key: value for key, value in manifest.items() if key != "unseen_experts"}
    return {**other, **({"unseen_experts": unseen} if unseen else {})}


class Scores(Mapping[str, Tensor]):
    """Read-only mapping: parameter name -> importance.

    For dense scores `scores[name]` is fp32 in the weight's shape ([C] for units); for sparse scores
    it is fp32 [M], the importance at `scores.index(name)`.

    Attributes:
        entries: name -> ScoreEntry.
        granularity: "weight" or "unit".
        num_examples: n.
        keep_top: the ratio of entries kept in each matrix; None for dense scores.
        expert_scope: "expert" or "tensor": whether a ratio is of each expert's part of a matrix of
            fused experts or of all of it.
        manifest: where the numbers come from (model, examples, tokens, dtype, coverage, versions).
    """

    def __init__(
        self,
        entries: Mapping[str, ScoreEntry],
        *,
        granularity: str,
        num_examples: int,
        keep_top: float | None = None,
        expert_scope: str = "expert",
        manifest: Mapping[str, Any] | None = None,
    ) -> None:
        check_expert_scope(expert_scope)
        if num_examples < 1:
            raise ValueError(
                f"num_examples must be at least 1, got {num_examples}; give what the sums are over"
            )
        self.entries = {name: entry.scoped(expert_scope) for name, entry in entries.items()}
        self.expert_scope = expert_scope
        self.granularity = stored_granularity(granularity)
        self.num_examples = num_examples
        self.keep_top = keep_top
        self.manifest = dict(manifest or {})

    def __getitem__(self, name: str) -> Tensor:
        entry = self._current(name)
        return importance(entry.sums, entry.factor, self.num_examples)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __repr__(self) -> str:
        form = "dense" if self.keep_top is None else f"top {self.keep_top:g} of each matrix"
        unit = "weights" if self.granularity == "weight" else "units"
        total = sum(entry.numel for entry in self.entries.values())
        size = f"{len(self)} matrices, {total:,} {unit}"
        unseen = unseen_experts(self.entries)
        said = f", {unseen}" if unseen else ""
        return f"Scores({size}, n={self.num_examples} examples, {form}{said})"

    @property
    def expert_load(self) -> list[dict[str, Any]]:
        """Of a mixture a row for each layer with experts: how the tokens fell on them.

        `tokens` is how many were routed (one that goes to two experts counts twice), `counts` how
        many to each expert, as text; `least`, `median` and `most` are an expert's share of them,
        `unseen` the numbers of experts without any, `shared` the experts that every token passes.
        """
        return load_rows(self.manifest)

    @property
    def is_sparse(self) -> bool:
        return self.keep_top is not None

    def index(self, name: str) -> Tensor | None:
        """int64 [M], ascending flat indices of a sparse score's entries; None when dense."""
        return self.entries[name].index

    @property
    def has_signs(self) -> bool:
        return all(entry.signed is not None for entry in self.entries.values())

    def signs(self, name: str) -> Tensor:
        """int8, in the form of `scores[name]`: sign of the sum over examples of W * dL_x/dW.

        +1 means that zeroing the weight lowers the mean loss of this set, to first order, -1 that
        it raises it, 0 that it does neither. Of a unit: sign of the sum of a * dL_x/da, zeroing its
        activation.

        Raises:
            ValueError: the scores were made without signs.
        """
        if self.entries[name].signed is None:
            raise ValueError(
                f"scores must have signs, got none for {name}; score again with signs=True"
            )
        return self._current(name).signs()

    def select(self, name: str, k: int) -> Tensor:
        """int64, ascending: the k most important entries (`ops.select_top`), where the sums lie.

        Raises:
            ValueError: a score is NaN or infinite, or k reaches beyond what sparse scores kept.
        """
        entry = self.entries[name]
        if self.keep_top is not None and k > int(self.keep_top * entry.competing):
            raise ValueError(
                f"ratio must not select more than keep_top={self.keep_top:g} kept of {name}, got "
                f"k={k} of {entry.competing}; score again with a larger keep_top"
            )
        with naming_matrix(name):
            return self._current(name).select(self.num_examples, k)

    def keep(self, ratio: float) -> Scores:
        """Sparse scores with only each matrix's top `ratio` entries, enough for smaller ratios.

        Raises:
            ValueError: `ratio` is out of range or above what these scores kept, or a score is NaN
                or infinite.
        """
        check_keep_top(ratio)
        if self.keep_top is not None and ratio > self.keep_top:
            raise ValueError(
                f"keep_top must be at most the {self.keep_top:g} that these scores kept, got "
                f"{ratio}; score again with a larger keep_top"
            )
        kept = {
            name: keep_entry(name, self._current(name), self.num_examples, ratio)
            for name in self.entries
        }
        return Scores(
            kept,
            granularity=self.granularity,
            num_examples=self.num_examples,
            keep_top=ratio,
            expert_scope=self.expert_scope,
            manifest={**self.manifest, "keep_top": ratio},
        )

    def scoped(self, expert_scope: str) -> Scores:
        """These scores with another `expert_scope`; sparse ones have been cut to their own."""
        check_expert_scope(expert_scope)
        if expert_scope == self.expert_scope or not self._has_experts():
            return self
        if self.is_sparse:
            raise ValueError(
                f"expert_scope must be {self.expert_scope!r}, by which these scores were cut to "
                f"keep_top, got {expert_scope!r}; score again with that, or without keep_top"
            )
        return Scores(
            self.entries,
            granularity=self.granularity,
            num_examples=self.num_examples,
            expert_scope=expert_scope,
            manifest={**self.manifest, "expert_scope": expert_scope},
        )

    def __add__(self, other: Scores) -> Scores:
        """Scores over the examples of both runs; with signs where both have them.

        Raises:
            ValueError: either is sparse (an entry dropped from one may be large in the other), or
                they belong to different weights.
        """
        if not isinstance(other, Scores):
            return NotImplemented
        if self.is_sparse or other.is_sparse:
            raise ValueError(
                "scores must be dense to be added, got scores made with keep_top; score the joined "
                "examples instead, or score both without keep_top"
            )
        self.require_same_weights(other)
        entries = {name: entry + other.entries[name] for name, entry in self.entries.items()}
        return Scores(
            entries,
            granularity=self.granularity,
            num_examples=self.num_examples + other.num_examples,
            expert_scope=self.expert_scope,
            manifest=_with_unseen(joined_manifests(self.manifest, other.manifest), entries),
        )

    def require_same_weights(self, other: Scores) -> None:
        """Raise ValueError unless both were made on the same matrices of the same model."""
        if self.granularity != other.granularity:
            raise ValueError(
                f"scores must share one granularity, got {self.granularity!r} and "
                f"{other.granularity!r}; score both with the same one"
            )
        if set(self.entries) != set(other.entries):
            extra = sorted(set(self.entries) ^ set(other.entries))
            self._require_same_model(other)
            raise ValueError(
                f"scores must cover the same matrices, got {len(extra)} in only one of them "
                f"({', '.join(extra[:3])}); score both with the same target_modules"
            )
        if self._has_experts() and self.expert_scope != other.expert_scope:
            raise ValueError(
                f"scores must share one expert_scope, got {self.expert_scope!r} and "
                f"{other.expert_scope!r}; score both with the same one"
            )
        for name, entry in self.entries.items():
            theirs = other.entries[name]
            if entry.shape != theirs.shape or entry.fingerprint != theirs.fingerprint:
                self._require_same_model(other)
                raise ValueError(
                    f"scores must belong to the same weights, got different values or shapes in "
                    f"{name}; score both on the same model in the same dtype"
                )

    def _require_same_model(self, other: Scores) -> None:
        """Name what the manifests say of two models, where they differ."""
        ours, theirs = (each.manifest.get("model") or {} for each in (self, other))
        different = [
            f"{key} ({brief(ours[key])} and {brief(theirs[key])})"
            for key in _OF_A_MODEL
            if key in ours and key in theirs and ours[key] != theirs[key]
        ]
        if different:
            raise ValueError(
                f"scores must be of one model, got two that differ in {', '.join(different)}; "
                "score both on the same"
            )

    def require_unchanged_weights(self) -> None:
        """Raise RuntimeError if a weight the scores share with a model has changed since."""
        for name, entry in self.entries.items():
            entry.require_unchanged(name)

    def _has_experts(self) -> bool:
        return any(entry.num_experts for entry in self.entries.values())

    def _current(self, name: str) -> ScoreEntry:
        """The entry, refused where its importance would be that of a weight changed since."""
        entry = self.entries[name]
        if entry.factor is not None:
            entry.require_unchanged(name)
        return entry

    def save_pretrained(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write `fastdean_config.json` and safetensors into a new folder, atomically.

        Dense weight scores are written with their weights, so that the folder stands on its own.
        """
        from fastdean.files.storage import write_folder

        self.require_unchanged_weights()
        tensors, described = {}, {}
        for name, entry in self.entries.items():
            tensors[f"{name}.sums"] = entry.sums.contiguous().cpu()
            if entry.index is not None:
                tensors[f"{name}.index"] = entry.index.contiguous().cpu()
            if entry.signed is not None:
                tensors[f"{name}.signed"] = entry.signed.contiguous().cpu()
            if entry.factor is not None:
                tensors[f"{name}.weight_values"] = entry.factor.contiguous().cpu()
            described[name] = {
                "shape": list(entry.shape),
                "unit_axis": entry.unit_axis,
                "fingerprint": entry.fingerprint,
                **({"unseen": list(entry.unseen)} if entry.num_experts else {}),
                **({"weightless": entry.weightless} if entry.weightless else {}),
            }
        config = {
            **({"expert_scope": self.expert_scope} if self._has_experts() else {}),
            "granularity": self.granularity,
            "num_examples": self.num_examples,
            "keep_top": self.keep_top,
            "manifest": self.manifest,
            "entries": described,
            **({"signs": True} if self.has_signs else {}),
        }
        write_folder(path, config, tensors, kind="scores", overwrite=overwrite)

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, revision: str | None = None, token: str | None = None
    ) -> Scores:
        """Read scores from a local folder or a hub id.

        Raises:
            ValueError: the folder is missing, truncated, or holds something else; or its
                configuration and tensors contradict each other. The text names what does not fit.
        """
        from fastdean.files.storage import CONFIG_NAME, read_folder, resolve

        folder = resolve(path, revision=revision, token=token)
        config, tensors = read_folder(folder, kind="scores")
        require(config, _CONFIG, folder / CONFIG_NAME)
        sparse = config["keep_top"] is not None
        plain = Record({**_ENTRY, "unit_axis": Exactly(None)})
        if config["granularity"] != "weight":
            plain = Record({**_ENTRY, "shape": _MATRIX, "unit_axis": Whole(most=1)})
        weightless = {"weightless": Whole(least=1)}
        stacked = Record({**_OF_EXPERTS, "unit_axis": Exactly(None)}, optional=weightless)
        entries = {}
        for name, described in config["entries"].items():
            with_experts = isinstance(described, Mapping) and "unseen" in described
            entry = stacked if with_experts else plain
            require(described, entry, folder / CONFIG_NAME, where=f"entries[{brief(name)}]")
            entries[name] = _read_entry(
                folder, name, described, sparse, config.get("signs", False), tensors
            )
        if tensors:
            raise unfit(folder, repr(min(tensors)), "a part of the scores", "another", _ADVICE)
        return cls(
            entries,
            granularity=config["granularity"],
            num_examples=config["num_examples"],
            keep_top=config["keep_top"],
            expert_scope=config.get("expert_scope", "expert"),
            manifest=config["manifest"],
        )


def _read_entry(
    folder: Path,
    name: str,
    described: Mapping[str, Any],
    sparse: bool,
    signs: bool,
    tensors: dict[str, Tensor],
) -> ScoreEntry:
    """One entry; its tensors are taken out of `tensors`."""

    def take(part: str, kind: Kind) -> Tensor:
        where = f"{name}.{part}"
        if where not in tensors:
            raise unfit(folder, repr(where), "a tensor", "no such tensor", _ADVICE)
        require(tensors[where], kind, folder, where=repr(where))
        return tensors.pop(where)

    shape, axis = tuple(described["shape"]), described["unit_axis"]
    size = shape if axis is None else (shape[axis],)
    index = take("index", Places(math.prod(size))) if sparse else None
    if index is not None:
        size = (index.numel(),)
    return ScoreEntry(
        sums=take("sums", Filled(("torch.float32",), size, finite=True, least=0.0)),
        weight=take("weight_values", Filled(_WEIGHTS, size)) if axis is None else None,
        index=index,
        shape=shape,
        unit_axis=axis,
        fingerprint=described["fingerprint"],
        unseen=tuple(described.get("unseen", ())),
        stacked="unseen" in described,
        weightless=described.get("weightless", 0),
        signed=take("signed", Filled(("torch.float32",), size, finite=True)) if signs else None,
    )
