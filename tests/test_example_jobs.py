"""The recipes of examples/jobs: what they start, what becomes of signals and dead ranks.

Launchers that take seconds to start are stood in for by scripts of the same name; the slow tests
start the real ones, on this machine's CPU with gloo.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import forked
import pytest
import torch
from tiny_folders import rows, save_model, write_jsonl, write_sources

from fastdean.coupling.results.scores import Scores
from fastdean.jobs.coupling.job import ScoreJob
from fastdean.jobs.coupling.scoring import run as score
from fastdean.masks import NeuronMask

ROOT = Path(__file__).resolve().parent.parent
JOBS = ROOT / "examples" / "jobs"
SCRIPTS = ("one_node", "two_nodes", "slurm", "accelerate")
LIMIT_S = 180
# Prints what it is given.
SHOWS = f"""#!{sys.executable}
import json, sys
print(json.dumps(sys.argv[1:]))
"""
RUNS = f"""#!{sys.executable}
import runpy, sys
sys.argv[0] = MODULE
runpy.run_module(MODULE, run_name="__main__", alter_sys=True)
"""
TORCHRUN = RUNS.replace("MODULE", "'torch.distributed.run'")
ACCELERATE = RUNS.replace("MODULE", "'accelerate.commands.accelerate_cli'")
# Of a cluster: the names of its nodes, and what was put back into the queue.
SCONTROL = """#!/bin/sh
case "$1" in
show) printf 'node-a\\nnode-b\\n' ;;
requeue) echo "$2" >> "$CLUSTER/requeued" ;;
esac
"""
# The step: the pid it has is where the signals go.
SRUN = """#!/bin/bash
printf '%s\\n' "$@" > "$CLUSTER/step"
echo $$ > "$CLUSTER/pid"
"""
SCANCEL = """#!/bin/sh
echo "$@" >> "$CLUSTER/signals"
kill -TERM "$(cat "$CLUSTER/pid")"
"""
# Tells the batch script that its time is up, goes on until the signal comes, and ends with $1.
TIME_IS_UP = """
tail -f /dev/null & left=$!
trap 'kill $left; exit {code}' TERM
kill -USR1 $PPID
wait
"""
# `scancel JOB`: SLURM ends the step and the batch script alike.
CANCELLED = """
kill -TERM $PPID
exit 143
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny model with its tokenizer, and rows for it."""
    folder = tmp_path_factory.mktemp("place")
    source = write_jsonl(folder / "rows.jsonl", rows(6, 0, unsafe=False))
    return ["--model", str(save_model(folder / "model")), "--data", str(source)]


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Puts programs in the place of those that a recipe calls."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("CLUSTER", str(tmp_path))

    def put(**scripts):
        for name, text in scripts.items():
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)

    return put


def call(name, *args, **variables):
    return subprocess.run(
        [JOBS / f"{name}.sh", *map(str, args)],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )


def given_to_torchrun(args):
    """What torchrun makes of it, and the command of FastDEAN."""
    from torch.distributed.run import get_args_parser

    parsed = get_args_parser().parse_args(args)
    assert parsed.module and parsed.training_script == "fastdean"
    return parsed, parsed.training_script_args


def test_every_recipe_is_listed_short_and_tested():
    listed = (ROOT / "examples" / "README.md").read_text("utf-8")
    assert sorted(path.stem for path in JOBS.glob("*.sh")) == sorted(SCRIPTS)
    for path in JOBS.iterdir():
        assert f"](jobs/{path.name})" in listed
        assert len(path.read_text("utf-8").splitlines()) <= 60


def test_on_one_node_torchrun_starts_a_job_that_goes_on(machine, place, tmp_path):
    machine(torchrun=SHOWS)
    done = call("one_node", "score", *place, "--out", tmp_path / "a b", RANKS="2")
    parsed, command = given_to_torchrun(json.loads(done.stdout))
    assert (parsed.nnodes, parsed.nproc_per_node, parsed.max_restarts) == ("1:1", "2", 3)
    assert parsed.standalone
    found = forked_ranks(command)
    assert [each.returncode for each in found] == [0, 0], found
    assert "goes on" not in found[0].stderr
    _, model, _, source = place
    alone = ScoreJob(model=model, data=source)
    score(alone, tmp_path / "alone", overwrite=False, progress=False)
    require_alike(tmp_path / "a b", tmp_path / "alone")
    # Without a GPU that could be counted.
    assert json.loads(call("one_node", "score").stdout)[2] == "gpu"


def test_on_two_nodes_both_agents_meet_at_the_head(machine):
    machine(torchrun=SHOWS)
    done = call("two_nodes", "score", "--out", "a b", HEAD="node-a:29400", RANKS="8")
    parsed, command = given_to_torchrun(json.loads(done.stdout))
    assert (parsed.nnodes, parsed.nproc_per_node, parsed.max_restarts) == ("2", "8", 3)
    assert (parsed.rdzv_backend, parsed.rdzv_endpoint) == ("c10d", "node-a:29400")
    assert command[-2:] == ["--out", "a b"]
    without = call("two_nodes", "score", RANKS="8")
    assert without.returncode != 0 and "HEAD: must be HOST:PORT" in without.stderr


def test_accelerate_reads_its_configuration(machine):
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    machine(accelerate=SHOWS)
    given = json.loads(call("accelerate", "score", "--out", "a b").stdout)
    parsed = launch_command_parser().parse_args(given[1:])
    assert given[0] == "launch" and parsed.module and parsed.training_script == "fastdean"
    assert parsed.training_script_args[-2:] == ["--out", "a b"]
    config = load_config_from_file(parsed.config_file)
    assert (config.num_processes, config.distributed_type) == (8, "MULTI_GPU")
    assert parsed.max_restarts == 3


def in_slurm(step, *args, number="70001"):
    """The batch script, with `step` for what its srun does."""
    return call(
        "slurm",
        *args,
        SLURM_JOB_ID=number,
        SLURM_JOB_NODELIST="node-[a-b]",
        SLURM_JOB_NUM_NODES="2",
        SLURM_CPUS_PER_TASK="64",
    )


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_recipe_without_a_command_asks_for_one(machine, name):
    machine(torchrun=SHOWS, accelerate=SHOWS, srun=SRUN, scontrol=SCONTROL)
    done = call(name, HEAD="node-a:29400")
    assert done.returncode != 0 and not done.stdout
    assert "must be a command of fastdean, such as score" in done.stderr


def test_the_slurm_script_asks_for_sbatch_where_it_is_started_without(machine):
    machine(srun=SRUN, scontrol=SCONTROL)
    done = call("slurm", "score")
    assert done.returncode != 0 and "start this script with sbatch" in done.stderr


@pytest.mark.parametrize(
    ("step", "code", "requeued"),
    [
        ("exit 0", 0, False),
        # What failed by itself would fail again.
        ("exit 2", 2, False),
        (TIME_IS_UP.format(code=1), 1, True),
        # It was through before it was stopped.
        (TIME_IS_UP.format(code=0), 0, False),
        # Who cancels a job does not want it back.
        (CANCELLED, -signal.SIGTERM, False),
    ],
    ids=["done", "failed", "stopped", "done in time", "cancelled"],
)
def test_a_slurm_job_is_put_back_if_its_time_was_up(machine, tmp_path, step, code, requeued):
    machine(scontrol=SCONTROL, scancel=SCANCEL, srun=SRUN + step)
    done = in_slurm(step, "score", "--out", "a b")
    assert done.returncode == code, done.stderr
    queue = tmp_path / "requeued"
    assert queue.exists() == requeued
    if requeued:
        assert queue.read_text() == "70001\n"
    signals = tmp_path / "signals"
    assert signals.exists() == ("USR1" in step)
    if signals.exists():
        # For the ranks alone: once, and to no batch script.
        assert signals.read_text() == "--signal=TERM 70001\n"


def test_a_slurm_job_has_a_torchrun_on_each_node(machine, tmp_path):
    machine(scontrol=SCONTROL, scancel=SCANCEL, srun=SRUN)
    assert in_slurm("", "score", "--out", "a b").returncode == 0
    given = (tmp_path / "step").read_text().splitlines()
    # Of versions that do not hand on what the job has a task would have one.
    assert "--cpus-per-task=64" in given[: given.index("torchrun")]
    parsed, command = given_to_torchrun(given[given.index("torchrun") + 1 :])
    assert (parsed.nnodes, parsed.nproc_per_node, parsed.max_restarts) == ("2", "gpu", 3)
    assert parsed.rdzv_backend == "c10d" and parsed.rdzv_endpoint == "node-a:30001"
    assert command[0] == "score" and command[-2:] == ["--out", "a b"]
    asked = [
        line.removeprefix("#SBATCH ")
        for line in (JOBS / "slurm.sh").read_text().splitlines()
        if line.startswith("#SBATCH ")
    ]
    assert {"--signal=B:USR1@120", "--requeue", "--ntasks-per-node=1"} <= set(asked)


# In the rank 1 of a job, as soon as it has written down its progress so often, and once.
IN_RANK_1 = """
import os, signal
replace, left, once = os.replace, 4, os.path.join(os.environ["CLUSTER"], "happened")
def replacing(source, target, **options):
    global left
    replace(source, target, **options)
    left -= os.path.basename(target) == "progress.json"
    if left == 0 and not os.path.exists(once):
        open(once, "w").close()
        ACT
