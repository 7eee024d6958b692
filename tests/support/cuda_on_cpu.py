"""The sources of CUDA kernels built for a CPU, with faults planted in them on request.

tests/csrc/cuda_on_cpu/ is the machine they run on; its README says what that shows and what not.
A planted fault is a choice that the program makes when it runs (FASTDEAN_MUTANT), so that one
compilation serves all of them.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
CHECKS = ROOT / "tests" / "csrc"
MACHINE = CHECKS / "cuda_on_cpu"
# "collapse" -> csrc/collapse_cuda.cu and tests/csrc/collapse_check.cpp.
OPERATIONS = sorted(path.stem.removesuffix("_cuda") for path in CSRC.glob("*.cu"))

_COMPILE = ["g++", "-c", "-std=c++17", "-g1", "-Wall", "-Wextra", "-Werror", "-x", "c++"]
# Of "unroll".
_COMPILE += ["-Wno-unknown-pragmas"]
_COMPILE += ["-DFASTDEAN_WITH_CUDA", f"-I{MACHINE}", f"-I{CSRC}", f"-I{CHECKS}"]
_SANITIZERS = ["-fsanitize=address,undefined"]
# Products and sums become one rounding, as nvcc has it, where this processor can.
_CPU = Path("/proc/cpuinfo")
_FUSED = ["-mfma", "-ffp-contract=fast"] if _CPU.exists() and " fma " in _CPU.read_text() else []
# How the kernels are compiled; everything else is the same object in all three.
BUILDS = {
    "plain": ["-O2", *_FUSED],
    "races": ["-O1", "-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0"],
    "sanitizers": ["-O1", *_SANITIZERS, "-fno-sanitize-recover=all"],
}
# Of the machine, and of an operation that this build has found something in.
FOUND_STATUS = 3

_LAUNCH = re.compile(r"\b(\w+(?:<[\w, ]+>)?)<<<(.*?)>>>\(([^;]*?)\);", re.DOTALL)
_BARRIER = "__syncthreads()"


@dataclass(frozen=True)
class Mutant:
    """A fault: in `function` of csrc/, `new` in place of the expression `old`.

    Attributes:
        build: which build has to find it.
        found: regular expression of what that build says.
        turn: which of several occurrences of `old`.
    """

    function: str
    old: str
    new: str
    build: str
    found: str
    turn: int = 0

    @property
    def name(self) -> str:
        if self.old == _BARRIER and self.new == "void(0)":
            return f"{self.function}: without barrier {self.turn + 1}"
        return f"{self.function}: {self.new} for {self.old}"


def removed_barriers(operation: str) -> list[Mutant]:
    """A mutant for every barrier in the source: each must be needed, and missed where it is not."""
    text = source_of(operation).read_text("utf-8")
    functions = re.findall(r"^(?:__global__|__device__).*?(\w+)\([^()]*\) \{$", text, re.M)
    found = [
        Mutant(name, _BARRIER, "void(0)", "races", r"(: race, |: reads shared memory)", turn)
        for name in functions
        for turn in range(text.count(_BARRIER, *_body(text, name)))
    ]
    assert len(found) == text.count(_BARRIER)
    return found


def source_of(operation: str) -> Path:
    return CSRC / f"{operation}_cuda.cu"


def _body(text: str, function: str) -> tuple[int, int]:
    start = rf"^(?!  )[^\n]*\b{function}\([^()]*\) \{{$"
    found = re.search(rf"{start}.*?^\}}$", text, re.M | re.DOTALL)
    assert found, f"no function {function}"
    return found.span()


def translated(text: str, path: Path, mutants: Sequence[Mutant] = ()) -> str:
    """C++ of a CUDA source: launches as calls, each mutant as a choice, lines where they were."""
    choices: dict[tuple[int, int], list[str]] = {}
    for number, mutant in enumerate(mutants):
        start, end = _body(text, mutant.function)
        places = [found.start() for found in re.finditer(re.escape(mutant.old), text[start:end])]
        assert len(places) > mutant.turn, f"{mutant.name} is nowhere"
        at = start + places[mutant.turn]
        choice = f"emulated::is_mutant({number}) ? ({mutant.new}) : "
        choices.setdefault((at, at + len(mutant.old)), []).append(choice)
    spans = sorted(choices)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans)), "they overlap"
    for (start, end), chosen in sorted(choices.items(), reverse=True):
        text = f"{text[:start]}({''.join(chosen)}{text[start:end]}){text[end:]}"
    launch = r'emulated::launch("\1", emulated::Config(\2), [=] { \1(\3); });'
    text, launches = _LAUNCH.subn(launch, text)
    assert launches and "<<<" not in text, f"{path.name} has a launch of another form"
    return f'#define __CUDACC__\n#line 1 "{path}"\n{text}'


class Workshop:
    """A folder of objects and programs, each made once by whichever process needs it first."""

    def __init__(self, folder: Path, mutants: dict[str, Sequence[Mutant]]):
        self._folder = folder
        self._mutants = mutants

    def run(
        self,
        operation: str,
        build: str,
        *arguments: str,
        mutant: Mutant | None = None,
        seed: int = 0,
    ) -> tuple[int, str]:
        """(status, output) of the check of an operation's kernels; 0 is success."""
        program = self._program(operation, build)
        variables = {**os.environ, "FASTDEAN_SEED": str(seed)}
        if mutant is not None:
            variables["FASTDEAN_MUTANT"] = str(self._mutants[operation].index(mutant))
        done = subprocess.run(
            [program, *arguments],
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )
        return done.returncode, _with_lines(program, done.stdout)

    def _program(self, operation: str, build: str) -> Path:
        # What is checked is the source as it is; the builds that find faults have them planted.
        mutants = self._mutants[operation] if build != "plain" else ()
        source = source_of(operation)
        objects = [
            self._object(MACHINE / "machine.cpp", "machine", ["-O2"]),
            self._object(MACHINE / "races.cpp", "races", ["-O2"]),
            # The check is not what is checked.
            self._object(CHECKS / f"{operation}_check.cpp", f"{operation}_check", ["-O0"]),
            self._object(source, f"{operation}_{build}", BUILDS[build], mutants),
        ]
        linked = [*(_SANITIZERS if build == "sanitizers" else ()), *objects]
        return self._made(f"{operation}_on_{build}", ["g++", *linked])

    def _object(
        self, source: Path, name: str, options: Sequence[str], mutants: Sequence[Mutant] = ()
    ) -> Path:
        text = source.read_text("utf-8")
        if source.suffix == ".cu":
            text = translated(text, source, mutants)
        return self._made(f"{name}.o", [*_COMPILE, *options, "-"], text)

    def _made(self, name: str, command: Sequence[str | Path], text: str = "") -> Path:
        path = self._folder / name
        with open(self._folder / f"{name}.lock", "w") as lock:
            # Tests run in several processes.
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                done = subprocess.run(
                    [*command, "-o", path], input=text, capture_output=True, text=True
                )
                assert done.returncode == 0, done.stderr
        return path


def _with_lines(program: Path, output: str) -> str:
    """The places in a report of races as lines of the source."""

    def line_of(found: re.Match[str]) -> str:
        command = ["addr2line", "-e", program, found[1]]
        said = subprocess.run(command, capture_output=True, text=True).stdout
        return said.strip().rpartition("/")[2] or found[0]

    return re.sub(r"\+(0x[0-9a-f]+)", line_of, output)
