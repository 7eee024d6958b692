"""By what examples are told apart, and a set of them from another."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

_SHA_BITS = 256


def examples_digest(digests: Iterable[bytes]) -> str:
    """One digest of a set of examples whatever their order: the sum of theirs modulo 2^256."""
    total = sum(int.from_bytes(digest, "big") for digest in digests) % (1 << _SHA_BITS)
    return f"{total:064x}"


def digest_of_batch(batch: Mapping[str, Any]) -> bytes:
    tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
    return digest(tensors.pop("input_ids"), columns=tensors)


def digest(*tensors: Tensor, columns: Mapping[str, Tensor] | None = None) -> bytes:
    content = hashlib.sha256()
    for tensor in tensors:
        content.update(_bytes_of(tensor))
    for name, tensor in sorted((columns or {}).items()):
        content.update(name.encode() + _bytes_of(tensor))
    return content.digest()


def _bytes_of(tensor: Tensor) -> bytes:
    # By bytes: NumPy knows no bfloat16.
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
