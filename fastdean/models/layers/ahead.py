"""The next window's weights on their way to a GPU while this one's compute.

A thread copies each weight from where it lies (pages of a file, pageable memory) into pinned memory
and starts its transfer on a stream of its own. Whoever takes the weights has its own stream wait
for the end of the transfer; the host waits for the thread alone.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import torch
from torch import Tensor


class Lane(Protocol):
    """A way from the host's memory to a device, beside what the device computes."""

    def send(self, tensor: Tensor) -> Tensor:
        """Start to send a tensor; what is returned has its values once the lane is there."""

    def record(self) -> Any:
        """An event that is reached when all that was sent so far has arrived."""

    def wait(self, event: Any, tensors: Iterable[Tensor]) -> None:
        """Let what is computed from now on, with these tensors, begin after an event."""


class CudaLane:
    """A stream of its own from pinned memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def send(self, tensor: Tensor) -> Tensor:
        pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        pinned.copy_(tensor)
        # The allocator of pinned memory keeps it until the stream is through with it.
        with torch.cuda.stream(self._stream):
            return pinned.to(self._device, non_blocking=True)

    def record(self) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(self._stream)
        return event

    def wait(self, event: torch.cuda.Event, tensors: Iterable[Tensor]) -> None:
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(event)
        for tensor in tensors:
            # Its memory belongs to the lane, and must not be used anew before this stream is done.
            tensor.record_stream(stream)


def lane_to(device: torch.device) -> Lane | None:
    """The lane to a device; None where weights are not copied, or not in the background."""
    return CudaLane(device) if device.type == "cuda" else None


class Ahead:
    """The weights of one window at a time, on their way."""

    def __init__(self, lane: Lane | None) -> None:
        self._lane = lane
        self._thread: ThreadPoolExecutor | None = None
        self._coming: tuple[Hashable, Future] | None = None

    def begin(self, window: Hashable, tensors: Mapping[str, Callable[[], Tensor]]) -> None:
        """Begin to send the tensors of a window: by name, what gives each one's values."""
        if self._lane is None or not tensors:
            return
        self.close()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="fastdean-weights")
        self._coming = (window, self._thread.submit(self._send, self._lane, tensors))

    def take(self, window: Hashable) -> dict[str, Tensor] | None:
        """The tensors of a window on the device; None if they are not on their way."""
        if self._lane is None or self._coming is None or self._coming[0] != window:
            return None
        sent = self._coming[1].result()
        self.close()
        if sent is None:
            return None
        tensors, event = sent
        self._lane.wait(event, tensors.values())
        return tensors

    def close(self) -> None:
        """Let go of what nobody took."""
        self._coming, thread, self._thread = None, self._thread, None
        if thread is not None:
            thread.shutdown(cancel_futures=True)

    @staticmethod
    def _send(
        lane: Lane, tensors: Mapping[str, Callable[[], Tensor]]
    ) -> tuple[dict[str, Tensor], Any] | None:
        try:
            sent = {name: lane.send(values()) for name, values in tensors.items()}
        except torch.OutOfMemoryError:
            # Two windows do not fit: each is brought when the one before has gone.
            return None
        return sent, lane.record()