if os.environ.get("RANK") == "1":
    os.replace = replacing
"""
DIES = "os.kill(os.getpid(), signal.SIGKILL)"
TIME_ENDS = (
    "os.kill(int(open(os.path.join(os.environ['CLUSTER'], 'batch')).read()), signal.SIGUSR1)"
)


@pytest.fixture
def in_rank_1(tmp_path, monkeypatch):
    """Has every Python that is started below do something in its rank 1; whether it did."""
    # Nobody need resolve this machine's name.
    monkeypatch.setenv("PET_LOCAL_ADDR", "127.0.0.1")

    def prepare(act):
        folder = tmp_path / "site"
        folder.mkdir()
        (folder / "sitecustomize.py").write_text(IN_RANK_1.replace("ACT", act))
        monkeypatch.setenv("PYTHONPATH", str(folder))
        return (tmp_path / "happened").exists

    return prepare


@pytest.fixture(scope="module")
def undisturbed(place, tmp_path_factory):
    """The scores of two ranks that nothing happens to."""
    out = tmp_path_factory.mktemp("undisturbed") / "scores"
    found = forked_ranks(["score", "--order", "layers", *place, "--out", str(out)])
    assert [each.returncode for each in found] == [0, 0], found
    return out


@pytest.mark.slow
def test_a_job_goes_on_when_torchrun_starts_it_again(
    machine, in_rank_1, place, undisturbed, tmp_path
):
    machine(torchrun=TORCHRUN)
    happened = in_rank_1(DIES)
    done = call("one_node", "score", *place, "--out", tmp_path / "scores", RANKS="2")
    assert done.returncode == 0 and happened(), done.stderr
    assert "local_rank: 1" in done.stderr, "who died is told"
    assert "scoring goes on from" in done.stderr
    require_alike(tmp_path / "scores", undisturbed, exact=True)


@pytest.mark.slow
def test_a_whole_run_goes_on_too(machine, in_rank_1, place, tmp_path):
    sets = write_sources(tmp_path)
    words = ["run", *place[:2], *(w for k, v in sets.items() for w in (f"--{k}", str(v)))]
    words += ["--ratio", "0.05", "--eval-examples", "0", "--quiet"]
    found = forked_ranks([*words, "--order", "layers", "--out", str(tmp_path / "undisturbed")])
    assert [each.returncode for each in found] == [0, 0], found
    machine(torchrun=TORCHRUN)
    happened = in_rank_1(DIES)
    done = call("one_node", *words, "--out", tmp_path / "run", RANKS="2")
    assert done.returncode == 0 and happened(), done.stderr
    assert "scoring goes on from" in done.stderr
    for name in sets:
        scores = Path("scores", name)
        require_alike(tmp_path / "run" / scores, tmp_path / "undisturbed" / scores, exact=True)
    one, other = (NeuronMask.from_pretrained(tmp_path / r / "mask") for r in ("run", "undisturbed"))
    assert one == other


@pytest.mark.slow
def test_a_job_of_two_agents_goes_on_when_a_rank_of_one_dies(
    machine, in_rank_1, place, undisturbed, tmp_path
):
    machine(torchrun=TORCHRUN)
    happened = in_rank_1(DIES)
    command = [JOBS / "two_nodes.sh", "score", *place, "--out", tmp_path / "scores"]
    variables = {"HEAD": f"127.0.0.1:{free_port()}", "RANKS": "1"}
    nodes = [
        subprocess.Popen(command, env=os.environ | variables, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    try:
        told = [node.communicate(timeout=LIMIT_S)[1] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0] and happened(), told
    assert "scoring goes on from" in "".join(told)
    require_alike(tmp_path / "scores", undisturbed, exact=True)


@pytest.mark.slow
def test_a_slurm_job_goes_on_in_its_next_turn(machine, in_rank_1, place, undisturbed, tmp_path):
    run = 'echo $PPID > "$CLUSTER/batch"\nshift\nexec "$@"\n'
    names = SCONTROL.replace("node-a\\nnode-b", "127.0.0.1")
    machine(scontrol=names, scancel=SCANCEL, srun=SRUN + run, torchrun=TORCHRUN)
    happened = in_rank_1(TIME_ENDS)
    # The script makes its port of it.
    port = free_port(range(20000, 32000))
    variables = {"SLURM_JOB_ID": str(port - 20000), "SLURM_JOB_NODELIST": "here"}
    variables |= {"SLURM_JOB_NUM_NODES": "1", "RANKS": "2"}
    out = tmp_path / "scores"
    first = call("slurm", "score", *place, "--out", out, **variables)
    assert first.returncode != 0 and happened(), first.stderr
    assert "fastdean: terminated" in first.stderr
    assert (tmp_path / "requeued").read_text().split() == [variables["SLURM_JOB_ID"]]
    assert (out / "rank-1" / "progress.json").exists()
    second = call("slurm", "score", *place, "--out", out, **variables)
    assert second.returncode == 0, second.stderr
    assert "scoring goes on from" in second.stderr
    require_alike(out, undisturbed, exact=True)


@pytest.mark.slow
def test_accelerate_starts_the_ranks_of_its_configuration(machine, place, undisturbed, tmp_path):
    machine(accelerate=ACCELERATE)
    config = (JOBS / "accelerate.yaml").read_text().replace("num_processes: 8", "num_processes: 2")
    (tmp_path / "two.yaml").write_text(config)
    done = call(
        "accelerate",
        "score",
        *place,
        "--out",
        tmp_path / "scores",
        CONFIG=str(tmp_path / "two.yaml"),
    )
    assert done.returncode == 0, done.stderr
    require_alike(tmp_path / "scores", undisturbed, exact=True)


def free_port(among=(0,)):
    """A port that nothing listens on; 0: any."""
    for port in among:
        with socket.socket() as free:
            try:
                free.bind(("127.0.0.1", port))
            except OSError:
                continue
            return free.getsockname()[1]
    raise AssertionError("no port is free")


def forked_ranks(command):
    """Two ranks of a command, as a launcher would start them."""
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    started = [
        forked.start(forked.run_command, *command, environment={**shared, "RANK": str(rank)})
        for rank in range(2)
    ]
    try:
        return [process.finish() for process in started]
    finally:
        for process in started:
            process.kill()


def require_alike(found, expected, exact=False):
    """The scores in two folders: of the same entries, with the same bits or up to rounding."""
    one, other = Scores.from_pretrained(found), Scores.from_pretrained(expected)
    assert one.entries.keys() == other.entries.keys()
    for name, entry in one.entries.items():
        assert torch.equal(entry.index, other.entries[name].index)
        if exact:
            assert torch.equal(entry.sums, other.entries[name].sums)
        else:
            torch.testing.assert_close(entry.sums, other.entries[name].sums)
