"""What `make` hands to the experiments: its variables as they were typed, and nothing is run."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RUN = ("$(shell touch {0})", "$(touch {0})", "`touch {0}`", "a;touch {0}", "a\\'; touch {0} '")
ODD = ("a b", "it's", 'a"b', "-x", "$HOME", "a\\", "ü|&<>*?#")


def made(folder, target, *variables):
    """What came of a target whose Python prints the words that it is given."""
    python = folder / "bin" / "python"
    python.parent.mkdir(exist_ok=True)
    python.write_text("#!/bin/sh\nprintf '%s\\0' \"$@\"\n")
    python.chmod(0o755)
    return subprocess.run(
        ["make", "-s", "-C", str(ROOT), f"VENV={folder}", "INSTALLED=", target, *variables],
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("odd", [*RUN, *ODD])
def test_a_variable_is_one_word_whatever_is_in_it(tmp_path, odd):
    odd = odd.format(tmp_path / "owned")
    done = made(tmp_path, "reproduce-spin", f"MODEL={odd}", "ARGS=--tasks 'x y'")
    assert done.stdout.split("\0")[1:-1] == [
        "experiments.reproduce_spin",
        *("--tasks", "x y", f"--model={odd}"),
    ]
    given = (f"{name}={odd}" for name in ("MODEL", "NC3_OUT", "METHOD"))
    done = made(tmp_path, "reproduce-nc3", *given)
    assert done.stdout.split("\0")[1:-1] == [
        *("experiments.debias", "run", "--resume"),
        *(f"--method={odd}", f"--model={odd}", f"--out={odd}/{odd}"),
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["bin"]


@pytest.mark.parametrize("target", ["reproduce-spin", "reproduce-nc3"])
def test_no_model_is_said(tmp_path, target):
    done = made(tmp_path, target)
    assert done.returncode and "MODEL must be a model, such as MODEL=" in done.stderr
    assert not done.stdout
