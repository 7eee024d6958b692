"""The record of CUDA forms that passed their check on hardware, and what dispatch makes of it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastdean import info, native
from fastdean.native import extension
from fastdean.ops import _dispatch, checked
from fastdean.ops._dispatch import choose

ROOT = Path(__file__).resolve().parents[2]
CSRC, KERNELS = ROOT / "csrc", ROOT / "fastdean" / "kernels"
FORM = ("zero_at_", "native")
SOURCES = {"collapse_cuda.cu": "1c", "fastdean.h": "1f", "mask_cuda.cu": "1a"}
BUILT = native.BuildFacts("GNU 1", "13.0", "80 90", native.ABI_VERSION, (), tuple(SOURCES.items()))


@pytest.fixture(autouse=True)
def no_default_from_outside(monkeypatch):
    monkeypatch.delenv("FASTDEAN_IMPL", raising=False)


@pytest.fixture
def record(monkeypatch, tmp_path):
    """The path of this install's record, which need not exist, beside an extension with CUDA."""
    path = tmp_path / "checked_forms.json"
    monkeypatch.setattr(checked, "FILE", path)
    built_of(monkeypatch, SOURCES)
    checked._held_against.cache_clear()
    yield path
    checked._held_against.cache_clear()


def built_of(monkeypatch, sources):
    build = dataclasses.replace(BUILT, cuda_sources=tuple(sources.items()))
    status = native.NativeStatus("available", "", build)
    monkeypatch.setattr(extension, "_load", lambda: (None, status))


def on_gpu(monkeypatch, major, minor):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (major, minor))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")


def write_passed(record, form=FORM, **changes):
    """One more entry of a check that passed on compute capability 9.0."""
    checked.write(record, [dataclasses.replace(checked.entry(*form), **changes)])
    checked._held_against.cache_clear()


def test_a_form_that_passed_is_preferred_on_gpus_of_its_kind(record, monkeypatch):
    on_gpu(monkeypatch, 9, 0)
    write_passed(record)
    found = choose("zero_at_", "cuda:0")
    assert (found.name, found.reason) == ("native", "preferred on cuda")
    # Every form for itself, and a CPU as before.
    assert choose("gather_at", "cuda").name == "reference"
    assert choose("gather_at", "cpu").name == "native"
    on_gpu(monkeypatch, 9, 1)
    assert choose("zero_at_", "cuda").name == "native"


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"capability": "8.6"}, "its check passed on compute capability 8.6, and this GPU has 9.0"),
        (
            {"digest": "0" * 64, "date": "2026-01-02"},
            "its sources have changed since its check passed on 2026-01-02",
        ),
        (
            {"rehearsal": True},
            "no check on a GPU is recorded for its CUDA kernel, only of a rehearsal",
        ),
        (
            {"preferred": False, "figure": "1.4 times its time"},
            "its check passed, and it was slower than the reference: 1.4 times its time",
        ),
    ],
    ids=["capability", "sources", "rehearsal", "slower"],
)
def test_another_form_declines_and_says_why(record, monkeypatch, changes, reason):
    on_gpu(monkeypatch, 9, 0)
    write_passed(record, **changes)
    found = choose("zero_at_", "cuda")
    assert (found.name, found.reason) == ("reference", f"not native: {reason}; ask for it by name")
    assert choose("zero_at_", "cuda", "native").name == "native"


def test_a_form_that_nobody_checked_declines(record, monkeypatch):
    on_gpu(monkeypatch, 9, 0)
    write_passed(record, ("gather_at", "native"))
    reason = choose("zero_at_", "cuda").reason
    assert reason.startswith("not native: no check on a GPU is recorded for its CUDA kernel; ask")


def test_the_entry_of_the_very_gpu_counts_before_one_of_its_kind(record, monkeypatch):
    on_gpu(monkeypatch, 8, 6)
    write_passed(record, capability="8.0", preferred=False, figure="slow")
    assert "slow" in choose("zero_at_", "cuda").reason
    write_passed(record)
    assert choose("zero_at_", "cuda").name == "native"


def test_other_sources_in_the_extension_end_the_belief(record, monkeypatch):
    on_gpu(monkeypatch, 9, 0)
    write_passed(record)
    # Those of another form are another matter.
    built_of(monkeypatch, SOURCES | {"collapse_cuda.cu": "other"})
    assert choose("zero_at_", "cuda").name == "native"
    for name in ("mask_cuda.cu", "fastdean.h"):
        built_of(monkeypatch, SOURCES | {name: "other"})
        assert "its sources have changed since" in choose("zero_at_", "cuda").reason


