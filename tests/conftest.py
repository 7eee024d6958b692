"""What holds for every test: no network, no progress bars, poisoned memory, honest GPU skips."""

from __future__ import annotations

import os

# Before anything imports the libraries that read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TQDM_DISABLE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

if "PYTEST_XDIST_WORKER" in os.environ:
    # Several processes share the cores: with threads of their own they would mostly wait.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import gc
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import machine
import pytest
import torch

from fastdean import native

# `benchmarks` and `experiments` are those of the checkout. Last: an installed fastdean goes first.
ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))

with torch.device("meta"):
    # Torch notes once which functions take a device: its own, not those that stand in below.
    torch.empty(0)


# Files that take longest. `make test` gives each file to one process, the next one to whichever is
# free: a long one at the end would leave the other process without work.
LONGEST_FIRST = [
    *("native/test_cuda_on_cpu", "native/test_sanitizers", "cli/test_cli"),
    *("jobs/test_coupling_job", "ops/test_collapse_op", "coupling/test_streaming"),
    *("coupling/test_by_layers", "coupling/test_resume", "native/test_selection_native"),
    *("benchmarks/test_benchmark_score", "kernels/test_selection_kernel", "ops/test_importance_op"),
    *("jobs/test_collapse_job", "debias/test_fine_tune", "coupling/test_score_state"),
    *("collapse/test_collapse_trainer", "benchmarks/test_gpu_first", "coupling/test_distributed"),
    *("coupling/test_sharded", "coupling/test_tensor_parallel", "collapse/test_collapse_sharded"),
    *("experiments/test_experiment_debias", "coupling/test_score", "native/test_cuda_builds"),
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {f"{name}.py": number for number, name in enumerate(LONGEST_FIRST)}
    tests = ROOT / "tests"
    # Stable: the others stay as they were.
    items.sort(key=lambda item: place.get(item.path.relative_to(tests).as_posix(), len(place)))


def pytest_collection_finish() -> None:
    # A million objects of libraries, which live as long as the tests do, are not looked at again.
    gc.freeze()


def pytest_sessionfinish() -> None:
    # Bindings tell of each object that is left at the end.
    gc.unfreeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is None or torch.cuda.is_available():
        return
    if os.environ.get("FASTDEAN_REQUIRE_GPU") == "1":
        pytest.fail("FASTDEAN_REQUIRE_GPU=1 and torch sees no CUDA device", pytrace=False)
    pytest.skip("needs a CUDA device")


def _poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def allocate_and_poison(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.partition(".")[0] == "fastdean" and tensor.is_floating_point():
            tensor.fill_(float("nan"))
        return tensor

    return allocate_and_poison


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised memory of the package holds NaN: a value read before it was written shows."""
    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, _poisoned(getattr(torch, name)))
    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(torch.Tensor, name, _poisoned(getattr(torch.Tensor, name)))


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels are tested: on the GPU, or interpreted on the CPU."""
    return machine.DEVICE


@pytest.fixture(scope="session")
def extension_built() -> bool:
    """Whether the compiled extension is here; failing where it should be and is not.

    FASTDEAN_NATIVE=OFF, the switch of the build, says that an install without it is under test.
    """
    found = native.status()
    expected = os.environ.get("FASTDEAN_NATIVE", "ON") != "OFF"
    assert found.state == ("available" if expected else "missing"), found
    return expected


@pytest.fixture
def own_garbage() -> Iterator[None]:
    """gc.collect() looks at what the test made, not for 0.2 s at all that was imported before."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def quick_benchmarks(monkeypatch: pytest.MonkeyPatch, own_garbage: None) -> None:
    """The benchmarks take whatever package is under test, and measure the machine in no time."""
    from benchmarks.harness import environment, rates

    monkeypatch.setattr(environment.fastdean, "__file__", str(ROOT / "fastdean" / "__init__.py"))
    # A file that is saved between two calls must not keep the second from resuming the first.
    monkeypatch.setattr(environment, "sources_checksum", lambda: "these sources")
    monkeypatch.setattr(rates, "_COPY_BYTES", {"cpu": 1 << 16, "cuda": 1 << 20})
    monkeypatch.setattr(rates, "_MATRIX_SIZE", {"cpu": 16, "cuda": 256})
    monkeypatch.setattr(rates, "_LEAST_SECONDS", 0.0)
    monkeypatch.setattr(rates, "_MATRIX_SECONDS", 0.0)
