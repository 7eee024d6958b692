"""Files that were damaged, or written by somebody else: what stands there is read, or refused.

Hundreds of seeded mutations of every file that FastDEAN reads. A reader gives exactly what the
mutated file says, or raises ValueError or RuntimeError in one line that names the file; it takes no
longer for a file that claims to be large.
"""

from __future__ import annotations

import copy
import json
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from tiny_classes import some_classes
from tiny_masks import FIRST, SECOND, Stack, mask_of
from tiny_results import DEBIASED, make_results

from fastdean import CollapseRegularizer, Scores
from fastdean.collapse import CollapseClasses, read_word_groups
from fastdean.coupling.results.score_entry import ScoreEntry
from fastdean.debias.course import Course
from fastdean.debias.resuming import Checkpoints
from fastdean.debias.training import _Training
from fastdean.files.declared import read_json
from fastdean.files.safetensors import stored_tensors
from fastdean.files.storage import CONFIG_NAME, read_folder, write_folder
from fastdean.jobs.bias.figures import FIGURES as BIAS_FIGURES
from fastdean.jobs.collapse.measuring import FIGURES as COLLAPSE_FIGURES
from fastdean.jobs.folder import RUN_FILE, RunFolder
from fastdean.masks import NeuronMask
from fastdean.report import read_results, render_report

MUTATIONS = 60
# What storage itself says of a folder; its reader is tested with it.
RESERVED = ("kind", "format_version", "fastdean_version")
# Written into the text, because json.dumps cannot.
DEEP, DIGITS, HUGE = "@DEEP@", "@DIGITS@", "@HUGE@"
TOKENS = {DEEP: "[" * 50_000 + "]" * 50_000, DIGITS: "9" * 5000, HUGE: "1e400"}
STRANGE: list[Any] = [
    None, True, False, -1, 0, 1, 3, 2**31, 2**62, 2**63, 10**15, 10**400, 0.5, -0.5, 1e-320, 1e308,
    float("nan"), float("inf"), float("-inf"), "", "x", "9" * 40, "x" * 1_000_000, "²", "../..",
    "\x1b[2J", "a\nb", "\u202e", "\ud800", [], {}, [[]], [1, 2], [True], {"a": {}},
    DEEP, DIGITS, HUGE,
]  # fmt: skip


def places(value: Any, found: tuple = ()) -> Iterator[tuple]:
    """The path of every value inside."""
    parts = value.items() if isinstance(value, dict) else enumerate(value)
    for key, part in parts:
        yield (*found, key)
        if isinstance(part, dict | list):
            yield from places(part, (*found, key))


def mutated_json(content: Any, draw: random.Random, keep: tuple[str, ...] = ()) -> bytes:
    """JSON with some fields dropped, exchanged or exploded, or with some bytes changed."""
    content = copy.deepcopy(content)
    for _ in range(draw.choice((1, 1, 2))):
        paths = [path for path in places(content) if path[0] not in keep]
        if not paths or not isinstance(content, dict | list):
            break
        *way, last = draw.choice(paths)
        holder = content
        for key in way:
            holder = holder[key]
        if draw.random() < 0.25 and isinstance(holder, dict):
            del holder[last]
        elif draw.random() < 0.1 and isinstance(holder, dict):
            holder[draw.choice(["", "x", "a\x1b", "y" * 100_000])] = holder.pop(last)
        else:
            holder[last] = copy.deepcopy(draw.choice(STRANGE))
    text = json.dumps(content)
    for name, token in TOKENS.items():
        text = text.replace(f'"{name}"', token)
    return text.encode() if draw.random() < 0.7 else mutated_bytes(text.encode(), draw)


def mutated_bytes(raw: bytes, draw: random.Random, begin: int = 0) -> bytes:
    at = draw.randrange(begin, len(raw))
    return draw.choice(
        [
            raw[:at] + bytes([raw[at] ^ (1 << draw.randrange(8))]) + raw[at + 1 :],
            raw[:at] + bytes([draw.randrange(256)]) + raw[at + 1 :],
            raw[:at],
            raw[:at] + raw[at + 1 :],
            raw[:at] + draw.choice([b"\xff", b"\x00", b"{", b'"', b",", b"9" * 50]) + raw[at:],
            b"\xef\xbb\xbf" + raw,
            b"",
        ]
    )