DAMAGED = {
    "nothing": "",
    "no JSON": "{",
    "a list": "[]",
    "another format": '{"format": 2, "forms": []}',
    "not text": b"\xff\xfe",
    "too deep": "[" * 100_000,
    "an entry of others": '{"format": 1, "forms": [{"op": "zero_at_"}]}',
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_record_that_cannot_be_read_is_believed_in_nothing(record, monkeypatch, content):
    on_gpu(monkeypatch, 9, 0)
    record.write_bytes(content if isinstance(content, bytes) else content.encode())
    found = choose("zero_at_", "cuda")
    assert found.name == "reference"
    assert f"not native: the record of checks at {record} cannot be read: " in found.reason
    assert "cannot be read" in info.render(info.collect())
    # What it holds may be somebody's: it is not written over.
    with pytest.raises(ValueError, match="cannot be read"):
        checked.write(record, [checked.entry(*FORM)])


@pytest.mark.parametrize(
    "changes",
    [
        {"capability": None},
        {"capability": 9},
        {"digest": "1f"},
        {"impl": "reference"},
        {"preferred": "yes"},
        {"preferred": False},
        {"figure": "slow"},
        {"versions": ["torch"]},
        {"date": "today"},
        {"rehearsal": None},
    ],
    ids=str,
)
def test_an_entry_that_makes_no_sense_makes_the_record_unreadable(record, monkeypatch, changes):
    on_gpu(monkeypatch, 9, 0)
    form = dataclasses.asdict(checked.entry(*FORM)) | changes
    record.write_text(json.dumps({"format": 1, "forms": [form]}))
    with pytest.raises(ValueError, match="form 0 has no sound "):
        checked.read(record)


def test_a_missing_record_declines_too(record, monkeypatch):
    on_gpu(monkeypatch, 9, 0)
    assert "cannot be read" in choose("zero_at_", "cuda").reason


def test_entries_join_those_that_are_there(record, monkeypatch):
    on_gpu(monkeypatch, 9, 0)
    write_passed(record, date="2026-01-01")
    write_passed(record, ("gather_at", "native"))
    write_passed(record, capability="8.0")
    # The same form on the same kind of GPU again, and rehearsals of one that passed and one not.
    write_passed(record, date="2026-02-02")
    write_passed(record, rehearsal=True)
    write_passed(record, ("select_top", "triton"), rehearsal=True)
    found = [(each.op, each.capability, each.rehearsal) for each in checked.read(record)]
    assert found == [
        ("gather_at", "9.0", False),
        ("select_top", "9.0", True),
        ("zero_at_", "8.0", False),
        ("zero_at_", "9.0", False),
    ]
    assert checked.read(record)[-1].date == "2026-02-02"


def test_the_command_records_what_passed(record, monkeypatch, tmp_path, capsys):
    on_gpu(monkeypatch, 9, 0)
    write_passed(record, ("gather_at", "native"))
    out = tmp_path / "out.json"
    forms = ["--passed", "zero_at_:native", "select_top:triton"]
    assert checked.main(["--out", str(out), *forms, "--slower", "write_at_:native=1.4 times"]) == 0
    assert capsys.readouterr().out == f"3 forms recorded in {out}\n"
    found = {each.op: each for each in checked.read(out)}
    # A new file may take the place of the record.
    assert found.keys() == {"gather_at", "zero_at_", "select_top", "write_at_"}
    assert (found["write_at_"].preferred, found["write_at_"].figure) == (False, "1.4 times")
    zeros = found["zero_at_"]
    assert (zeros.capability, zeros.device, zeros.rehearsal) == ("9.0", "Some GPU", False)
    assert zeros.digest == checked.digest(*FORM) and zeros.preferred
    assert zeros.versions["torch"] == torch.__version__ and zeros.versions["cuda"] == "13.0"


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["--passed", "zero_at_:reference"], "a form must be one of .*, got zero_at_:reference"),
        (["--passed", "zero_at_"], "a form must be one of "),
        (["--slower", "zero_at_:native"], "--slower must be OP:IMPL=FIGURE, got 'zero_at_:native'"),
        ([], "--passed must name a form, got none"),
    ],
)
def test_the_command_refuses_what_is_no_form(record, tmp_path, capsys, arguments, text):
    assert checked.main(["--rehearse", "--out", str(tmp_path / "out.json"), *arguments]) == 2
    assert re.match(f"error: {text}", capsys.readouterr().err)
    assert not (tmp_path / "out.json").exists()


