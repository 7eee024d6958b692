"""compute-sanitizer: whether it can run on this device, and tests under it.

    python3 -m benchmarks.gpu.sanitized                       # whether it can run
    python3 -m benchmarks.gpu.sanitized memcheck ARGUMENTS    # pytest with these arguments under it

The status is 0 only where the tool says itself that it found nothing: silence must not look like a
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
    command = [tool, "--error-exitcode", str(FOUND)]
    if not arguments:
        status, is_clean = _run([*command, sys.executable, "-c", _PROBE])
        if status or not is_clean:
            print("refused: compute-sanitizer cannot run on this device; nothing was checked")
            return REFUSED
        return 0
    check, *rest = arguments
    status, is_clean = _run([*command, "--tool", check, sys.executable, "-m", "pytest", *rest])
    if status == 0 and not is_clean:
        print(f"error: {check} did not say that it found nothing")
        return 1
    return status


def _run(command: Sequence[str]) -> tuple[int, bool]:
    """(status, whether the tool said that it found nothing); the output is passed on."""
    # Every tensor an allocation of its own: inside torch's pool a stray access hits another tensor.
    variables = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    said = []
    with subprocess.Popen(
        command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace",
    ) as process:  # fmt: skip
        for line in process.stdout:
            print(line, end="", flush=True)
            said.append(line)
    return process.returncode, _CLEAN.search("".join(said)) is not None


def _path() -> str:
    return os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
