"""What an estimate found: the work, the memory, and each order with what it needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fastdean.jobs.estimate.wording import counted, duration, gigabytes

# Of a peak, what it may be off: a test compares it with processes.
_UNSURE = 0.1


@dataclass(frozen=True)
class OrderEstimate:
    """One way to go about a job, of one rank.

    Attributes:
        order: "batches" or "layers"; `weights`: "resident", "streamed", or "sharded" over the ranks
            (FSDP2).
        fits: whether the peak fits; None: it is not known how much memory there is.
        passes: how often every batch goes through the model, by layers through the layer with the
            most of them backward, where `memory_budget` does not hold all sums.
        peak_bytes: the most memory at a time; `parts` adds up to it, at the `moment`.
        states: bytes of what layers return and of one layer's gradients, by where they would be.
        operations: "forward", "recomputed_forward", "backward" and "importance" (FLOP).
        weights_read_bytes: from memory, by all passes; `files_read_bytes`: from files.
        received: bytes that come from other ranks, about as many as go to them: of "sums", of
            "candidates" for the top entries, of "weights" that are sharded, and of "activations"
            and their gradients, which tensor parallel adds up over the ranks of a model.
        seconds: at least, from the rates; None without rates.
    """

    order: str
    weights: str
    fits: bool | None
    passes: int
    peak_bytes: int
    moment: str
    parts: dict[str, int]
    states: dict[str, int]
    operations: dict[str, float]
    weights_read_bytes: int
    files_read_bytes: int
    received: dict[str, int]
    seconds: float | None


@dataclass(frozen=True)
class Estimate:
    """What a scoring needs. Bytes and FLOP; a multiplication and an addition are two operations.

    Attributes:
        model: its class, parameters, dtype and layers; `targets`: scored matrices and weights.
        work: examples, tokens and batches of a rank.
        machine: device, memory in bytes, ranks, and the rates.
        memory: bytes of weights, one layer's weights, all sums, a layer's sums, states of all
            layers, one batch, one window, and the base, which is Python with its libraries.
        orders: "batches", "layers", "layers, streamed", and of several ranks "layers, sharded";
            with tensor parallel the first two.
        notes: what is not counted or not divided, in sentences.
    """

    model: dict[str, Any]
    targets: dict[str, int]
    work: dict[str, int]
    machine: dict[str, Any]
    memory: dict[str, int]
    orders: dict[str, OrderEstimate]
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries, lists, strings and numbers."""
        return asdict(self)

    @property
    def verdict(self) -> str:
        """Which order fits where, in one line."""
        machine = self.machine
        if machine["memory_bytes"] is None:
            return "The system does not say how much memory there is."
        fitting = [name for name, each in self.orders.items() if each.fits]
        others = [name for name, each in self.orders.items() if not each.fits]
        where = f"{gigabytes(machine['memory_bytes'])} of {machine['device']} memory"

        def named(names: Sequence[str]) -> str:
            peaks = (
                f'"{name}" ({gigabytes(self.orders[name].peak_bytes)}{self._left(name)})'
                for name in names
            )
            return ", ".join(peaks)

        if not fitting:
            return f"Nothing fits into {where}: {named(others)}."
        rest = f"; too large: {named(others)}" if others else ""
        return f"Into {where} fit: {named(fitting)}{rest}."

    def _left(self, name: str) -> str:
        """What an order that fits leaves, where that is less than the estimate may be off."""
        each, there = self.orders[name], self.machine["memory_bytes"]
        elsewhere = {place: size for place, size in each.states.items() if place != "device"}
        if not each.fits:
            return ""
        if elsewhere:
            ((place, size),) = elsewhere.items()
            return f", no room left: {gigabytes(size)} of states go to {place}"
        left = there - each.peak_bytes
        if left >= _UNSURE * each.peak_bytes:
            return ""
        return f", {gigabytes(left)} left, and it may be {_UNSURE:.0%} more"

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def _lines(found: Estimate) -> list[str]:
    model, work, memory = found.model, found.work, found.memory
    head = ["", *(f"{name}" for name in found.orders)]
    table = [
        head,
        ["peak", *(gigabytes(each.peak_bytes) for each in found.orders.values())],
    ]
    names = list(dict.fromkeys(name for each in found.orders.values() for name in each.parts))
    for name in names:
        sizes = (each.parts.get(name) for each in found.orders.values())
        table.append([f"  {name}", *("-" if size is None else gigabytes(size) for size in sizes)])
    table.append(
        [
            "all states",
            *(
                "-"
                if not e.states
                else ", ".join(f"{gigabytes(size)} {place}" for place, size in e.states.items())
                for e in found.orders.values()
            ),
        ]
    )
    for name in ("forward", "recomputed_forward", "backward", "importance"):
        values = (each.operations[name] / 1e12 for each in found.orders.values())
        table.append([f"{name.replace('_', ' ')}, TFLOP", *(f"{v:,.3g}" for v in values)])
    for name, key in (("weights read", "weights_read_bytes"), ("of files", "files_read_bytes")):
        table.append([name, *(gigabytes(getattr(each, key)) for each in found.orders.values())])
    for kind in ("sums", "candidates", "weights", "activations"):
        received = [each.received.get(kind) for each in found.orders.values()]
        if any(received):
            table.append(
                [f"{kind} of other ranks", *(gigabytes(n) if n else "-" for n in received)]
            )
    if any(each.passes > 1 for each in found.orders.values()):
        table.append(["passes", *(str(each.passes) for each in found.orders.values())])
    if any(each.seconds is not None for each in found.orders.values()):
        times = (each.seconds for each in found.orders.values())
        table.append(["time, at least", *(duration(t or 0) for t in times)])
    widths = [max(len(row[i]) for row in table) for i in range(len(head))]
    # Where ranks hold a model together, sizes are those of a rank and counts those of the model.
    of_a_rank = " a rank" if found.machine["ranks_of_a_model"] > 1 else ""
    return [
        found.verdict,
        f"{model['class']}, {counted(model['parameters'], 'parameter')} in {model['dtype']} "
        f"({gigabytes(memory['weights'])}{of_a_rank}), {counted(model['layers'], 'layer')}; "
        f"{counted(found.targets['matrices'], 'matrix', 'matrices')} scored "
        f"({counted(found.targets['weights'], 'weight')}, "
        f"{gigabytes(memory['sums'])} of sums{of_a_rank}).",
        f"{work['sets']} x "
        f"{counted(work['examples_of_a_rank'] // work['sets'], 'example')} a rank, "
        f"{counted(work['tokens_of_a_rank'], 'token')} in "
        f"{counted(work['batches_of_a_rank'], 'batch', 'batches')} of at most "
        f"{work['tokens_of_the_largest_batch']:,}.",
        "",
        *(
            "  ".join(
                cell.ljust(w) if i == 0 else cell.rjust(w)
                for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in table
        ),
        "",
        _moments(found),
        *found.notes,
    ]


def _moments(found: Estimate) -> str:
    """Of which moment the parts of each column are."""
    names: dict[str, list[str]] = {}
    for name, each in found.orders.items():
        names.setdefault(each.moment, []).append(f'"{name}"')
    said = "; ".join(f"{' and '.join(orders)}: {moment}" for moment, orders in names.items())
    return f"Each column has the parts of its own peak, when it is reached ({said})."