def test_without_a_gpu_only_a_rehearsal_is_written(record, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    built_of(monkeypatch, {})
    checked.write(record, [])
    arguments = ["--out", str(record), "--passed", "zero_at_:native"]
    assert checked.main(arguments) == 2
    assert "must be written where they ran, on a CUDA device, got none" in capsys.readouterr().err
    assert checked.read(record) == ()
    assert checked.main([*arguments, "--rehearse"]) == 0
    (found,) = checked.read(record)
    assert (found.capability, found.device, found.digest) == (None, None, None)
    assert found.rehearsal


def test_a_form_that_is_not_in_this_install_is_not_recorded(record, monkeypatch):
    on_gpu(monkeypatch, 9, 0)
    built_of(monkeypatch, {})
    with pytest.raises(
        RuntimeError, match="zero_at_:native must be in this install .* FASTDEAN_CU"
    ):
        checked.entry(*FORM)


def test_info_says_of_every_cuda_form_what_is_recorded(record, monkeypatch):
    on_gpu(monkeypatch, 9, 0)
    write_passed(record, date="2026-01-02")
    write_passed(record, ("select_top", "triton"), preferred=False, figure="1.4 times")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    facts = info.collect()
    found = {(row["op"], row["impl"]): row["record"] for row in facts["cuda_forms"]}
    assert found.keys() == checked.SOURCES.keys()
    passed = "passed on compute capability 9.0 (Some GPU), 2026-01-02, torch "
    assert found[FORM].startswith(passed)
    assert found["select_top", "triton"].endswith("; slower than the reference: 1.4 times")
    assert found["gather_at", "native"] == "no check on a GPU is recorded for its CUDA kernel"
    assert re.search(rf"^zero_at_ +native +{re.escape(passed)}", info.render(facts), re.MULTILINE)


def test_without_a_context_no_gpu_is_asked_for_its_capability(record, monkeypatch):
    on_gpu(monkeypatch, 9, 0)
    write_passed(record, capability="8.0")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", None)
    assert choose("zero_at_", "cuda").name == "native"


def test_the_record_of_this_package_is_sound():
    shipped = checked.read(Path(checked.__file__).with_name("checked_forms.json"))
    for each in shipped:
        assert (each.op, each.impl) in checked.SOURCES and not each.rehearsal


def test_every_form_that_runs_on_cuda_has_sources():
    forms = {
        (op, entry.name)
        for op, entries in _dispatch._TABLE.items()
        for entry in entries
        if entry.name != "reference" and entry not in _dispatch.ONLY_ON_CPU
    }
    assert forms == checked.SOURCES.keys()


def _reached(first, follow):
    """The files that `follow` leads to, directly or not."""
    found, new = set(), {first}
    while new:
        found |= new
        new = {other for name in new for other in follow(name)} - found
    return found


def _included(name):
    return re.findall(r'#include "(.+)"', (CSRC / name).read_text("utf-8"))


def _imported(name):
    text = (KERNELS / name).read_text("utf-8")
    modules = re.findall(r"^\s*from fastdean\.kernels(?:\.(\w+))? import", text, re.MULTILINE)
    return [f"{module or '__init__'}.py" for module in modules]


def test_the_sources_of_a_form_are_all_that_it_is_made_of():
    for (op, impl), names in checked.SOURCES.items():
        if impl == "triton":
            home = _dispatch._TRITON_HOME[op].rpartition(".")[2]
            expected = _reached(f"{home}.py", _imported)
        else:
            (home,) = (name for name in names if name.endswith(".cu"))
            assert f"{op.rstrip('_')}_cuda(" in (CSRC / home).read_text("utf-8")
            expected = _reached(home, _included)
        assert set(names) == expected, (op, impl)


def test_the_build_gives_the_extension_the_digests_of_every_compiled_source():
    build = (ROOT / "CMakeLists.txt").read_text("utf-8")
    listed = re.search(r"foreach\(name (.+)\)", build)[1].split()
    assert set(listed) == {
        name for (_, impl), names in checked.SOURCES.items() if impl == "native" for name in names
    }


def test_the_extension_is_made_of_the_sources_that_stand_here():
    build = native.status().build
    if build is None or not build.cuda:
        pytest.skip("an install without CUDA is under test")
    for name, digest in build.cuda_sources:
        found = hashlib.sha256((CSRC / name).read_bytes()).hexdigest()
        assert found == digest, f"{name} has changed since the build; install again"


def test_importing_the_dispatch_reads_no_record():
    code = (
        "from fastdean.ops import _dispatch, checked; _dispatch.choose('zero_at_', 'cpu');"
        "print(checked._held_against.cache_info().misses)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=CSRC)
    assert (done.stdout, done.stderr) == ("0\n", "")


def test_the_module_runs_as_a_command(tmp_path):
    command = [sys.executable, "-W", "error", "-m", "fastdean.ops.checked", "--rehearse"]
    command += ["--out", tmp_path / "out.json", "--passed", "collapse_alignment:native"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=CSRC)
    assert (done.returncode, done.stderr) == (0, "")
    assert [each.op for each in checked.read(tmp_path / "out.json") if each.rehearsal]
