"""A job layer by layer that goes on with another number of ranks, to the same bits.

A job stops when the upper layer is through; its folder is made once, and copied for each test.
"""

from __future__ import annotations

import shutil
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from oracle import norm_error
from test_resume import assert_same_bits, score, stopped
from test_sharded import sharded
from test_sharded_and_split import attempt, in_two_ways
from tiny_experts import experts_model
from tiny_models import llama
from tiny_split import by_torch
from two_ranks import join_group, leave_group, run_ranks

from fastdean.coupling import scoring_job
from fastdean.coupling.resuming import job_parts, kept_entries, resumable, state_files, taken_over
from fastdean.files.storage import held

EXACT = {"keep_top": 0.05, "deterministic": True}
# Two layers forward, the losses of two sets, the upper layer backward for each.
DONE = 6


def stop(folder, done=DONE, model=None, **options):
    """A job that every rank leaves when so many of its steps are done."""
    with pytest.MonkeyPatch.context() as patch:
        stopped(folder, done, patch, model, **options)


def go_on(folder, model=None, **options):
    """The scores of a job that goes on, and what it finishes of each data set."""
    finished, keep = [], kept_entries.keep_entries

    def noted(home, number, entries):
        finished.extend((number, name) for name in entries)
        keep(home, number, entries)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring_job, "keep_entries", noted)
        return score(model, resume=folder, **options), finished


def described(found):
    scores, finished = found
    return {
        "entries": {
            name: {
                parameter: (entry.index, entry.sums, entry.signed, entry.fingerprint)
                for parameter, entry in each.entries.items()
            }
            for name, each in scores.items()
        },
        "finished": finished,
    }


def gone_on(folder, model, options):
    return described(go_on(folder, model, **options))


def require_same(result, alone, *, exact=True):
    assert not isinstance(result, str), result
    assert list(result["entries"]) == list(alone)
    for name, scores in alone.items():
        assert list(result["entries"][name]) == list(scores.entries)
        for parameter, entry in scores.entries.items():
            index, sums, signed, fingerprint = result["entries"][name][parameter]
            assert fingerprint == entry.fingerprint
            assert index is None or torch.equal(index, entry.index)
            if exact:
                assert torch.equal(sums, entry.sums)
            assert norm_error(sums, entry.sums) < 1e-5
            assert (signed is None) == (entry.signed is None)
            assert signed is None or norm_error(signed, entry.signed) < 1e-5


def require_lower_layer(finished):
    """What was finished before is not scored again."""
    assert sorted({number for number, _ in finished}) == [0, 1]
    assert len(finished) == 6 and all(".layers.0." in name for _, name in finished)


@contextmanager
def of_gpu(number):
    """As a job says of itself on this one of several GPUs; its results come from there."""
    of, keep = state_files.Part.of, kept_entries.keep_entries

    def kept(*arguments):
        with pytest.MonkeyPatch.context() as patch:
            there = f"cuda:{number}"
            patch.setattr(state_files.Part, "of", lambda tensor: replace(of(tensor), device=there))
            keep(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job_parts, "_device", lambda parameter: f"cuda:{number} of a kind")
        patch.setattr(scoring_job, "keep_entries", kept)
        yield


def two_ranks(rank, folder):
    join_group(rank, folder)
    stop(folder / "two", **EXACT)
    stop(folder / "plain", keep_top=0.05)
    # There is no such device here, so that nothing of it may be asked for.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job_parts, "_device", lambda parameter: f"cuda:{rank} of a kind")
        found = attempt(gone_on, folder / "one", llama(), EXACT)
    leave_group(rank, folder, found)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """What two ranks left, and what they found where one had begun."""
    folder = tmp_path_factory.mktemp("jobs")
    with of_gpu(7):
        stop(folder / "one", **EXACT)
    return folder, run_ranks(two_ranks, folder)


@pytest.fixture
def job(folders, tmp_path):
    """A job of two ranks that is not finished."""
    return Path(shutil.copytree(folders[0] / "two", tmp_path / "job"))


@pytest.fixture(scope="module")
def alone():
    return score(**EXACT)


def test_two_ranks_go_on_where_one_began(folders, alone):
    folder, ranks = folders
    for found in ranks:
        require_same(found, alone)
        require_lower_layer(found["finished"])
    assert not (folder / "one").exists()


def test_one_goes_on_where_two_ranks_began(job, alone, caplog):
    found, finished = go_on(job, **EXACT)
    assert_same_bits(found, alone)
    require_lower_layer(finished)
    assert not job.exists()
    assert "begun on another number of ranks (2, now 1): the layers are run again" in caplog.text
    assert "finished matrices are kept (6)" in caplog.text


def test_without_determinism_it_is_the_same_but_for_rounding(folders):
    result = described(go_on(folders[0] / "plain", keep_top=0.05))
    require_same(result, score(keep_top=0.05), exact=False)
    require_lower_layer(result["finished"])


@pytest.mark.parametrize("moment", range(5))
def test_a_kill_while_folders_take_their_places_loses_nothing(job, alone, moment, monkeypatch):
    """At every removal, every renaming, and in the first step after them."""
    calls = []

    def killed(call):
        def counted(*arguments):
            calls.append(call)
            if len(calls) == moment + 1:
                raise KeyboardInterrupt
            return call(*arguments)

        return counted

    with monkeypatch.context() as patch:
        patch.setattr(taken_over, "remove_folder", killed(taken_over.remove_folder))
        patch.setattr(taken_over.os, "rename", killed(taken_over.os.rename))
        patch.setattr(taken_over, "write_progress", killed(taken_over.write_progress))
        reached = killed(resumable.Resumable.reached)
        patch.setattr(resumable.Resumable, "reached", reached)
        with pytest.raises(KeyboardInterrupt):
            score(resume=job, **EXACT)
    found, finished = go_on(job, **EXACT)
    assert_same_bits(found, alone)
    require_lower_layer(finished)
    assert not job.exists()


