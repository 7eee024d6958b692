"""What tensor and expert parallel change in an estimate: what a rank has, and what it is sent."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastdean.coupling.targets.target import Target

_SUM_BYTES, _PLACE_BYTES, _LOSSLESS_BYTES = 4, 8, 8


@dataclass(frozen=True)
class Whole:
    """Of a target what its entries are selected by, before the model was split.

    Attributes:
        shape: of the weight; `itemsize`: bytes of a number of it.
    """

    shape: tuple[int, ...]
    itemsize: int

    @classmethod
    def of(cls, target: Target) -> Whole:
        return cls(tuple(target.weight.shape), target.weight.element_size())


@dataclass(frozen=True)
class Split:
    """Over how many ranks a model is split, and what they exchange inside of its layers.

    Attributes:
        ranks: that hold one model together; 1: each holds its own.
        experts: whether each owns whole experts.
        cut: name of each parameter of which a rank has a part -> the axis.
        forward, backward: bytes of a token row that the ranks of a model add up, on its way
            through the layers and back; `table`: of what the embedding returns; `logits`: of a
            target row those they gather, and `behind` of its way back through the head.
    """

    ranks: int = 1
    experts: bool = False
    cut: dict[str, int] = field(default_factory=dict)
    forward: int = 0
    backward: int = 0
    table: int = 0
    logits: int = 0
    behind: int = 0

    @classmethod
    def of(cls, model: Any, ranks: int, *, experts: bool) -> Split:
        """Split a model on the meta device, in its place, as its own plans say.

        Raises:
            ValueError: it has no such plan.
        """
        from fastdean.models.ranks.planned_split import split_as_planned

        if ranks == 1:
            return cls()
        head, table = (
            getattr(getattr(model, getter, lambda: None)(), "weight", None)
            for getter in ("get_output_embeddings", "get_input_embeddings")
        )
        names = {id(p): n for n, p in model.named_parameters()}
        of_logits = 0 if head is None else len(head) * head.element_size()
        cut = split_as_planned(model, ranks, experts=experts)
        of_head, of_table = names.get(id(head)), names.get(id(table))
        forward = backward = looked_up = logits = behind = 0
        for name, parameter in model.named_parameters():
            if name not in cut or parameter.dim() < 2:
                continue
            axis, size = cut[name], parameter.element_size()
            *_, rows, columns = parameter.shape
            # One that is both is called by the name of the table.
            if name == of_table:
                looked_up = columns * size
            if name == of_head:
                logits, behind = of_logits, columns * size
            if name in (of_head, of_table):
                continue
            if parameter.dim() == 3 and axis == 0:
                # What goes into experts is as wide as what comes out; of several weights of a
                # module each has one of the two.
                forward += rows * size if _is_down(name) else 0
                backward += 0 if _is_down(name) else columns * size
            elif axis == parameter.dim() - 1:
                forward += rows * size
            else:
                backward += columns * size
        return cls(ranks, experts, cut, forward, backward, looked_up, logits, behind)

    @property
    def of_attention(self) -> int:
        """Over how many ranks the heads of attention are split."""
        return self.ranks if any("attn" in n or "attention" in n for n in self.cut) else 1

    @property
    def of_experts(self) -> int:
        """Over how many ranks the experts of a token are spread."""
        return self.ranks if self.experts else 1

    def added_up(
        self, rows: int, targets: int, forwards: float, backwards: float, lookups: int
    ) -> int:
        """Bytes that a rank is sent inside of layers, as a ring sends them.

        Args:
            rows, targets: token rows of all batches, and those whose logits are made.
            forwards, backwards: how often a row takes either way; `lookups`: how often a token is
                looked up.
        """
        share = (self.ranks - 1) / self.ranks
        of_a_row = self.forward * forwards + self.backward * backwards + self.table * lookups
        around = 2 * rows * of_a_row
        return int(share * (around + targets * (self.logits + 2 * self.behind)))

    def received(
        self,
        targets: Sequence[Target],
        wholes: Sequence[Whole],
        shares: int,
        examples: int,
        keep_top: float | None,
        by_unit: bool,
    ) -> dict[str, int]:
        """Bytes that a rank receives for the entries of one data set, by kind.

        Args:
            targets: with this rank's blocks; `wholes`: the same before they were split.
            shares: how many models the ranks hold, each for a share of the examples.
            examples, keep_top: as `Top` takes them; None: all entries are wanted.
        """
        from fastdean.coupling.sums.reduction import Top

        found: Counter[str] = Counter()
        others = self.ranks * shares - 1
        for target, whole in zip(targets, wholes, strict=True):
            block = target.weight
            summed = target.num_inputs if by_unit else block.numel()
            own = -(-summed // shares)
            found["sums"] += (shares - 1) * own * _SUM_BYTES
            is_cut = target.parameter in self.cut
            if not is_cut:
                # That all got the same is looked at by the rows and columns of the sums.
                found["sums"] += others * _LOSSLESS_BYTES * (summed if by_unit else _edges(block))
            if keep_top is None or by_unit:
                if shares > 1:
                    found["sums"] += others * own * _SUM_BYTES
                places = 0 if not is_cut else _places(target, self.cut, by_unit)
                found["sums"] += others * (summed * _SUM_BYTES + places * _PLACE_BYTES)
                if is_cut:
                    bytes_ = whole.itemsize * block.numel() * (self.ranks - 1)
                    found["weights"] += bytes_
                continue
            top = Top(examples, keep_top, "expert", target.stacked)
            matrices = len(block) if top.matrices(whole.shape) > 1 else 1
            k = top.count(_numel(whole.shape) // top.matrices(whole.shape))
            of_matrix = block.numel() // matrices
            in_share = max(1, -(-matrices // shares))
            most = in_share * min(k, min(of_matrix, own))
            seen = whole.shape[0] if target.stacked else 0
            each = _PLACE_BYTES + _SUM_BYTES + whole.itemsize
            found["candidates"] += others * (most * each + seen)
        return dict(found)


def _is_down(name: str) -> bool:
    return "down" in name.rpartition(".")[2]


def _numel(shape: Sequence[int]) -> int:
    found = 1
    for size in shape:
        found *= size
    return found


def _edges(block: Any) -> int:
    rows = len(block)
    return rows + block.numel() // max(1, rows)


def _places(target: Target, cut: dict[str, int], by_unit: bool) -> int:
    return target.num_inputs if by_unit else target.weight.shape[cut[target.parameter]]
