"""compute-sanitizer: whether it can run on this device, and tests under it.

    python3 -m benchmarks.gpu.sanitized                       # whether it can run
    python3 -m benchmarks.gpu.sanitized memcheck ARGUMENTS    # pytest with these arguments under it

memcheck finds reads and writes out of bounds, racecheck programs that race for shared memory. The
status is 0 only where the tool says itself that it found nothing: silence must not look like a
clean run. REFUSED: it is not here, or cannot run on this device; FOUND: it found something; else
the tests' own.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence

REFUSED, FOUND = 3, 9
# What the tool ends with where it has found nothing.
_CLEAN = re.compile(r"^=+ (ERROR SUMMARY: 0 errors|RACECHECK SUMMARY: 0 hazards displayed)", re.M)
# A kernel of torch's own, so that a refusal of the device is told from a finding.
_PROBE = 'import torch; print(torch.arange(3, device="cuda").sum().item())'


def main(arguments: Sequence[str]) -> int:
    tool = shutil.which("compute-sanitizer", path=_path())
    if tool is None:
        print("refused: compute-sanitizer is not installed; nothing was checked")
        return REFUSED
    if not arguments:
        return _probe(tool)
    check, *rest = arguments
    # Every tensor an allocation of its own: inside torch's pool a stray access hits another tensor.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [tool, "--tool", check, "--error-exitcode", str(FOUND)]
    status, said = _run([*command, sys.executable, "-m", "pytest", *rest], environment)
    if status == 0 and not _CLEAN.search(said):
        print(f"error: {check} did not say that it found nothing")
        return 1
    return status


def _probe(tool: str) -> int:
    import torch

    if not torch.cuda.is_available():
        print("refused: torch sees no CUDA device; nothing was checked")
        return REFUSED
    command = [tool, "--error-exitcode", str(FOUND), sys.executable, "-c", _PROBE]
    status, said = _run(command, dict(os.environ))
    if status or not _CLEAN.search(said):
        print("refused: compute-sanitizer cannot run on this device; nothing was checked")
        return REFUSED
    return 0


def _run(command: Sequence[str], environment: dict[str, str]) -> tuple[int, str]:
    """(status, output), which is passed on line by line."""
    said = []
    with subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            said.append(line)
    return process.returncode, "".join(said)


def _path() -> str:
    return os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