@dataclass
class Case:
    """A file that is read.

    Attributes:
        make: writes a sound file or folder at a path, and returns the file that is mutated.
        use: reads what stands at the path and uses it.
        keep: fields at the top that stay as they are.
    """

    make: Callable[[Path], Path]
    use: Callable[[Path], Any]
    keep: tuple[str, ...] = ()


def as_version_1(folder: Path) -> Path:
    """The configuration of a folder, as one of those that list no digests."""
    file = folder / CONFIG_NAME
    config = json.loads(file.read_text("utf-8"))
    for name in ("sha256", "config_sha256"):
        config.pop(name, None)
    file.write_text(json.dumps(config | {"format_version": 1}), "utf-8")
    return file


def make_mask(path: Path) -> Path:
    table = [
        {"name": name, "layer": n, "module": "m", "numel": 36, "k": 2, "first": 2, "second": 2,
         "coupled": 2, "removed": 0, "kept": 2}
        for n, name in enumerate((FIRST, SECOND))
    ]  # fmt: skip
    mask = mask_of(Stack(), {FIRST: [0, 3], SECOND: [7, 8]}, scale=0.5)
    mask = NeuronMask(mask.entries, scale=0.5, manifest={"rule": "paper"}, table=table)
    return as_version_1(mask.save_pretrained(path))


def use_mask(path: Path) -> None:
    mask = NeuronMask.from_pretrained(path)
    config, tensors = read_folder(path, kind="mask")
    assert (mask.scale, mask.manifest, mask.table) == (
        config["scale"],
        config["manifest"],
        config["table"],
    )
    for name, entry in mask.entries.items():
        assert list(entry.shape) == config["shapes"][name]
        assert torch.equal(entry.index, tensors[f"{name}.index"])
    assert len(repr(mask)) < 1000 and str(mask.summary())


