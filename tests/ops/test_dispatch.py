"""Which implementation runs and why, and an extension that is missing or broken."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from types import SimpleNamespace

import pytest
import torch

from fastdean import kernels, native
from fastdean.native import extension
from fastdean.ops import _dispatch, reference, zero_at_
from fastdean.ops._dispatch import choose, explain

BUILT = native.BuildFacts(
    compiler="GNU 1", cuda="", architectures="", abi=native.ABI_VERSION, cpu_levels=()
)
BUILT_WITH_CUDA = dataclasses.replace(BUILT, cuda="13.0", architectures="80 90")


@pytest.fixture(autouse=True)
def no_default_from_outside(monkeypatch):
    monkeypatch.delenv("FASTDEAN_IMPL", raising=False)


def _pretend(monkeypatch, state: str, reason: str = "", build: native.BuildFacts | None = None):
    status = native.NativeStatus(state, reason, build)
    monkeypatch.setattr(extension, "_load", lambda: (None, status))


def _pretend_interpreting(monkeypatch, interpreted: bool):
    # The kernels first: imported meanwhile they would keep the pretence.
    for module in _dispatch._TRITON_HOME.values():
        importlib.import_module(module)
    monkeypatch.setattr(kernels, "interpreted", lambda: interpreted)


def _without_triton(monkeypatch):
    monkeypatch.setattr(kernels, "refusal", lambda device, dtype=None: "Triton is not installed")


ACCUMULATIONS = (
    "accumulate_importance_",
    "accumulate_expert_importance_",
    "accumulate_unit_importance_",
)

MASK_OPERATIONS = ("gather_at", "write_at_", "zero_at_")


def test_every_operation_runs_everywhere_without_the_extension_and_without_triton(monkeypatch):
    _pretend(monkeypatch, "missing", "this install has no compiled extension")
    _without_triton(monkeypatch)
    fused = ("select_importance", "select_expert_importance")
    for op in (*ACCUMULATIONS, "select_top", *fused, *MASK_OPERATIONS):
        for device in ("cpu", "cuda", "mps"):
            choice = choose(op, device)
            assert choice.name == "reference"
            assert choice.callable is getattr(reference, op)


@pytest.mark.parametrize("op", [*ACCUMULATIONS, "select_top"])
def test_triton_is_preferred_on_a_gpu_and_interpreted_only_when_named(monkeypatch, op):
    _pretend(monkeypatch, "missing", "this install has no compiled extension")
    _pretend_interpreting(monkeypatch, False)
    assert choose(op, "cuda", dtype=torch.bfloat16).name == "triton"
    with pytest.raises(RuntimeError, match="Triton runs on a CPU only with TRITON_INTERPRET=1"):
        choose(op, "cpu", "triton")
    _pretend_interpreting(monkeypatch, True)
    on_cpu, on_cuda = choose(op, "cpu"), choose(op, "cuda")
    assert (on_cpu.name, on_cuda.name) == ("reference", "reference")
    assert "not triton: interpreted kernels are slow; ask for it by name" in on_cpu.reason
    assert "not triton: TRITON_INTERPRET=1 keeps Triton from compiling" in on_cuda.reason
    assert choose(op, "cpu", "triton").callable.__name__ == op


def test_what_the_kernels_cannot_take_falls_to_the_reference_unless_they_are_named(monkeypatch):
    _pretend_interpreting(monkeypatch, False)
    double = choose("accumulate_importance_", "cuda", dtype=torch.float64)
    assert double.name == "reference"
    assert "take fp32, bf16 and fp16, not torch.float64" in double.reason
    with pytest.raises(
        RuntimeError, match="impl='triton' must be able to run .* not torch.float64"
    ):
        choose("accumulate_importance_", "cuda", "triton", torch.float64)
    with pytest.raises(RuntimeError, match="run on CUDA tensors, not on mps"):
        choose("accumulate_importance_", "mps", "triton")


@pytest.mark.parametrize("value", ["1", "true", "ON", "yes"])
def test_interpreting_is_read_as_triton_reads_it(monkeypatch, value):
    import triton

    monkeypatch.setenv("TRITON_INTERPRET", value)
    assert kernels.interpreted() and triton.knobs.runtime.interpret
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert not kernels.interpreted() and not triton.knobs.runtime.interpret


def test_an_install_without_triton_says_so(monkeypatch):
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: None)
    assert "not triton: Triton is not installed" in choose("select_top", "cuda").reason


def test_a_gpu_that_is_too_old_runs_the_reference(monkeypatch):
    _pretend_interpreting(monkeypatch, False)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    found = choose("select_top", "cuda")
    assert found.name == "reference"
    assert "compute capability 7.5, and the Triton kernels need 8.0" in found.reason


@pytest.mark.parametrize("op", MASK_OPERATIONS)
def test_the_extension_is_preferred_on_the_cpu_and_only_there(monkeypatch, op):
    _pretend(monkeypatch, "available", build=BUILT_WITH_CUDA)
    on_cpu, on_cuda = choose(op, "cpu"), choose(op, "cuda:1")
    assert (on_cpu.name, on_cpu.callable) == ("native", getattr(native, op))
    assert on_cuda.name == "reference"
    assert "not native: " in on_cuda.reason and "; ask for it by name" in on_cuda.reason
    assert choose(op, "cuda", "native").name == "native"


def test_the_compiled_accumulation_is_the_default_of_a_cpu(monkeypatch):
    _pretend(monkeypatch, "available", build=BUILT_WITH_CUDA)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for op in ("accumulate_importance_", "accumulate_expert_importance_"):
            assert choose(op, "cpu", dtype=dtype).name == "native"
        for op in ("select_importance", "select_expert_importance"):
            assert choose(op, "cpu", dtype=dtype).callable is getattr(native, op)
    double = choose("accumulate_importance_", "cpu", dtype=torch.float64)
    assert double.name == "reference"
    assert "takes fp32, bf16 and fp16, not torch.float64" in double.reason
    with pytest.raises(RuntimeError, match="accumulation runs on the CPU, not on cuda"):
        choose("accumulate_importance_", "cuda", "native")


def test_the_compiled_selection_is_the_default_of_a_cpu(monkeypatch):
    _pretend(monkeypatch, "available", build=BUILT_WITH_CUDA)
    for dtype in (None, torch.float32, torch.bfloat16, torch.float16, torch.float64):
        assert choose("select_top", "cpu", dtype=dtype).callable is native.select_top
    small = choose("select_top", "cpu", dtype=torch.float8_e4m3fn)
    assert small.name == "reference" and "not torch.float8_e4m3fn" in small.reason
    with pytest.raises(RuntimeError, match="selection runs on the CPU, not on cuda"):
        choose("select_top", "cuda", "native")


def test_without_cuda_in_the_extension_naming_it_for_cuda_raises(monkeypatch):
    _pretend(monkeypatch, "available", build=BUILT)
    with pytest.raises(RuntimeError, match="on cuda, got a refusal: .* compiled without CUDA"):
        choose("zero_at_", "cuda", "native")


def test_the_extension_refuses_other_devices(monkeypatch):
    _pretend(monkeypatch, "available", build=BUILT_WITH_CUDA)
    with pytest.raises(RuntimeError, match="runs on CPU and CUDA tensors, not on mps"):
        choose("zero_at_", "mps", "native")


def test_an_unknown_name_is_refused(monkeypatch):
    message = "impl must be one of reference, triton, native, got 'cuda'; leave it out"
    with pytest.raises(ValueError, match=message):
        choose("zero_at_", "cpu", "cuda")
    with pytest.raises(ValueError, match=message):
        zero_at_([torch.ones(2)], [torch.tensor([0])], impl="cuda")
    monkeypatch.setenv("FASTDEAN_IMPL", "fast")
    with pytest.raises(ValueError, match="FASTDEAN_IMPL must be one of .*, got 'fast'"):
        choose("zero_at_", "cpu")


def test_a_named_implementation_that_does_not_exist_raises():
    with pytest.raises(
        RuntimeError, match="there is no Triton kernel for zero_at_ in this version"
    ):
        choose("zero_at_", "cpu", "triton")


def test_a_named_extension_that_is_missing_raises_and_nothing_is_written(monkeypatch):
    _pretend(monkeypatch, "missing", "this install has no compiled extension")
    weight = torch.ones(2)
    message = "impl='native' must be able to run zero_at_ on cpu.* has no compiled extension"
    with pytest.raises(RuntimeError, match=message):
        zero_at_([weight], [torch.tensor([0])], impl="native")
    assert weight.tolist() == [1, 1]


def test_a_default_for_all_falls_back_where_an_operation_lacks_it(monkeypatch):
    monkeypatch.setenv("FASTDEAN_IMPL", "triton")
    choice = choose("zero_at_", "mps")
    assert choice.name == "reference"
    assert choice.reason == (
        "FASTDEAN_IMPL=triton, but there is no Triton kernel for zero_at_ in this version"
    )


def test_a_default_for_all_raises_where_it_exists_and_cannot_run(monkeypatch):
    monkeypatch.setenv("FASTDEAN_IMPL", "native")
    _pretend(monkeypatch, "missing", "this install has no compiled extension")
    with pytest.raises(RuntimeError, match="FASTDEAN_IMPL=native must be able to run zero_at_"):
        choose("zero_at_", "cpu")
    assert choose("accumulate_unit_importance_", "cpu").name == "reference"


def test_an_argument_outranks_the_default(monkeypatch):
    monkeypatch.setenv("FASTDEAN_IMPL", "native")
    assert choose("zero_at_", "cpu", "reference").name == "reference"


def test_a_broken_extension_raises_unless_it_was_declined(monkeypatch):
    _pretend(monkeypatch, "broken", "importing fastdean._C failed: undefined symbol")
    with pytest.raises(RuntimeError, match="undefined symbol; reinstall fastdean, or set"):
        choose("zero_at_", "cpu")
    with pytest.raises(RuntimeError, match="undefined symbol"):
        native.zero_at_([torch.ones(1)], [torch.tensor([0])])
    assert choose("zero_at_", "cpu", "reference").name == "reference"
    monkeypatch.setenv("FASTDEAN_IMPL", "reference")
    assert choose("zero_at_", "cpu").name == "reference"


def test_explain_gives_a_reason_for_everything(monkeypatch):
    _pretend(monkeypatch, "available", build=BUILT)
    rows = {row.op: row for row in explain("cpu")}
    assert rows["zero_at_"].chosen == "native"
    assert dict(rows["zero_at_"].others) == {
        "reference": "another one is preferred",
        "triton": "there is no Triton kernel for zero_at_ in this version",
    }
    for row in rows.values():
        assert {row.chosen, *dict(row.others)} == set(_dispatch.IMPLEMENTATIONS)
        assert row.reason and all(why for _, why in row.others)


def test_explain_reports_a_broken_extension_instead_of_raising(monkeypatch):
    _pretend(monkeypatch, "broken", "importing fastdean._C failed: undefined symbol")
    row = next(row for row in explain("cpu") if row.op == "zero_at_")
    assert row.chosen == ""
    assert "undefined symbol" in row.reason
    assert "undefined symbol" in dict(row.others)["native"]


@pytest.mark.parametrize("asked", ["native", "fast"], ids=["cannot_run", "unknown"])
def test_explain_blames_an_unusable_default_for_what_could_run(monkeypatch, asked):
    _pretend(monkeypatch, "missing", "this install has no compiled extension")
    monkeypatch.setenv("FASTDEAN_IMPL", asked)
    row = next(row for row in explain("cpu") if row.op == "zero_at_")
    assert row.chosen == "" and row.reason.startswith("FASTDEAN_IMPL")
    assert dict(row.others) == {
        "reference": f"FASTDEAN_IMPL={asked} asks for another one",
        "triton": "there is no Triton kernel for zero_at_ in this version",
        "native": "this install has no compiled extension",
    }


def test_explain_tells_a_preference_from_a_default(monkeypatch):
    _pretend(monkeypatch, "available", build=BUILT)
    monkeypatch.setenv("FASTDEAN_IMPL", "reference")
    chosen = {row.op: row for row in explain("cpu")}["zero_at_"]
    assert dict(chosen.others)["native"] == "FASTDEAN_IMPL=reference asks for another one"
    monkeypatch.setenv("FASTDEAN_IMPL", "triton")
    fallen_back = {row.op: row for row in explain("cpu")}["zero_at_"]
    assert dict(fallen_back.others)["reference"] == "another one is preferred"


def _load_again() -> native.NativeStatus:
    return extension._load.__wrapped__()[1]


def test_an_absent_extension_is_a_normal_state(monkeypatch):
    monkeypatch.setitem(sys.modules, "fastdean._C", None)
    assert _load_again() == native.NativeStatus(
        "missing", "this install has no compiled extension", None
    )


class _Refusing:
    """An import hook under which the extension is found and its import fails with `error`."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def find_spec(self, name, path=None, target=None):
        if name == "fastdean._C":
            raise self.error


