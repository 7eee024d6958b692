"""A rank that is killed at any moment: the others end in time and name it, and the job goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

KILLED_RANKS = Path(__file__).parent.parent / "support" / "killed_ranks.py"
SEED, ROUNDS = 20, 20


@pytest.fixture(scope="module")
def rounds(tmp_path_factory):
    """What was found in each round, or in those before a job that left alone did not end well."""
    done = subprocess.run(
        [sys.executable, KILLED_RANKS, tmp_path_factory.mktemp("rounds"), str(SEED), str(ROUNDS)],
        capture_output=True,
        text=True,
        timeout=3000,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("number", range(ROUNDS))
def test_a_rank_is_killed_and_the_job_goes_on_to_the_same_bits(rounds, number):
    found = rounds[number]
    assert found["kills"] and not found["hung"], found
    for kill in found["kills"]:
        assert kill["codes"] == [1] * (found["ranks"] - 1), kill
        named = [f"no answer from rank {kill['rank']} of" in said for said in kill["said"]]
        if kill["hosted"]:
            # Who comes when rank 0 has ended, and the store with it, misses rank 0.
            gone = ["no answer from rank 0 of" in said for said in kill["said"]]
            assert any(named) and all(map(max, named, gone)), kill
        else:
            assert all(named), kill
    assert found["codes"] == [0] * found["ranks"], found
    assert found["same"] and not found["left"], found


@pytest.mark.slow
def test_the_rounds_are_of_all_kinds(rounds):
    kinds = {(found["kind"], found["ranks"]) for found in rounds}
    assert len(kinds) == 8
    ranks = {kill["rank"] for found in rounds for kill in found["kills"]}
    assert ranks == {0, 1, 2, 3}