def make_scores(path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    entries = {
        name: ScoreEntry.of(
            torch.rand(8, 4, generator=generator), torch.randn(8, 4, generator=generator)
        )
        for name in ("a.weight", "b.weight")
    }
    scores = Scores(entries, granularity="weight", num_examples=3, manifest={"created": "now"})
    scores.keep(0.25).save_pretrained(path)
    return as_version_1(path)


def use_scores(path: Path) -> None:
    scores = Scores.from_pretrained(path)
    config, tensors = read_folder(path, kind="scores")
    assert (scores.num_examples, scores.keep_top) == (config["num_examples"], config["keep_top"])
    assert scores.entries.keys() == config["entries"].keys()
    for name, entry in scores.entries.items():
        assert torch.equal(entry.sums, tensors[f"{name}.sums"])
        assert scores[name].isfinite().all()
    repr(scores)


@cache
def a_regularizer() -> CollapseRegularizer:
    model = tiny_models.llama()
    return CollapseRegularizer(model, some_classes(), 1.0, schedule=lambda step: 1.0)


def make_state(path: Path) -> Path:
    state = a_regularizer().state_dict() | {"step": 4, "factors": [[0, 1, 1.0], [2, 3, 1.0]]}
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    config = {name: value for name, value in state.items() if name not in tensors}
    folder = path / "collapse_regularizer"
    write_folder(folder, config, tensors, kind="collapse")
    return as_version_1(folder)


def use_state(path: Path) -> None:
    from fastdean.collapse.trainer import _read_state

    regularizer = a_regularizer()
    _read_state(regularizer, path)
    config, tensors = read_folder(path / "collapse_regularizer", kind="collapse")
    assert regularizer.step == config["step"]
    assert torch.equal(regularizer.state.sums, tensors["sums"])


def a_training() -> _Training:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    course = Course(4, 3, 0.1, 2, 1, 0.0, 0)
    return _Training(model, None, None, course, 0.0)


def make_checkpoint(path: Path) -> Path:
    training = a_training()
    training.model(torch.ones(1, 3)).sum().backward()
    training._optimizer.step()
    history = [{"step": 1, "loss": 1.0, "base": 1.0, "collapse": None, "learning_rate": 0.1}]
    Checkpoints(path, {"seed": 0}).save(1, training._state(), history)
    return as_version_1(path / "checkpoint-000001")


def use_checkpoint(path: Path) -> None:
    training = a_training()
    model = training.model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    try:
        found = Checkpoints(path, {"seed": 0}).restore(training._restore, resume=True)
    except (ValueError, RuntimeError):
        assert all(torch.equal(value, before[n]) for n, value in model.state_dict().items())
        raise
    _, tensors = read_folder(path / "checkpoint-000001", kind="training")
    assert found.step == len(found.history)
    for name, value in model.state_dict().items():
        assert any(torch.equal(value, stored) for stored in tensors.values()), name


def make_json(content: Any, name: str = "file.json") -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        (path / name).parent.mkdir(parents=True)
        (path / name).write_text(json.dumps(content), "utf-8")
        return path / name

    return make


def use_results(path: Path) -> None:
    results = read_results(path / "file.json")
    assert results == json.loads((path / "file.json").read_bytes().decode("utf-8-sig"))
    page = render_report(results)
    assert page.startswith("<!DOCTYPE html>")


def use_run_file(path: Path) -> None:
    job = {"model": "m", "seed": 0}
    folder = RunFolder(path, job, inputs={"model": "abc"})
    try:
        folder.check()
    except ValueError as error:
        assert "holds this run" in str(error) or "another" in str(error), error
    assert folder.resumes in (True, False)


def use_step(kind: Any) -> Callable[[Path], None]:
    def use(path: Path) -> None:
        anew = {"taken": "anew"}
        figures = RunFolder(path, {}).figures("taken", lambda: anew, kind)
        stored = (path / "steps" / "taken.json").read_bytes().decode("utf-8-sig")
        # Only figures of an older format are taken again.
        assert figures == json.loads(stored)["figures"] or (
            figures is anew and json.loads(stored)["format"] == 1
        )

    return use


def use_classes(path: Path) -> None:
    stored = read_json(path / "file.json")
    try:
        classes = CollapseClasses.from_dict(stored)
    except ValueError as error:
        raise ValueError(f"{str(path)!r}: {error}") from None
    assert json.loads(json.dumps(classes.to_dict())) == stored
    classes.report()


def use_words(name: str) -> Callable[[Path], None]:
    def use(path: Path) -> None:
        groups = read_word_groups(path / name)
        assert all(word for words in groups.values() for word in words)

    return use


def make_words(path: Path) -> Path:
    path.mkdir()
    (path / "words.txt").write_text("she\nher\nwoman\n", "utf-8")
    return path / "words.txt"


def make_shards(path: Path) -> Path:
    path.mkdir()
    weight_map = {}
    for number, name in enumerate(("a.weight", "b.weight")):
        save_file({name: torch.ones(2, 3)}, path / f"model-{number}.safetensors")
        weight_map[name] = f"model-{number}.safetensors"
    index = path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 48}, "weight_map": weight_map}))
    return index


def use_shards(path: Path) -> None:
    for tensor in stored_tensors(path).values():
        assert tensor.shape and tensor.offset > 8 and (path / tensor.file_name).is_file()


