"""One measurement of one contender, as it is written down."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from operations.case import Contender, OpCase
from operations.measuring import Measured
from operations.rates import Rates

BANDWIDTH = "bytes at the copy bandwidth"


@dataclass(frozen=True)
class Floor:
    """What nothing of this volume beats: a plain product, or bytes at the copy bandwidth."""

    name: str
    seconds: float


@dataclass(frozen=True)
class OpRecord:
    """One contender on one case.

    Attributes:
        case, settings: the size, for people and in numbers.
        sets: sets of inputs the calls took turns on, together several times the cache.
        rounds: timed rounds of one call for each set; median, p20 and p80 are over these.
        timed_by: "graph replays", "events" (launch gaps included) or "host clock".
        device_s: seconds of a call for which the device is busy, by torch's profiler: what stands
            in `median_s` less the gaps. Only where timed by events, else None.
        host_s: seconds until a call is back at the host, the device not waited for; None on a CPU.
        operations, bytes: the work that cannot be avoided; `*_per_s`: over the median.
        error: before the timing, on other inputs: norm-wise, or the share of wrong indices; None
            for the floor, which computes something else.
        peak_bytes: memory a call took besides its inputs; None on a CPU.
        product: how products in fp32 of half-precision operands were computed.
        floor, floor_s: what the floor was, and its seconds in this run.
        copy_bandwidth, matrix_rate: of this machine in this run, bytes and operations per second.
        toy: sizes at which nothing can be learned about speed.
        gate: "passed" or "skipped": the tests that run before a measurement.
    """

    op: str
    case: str
    impl: str
    dtype: str
    settings: Mapping[str, Any]
    sets: int
    rounds: int
    timed_by: str
    median_s: float
    p20_s: float
    p80_s: float
    device_s: float | None
    host_s: float | None
    operations: int
    bytes: int
    operations_per_s: float
    bytes_per_s: float
    error: float | None
    peak_bytes: int | None
    product: str
    floor: str
    floor_s: float
    share_of_floor: float
    copy_bandwidth: float
    matrix_rate: float
    toy: bool
    gate: str

    @classmethod
    def of(
        cls,
        case: OpCase,
        contender: Contender,
        measured: Measured,
        floor: Floor,
        rates: Rates,
        **run: Any,
    ) -> OpRecord:
        """`run` holds what the other arguments do not say."""
        timing = measured.timing
        median = timing.seconds.median
        return cls(
            op=case.op,
            case=case.name,
            impl=contender.name,
            dtype=case.dtype,
            settings=dict(case.settings),
            rounds=timing.rounds,
            timed_by=timing.timed_by,
            median_s=median,
            p20_s=timing.seconds.p20,
            p80_s=timing.seconds.p80,
            device_s=measured.device_s,
            host_s=measured.host_s,
            operations=case.operations,
            bytes=case.bytes,
            operations_per_s=case.operations / median,
            bytes_per_s=case.bytes / median,
            peak_bytes=measured.peak_bytes,
            floor=floor.name,
            floor_s=floor.seconds,
            share_of_floor=floor.seconds / median,
            copy_bandwidth=rates.copy_bandwidth,
            matrix_rate=rates.matrix_rate,
            **run,
        )
