"""Memory that was freed goes back to the system; what there is, is tested with the orders."""

from __future__ import annotations

import ctypes
import sys

import forked
import pytest
import torch

from fastdean.models.available_memory import give_back_freed, resident_memory

_MB = 1 << 20


def freed_pieces(device):
    """Pieces of 8 MB that are freed with others alive between them; what that left resident."""
    torch.set_num_threads(1)
    # After one of this size glibc takes smaller ones from its heap, and keeps them there.
    torch.ones(30 * _MB, dtype=torch.uint8)
    held = [torch.ones(8 * _MB, dtype=torch.uint8) for _ in range(16)]
    del held[::2]
    before = resident_memory()
    give_back_freed(torch.device(device))
    print(before - resident_memory())


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "malloc_trim"),
    reason="glibc alone gives memory back when it is asked",
)
@pytest.mark.parametrize(("device", "least"), [("cpu", 48 * _MB), ("meta", None)])
def test_freed_memory_goes_back_to_the_system(device, least):
    done = forked.run(freed_pieces, device)
    assert done.returncode == 0, done.stderr
    given = int(done.stdout)
    assert given < _MB if least is None else given > least


def test_an_allocator_that_cannot_is_left_alone(monkeypatch):
    """As of macOS and musl, whose C libraries have no such function."""
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    give_back_freed(torch.device("cpu"))
