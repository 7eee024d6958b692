"""Kernels compiled for a GPU that is not here, and what the compiler says of them.

Triton decides on import whether its kernels are interpreted, so the compiling is done by a process
of its own: this file, run as a script, reads builds as JSON from stdin and answers on stdout.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pytest

# Compute capability -> bytes of shared memory that one program may take.
SHARED_LIMIT = {
    80: 163 * 1024,
    86: 99 * 1024,
    89: 99 * 1024,
    90: 227 * 1024,
    100: 227 * 1024,
    120: 99 * 1024,
}
REGISTER_LIMIT = 255

# Every run of the tests compiles for those that wheels are made for; the others take minutes more.
CAPABILITIES = [
    pytest.param(each, marks=() if each in (80, 90) else pytest.mark.slow) for each in SHARED_LIMIT
]


@dataclass(frozen=True)
class Build:
    """One specialisation of a kernel.

    Attributes:
        name: for the test's id.
        kernel: "module:function".
        types: Triton types of the run-time arguments, such as "*bf16" or "i64".
        constants: values of the compile-time ones; a stride of 1 belongs here, as Triton makes it
            one at run time too.
        divisible: run-time arguments that are multiples of 16, which Triton specialises on.
    """

    name: str
    kernel: str
    types: Mapping[str, str]
    constants: Mapping[str, object]
    num_warps: int
    num_stages: int = 1
    divisible: Sequence[str] = field(default_factory=tuple)


@dataclass(frozen=True)
class Resources:
    """What a build takes: registers a thread, bytes of spilled memory, bytes of shared memory."""

    registers: int
    stack_bytes: int
    shared_bytes: int
    ptx: str


def compile_all(builds: Sequence[Build], capability: int) -> dict[str, Resources]:
    """name -> resources of every build, for a compute capability such as 80 (8.0)."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([*sys.path, environment.get("PYTHONPATH", "")])
    request = {"capability": capability, "builds": [asdict(build) for build in builds]}
    done = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return {name: Resources(**found) for name, found in json.loads(done.stdout).items()}


def require_fit(
    builds: Mapping[str, Resources],
    capability: int,
    known_spills: Mapping[tuple[str, int], int] | None = None,
) -> None:
    """Fail unless every build keeps to registers and to the shared memory that there is.

    Args:
        known_spills: (name, compute capability) -> bytes that may be spilled, and no more.
    """
    assert builds
    for name, found in builds.items():
        allowed = (known_spills or {}).get((name, capability), 0)
        assert found.stack_bytes <= allowed, f"{name} spills {found.stack_bytes} bytes"
        assert found.registers <= REGISTER_LIMIT, name
        assert found.shared_bytes <= SHARED_LIMIT[capability], name


def _compile(build: Build, capability: int) -> Resources:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, _, name = build.kernel.partition(":")
    kernel = getattr(importlib.import_module(module), name)
    names = kernel.arg_names
    missing = set(names) - set(build.types) - set(build.constants)
    unknown = (set(build.types) | set(build.constants)) - set(names)
    assert not missing and not unknown, f"{build.name}: missing {missing}, unknown {unknown}"
    signature = {n: "constexpr" if n in build.constants else build.types[n] for n in names}
    constants = {(names.index(n),): value for n, value in build.constants.items()}
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in build.divisible}
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", capability, 32),
        options={
            "num_warps": build.num_warps,
            "num_stages": build.num_stages,
            "enable_fp_fusion": False,
        },
    )
    registers, stack = _usage(compiled.asm["cubin"])
    return Resources(registers, stack, compiled.metadata.shared, compiled.asm["ptx"])


def _usage(cubin: bytes) -> tuple[int, int]:
    import triton.backends.nvidia as backend

    tool = Path(backend.__file__).parent / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        report = subprocess.run(
            [tool, "-res-usage", path], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", report)
    assert found, report
    return int(found[1]), int(found[2])


def _main() -> None:
    warnings.simplefilter("error")
    request = json.load(sys.stdin)
    results = {}
    for each in request["builds"]:
        build = Build(**each)
        results[build.name] = asdict(_compile(build, request["capability"]))
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    _main()