def changed(layer):
    model = llama()
    with torch.no_grad():
        model.model.layers[layer].mlp.up_proj.weight[0, 0] += 1
    return model


@pytest.mark.parametrize(
    ("model", "options", "text"),
    [
        (llama, {"keep_top": 0.1}, "differs in keep_top; choose another folder"),
        (llama, {"deterministic": False}, "differs in deterministic; choose another folder"),
        (lambda: changed(1), {}, "differs in the weights of model.layers.1; choose"),
    ],
    ids=["option", "determinism", "weights"],
)
def test_another_job_is_refused_by_name(job, model, options, text):
    with pytest.raises(ValueError, match=text):
        score(model(), resume=job, **{**EXACT, **options})


def test_a_job_that_others_are_at_is_refused(job):
    with held(job / "rank-1", "resume"), pytest.raises(ValueError, match="must not be in use"):
        score(resume=job, **EXACT)
    assert sorted(path.name for path in job.iterdir()) == ["rank-0", "rank-1"]


def test_files_that_are_damaged_are_refused(job):
    file = job / "rank-0" / "entries-0"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="must be as this job wrote it, got other content"):
        score(resume=job, **EXACT)


def test_a_lost_record_is_refused_with_what_it_is_of(job):
    """Finished matrices are not scored again because nobody knows of them."""
    (job / "rank-0" / "progress.json").unlink()
    with pytest.raises(ValueError, match=r"progress.json' must be as .*, got no such file; remove"):
        score(resume=job, **EXACT)


@pytest.mark.parametrize("begun", [True, False], ids=["begun", "not begun"])
def test_what_ranks_left_before_they_began_is_not_in_the_way_of_the_results(job, alone, begun):
    """Of ranks that there are no more, killed when their folders were there and nothing in them."""
    if not begun:
        shutil.rmtree(job)
        (job / "rank-1").mkdir(parents=True)
    (job / "rank-3").mkdir()
    (job / "rank-4" / ".job.json.0123abcd.tmp").mkdir(parents=True)
    (job / ".rank-5.0123abcd.tmp").mkdir()
    assert_same_bits(score(resume=job, **EXACT), alone)
    assert not job.exists() or not any(job.iterdir())


def mixtral():
    return experts_model("Mixtral")


# Name of a job: the model, how it is scored, after how many steps it stops.
JOBS = {
    "exact": (llama, EXACT, DONE),
    "dense": (llama, {"deterministic": True, "signs": True}, DONE),
    "forward": (llama, EXACT, 2),
    "losses": (llama, EXACT, 4),
    "head": (llama, {**EXACT, "target_modules": ["down_proj", "lm_head"]}, 5),
    "units": (llama, {"deterministic": True, "granularity": "unit"}, DONE),
    "experts": (mixtral, {**EXACT, "memory_budget": 150_000}, 9),
    "by example": (llama, {**EXACT, "target_modules": "every"}, 11),
}


def world_of(folder):
    return int(folder.name.partition(" ")[0])


def begin(rank, folder):
    join_group(rank, folder, world=world_of(folder))
    for name, (make, options, done) in JOBS.items():
        stop(folder.parent / name, done, make(), **options)
    leave_group(rank, folder, {})


def end(rank, folder):
    join_group(rank, folder, world=world_of(folder))
    found = {
        name: attempt(gone_on, folder.parent / name, make(), options)
        for name, (make, options, _) in JOBS.items()
    }
    leave_group(rank, folder, found)


@pytest.mark.slow
@pytest.mark.parametrize("begun, count", [(2, 1), (1, 4), (2, 4), (4, 2)])
def test_numbers_of_ranks_and_ways_to_score(tmp_path, begun, count):
    first, second = tmp_path / f"{begun} begin", tmp_path / f"{count} end"
    first.mkdir(), second.mkdir()
    run_ranks(begin, first, world=begun)
    ranks = run_ranks(end, second, world=count)
    for name, (make, options, _) in JOBS.items():
        expected = score(make(), **options)
        for found in ranks:
            require_same(found[name], expected)


def mesh_of(world):
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "tp"))


# Where a rank has a part of the weights.
IN_PARTS = {
    "split": lambda world: by_torch(llama(), mesh_of(world)["tp"]),
    "sharded": lambda world: sharded(llama()),
    "both": lambda world: in_two_ways(llama(), mesh_of(world)),
}


def begin_in_parts(rank, folder):
    join_group(rank, folder, world=4)
    for name, make in IN_PARTS.items():
        stop(folder / name, model=make(4), **EXACT)
    leave_group(rank, folder, {})


def end_in_parts(rank, folder):
    join_group(rank, folder)
    found = {"whole": attempt(gone_on, folder.parent / "split", llama(), EXACT)}
    for name, make in IN_PARTS.items():
        found[name] = attempt(gone_on, folder.parent / name, make(2), EXACT)
    leave_group(rank, folder, found)


@pytest.mark.slow
def test_models_in_parts_go_on_where_as_many_ranks_hold_one(tmp_path):
    run_ranks(begin_in_parts, tmp_path, world=4)
    expected, folder = score(**EXACT), tmp_path / "two"
    folder.mkdir()
    for found in run_ranks(end_in_parts, folder):
        assert "with one of which 2 ranks held a model together, and not 1;" in found.pop("whole")
        for name, result in found.items():
            # Ranks that hold a model together add up products of their own.
            require_same(result, expected, exact=name == "sharded")
            require_lower_layer(result["finished"])
