"""The folder of a run: whose it is, whether it is finished, and what in it may be replaced.

    fastdean_run.json        the job, digests of what it reads, and whether it is finished
    sweep/<data sets>/       how far their scoring layer by layer came; gone when it ends
    scores/<data set>/       sparse scores, enough for any ratio up to the curve's last
    mask/                    the mask of the job's rule
    controls/<rule>/         the masks it is measured against
    steps/<step>.json        the figures of a finished step
    training/                the checkpoints of `debias`
    model/                   the debiased model, an ordinary Hugging Face folder
    answers.jsonl            of the job `answer`: a line for each answer
    verdicts.jsonl           of the job `judge`: a line for each verdict
    table.md                 its table
    items.json               of the job `eval`: the scores of its tasks by item
    results.json             every figure of the report
    report.html
    card.md                  its verdict and its tables in Markdown

A folder is in one of four states: free, held by this job unfinished (it is resumed), held by a
finished or another run (refused, or with `overwrite` replaced), or holding files that FastDEAN did
not write (refused).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastdean.debias.saving import is_saved_model
from fastdean.files.declared import (
    Anything,
    Exactly,
    Flag,
    Kind,
    Maps,
    Maybe,
    Record,
    Text,
    Whole,
    read_json,
    require,
)
from fastdean.files.provenance import versions
from fastdean.files.storage import (
    check_free,
    holds_only,
    is_empty,
    is_temporary,
    real_place,
    remove_folder,
    write_json_atomic,
)
from fastdean.models.ranks.distributed import Ranks
from fastdean.ops._dispatch import ENVIRONMENT_VARIABLE
from fastdean.wording.log import logger

RUN_FILE = "fastdean_run.json"
RESULTS_FILE = "results.json"
REPORT_FILE, CARD_FILE = "report.html", "card.md"
ITEMS_FILE = "items.json"
ANSWERS_FILE, VERDICTS_FILE, TABLE_FILE = "answers.jsonl", "verdicts.jsonl", "table.md"
# In place of a digest: it is taken while the job runs.
NOT_READ_YET = "not read yet"

_FOLDERS = ("sweep", "scores", "mask", "controls", "steps", "training", "model")
# Lines that are added one after the other: what is finished of an unfinished run.
_LINES = (ANSWERS_FILE, VERDICTS_FILE)
_FILES = (*_LINES, TABLE_FILE, ITEMS_FILE, RESULTS_FILE, REPORT_FILE, CARD_FILE, RUN_FILE)
# 2: intervals that are Student's or exact, with the values they were made of. 3: neural collapse of
# each word and group, and the level that a test can reach.
_STEP_FORMAT = 3
# Of an option's value in a message.
_LONGEST_VALUE = 120
# Options that nobody reads in bytes; on the command line they are typed in GB.
_IN_BYTES = ("memory_budget",)
# What a run file holds.
_RUN = Record(
    {
        "job": Maps(Anything()),
        "inputs": Maps(Maybe(Text(longest=1000))),
        "finished": Flag(),
        "versions": Maps(Text(longest=1000)),
    }
)


# Of a run file that does not say.
_USUAL = {ENVIRONMENT_VARIABLE: "unset", "ranks": "1"}


@dataclass
class RunFolder:
    """One job's view of a run folder.

    Attributes:
        path: the folder, which need not exist.
        job: what identifies the run, as plain JSON.
        overwrite: whether a finished or another run may be replaced.
        inputs: what the job reads, such as a data set, "model weights" or "words" -> its digest,
            None where it has none; as far as it is read so far.
        other_versions: a sentence on what is not as the resumed run began and may change its
            figures in rounding: versions of packages, FASTDEAN_IMPL, the number of ranks; none of a
            run that is not resumed.
        shows: the file of a finished run that a person looks at.
    """

    path: Path
    job: dict[str, Any]
    overwrite: bool = False
    inputs: dict[str, str | None] = field(default_factory=dict)
    other_versions: list[str] = field(default_factory=list)
    shows: str = REPORT_FILE
    _claimed: bool = False
    _created: bool = False

    def __post_init__(self) -> None:
        if ".." in self.path.parts:
            # `new/../other` is `other`, also while there is no `new`.
            self.path = real_place(self.path, "out")

    @property
    def mask(self) -> Path:
        return self.path / "mask"

    def scores(self, data_set: str) -> Path:
        return self.path / "scores" / data_set

    def sweep(self, data_sets: Sequence[str]) -> Path:
        return self.path / "sweep" / ",".join(data_sets)

    def swept(self) -> list[str]:
        """The data sets of a sweep that an earlier call of this job left unfinished."""
        left = self.path / "sweep"
        if not self.resumes or not left.is_dir():
            return []
        return next((folder.name.split(",") for folder in left.iterdir() if folder.is_dir()), [])

    def control(self, rule: str) -> Path:
        return self.path / "controls" / rule

    @property
    def training(self) -> Path:
        return self.path / "training"

    @property
    def model(self) -> Path:
        return self.path / "model"

    def figures(
        self, step: str, measure: Callable[[], dict[str, Any]], kind: Kind
    ) -> dict[str, Any]:
        """The figures of a step: those that an earlier call of the job kept, or `measure()`.

        Figures of an older format were computed by other rules: they are taken anew, so that no
        run compares the two.

        Args:
            measure: returns what JSON can hold.
            kind: what its figures look like.
        Raises:
            ValueError: the file of the step holds anything but its figures.
        """
        file = self.path / "steps" / f"{step}.json"
        kept = _kept_figures(file, step, kind) if file.exists() else None
        if kept is not None:
            return kept
        found = measure()
        self.claim()
        file.parent.mkdir(exist_ok=True)
        write_json_atomic(file, {"format": _STEP_FORMAT, "step": step, "figures": found})
        return found

    @property
    def resumes(self) -> bool:
        """Whether the folder holds this very job, unfinished."""
        state = self._state()
        return state is not None and not state["finished"] and self._is_ours(state)

    def is_finished(self) -> bool:
        """Whether the folder holds this very job, finished, as far as its input is read so far."""
        state = self._state()
        return state is not None and state["finished"] and self._is_ours(state)

    @property
    def work(self) -> str:
        """The job into this folder, as starts of it tell each other of it."""
        return f"run in {self.path.resolve()}"

    def check(self) -> None:
        """Raise ValueError unless the job may write here; nothing is changed."""
        check_place(self.path, "out")
        if not self.path.exists() or all(_is_leftover(part) for part in self.path.iterdir()):
            return
        state = self._state()
        if state is not None and self.resumes:
            self._note_versions(state)
            return
        found = f"out must be a new or empty folder, got {str(self.path)!r}, which holds"
        if state is None:
            raise ValueError(f"{found} other files; choose another")
        if not self.overwrite:
            raise ValueError(f"{found} {self._described(state)}")
        foreign = sorted(_foreign(self.path))
        if foreign:
            raise ValueError(
                f"{found} files beside a run that FastDEAN did not write: "
                f"{', '.join(foreign[:3])}; move them away to have the run replaced, or choose "
                "another folder"
            )

    def claim(self) -> None:
        """Make the folder this job's own, removing the run that it replaces."""
        if self.resumes:
            return
        self.check()
        self._claimed, self._created = True, not self.path.exists()
        if not self._created:
            _remove_run(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        self._mark(finished=False)

    def kept_input(self, name: str) -> str | None:
        """The digest that the run in the folder has of what it read; None where it has none."""
        state = self._state()
        return None if state is None else state["inputs"].get(name)

    def note(self, digests: Mapping[str, str | None]) -> None:
        """Write down what was not read when the folder was claimed."""
        self.inputs |= digests
        self._mark(finished=False)

    def finish(self) -> None:
        self._mark(finished=True)

    def release_if_empty(self) -> None:
        """After a failure: what this object claimed goes, if nothing was finished in it.

        A folder that was there before stays, empty, for any job to take.
        """
        parts = [self.path / name for name in _FOLDERS if (self.path / name).is_dir()]
        lines = [self.path / name for name in _LINES if (self.path / name).is_file()]
        begun = any(file.stat().st_size for file in lines) or any(any(p.iterdir()) for p in parts)
        if not self._claimed or begun:
            return
        with suppress(OSError):
            for file in (*lines, self.path / RUN_FILE):
                file.unlink(missing_ok=True)
            for part in parts:
                part.rmdir()
            if self._created:
                self.path.rmdir()

    def _is_ours(self, state: Mapping[str, Any]) -> bool:
        return state["job"] == self.job and not self._changed(state)

    def _changed(self, state: Mapping[str, Any]) -> list[str]:
        """What has been read and is not what it was, or was not recorded."""
        kept = state["inputs"]
        changed = [
            name
            for name, digest in self.inputs.items()
            if kept.get(name) not in (digest, NOT_READ_YET)
        ]
        # Another version may define a figure otherwise.
        own = state["versions"].get("fastdean") != versions().get("fastdean")
        return [*changed, *(["the version of fastdean"] if own else [])]

    def _note_versions(self, state: Mapping[str, Any]) -> None:
        """Say once which packages and settings are not what they were: they round otherwise."""
        kept, now = {**_USUAL, **state["versions"]}, _circumstances()
        moved = [
            f"{name} {kept.get(name, 'absent')} (now {now.get(name, 'absent')})"
            for name in sorted({*kept, *now})
            if kept.get(name) != now.get(name)
        ]
        if moved and not self.other_versions:
            self.other_versions.append(
                f"Steps of this run that were finished earlier were done with {', '.join(moved)}; "
                "their figures may differ in rounding."
            )
            logger.warning("%s", self.other_versions[0])

    def _described(self, state: Mapping[str, Any]) -> str:
        if state["job"] != self.job:
            return (
                f"another run, which differs in {', '.join(self._other_options(state))}; choose "
                "another folder or pass --overwrite"
            )
        if state["finished"]:
            return f"this run, finished; see its {self.shows}, or pass --overwrite to do it again"
        return (
            f"this run on other input, which differs in {', '.join(self._changed(state))}; choose "
            "another folder or pass --overwrite"
        )

    def _other_options(self, state: Mapping[str, Any]) -> list[str]:
        """Each option whose value is not what it was, with both, as in "seed=0 (now 1)"."""
        kept = state["job"]
        return [
            f"{name}={_shown(name, kept.get(name))} (now {_shown(name, self.job.get(name))})"
            for name in {**self.job, **kept}
            if (name in self.job, self.job.get(name)) != (name in kept, kept.get(name))
        ]

    def _state(self) -> dict[str, Any] | None:
        return run_state(self.path)

    def _mark(self, finished: bool) -> None:
        write_json_atomic(
            self.path / RUN_FILE,
            {
                "job": self.job,
                "inputs": self.inputs,
                "finished": finished,
                "versions": _circumstances(),
            },
        )


def run_state(folder: Path) -> dict[str, Any] | None:
    """What the run file in a folder says, None where there is none; ValueError for a damaged one.

    Its fields are "job", the options, "inputs", digests of what was read, "finished", "versions".
    """
    file = folder / RUN_FILE
    if not file.exists():
        return None
    return read_json(file, _RUN, advice="choose another folder, or delete this one")


def _shown(name: str, value: Any) -> str:
    """An option's value in a message."""
    if value is None:
        return "unset"
    if name in _IN_BYTES and isinstance(value, int | float):
        return f"{value / 1e9:.12g} GB"
    text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."


def _circumstances() -> dict[str, str]:
    """What a figure's last digits depend on besides the job and its inputs."""
    asked = os.environ.get(ENVIRONMENT_VARIABLE)
    return {
        **versions(),
        **_USUAL,
        **({ENVIRONMENT_VARIABLE: asked} if asked else {}),
        "ranks": str(Ranks.of_group().size),
    }


def require_outside(out: Path, model: str) -> None:
    """Raise ValueError if `out` is, or lies in, the folder of a local model, which is only read.

    Also if no model is named: "" would stand for the current folder.
    """
    if not model:
        raise ValueError("model must be a folder or a hub id, got ''; name the model")
    source, place = real_place(model, "model"), real_place(out, "out")
    if source.is_dir() and (place == source or source in place.parents):
        raise ValueError(
            f"out must be a folder outside of model, got {str(out)!r} for model {model!r}; "
            "choose another"
        )


def check_place(path: Path, name: str) -> None:
    """Raise ValueError unless a folder stands at `path` or could be made there."""
    real_place(path, name)
    place = path
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise ValueError(
            f"{name} must be a new or empty folder, got {str(path)!r}: {str(place)!r} is a file"
        )
    if not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(
            f"{name} must be a folder that can be written to, got {str(path)!r}: no permission in "
            f"{str(place)!r}"
        )


def require_free(
    out: Path, overwrite: bool, may_replace: Callable[[Path], bool], finished: str
) -> None:
    """Before the work, not after: raise ValueError unless a new folder may come to stand at `out`.

    Args:
        may_replace: whether `overwrite` may replace the folder that is there.
        finished: what such a folder holds, as in "a mask".
    """
    check_place(out, "out")
    if not overwrite and out.exists() and not is_empty(place := real_place(out, "out")):
        found = f"out must be a new or empty folder, got {str(out)!r}, which"
        if may_replace(place):
            raise ValueError(
                f"{found} holds {finished} already, finished; use that, choose another or pass "
                "--overwrite to make it again"
            )
        raise ValueError(f"{found} has files in it; choose another")
    check_free(out, overwrite=overwrite, may_replace=may_replace, name="out")


def _kept_figures(file: Path, step: str, kind: Kind) -> dict[str, Any] | None:
    """What `RunFolder.figures` wrote for a step; None of an older format.

    Raises:
        ValueError: the file holds anything else.
    """
    advice = "delete the file, and its figures are taken again"
    whole = Record({"format": Whole(1, _STEP_FORMAT), "step": Exactly(step), "figures": Anything()})
    kept = read_json(file, whole, advice=advice)
    if kept["format"] < _STEP_FORMAT:
        return None
    require(kept["figures"], kind, file, where="figures", advice=advice)
    return kept["figures"]


def _is_leftover(path: Path) -> bool:
    """Whether a write or a removal that a kill cut short left `path` at the top of a run folder."""
    return any(is_temporary(path.name, name) for name in (*_FILES, *_FOLDERS))


def _foreign(folder: Path) -> Iterator[str]:
    """What lies in a run folder and is no part of a run, relative to it.

    A link is none: what it leads to lies elsewhere, and whoever made it wants it there.
    """
    for entry in folder.iterdir():
        if _is_leftover(entry) or (entry.name in _FILES and not entry.is_dir()):
            continue
        if entry.name not in _FOLDERS or entry.is_symlink() or not entry.is_dir():
            yield entry.name
            continue
        for part in [entry] if entry.name in ("mask", "model") else entry.iterdir():
            if part.is_symlink() or not (is_temporary(part.name) or _is_part(part, entry.name)):
                yield part.relative_to(folder).as_posix()


def _is_part(path: Path, room: str) -> bool:
    """Whether FastDEAN wrote `path`, which lies in, or is, that folder of a run."""
    if room == "steps":
        return _is_step(path)
    if room == "model":
        return is_saved_model(path)
    kind = {"scores": "scores", "training": "training"}.get(room, "mask")
    return path.is_dir() and holds_only(path, kind)


def _is_step(path: Path) -> bool:
    """Whether `path` is a file that `RunFolder.figures` wrote under that name."""
    step = Record({"format": Whole(), "step": Exactly(path.stem), "figures": Anything()})
    try:
        read_json(path, step, advice="")
    except (OSError, ValueError):
        return False
    return path.suffix == ".json"


def _remove_run(folder: Path) -> None:
    """Delete the parts of a run; its run file last, so that half a run is not taken for none."""
    for name in _FOLDERS:
        if (folder / name).exists():
            remove_folder(folder / name)
    for leftover in [part for part in folder.iterdir() if _is_leftover(part)]:
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    for name in _FILES:
        (folder / name).unlink(missing_ok=True)
