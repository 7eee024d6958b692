"""Single entries of weights, switched between two states many times and packed once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastdean.native.autograd import increment_versions
from fastdean.native.extension import loaded
from fastdean.native.places import Places

# What torch calls DLPack's table of C functions.
_DLPACK = "__dlpack_c_exchange_api__"

_storage_of = Tensor.untyped_storage
_size_of = torch.UntypedStorage.nbytes


def can_replace() -> bool:
    """Whether this torch describes its tensors through DLPack's C functions."""
    api = getattr(Tensor, _DLPACK, None)
    return api is not None and loaded().describes_tensors(api=api)


class DeviceReplacement:
    """Two states of the same places on one device; either is written over the other, repeatedly.

    On CUDA a call launches a comparison and a write that depends on it, and reads one number back:
    the host waits for the current stream.

    Args:
        tensors, indices: as for `masks.zero_at_`; keeps no tensor.
        before, after: per tensor one value per index, in its dtype, on the CPU.
    Raises: RuntimeError as `masks.zero_at_`.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        indices: Sequence[Tensor],
        before: Sequence[Tensor],
        after: Sequence[Tensor],
    ) -> None:
        self._extension = loaded()
        self._api = getattr(Tensor, _DLPACK)
        shape = (len(tensors), self._extension.FACT_FIELDS)
        self._facts = torch.empty(shape, dtype=torch.int64, device="cpu")
        self._facts_at = self._facts.data_ptr()
        self._extension.read_facts(api=self._api, tensors=list(tensors), facts=self._facts_at)
        self._storage_sizes = _storage_sizes(tensors)
        self._of_inference = any(tensor.is_inference() for tensor in tensors)
        self._places = Places(tensors, indices, after, before)
        self._on_cpu = self._places.device.type == "cpu"
        if not self._on_cpu:
            # Later calls may use another stream than this one, which copies the tables.
            torch.cuda.current_stream(self._places.device).synchronize()

    def replace_(
        self, tensors: Sequence[Tensor], *, back: bool = False, write: bool = True
    ) -> bool:
        """Write `after` over `before`, with `back` the other way round, or nothing.

        Args:
            tensors: those prepared, as they are now.
            write: False only compares.
        Returns: False, with nothing written, if a tensor's type, address, shape, strides, dtype,
            device or size of storage has changed; if a place does not hold, bit for bit, the value
            to write over; or if a tensor was made in inference mode and this call is outside of it.
        Raises: ValueError for another number of tensors.
        """
        same = self._extension.same_facts(
            api=self._api, tensors=tensors, facts=self._facts_at, num_tensors=self._places.num_rows
        )
        # DLPack does not tell how much memory is at the address; some may have been freed.
        if not same or _storage_sizes(tensors) != self._storage_sizes:
            return False
        if self._of_inference and not torch.is_inference_mode_enabled():
            return False
        first_other = self._on_places(reverse=back, write=write)
        if first_other != len(tensors):
            return False
        if write:
            increment_versions(tensors)
        return True

    def _on_places(self, *, reverse: bool, write: bool) -> int:
        places = self._places
        if self._on_cpu:
            return self._extension.replace_at_cpu(
                rows=places.rows_at,
                num_rows=places.num_rows,
                num_workers=torch.get_num_threads(),
                reverse=reverse,
                write=write,
            )
        with torch.cuda.device(places.device):
            first_other = torch.empty(1, dtype=torch.int64, device=places.device)
            self._extension.replace_at_cuda(
                rows=places.rows_at,
                num_rows=places.num_rows,
                max_count=places.max_count,
                reverse=reverse,
                write=write,
                first_other=first_other.data_ptr(),
                stream=torch.cuda.current_stream(places.device).cuda_stream,
            )
            found = int(first_other)
        return places.num_rows if found == -1 else found


def _storage_sizes(tensors: Sequence[Tensor]) -> list[int]:
    """In bytes."""
    return [*map(_size_of, map(_storage_of, tensors))]
