"""The compiled operations let other Python threads run while they work.

Nothing is timed. A thread that has the interpreter's lock is never asked to give it up here, so
that a second thread can run during a call if, and only if, the call gives it up itself.
"""

from __future__ import annotations

import ctypes
import sys
import threading
import time

import pytest
import torch

from fastdean import native
from fastdean.native import extension
from fastdean.ops import accumulate_importance_, collapse_alignment

# Far beyond a loaded machine's delays; only a failure takes this long.
PATIENCE_S = 20.0
NEVER_S = 10_000.0


def another_thread_runs_during(call, most_calls=sys.maxsize):
    """Whether a second thread got its turn during `call`, which is repeated until it has.

    Nothing in the loop but `call` may give up the lock: no torch, no blocking.
    """
    ran, gate = [], threading.Lock()

    def other():
        with gate:
            ran.append(True)

    interval = sys.getswitchinterval()
    # Before the thread starts: while it waits for the lock it must not ask for it.
    sys.setswitchinterval(NEVER_S)
    thread = threading.Thread(target=other)
    try:
        with gate:
            thread.start()
        before = len(ran)
        deadline = time.monotonic() + PATIENCE_S
        while not ran and most_calls and time.monotonic() < deadline:
            call()
            most_calls -= 1
        during = len(ran) - before
    finally:
        sys.setswitchinterval(interval)
        thread.join()
    return during == 1


@pytest.mark.parametrize("library, gives_up", [(ctypes.CDLL, True), (ctypes.PyDLL, False)])
def test_the_check_tells_a_call_that_keeps_the_lock_from_one_that_gives_it_up(library, gives_up):
    memory = ctypes.create_string_buffer(1 << 20)
    fill = library(None).memset
    fill.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)

    def call():
        fill(memory, 0, len(memory))

    calls = {} if gives_up else {"most_calls": 200}
    assert another_thread_runs_during(call, **calls) is gives_up


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def accumulate():
    x, g = random(256, 500), random(256, 500, seed=1)
    accumulate_importance_(torch.zeros(500, 500), x, g, torch.tensor([[0, 256]]), impl="native")


def collapse():
    weight = random(100, 400).requires_grad_()
    labels = torch.arange(4000) % 100
    sums, counts = torch.zeros(100, 400), torch.zeros(100, dtype=torch.float64)
    loss, *_ = collapse_alignment(
        random(4000, 400).requires_grad_(), labels, weight, sums, counts, decay=0.0, impl="native"
    )
    loss.backward()


def places():
    return [random(1_000_000)], [torch.arange(0, 1_000_000, 2)]


def select():
    sums = random(2000, 2000).abs()
    native.select_top(sums, sums, 3, 100_000)


def select_fused():
    x, g, weight = random(256, 500), random(256, 500, seed=1), random(500, 500, seed=2)
    native.select_importance(x, g, torch.tensor([[0, 256]]), torch.tensor([0]), weight, [1000])


CALLS = {
    "accumulate_importance_cpu": accumulate,
    "collapse_alignment_cpu": collapse,
    "collapse_alignment_backward_cpu": collapse,
    "select_top_cpu": select,
    "select_importance_cpu": select_fused,
    "bit_sums_cpu": lambda: native.bit_sums(random(2000, 2000).view(torch.int32)),
    "gather_at_cpu": lambda: native.gather_at(*places()),
    "write_at_cpu": lambda: native.write_at_(*places(), [torch.ones(500_000)]),
    "zero_at_cpu": lambda: native.zero_at_(*places()),
}


@pytest.fixture
def module(extension_built):
    if not extension_built:
        pytest.skip("an install without the extension is under test")
    return extension.loaded()


def test_no_compiled_operation_is_forgotten(module):
    assert {name for name in dir(module) if name.endswith("_cpu")} == set(CALLS)


@pytest.mark.parametrize("name", CALLS)
def test_other_threads_run_while_a_compiled_operation_works(name, module, monkeypatch):
    real, found = getattr(module, name), []

    def watched(**arguments):
        found.append(another_thread_runs_during(lambda: real(**arguments)))
        return real(**arguments)

    monkeypatch.setattr(module, name, watched)
    CALLS[name]()
    assert found == [True]