COLLAPSE = {
    "shift": "next",
    "features": "base",
    "examples": 4,
    "held-out examples": 1,
    "tokens of a class": 10,
    "classes seen": 3,
    "metrics": {
        name: {"value": value, "definition": "d", "note": ""}
        for name, value in (("unc3_std", 0.5), ("nc3_mean", None), ("nc1", "inf"))
    },
    "alignments": [0.1, None, 0.3],
    "tokens": [4, 0, 6],
    "groups": {"g": {"words": 2, "unc3_std": 0.1, "nc3_mean": 0.2, "nc1_k1": None}},
}
BIAS = {
    "bec_pro": {
        "name": "bec_pro", "value": 0.5, "unit": "nats", "neutral": 0.0, "verdict": "above neutral",
        "low": 0.1, "high": 0.9, "n": 6, "confidence": 0.95,
        "by_category": {"g": {"value": 0.5, "low": None, "high": None, "n": 1, "verdict": "v"}},
        "figures": {}, "notes": ["a note"],
        "made_of": {
            "values": [0.1, 0.9], "weights": None, "whole": None, "resamples": 3,
            "replicates": [0.1, 0.5, 0.9],
        },
    }
}  # fmt: skip
RUN = {
    "job": {"model": "m", "seed": 0},
    "inputs": {"model": "abc", "text": None},
    "finished": False,
    "versions": {"torch": "2"},
}
STEP = "steps/taken.json"
WORDS = {"female": ["she", "her"], "male": ["he"]}
CLASSES = {
    "pieces": [[5], [6, 7]],
    "words": ["she", " her"],
    "groups": ["g", "g"],
    "left_out": [["a", "g", "because"]],
}
CASES = {
    "mask": Case(make_mask, use_mask, RESERVED),
    "scores": Case(make_scores, use_scores, RESERVED),
    "statistics": Case(make_state, use_state, RESERVED),
    "checkpoint": Case(make_checkpoint, use_checkpoint, RESERVED),
    "results": Case(make_json(make_results(layers=2)), use_results),
    "results of a training": Case(make_json(DEBIASED), use_results),
    "run": Case(make_json(RUN, RUN_FILE), use_run_file),
    "step, collapse": Case(
        make_json({"format": 3, "step": "taken", "figures": COLLAPSE}, STEP),
        use_step(COLLAPSE_FIGURES),
    ),
    "step, bias": Case(
        make_json({"format": 3, "step": "taken", "figures": BIAS}, STEP), use_step(BIAS_FIGURES)
    ),
    "classes": Case(make_json(CLASSES), use_classes),
    "words": Case(make_json(WORDS, "words.json"), use_words("words.json")),
    "index": Case(make_shards, use_shards),
}
BYTES = {
    "words.txt": Case(make_words, use_words("words.txt")),
    "mask's tensors": Case(lambda p: make_mask(p).parent / "mask.safetensors", use_mask),
    "scores' tensors": Case(lambda p: make_scores(p).parent / "scores.safetensors", use_scores),
    "statistics' tensors": Case(lambda p: make_state(p).parent / "collapse.safetensors", use_state),
    "checkpoint's tensors": Case(
        lambda p: make_checkpoint(p).parent / "training.safetensors", use_checkpoint
    ),
    "header": Case(lambda p: make_shards(p).parent / "model-0.safetensors", use_shards),
}


def used(case: Case, path: Path) -> str | None:
    """What the reader said against the file, after checking how it said it."""
    begin = time.process_time()
    try:
        case.use(path)
        said = None
    except (ValueError, RuntimeError) as error:
        said = str(error)
        assert not isinstance(error, RecursionError)
        assert len(said.splitlines()) == 1, said
        assert path.name in said, said
        assert len(said) < 2000, said
    assert time.process_time() - begin < 1.0
    return said


@pytest.mark.parametrize("name", CASES)
def test_mutated_json_is_read_as_it_is_or_refused_in_one_line(name, tmp_path):
    case, draw = CASES[name], random.Random(name)
    file = case.make(tmp_path / "kept")
    content = json.loads(file.read_text("utf-8"))
    assert used(case, tmp_path / "kept") is None
    refused = 0
    for _ in range(MUTATIONS):
        file.write_bytes(mutated_json(content, draw, case.keep))
        refused += used(case, tmp_path / "kept") is not None
    assert refused > MUTATIONS / 4


@pytest.mark.parametrize("name", BYTES)
def test_mutated_bytes_are_read_as_they_are_or_refused_in_one_line(name, tmp_path):
    case, draw = BYTES[name], random.Random(name)
    file = case.make(tmp_path / "kept")
    raw = file.read_bytes()
    assert used(case, tmp_path / "kept") is None
    refused = 0
    for _ in range(MUTATIONS):
        file.write_bytes(mutated_bytes(raw, draw))
        refused += used(case, tmp_path / "kept") is not None
    assert refused


@pytest.mark.parametrize("name", ["results", "run", "words", "index"])
def test_what_is_no_file_is_refused_in_one_line(name, tmp_path, monkeypatch):
    case = CASES[name]
    file = case.make(tmp_path / "kept")
    monkeypatch.setattr(Path, "read_bytes", _not_allowed)
    assert "Permission denied" in used(case, tmp_path / "kept")
    monkeypatch.undo()
    file.unlink()
    file.mkdir()
    # Without its index a folder of shards is one of files.
    assert (used(case, tmp_path / "kept") is None) == (name == "index")


def _not_allowed(self):
    raise PermissionError(13, "Permission denied", str(self))


def test_a_sound_file_loads_after_all_of_this(tmp_path):
    file = make_mask(tmp_path / "kept")
    assert load_file(file.parent / "mask.safetensors").keys()
