"""What the caller of `score()` asks for, checked before a model is opened."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastdean.coupling.results.scores import check_expert_scope, check_keep_top
from fastdean.coupling.sums.accumulators import all_sums_bytes
from fastdean.coupling.sums.block_sums import sums_at_a_time
from fastdean.coupling.sums.holding import Holding, together_bytes
from fastdean.coupling.targets.target import Target
from fastdean.coupling.workloads.rank_blocks import blocks_of_a_rank
from fastdean.files.declared import brief
from fastdean.models.ranks.distributed import Ranks
from fastdean.wording.mendable import InputTypeError
from fastdean.wording.numbers import require_flag, require_real

ORDERS = ("auto", "batches", "layers")
# Where states may be, besides a folder.
PLACES = ("auto", "device", "host")
# Where somebody may want the states, in other words than ours.
_NO_FOLDERS = frozenset(("cpu", "cuda", "disk", "files", "gpu", "memory", "ram"))


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The arguments of `score` that say what is computed, and how.

    Raises:
        ValueError, TypeError: one of them cannot be taken, whatever the model.
    """

    granularity: str = "weight"
    target_modules: str | Sequence[str] = "mlp"
    keep_top: float | None = None
    expert_scope: str = "expert"
    memory_budget: int | None = None
    order: str = "auto"
    states: str | Path = "auto"
    states_budget: int | None = None
    resume: str | Path | None = None
    signs: bool = False
    deterministic: bool = False
    impl: str | None = None

    def __post_init__(self) -> None:
        _require_names(self.target_modules)
        check_keep_top(self.keep_top)
        require_flag("signs", self.signs)
        require_flag("deterministic", self.deterministic)
        check_expert_scope(self.expert_scope)
        _require_order(self.order, self.states, self.states_budget, self.resume)
        if self.memory_budget is not None:
            require_real("memory_budget", self.memory_budget, "a number of bytes")

    def sums_at_a_time(self, ranks: Ranks) -> int:
        """How many sums of a target live at a time."""
        return sums_at_a_time(blocks_of_a_rank(ranks, self.deterministic))

    def sums_bytes(self, ranks: Ranks) -> Callable[[Sequence[Target]], int]:
        """What targets take that are summed together."""
        return all_sums_bytes(self.granularity, self.signs, self.sums_at_a_time(ranks))

    def together_bytes(
        self, holding: Holding | None, ranks: Ranks
    ) -> Callable[[Sequence[Target]], int]:
        """What targets of a data set take that are in a window together."""
        return together_bytes(holding, self.granularity, self.signs, self.sums_at_a_time(ranks))

    def kept_bytes(self, targets: Sequence[Target]) -> int:
        """What the sums of targets take that are kept to the end; of one data set."""
        return all_sums_bytes(self.granularity, self.signs)(targets)


def _require_names(target_modules: Any) -> None:
    parts = target_modules if isinstance(target_modules, Collection) else [target_modules]
    other = next((part for part in parts if not isinstance(part, str)), None)
    if other is not None or not isinstance(target_modules, Collection):
        raise InputTypeError(
            "target_modules must be a text or a list of texts, got "
            f"{brief(target_modules)}; leave it out for 'mlp'"
        )


def _require_order(
    order: str, states: str | Path, states_budget: int | None, resume: str | Path | None
) -> None:
    if order not in ORDERS:
        raise ValueError(
            f"order must be one of {', '.join(ORDERS)}, got {order!r}; leave it out for 'auto'"
        )
    if not isinstance(states, str | os.PathLike):
        raise InputTypeError(
            f"states must be 'auto', 'device', 'host' or a folder, got {type(states).__name__}"
        )
    is_folder = states not in PLACES
    if is_folder:
        _require_folder("states", states, "'auto', 'device', 'host' or a folder")
    if states_budget is not None:
        if not isinstance(states_budget, int) or isinstance(states_budget, bool):
            raise InputTypeError(
                f"states_budget must be a number of bytes, got {type(states_budget).__name__}"
            )
        if states_budget < 0:
            raise ValueError(f"states_budget must be at least 0 bytes, got {states_budget}")
    if resume is not None:
        if not isinstance(resume, str | os.PathLike):
            raise InputTypeError(f"resume must be a folder, got {type(resume).__name__}")
        _require_folder("resume", resume, "a folder")
        if states != "auto":
            raise ValueError(
                f"states must be left out with resume, whose folder holds them, got {str(states)!r}"
            )
    if order == "batches":
        for name, given in (
            ("states", None if states in ("auto", "device") or is_folder else states),
            ("states_budget", states_budget),
            ("resume", resume),
        ):
            if given is not None:
                raise ValueError(
                    f"{name} must be left out with order='batches', which keeps none, got "
                    f"{str(given)!r}; use order='layers'"
                )


def _require_folder(name: str, path: str | Path, expected: str) -> None:
    folder = Path(path).expanduser()
    plain = str(path)
    if plain == "" or plain in _NO_FOLDERS or (folder.exists() and not folder.is_dir()):
        raise ValueError(
            f"{name} must be {expected}, got {plain!r}; write ./NAME for a folder of such a name"
        )
