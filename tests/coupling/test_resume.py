"""`score(resume=DIR)`: a job layer by layer that was killed goes on, to the same bits."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers
from interrupts import interrupt, moments
from tiny_data import batches, make_examples, word_tokenizer
from tiny_experts import experts_model
from tiny_models import gpt2, llama

import fastdean
from fastdean.coupling import order
from fastdean.coupling.layers import by_layers, states
from fastdean.coupling.resuming import (
    job_files,
    job_parts,
    kept_entries,
    kept_files,
    resumable,
    state_files,
)
from fastdean.coupling.scoring import score_sets
from fastdean.coupling.workloads import loss_scale
from fastdean.files import folders
from fastdean.models.layers.replay import NotByLayers, Replay
from fastdean.models.loading import stream_model

OPTIONS = {"progress": False, "order": "layers", "target_modules": "mlp", "tokens_per_batch": 12}
KILLED = Path(__file__).parent.parent / "support" / "killed.py"


def loaders(seed=0):
    return {
        "fair": list(batches(make_examples(seed, lengths=(3, 9, 5)), 2)),
        "general": list(batches(make_examples(seed + 7, lengths=(6, 11)), 1)),
    }


def score(model=None, sets=None, **options):
    return score_sets(model or llama(), sets or loaders(), **{**OPTIONS, **options})


def assert_same_bits(found, expected):
    assert list(found) == list(expected)
    for name in expected:
        assert list(found[name]) == list(expected[name])
        for parameter, entry in expected[name].entries.items():
            other = found[name].entries[parameter]
            assert torch.equal(other.sums, entry.sums), parameter
            assert (entry.index is None) == (other.index is None)
            assert entry.index is None or torch.equal(other.index, entry.index)
            assert torch.equal(other.weight, entry.weight)
            assert (other.shape, other.unit_axis) == (entry.shape, entry.unit_axis)
            assert other.fingerprint == entry.fingerprint
        assert all(torch.equal(found[name][p], expected[name][p]) for p in expected[name])


def stopped(folder, steps, monkeypatch, model=None, sets=None, **options):
    """A job that is interrupted when so many of its steps are done."""
    with monkeypatch.context() as patch:
        reached = resumable.Resumable.reached

        def stopping(self, step):
            reached(self, step)
            if step + 1 == steps:
                raise KeyboardInterrupt

        patch.setattr(resumable.Resumable, "reached", stopping)
        with pytest.raises(KeyboardInterrupt):
            score(model, sets, resume=folder, **options)


def steps_run(monkeypatch):
    """The steps that are done from now on, as they are done."""
    seen = []
    reached = resumable.Resumable.reached
    monkeypatch.setattr(
        resumable.Resumable, "reached", lambda self, step: seen.append(step) or reached(self, step)
    )
    return seen


def mixtral():
    return experts_model("Mixtral")


# Two layers forward, the losses of two sets, two layers backward for each of them.
STEPS = 8


@pytest.mark.parametrize(
    ("build", "options", "done"),
    [
        (llama, {}, 1),
        (llama, {"keep_top": 0.05}, 5),
        (gpt2, {"granularity": "unit", "keep_top": 0.2}, STEPS - 1),
        # One group of targets for each matrix.
        (lambda: llama().bfloat16(), {"memory_budget": 53_177, "keep_top": 0.05}, 8),
        (mixtral, {}, 6),
        (mixtral, {"keep_top": 0.05, "expert_scope": "tensor"}, 5),
    ],
    ids=["dense", "sparse", "units", "groups", "experts", "sparse experts"],
)
def test_it_goes_on_in_the_step_it_was_in(build, options, done, tmp_path, monkeypatch):
    expected, folder = score(build(), **options), tmp_path / "new" / "job"
    stopped(folder, done, monkeypatch, build(), **options)
    seen = steps_run(monkeypatch)
    assert_same_bits(score(build(), resume=folder, **options), expected)
    assert seen == list(range(done, seen[-1] + 1))
    assert seen[-1] + 1 == (STEPS if "memory_budget" not in options else 4 + 2 * 2 * 3)
    assert not os.listdir(tmp_path)


def test_it_goes_on_within_a_layer(tmp_path, monkeypatch):
    expected, ran = score(), []
    forward = torch.nn.Linear.forward
    keep = states.States.keep

    def third(self, layer, batch, returned):
        keep(self, layer, batch, returned)
        if (layer, batch) == (1, 2):
            raise KeyboardInterrupt

    monkeypatch.setattr(states.States, "keep", third)
    with pytest.raises(KeyboardInterrupt):
        score(resume=tmp_path)
    monkeypatch.setattr(
        states.States, "keep", lambda self, k, b, r: ran.append((k, b)) or keep(self, k, b, r)
    )
    assert_same_bits(score(resume=tmp_path), expected)
    # The third batch was kept, and not yet noted as done; the fifth is the rehearsal's.
    assert ran == [(1, 2), (1, 3), (1, 4)] and torch.nn.Linear.forward is forward


def test_it_is_written_down_every_so_many_seconds(tmp_path, monkeypatch):
    monkeypatch.setattr(resumable, "_SECONDS", -1.0)
    written = []
    save = resumable.Resumable._save
    monkeypatch.setattr(
        resumable.Resumable,
        "_save",
        lambda self, commit, before: (
            written.append((commit["step"], commit["batches"])) or save(self, commit, before)
        ),
    )
    score(resume=tmp_path)
    assert written[:7] == [(0, 0), (0, 1), (0, 2), (0, 3), (0, 4), (1, 0), (1, 1)]


def test_an_interrupt_at_any_line_loses_nothing(tmp_path, monkeypatch):
    folder = tmp_path / "job"
    model = llama()
    sets = {"one": list(batches(make_examples(lengths=(4, 6)), 1))}
    options = {"target_modules": ".*up_proj", "tokens_per_batch": 1, "keep_top": 0.1}
    monkeypatch.setattr(resumable, "_SECONDS", -1.0)
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    monkeypatch.setattr(fastdean.coupling.passes.trial, "_DIRECTIONS", 1)

    def call():
        return score(model, sets, resume=folder, **options)

    expected = score(model, sets, **options)
    modules = (by_layers, kept_entries, kept_files, resumable, state_files, states)
    files = {module.__file__ for module in modules}
    found = moments(call, files)
    assert len(found) > 300, len(found)
    for moment in found[::47]:
        interrupt(call, files, moment)
        assert_same_bits(call(), expected)
        assert not os.listdir(tmp_path)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_an_interrupt_at_the_end_of_the_rehearsal_loses_nothing(tmp_path, monkeypatch):
    """What the rehearsed batch left behind is needed until the step is noted as done."""
    expected = score()
    forget = by_layers.Lookups.forget

    def interrupted(self, b):
        raise KeyboardInterrupt

    monkeypatch.setattr(by_layers.Lookups, "forget", interrupted)
    with pytest.raises(KeyboardInterrupt):
        score(resume=tmp_path / "job")
    monkeypatch.setattr(by_layers.Lookups, "forget", forget)
    assert_same_bits(score(resume=tmp_path / "job"), expected)


def killed(folder, *points):
    """Run a job that is killed at each of the points, and compare what comes of it."""
    result = subprocess.run(
        [sys.executable, str(KILLED), str(folder), *points],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def test_a_killed_process(tmp_path):
    """In the middle of a write, before the commit record is put in its place, and after."""
    assert killed(tmp_path, "write:5", "replace-before:4", "replace-after:6") == ["same"] * 3
    assert not os.listdir(tmp_path)


@pytest.mark.slow
def test_a_process_that_is_killed_at_any_moment(tmp_path):
    assert killed(tmp_path, *["random"] * 30) == ["same"] * 30


def test_sigterm_ends_the_process_and_the_job_goes_on(tmp_path, monkeypatch, caplog):
    keep = states.States.keep

    def terminated(self, layer, batch, returned):
        keep(self, layer, batch, returned)
        if layer == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    expected = score()
    with monkeypatch.context() as patch:
        patch.setattr(states.States, "keep", terminated)
        with pytest.raises(SystemExit) as ended:
            score(resume=tmp_path)
    assert ended.value.code == 143
    assert "terminated; what is finished is kept, call again with the same arguments" in caplog.text
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    seen = steps_run(monkeypatch)
    assert_same_bits(score(resume=tmp_path), expected)
    assert seen[0] == 1


def test_a_handler_of_sigterm_stays(tmp_path, monkeypatch):
    own = lambda number, frame: None  # noqa: E731
    before = signal.signal(signal.SIGTERM, own)
    seen = []
    keep = states.States.keep
    monkeypatch.setattr(
        states.States,
        "keep",
        lambda self, *args: seen.append(signal.getsignal(signal.SIGTERM)) or keep(self, *args),
    )
    try:
        score(resume=tmp_path)
        assert set(seen) == {own} and signal.getsignal(signal.SIGTERM) is own
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_full_disk_stops_a_job_that_goes_on(tmp_path, monkeypatch):
    expected = score()
    with monkeypatch.context() as patch:

        def full(handle, content, at, write=os.pwrite):
            if len(os.listdir(tmp_path / "rank-0")) > 4:
                raise OSError(errno.ENOSPC, "No space left on device")
            return write(handle, content, at)

        patch.setattr(os, "pwrite", full)
        message = "^states must have room on the disk of .* none left; free some, .* call again$"
        with pytest.raises(OSError, match=message):
            score(resume=tmp_path)
    seen = steps_run(monkeypatch)
    assert_same_bits(score(resume=tmp_path), expected)
    assert seen[0] >= 2


@pytest.mark.parametrize("most", [300, 1000, 2500])
def test_a_limit_on_files_stops_a_job_that_goes_on(most, tmp_path):
    """On the first file that says which job it is, and on larger ones."""
    expected, folder = score(), tmp_path / "job"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        message = "^states must be files that can be written in .*rank-0.*, got an error: File too "
        with pytest.raises(OSError, match=f"{message}.*raise the limit .* call again$") as error:
            score(resume=folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert error.value.errno == errno.EFBIG
    assert_same_bits(score(resume=folder), expected)


def test_a_small_disk_is_refused_with_the_results_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "statvfs", lambda place: type("Disk", (), FREE)())
    with pytest.raises(RuntimeError, match="room on a disk for about 124,416 bytes"):
        score(resume=tmp_path / "job")
    assert not os.listdir(tmp_path)


# 34 tokens of 32 numbers in 2 layers and as 2 gradients, 6 matrices of 64 x 32 sums in 2 sets.
FREE = {"f_bavail": 100_000, "f_blocks": 1 << 30, "f_bfree": 100_000, "f_frsize": 1}


def test_a_job_that_cannot_begin_leaves_nothing(tmp_path, monkeypatch):
    def refused(*args):
        raise NotByLayers("no layer can be run")

    monkeypatch.setattr(Replay, "reach", refused)
    with pytest.raises(RuntimeError, match="no layer can be run"):
        score(resume=tmp_path / "job")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("done", [5, 6, 7])
def test_what_overflowed_in_fp16_goes_on_at_its_own_scale(done, tmp_path, monkeypatch):
    monkeypatch.setattr(loss_scale.LossScale, "fitted", lambda *_: loss_scale.LossScale(24))
    expected = score(llama().half())
    stopped(tmp_path, done, monkeypatch, llama().half())
    assert_same_bits(score(llama().half(), resume=tmp_path), expected)


# What has changed.


def other_weights(part):
    def change():
        model = llama()
        with torch.no_grad():
            model.get_parameter(part)[0] += 0.5
        return {"model": model}

    return change


def other_attention():
    model = llama()
    model.set_attn_implementation("eager")
    return {"model": model}


def other_configuration():
    model = llama()
    model.config.rms_norm_eps = 1e-3
    return {"model": model}


CHANGES = {
    "the weights of model.layers.0": other_weights("model.layers.0.mlp.up_proj.weight"),
    "the weights of model.layers.1": other_weights("model.layers.1.self_attn.q_proj.weight"),
    "weights outside the layers": other_weights("model.embed_tokens.weight"),
    "attention implementation": other_attention,
    "model configuration": other_configuration,
    "dtype": lambda: {"model": llama().bfloat16()},
    "data set 'fair'": lambda: {"sets": loaders(1)},
    "names of the data sets": lambda: {"sets": dict(zip("ab", loaders().values(), strict=True))},
    "batches": lambda: {"sets": {**loaders(), "fair": loaders()["fair"][::-1]}},
    "granularity": lambda: {"granularity": "unit"},
    "target_modules": lambda: {"target_modules": ".*mlp.*"},
    "keep_top": lambda: {"keep_top": 0.1},
    "tokens_per_batch": lambda: {"tokens_per_batch": 5},
    "memory_budget": lambda: {"memory_budget": 1 << 20},
    "impl": lambda: {"impl": "reference"},
    "deterministic": lambda: {"deterministic": True},
}


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory):
    """A job with everything but the last layer backward done."""
    folder = tmp_path_factory.mktemp("jobs") / "job"
    with pytest.MonkeyPatch.context() as patch:
        stopped(folder, 5, patch)
    return folder


@pytest.fixture
def job(unfinished, tmp_path):
    shutil.copytree(unfinished, tmp_path / "job")
    return tmp_path / "job"


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("part", CHANGES)
def test_what_has_changed_is_named(part, job):
    before = contents(job)
    message = f"resume must be a folder of this job, got .* that differs in .*{part}.*; choose"
    with pytest.raises(ValueError, match=message) as raised:
        score(**CHANGES[part](), resume=job)
    assert "\n" not in str(raised.value)
    assert contents(job) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_precision_of_products_is_named(dtype, tmp_path, monkeypatch):
    stopped(tmp_path / "job", 5, monkeypatch, llama().to(dtype))
    message = "differs in precision of products;"
    with torch.autocast("cpu", torch.float16), pytest.raises(ValueError, match=message):
        score(llama().to(dtype), resume=tmp_path / "job")


def test_no_name_of_a_set_is_that_of_another_sets_part(tmp_path, monkeypatch):
    """What hooks score and what is scored by example are told apart, whatever a set is called."""
    names = "a", "a, by example"
    sets = dict(zip(names, loaders().values(), strict=True))
    stopped(tmp_path / "job", 2, monkeypatch, sets=sets, target_modules="every")
    parts = json.loads((tmp_path / "job" / "rank-0" / "job.json").read_text("utf-8"))["parts"]
    told = [part for part in parts if part.startswith("data set ")]
    assert told == [
        "data set 'a'",
        "data set 'a', by example",
        "data set 'a, by example'",
        "data set 'a, by example', by example",
    ]


ROWS = [{"prompt": "the cat", "response": "sat on a mat"}, {"text": "the dog ran"}]


def swapped_words():
    tokenizer = word_tokenizer()
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    words = rules["model"]["vocab"]
    words["cat"], words["dog"] = words["dog"], words["cat"]
    tokenizer._tokenizer = tokenizer.backend_tokenizer.from_str(json.dumps(rules))
    return tokenizer


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (swapped_words, "data set 'fair', tokenizer"),
        (lambda: word_tokenizer(bos=False), "data set 'fair', tokenizer"),
        (lambda: word_tokenizer(chat_template="{{ messages }}"), "chat template"),
    ],
    ids=["words", "rules", "template"],
)
def test_another_tokenizer_is_named(changed, named, tmp_path, monkeypatch):
    options = {"tokenizer": word_tokenizer()}
    stopped(tmp_path, 2, monkeypatch, sets={"fair": ROWS}, **options)
    with pytest.raises(ValueError, match=f"one that differs in {named}; choose another folder"):
        score(sets={"fair": ROWS}, resume=tmp_path, **options | {"tokenizer": changed()})
    assert score(sets={"fair": ROWS}, resume=tmp_path, **options)


def test_the_tokenizer_of_tokens_does_not_matter(tmp_path, monkeypatch):
    stopped(tmp_path, 2, monkeypatch, tokenizer=word_tokenizer())
    assert score(resume=tmp_path)


class Counting(dict):
    """Weights, and how often each is read."""

    def __init__(self, weights):
        super().__init__(weights)
        self.reads = Counter()

    def __getitem__(self, name):
        self.reads[name] += 1
        return super().__getitem__(name)


def offloaded(**changes):
    from accelerate import cpu_offload

    model, weights = llama(), Counting(llama().state_dict() | changes)
    cpu_offload(model, execution_device=torch.device("cpu"), state_dict=weights)
    return model, weights.reads


def test_weights_that_are_offloaded_are_compared_when_they_are_read_anyway(tmp_path, monkeypatch):
    (model, reads), options = offloaded(), {"keep_top": 0.1}
    expected = score(model, **options)  # and the model was asked its questions, once
    counts = []
    for resume in (None, tmp_path / "whole"):
        reads.clear()
        assert_same_bits(score(model, resume=resume, **options), expected)
        counts.append({name: n for name, n in reads.items() if ".layers." in name})
    assert counts[0] == counts[1] and counts[0]
    stopped(tmp_path, 5, monkeypatch, model, **options)
    name = "model.layers.0.mlp.up_proj.weight"
    changed, _ = offloaded(**{name: llama().get_parameter(name).detach() + 1})
    with pytest.raises(ValueError, match="differs in the weights of model.layers.0; choose"):
        score(changed, resume=tmp_path, **options)
    assert_same_bits(score(model, resume=tmp_path, **options), expected)


@pytest.mark.parametrize("package", ["fastdean", "torch"])
def test_another_version_is_named(package, job, monkeypatch):
    found = job_parts.versions()
    monkeypatch.setattr(job_parts, "versions", lambda: {**found, package: "0.0.1"})
    with pytest.raises(ValueError, match=f"differs in the version of {package}; choose"):
        score(resume=job)


def test_another_format_of_the_states_is_named(job, monkeypatch):
    monkeypatch.setattr(job_files, "FORMAT", job_files.FORMAT + 1)
    with pytest.raises(ValueError, match="differs in format of the states; choose"):
        score(resume=job)


def test_other_threads_are_said_and_not_refused(job, monkeypatch, caplog):
    monkeypatch.setattr(resumable, "circumstances", lambda: {"threads": "64", "processor": "?"})
    score(resume=job)
    assert "begun with another number of threads or on another processor" in caplog.text


# What is damaged.


def cut(name):
    def damage(folder):
        with open(folder / name, "r+b") as file:
            file.truncate((folder / name).stat().st_size - 7)

    return damage


def flipped(name, at):
    def damage(folder):
        content = bytearray((folder / name).read_bytes())
        content[at] ^= 1
        (folder / name).write_bytes(content)

    return damage


def removed(name):
    return lambda folder: (folder / name).unlink()


def linked_to_nothing(name):
    """As of a disk that is not mounted."""

    def damage(folder):
        (folder / name).unlink()
        (folder / name).symlink_to(folder.parent / "elsewhere" / name)

    return damage


def swapped(one, other):
    def damage(folder):
        contents = [(folder / name).read_bytes() for name in (one, other)]
        for name, content in zip((other, one), contents, strict=True):
            (folder / name).write_bytes(content)

    return damage


def edited(name, part, value):
    def damage(folder):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**content, part: value}))

    return damage


DAMAGES = {
    "state cut": cut("state-0"),
    "state changed": flipped("state-1", -4700),
    "header changed": flipped("state-0", 70),
    "magic changed": flipped("state-0", 0),
    "length changed": flipped("gradient-1", 9),
    "gradient changed": flipped("gradient-1", -3),
    "entries changed": flipped("entries-0", -3),
    "state lost": removed("state-1"),
    "entries lost": removed("entries-0"),
    "progress lost": removed("progress.json"),
    "states swapped": swapped("state-0", "state-1"),
    "kinds swapped": swapped("gradient-1", "state-1"),
    "progress edited": edited("progress.json", "most_bytes", 5),
    "progress foreign": edited("progress.json", "number", "0"),
    "progress no progress": edited("progress.json", "commit", 3),
    "job foreign": edited("job.json", "kind", "holidays"),
    "job no job": flipped("job.json", 0),
    "job of another number": edited("job.json", "number", "0"),
    "job linked to nothing": linked_to_nothing("job.json"),
    "progress linked to nothing": linked_to_nothing("progress.json"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_refused(damage, job):
    DAMAGES[damage](job / "rank-0")
    left = sorted(os.listdir(job / "rank-0"))
    with pytest.raises(ValueError, match="must .*, got .*; remove .*rank-0.* to start again") as e:
        score(resume=job)
    assert "\n" not in str(e.value) and sorted(os.listdir(job / "rank-0")) == left


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EIO])
def test_nobody_is_told_to_remove_states_that_cannot_be_opened(number, job, monkeypatch):
    expected = score()
    with monkeypatch.context() as patch:

        def refusing(path, flags, *mode, open=os.open):
            if flags & os.O_RDWR and Path(path).name.startswith("state-"):
                raise OSError(number, os.strerror(number), path)
            return open(path, flags, *mode)

        patch.setattr(os, "open", refusing)
        said = (
            f"^states must be files that can be written in .*: {os.strerror(number)}; see to that"
        )
        with pytest.raises(OSError, match=said) as error:
            score(resume=job)
    assert "to start again" not in str(error.value)
    assert_same_bits(score(resume=job), expected)


def test_files_of_another_job_are_refused(job, tmp_path, monkeypatch):
    other = tmp_path / "other"
    stopped(other, 5, monkeypatch)
    shutil.copy(other / "rank-0" / "state-1", job / "rank-0" / "state-1")
    with pytest.raises(ValueError, match="got the file of another job or another layer; remove"):
        score(resume=job)


# Whose folder it is.


@pytest.mark.parametrize(
    "name",
    [
        *("thesis.txt", "rank-0/thesis.txt", "rank-x/job.json", "fastdean_config.json"),
        *("rank-01/job.json", "rank-\N{SUPERSCRIPT TWO}/job.json"),
    ],
)
def test_a_folder_of_other_things_is_refused(name, tmp_path):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="resume must be a new or empty folder, or hold an unfin"):
        score(resume=tmp_path)
    assert contents(tmp_path) == before


def test_a_file_among_the_states_is_refused(job):
    (job / "rank-0" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="and nothing else, got .* with 'thesis.txt' in it; move"):
        score(resume=job)
    assert (job / "rank-0" / "thesis.txt").read_text() == "mine"


def test_two_at_once_are_refused(job):
    before = contents(job)
    with (
        folders.held(job / "rank-0", "resume"),
        pytest.raises(ValueError, match="resume must not be in use, got .* is at work; wait"),
    ):
        score(resume=job)
    assert contents(job) == before


def test_an_empty_folder_stays(tmp_path):
    score(resume=tmp_path)
    assert tmp_path.is_dir() and not os.listdir(tmp_path)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"order": "batches"}, ValueError, "resume must be left out with order='batches', which"),
        ({"states": "host"}, ValueError, "states must be left out with resume, whose folder"),
        ({"resume": 3}, TypeError, "resume must be a folder, got int"),
        ({"resume": ""}, ValueError, "resume must be a folder, got ''"),
        ({"resume": __file__}, ValueError, "resume must be a folder, got "),
    ],
)
def test_what_resume_does_not_go_with(options, error, message, tmp_path):
    with pytest.raises(error, match=message):
        score(**{"resume": tmp_path / "job", **options})
    assert not os.listdir(tmp_path)


def test_where_auto_goes_batch_by_batch_it_makes_no_difference(tmp_path, monkeypatch):
    monkeypatch.setattr(order, "available_memory", lambda device: 1 << 40)
    found = score(order="auto", resume=tmp_path / "job")
    assert found["fair"].manifest["order"]["by"] == "batches" and not os.listdir(tmp_path)
    # Memory may have become free since a job began layer by layer.
    stopped(tmp_path / "job", 3, monkeypatch)
    found = score(order="auto", resume=tmp_path / "job")
    assert found["fair"].manifest["order"]["by"] == "layers" and not os.listdir(tmp_path)


def test_finished_data_sets_are_told_before_the_folder_goes(tmp_path):
    seen = []
    score(
        resume=tmp_path / "job",
        finished=lambda name, scores: seen.append((name, (tmp_path / "job").is_dir())),
    )
    assert seen == [("fair", True), ("general", True)] and not os.listdir(tmp_path)


def test_where_the_other_order_is_taken_the_folder_goes(tmp_path, monkeypatch):
    model = llama()
    model.config.num_hidden_layers = 1  # the second is left out, which is seen late
    monkeypatch.setattr(order, "available_memory", lambda device: 1)
    found = score(
        model,
        order="auto",
        keep_top=0.1,
        resume=tmp_path / "job",
        target_modules=r"model\.layers\.0\..*up_proj",
    )
    assert found["fair"].manifest["order"]["by"] == "batches" and not os.listdir(tmp_path)


def streamed_folder(folder, change=None):
    """A checkpoint of three layers of two kinds; `change` is added to a weight of this name."""
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    torch.manual_seed(0)
    config = transformers.Gemma2Config(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        layer_types=kinds,
    )
    model = transformers.Gemma2ForCausalLM(config)
    if change is not None:
        model.get_parameter(change).data += 1
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    "options",
    [{"keep_top": 0.05, "target_modules": "all"}, {"granularity": "unit"}],
    ids=["sparse", "units"],
)
# Within the layers forward, at the loss, and in the layers backward.
@pytest.mark.parametrize("done", [2, 4, 9])
def test_a_streamed_job_goes_on_in_another_process(options, done, tmp_path, monkeypatch):
    folder, job = streamed_folder(tmp_path / "model"), tmp_path / "job"
    expected = score(stream_model(folder), **options)
    stopped(job, done, monkeypatch, stream_model(folder), **options)
    stream = stream_model(folder)
    found = score(stream, resume=job, **options)
    assert not job.exists()
    for name in expected:
        assert list(found[name]) == list(expected[name])
        for parameter, entry in expected[name].entries.items():
            other = found[name].entries[parameter]
            assert torch.equal(other.sums, entry.sums)
            assert (other.weight is None) == (entry.weight is None), parameter
            assert entry.weight is None or torch.equal(other.weight, entry.weight)
    assert {parameter.device.type for parameter in stream.model.parameters()} == {"meta"}
    # What the first process read is counted too.
    read, once = (
        each["fair"].manifest["order"]["bytes_of_weights_read"] for each in (found, expected)
    )
    assert read >= once and read > stream.bytes_read


@pytest.mark.parametrize(
    ("changed", "done"),
    [
        ("model.layers.0.mlp.up_proj.weight", 1),
        ("model.layers.1.mlp.up_proj.weight", 5),
        # Which is through, and is not looked at again.
        ("model.layers.2.mlp.up_proj.weight", 9),
    ],
)
def test_a_streamed_layer_that_was_run_and_has_changed_is_refused_before_anything_runs(
    changed, done, tmp_path, monkeypatch
):
    folder, job = streamed_folder(tmp_path / "model"), tmp_path / "job"
    other = streamed_folder(tmp_path / "other", changed)
    options = {"keep_top": 0.05}
    stopped(job, done, monkeypatch, stream_model(folder), **options)
    seen = steps_run(monkeypatch)
    layer = changed.rpartition(".mlp")[0]
    with pytest.raises(ValueError, match=f"differs in the weights of {layer};"):
        score(stream_model(other), resume=job, **options)
    assert not seen
    # The job itself is as it was.
    score(stream_model(folder), resume=job, **options)
    assert seen[0] == done
