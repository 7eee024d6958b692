"""The ways to go about a scoring, each with its memory, its operations and what it reads."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from torch import Tensor

from fastdean.coupling.layers.needed_memory import TRIED_ROWS, Peak
from fastdean.coupling.targets.target import Target
from fastdean.jobs.estimate.found import OrderEstimate
from fastdean.jobs.estimate.job import EstimateJob
from fastdean.jobs.estimate.machine import Machine
from fastdean.jobs.estimate.measured import seconds
from fastdean.jobs.estimate.planned import Planned
from fastdean.jobs.estimate.windows import Windows
from fastdean.jobs.estimate.work import operations_of, received_bytes_of


class Orders:
    """Both orders of a planned scoring, with weights resident, in their files or sharded."""

    def __init__(
        self, job: EstimateJob, planned: Planned, machine: Machine, windows: Windows
    ) -> None:
        self._job, self._planned, self._machine, self._windows = job, planned, machine, windows
        self._memory = planned.memory
        self._operations = operations_of(
            planned.model, planned.layers, planned.targets, planned.lengths, job, planned.split
        )

    def all(self) -> dict[str, OrderEstimate]:
        """By name, those that the budget and the model allow."""
        found, refused, alone = {}, self._windows.refused, self._planned.split.ranks == 1
        if "batches" not in refused:
            found["batches"] = self._by_batches()
        if self._planned.layers and "layers" not in refused:
            found["layers"] = self._by_layers()
            # The scores of dense sums need the whole weights once more.
            if alone and not (self._planned.dense and self._job.granularity == "weight"):
                found["layers, streamed"] = self._streamed()
            if alone and self._planned.ranks > 1:
                found["layers, sharded"] = self._sharded()
        return found

    def _by_batches(self) -> OrderEstimate:
        planned, memory, passes = self._planned, self._memory, len(self._windows.passes)
        most = max(self._windows.passes)
        sums = self._beside_dense(most) if planned.dense else most
        return self._order(
            "batches",
            [
                memory.by_batches(planned.rows, sums),
                self._trial(self._weights, memory.weights),
            ],
            kept=self._results,
            # Forward and backward, each batch.
            read=2 * self._used * planned.batches * passes,
            files=memory.weights,
            passes=passes,
        )

    def _by_layers(self) -> OrderEstimate:
        peaks = self._memory.by_layers(
            self._planned.rows, self._windows.largest, kept_sums=self._dense_sums
        )
        return self._swept(
            "layers",
            [*peaks, self._trial(self._weights, self._memory.weights)],
            kept=self._results,
            files=self._memory.weights,
        )

    def _streamed(self) -> OrderEstimate:
        memory, rows, on_gpu = self._memory, self._planned.rows, self._machine.on_gpu
        outside = (
            memory.outside if on_gpu else memory.touched(2 * rows.longest + TRIED_ROWS, loss=True)
        )
        peaks = memory.by_layers(
            rows,
            self._windows.largest,
            streamed=True,
            mapped=not on_gpu,
            kept_sums=self._dense_sums,
        )
        return self._swept(
            "layers, streamed",
            [*peaks, self._trial(self._weights_of_first, self._begun + outside)],
            kept=self._results,
            files=memory.outside + self._of_layers + self._again,
        )

    def _sharded(self) -> OrderEstimate:
        memory, ranks = self._memory, self._planned.ranks
        peaks = memory.by_layers(
            self._planned.rows,
            self._windows.largest,
            kept_sums=self._dense_sums,
            shards=ranks,
        )
        held = -(-memory.weights // ranks) + memory.outside + self._begun
        peaks.append(memory.trial(self._planned.rows, self._weights_of_first, held, on_cpu=False))
        copies = sum(weight.nbytes for weight in self._weights)
        # For the trial, forward and backward; of all the others' shards.
        gathers = memory.outside + self._begun + self._of_layers + self._again
        return self._swept(
            "layers, sharded",
            peaks,
            kept=copies if self._planned.dense else self._planned.results_bytes,
            files=memory.weights,
            gathered=gathers - gathers // ranks,
        )

    def _swept(
        self, name: str, peaks: Sequence[Peak], *, kept: int, files: int, gathered: int = 0
    ) -> OrderEstimate:
        of_layers, again = self._of_layers, self._again
        each_batch = 2 * (self._used - of_layers) + of_layers + 2 * again * self._repeated
        most = max(map(len, self._windows.parts.values()), default=1)
        read = int(each_batch * self._planned.batches)
        return self._order(
            name, peaks, kept=kept, read=read, files=files, passes=most, gathered=gathered
        )

    def _order(
        self,
        name: str,
        peaks: Sequence[Peak],
        *,
        kept: int,
        read: int,
        files: int,
        passes: int,
        gathered: int = 0,
    ) -> OrderEstimate:
        """Args:
        peaks: of the moments that may be the fullest; kept: bytes of scores beside them.
        read: bytes of weights from memory; files: from files; gathered: from other ranks.
        """
        planned, machine = self._planned, self._machine
        fixed = {"base": machine.base, "scores kept": kept}
        room = None if machine.memory is None else machine.memory - machine.base - kept
        # What layers return goes elsewhere where there is no room for it.
        bounded = [peak.within(room, on_cpu=not machine.on_gpu) for peak in peaks]
        peak = max(bounded, key=lambda each: each.total)
        # Of the moment with most of it.
        wanted, here = max(
            (before.parts.get("states", 0), after.parts.get("states", 0))
            for before, after in zip(peaks, bounded, strict=True)
        )
        elsewhere = "host or files" if machine.on_gpu else "files"
        places = {"device": here, elsewhere: wanted - here}
        parts = {key: value for key, value in {**fixed, **peak.parts}.items() if value}
        total = sum(parts.values())
        order, _, weights = name.partition(", ")
        counted = dict(self._operations)
        taken: tuple[float, float, int]
        if order == "batches":
            counted["recomputed_forward"] = 0.0
            counted["forward"] *= passes
            counted["backward"] *= passes
            taken = (passes, passes, passes)
        else:
            counted["recomputed_forward"] *= self._repeated
            counted["backward"] *= self._repeated
            # The way to each window begins at the embedding.
            ways = len(planned.layers) + 1 + sum(self._often.values())
            taken = (1 + self._repeated, self._repeated, ways)
        predicted = sum(count for _, count in planned.lengths)
        added_up = planned.split.added_up(planned.rows.all, predicted, *taken)
        received = {**self._exchanged, "activations": added_up}
        received["weights"] = received.get("weights", 0) + gathered
        return OrderEstimate(
            order=order,
            weights=weights or "resident",
            fits=None if machine.memory is None else total <= machine.memory,
            passes=passes,
            peak_bytes=total,
            moment=peak.moment,
            parts=parts,
            states={place: size for place, size in places.items() if size},
            operations=counted,
            weights_read_bytes=read,
            files_read_bytes=files,
            received={kind: size for kind, size in received.items() if size},
            seconds=seconds(sum(counted.values()), read, machine.rates),
        )

    def _trial(self, weights: Sequence[Tensor], resident: int) -> Peak:
        on_cpu = not self._machine.on_gpu
        return self._memory.trial(self._planned.rows, weights, resident, on_cpu=on_cpu)

    def _beside_dense(self, most: int) -> int:
        """Beside those of all sets what blocks take, of which one is the sums themselves."""
        if not self._planned.dense:
            return 0
        return self._job.sets * self._windows.every + most - most // self._windows.at_a_time

    @property
    def _dense_sums(self) -> int:
        return self._beside_dense(max(self._windows.largest.values(), default=0))

    @property
    def _results(self) -> int:
        return 0 if self._planned.dense else self._planned.results_bytes

    @cached_property
    def _exchanged(self) -> dict[str, int]:
        """Bytes of sums and candidates, and of what a split model's scores take besides."""
        job, planned = self._job, self._planned
        if planned.split.ranks == 1:
            return received_bytes_of(planned.targets, job, planned.ranks, planned.keep_top)
        of_a_set = planned.split.received(
            planned.targets,
            planned.wholes,
            planned.shares,
            job.examples,
            planned.keep_top,
            job.granularity == "unit",
        )
        return {kind: job.sets * size for kind, size in of_a_set.items()}

    @property
    def _tried(self) -> Sequence[Target]:
        """Those of whose weights a trial takes the gradients: of units none."""
        return self._planned.targets if self._job.granularity == "weight" else []

    @property
    def _weights(self) -> list[Tensor]:
        return [target.weight for target in self._tried]

    @cached_property
    def _first(self) -> list[int]:
        """The first layer of each kind, on which a model in files or shards is tried."""
        kinds = {
            tuple(map(tuple, (p.shape for p in layer.parameters()))): i
            for i, layer in reversed(list(enumerate(self._planned.layers)))
        }
        return sorted(kinds.values())

    @property
    def _begun(self) -> int:
        return sum(self._memory.layers[i].weights for i in self._first)

    @property
    def _weights_of_first(self) -> list[Tensor]:
        return [target.weight for target in self._tried if target.layer_index in self._first]

    @property
    def _used(self) -> int:
        """Bytes of weights that a pass reads: of the embedding a few rows alone."""
        return self._memory.weights - self._memory.embedding

    @property
    def _of_layers(self) -> int:
        return sum(layer.weights for layer in self._memory.layers)

    @cached_property
    def _often(self) -> dict[int, int]:
        """By layer, how often its window is opened backward: from the lowest target up."""
        layers = len(self._planned.layers)
        placed = (target.layer_index for target in self._planned.targets)
        lowest = min((index for index in placed if index is not None), default=layers)
        return {k: len(self._windows.parts.get(k, [])) or 1 for k in range(lowest, layers)}

    @property
    def _again(self) -> int:
        """Bytes of the layers that run once more, and backward."""
        return sum(self._memory.layers[k].weights for k in self._often)

    @property
    def _repeated(self) -> float:
        """How often these are run, on average over their weights."""
        taken = sum(n * self._memory.layers[k].weights for k, n in self._often.items())
        return taken / max(1, self._again)