@pytest.mark.parametrize(
    "error",
    [
        ImportError("undefined symbol: Py_Nothing"),
        ModuleNotFoundError("No module named 'elsewhere'", name="elsewhere"),
        OSError("invalid ELF header"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_extension_that_cannot_be_imported_is_broken(monkeypatch, error):
    monkeypatch.delitem(sys.modules, "fastdean._C", raising=False)
    monkeypatch.setattr(sys, "meta_path", [_Refusing(error), *sys.meta_path])
    importlib.invalidate_caches()
    found = _load_again()
    assert found.state == "broken"
    assert found.reason == f"importing fastdean._C failed: {error}"


def test_an_extension_of_another_version_is_broken(monkeypatch):
    monkeypatch.setitem(sys.modules, "fastdean._C", SimpleNamespace(ABI_VERSION=-1))
    found = _load_again()
    assert found.state == "broken"
    wanted = native.ABI_VERSION
    assert found.reason == f"fastdean._C has ABI number -1 and this fastdean needs {wanted}"


def test_an_extension_with_cuda_imports_without_a_driver_and_its_calls_raise(extension_built):
    if not extension_built:
        pytest.skip("an install without the extension is under test")
    if torch.cuda.is_available():
        pytest.skip("this machine has a driver")
    build = native.status().build
    compiled = extension.loaded()
    if not build.cuda:
        assert not hasattr(compiled, "zero_at_cuda")
        return
    assert build.architectures
    for op in ("gather_at", "write_at", "zero_at"):
        with pytest.raises(RuntimeError, match=f"{op} on CUDA: cudaError"):
            getattr(compiled, f"{op}_cuda")(rows=0, num_rows=1, max_count=1, stream=0)
