"""The steps of the study, each once: score, couple, answer, judge, price.

study.json           what is asked for, with digests of the rows
questions.jsonl      SALAD's questions and the benign prompts, each with its set
scored/SEED/         a run of `fastdean run` for each seed
masks/SEED-EDIT/     the masks made of its scores
answers/             of `fastdean answer`: the model as it came and under every mask
verdicts/JUDGE/      of `fastdean judge`, by the judge's name
price/               perplexity and tasks, a file for each model
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch

from experiments.reproduce_spin import kept
from experiments.reproduce_spin.paper import (
    ANSWER_TEMPLATE,
    ASKED,
    COUPLED,
    EDITS,
    RANDOM,
    SCORED,
    SOURCES,
    TARGET_MODULES,
    TEMPLATE,
)
from fastdean.coupling import Scores, couple
from fastdean.data.sources import load_rows, load_table, numbered_rows
from fastdean.evaluation import perplexity_of_text
from fastdean.evaluation.ability import task_manager, task_scores
from fastdean.evaluation.answers.records import KEY, ORIGINAL, RECORD
from fastdean.evaluation.answers.server import without_port
from fastdean.evaluation.over_refusal import benign_rows
from fastdean.files.declared import Anything, Maps, read_json
from fastdean.files.hub import cached_commit
from fastdean.files.lines import Lines
from fastdean.files.provenance import versions
from fastdean.files.storage import is_temporary, write_json_atomic, write_text_atomic
from fastdean.jobs import Job
from fastdean.jobs import run as run_job
from fastdean.jobs.answers import answering, judging
from fastdean.jobs.answers.job import AnswerJob, JudgeJob
from fastdean.jobs.answers.judging import asked_judge
from fastdean.jobs.folder import ANSWERS_FILE, RESULTS_FILE, check_place, require_outside
from fastdean.jobs.session import plain
from fastdean.masks import NeuronMask
from fastdean.models.identity import json_digest, model_files_digest
from fastdean.models.loading import load_model
from fastdean.wording.alike import told_together
from fastdean.wording.mendable import StateError
from fastdean.wording.printable import error_line

_STUDY_FILE, _QUESTIONS_FILE = "study.json", "questions.jsonl"


@dataclass(frozen=True)
class Study:
    """What is asked for.

    Attributes:
        sources: name of `paper.SOURCES` -> SRC.
        questions: at most so many of each set; None: all.
        judges: see `judging.asked_judge`.
        tasks: of lm-eval; maybe none.
        window: tokens, of the perplexity; None: see `perplexity_of_text`.
        max_length, skip_bad_rows, min_k: of the scored rows and the masks, see `jobs.Job`; bad
            rows are also questions that leave no room for an answer.
    """

    model: str
    out: Path
    sources: Mapping[str, str]
    seeds: int
    examples: int
    ratio: float
    questions: int | None
    max_new_tokens: int
    judges: tuple[str, ...]
    tasks: tuple[str, ...]
    window: int | None
    dtype: str
    device: str | None
    max_length: int | None = None
    skip_bad_rows: bool = False
    min_k: int = 0

    @property
    def on(self) -> dict[str, Any]:
        """What every job on the model is told."""
        return {"model": self.model, "dtype": self.dtype, "device": self.device}

    def states(self) -> list[tuple[str, int]]:
        """Every edit of every seed."""
        return [(edit, seed) for seed in range(self.seeds) for edit in EDITS]

    def mask(self, edit: str, seed: int) -> Path:
        if edit == RANDOM:
            # Drawn while the model is in memory: scores hold too few entries to draw from.
            return self.out / "scored" / str(seed) / "controls" / RANDOM
        return self.out / "masks" / state(edit, seed)


def state(edit: str, seed: int) -> str:
    """What the answers of a masked model are called."""
    return f"{edit}-{seed}"


def read_sources(study: Study) -> dict[str, list[Any]]:
    """The rows of every source, before anything is loaded.

    Raises:
        ValueError: sources that cannot be read, all of them in one line.
    """
    found, missing = {}, {}
    for name in SOURCES:
        try:
            found[name] = _rows(study, name)
        except (ValueError, OSError) as error:
            missing[name] = error_line(error)
    if missing:
        raise ValueError(
            f"sources must be readable, got {len(missing)} that are not: "
            f"{told_together(missing)}; pass each as --source NAME=FILE"
        )
    return found


def open_study(study: Study, rows: Mapping[str, Sequence[Any]]) -> None:
    """Make the folder this study's, and write its questions.

    Raises:
        ValueError: it holds another study, or an option is out of range.
    """
    scoring_job(study, 0)
    check_place(study.out, "out")
    if "::" in str(study.out):
        raise ValueError(
            f"out must be a folder without '::' in its path, got {str(study.out)!r}: what stands "
            "in it is read as a SRC, where that begins an option; choose another"
        )
    require_outside(study.out, study.model)
    file, asked = study.out / _STUDY_FILE, study.out / _QUESTIONS_FILE
    # Judges and tasks may be added to a study that has been done.
    left_out = ("out", "sources", "judges", "tasks")
    now = {name: value for name, value in vars(study).items() if name not in left_out}
    now |= {f"source {name}": source for name, source in study.sources.items()}
    now |= {f"rows of {name}": json_digest(found) for name, found in rows.items()}
    now["files of the model"] = model_files_digest(study.model)
    now["revision of the model"] = cached_commit(study.model)
    now["fastdean"] = versions()["fastdean"]
    told = f"out must be a new folder or this study's, got {str(study.out)!r}, which"
    study.out.mkdir(parents=True, exist_ok=True)
    if file.exists() and any((study.out / "scored").glob("*")):
        before = read_json(file, Maps(Anything()), advice="choose another --out")
        differ = [f"{n} {before.get(n)} (now {now[n]})" for n in now if before.get(n) != now[n]]
        if differ:
            raise ValueError(f"{told} began with {', '.join(differ)}; pass another --out")
    elif any(not is_temporary(part.name) for part in study.out.iterdir()) and not file.exists():
        raise ValueError(f"{told} holds other files; pass another --out")
    else:
        write_json_atomic(file, now)
        lines = (json.dumps(row, ensure_ascii=False) for row in questions(rows))
        write_text_atomic(asked, "".join(f"{line}\n" for line in lines))


def revision(study: Study) -> str | None:
    """The commit of the hub's that the study's model is of; None of a local one."""
    return read_json(study.out / _STUDY_FILE, Maps(Anything()))["revision of the model"]


def require_judges(study: Study) -> None:
    """Raise ValueError if a judge that has still to work has no model to load."""
    asked = [asked_judge(each) for each in study.judges]
    judging.require_judges(
        [each for each in asked if not kept.is_finished(verdicts_folder(study, each.name))]
    )


def questions(rows: Mapping[str, Sequence[Any]]) -> list[dict[str, str]]:
    """All that the model is asked, in one list; a question's id is its place, from 1."""
    return [{"prompt": text, "set": name} for name in ASKED for text in rows[name]]


def do(study: Study, rows: Mapping[str, Sequence[Any]], progress: bool) -> list[str]:
    """Every step that an earlier call has not done.

    Returns:
        A sentence on each control that could not be made.
    """
    notes = []
    # Scored seeds, answers, each judge, and the price.
    total = study.seeds + 1 + len(study.judges) + 1
    parts = (f"part {number} of {total}" for number in count(1))
    for seed in range(study.seeds):
        folder = study.out / "scored" / str(seed)
        _once(run_job, scoring_job(study, seed), folder, progress, next(parts))
        notes += _couple(study, seed)
    _answer(study, progress, next(parts))
    wrong = {}
    for judge, part in zip(study.judges, parts, strict=False):
        try:
            _judge(study, judge, progress, part)
        except (ValueError, RuntimeError, OSError) as error:
            # One that cannot be loaded leaves the others and the price to be done.
            wrong[asked_judge(judge).name] = error
    _price(study, rows["text"], progress, f"part {total} of {total}")
    if wrong:
        told = "; ".join(f"{name} ({error_line(error)})" for name, error in wrong.items())
        raise StateError(
            f"judges must all judge, got {len(wrong)} that did not: {told}; the rest is done and "
            "kept: mend them, or leave them out, and call again"
        )
    return notes


def masks(study: Study) -> dict[str, NeuronMask]:
    """State -> its mask, of the masks that could be made."""
    return {
        state(*each): NeuronMask.from_pretrained(str(study.mask(*each)))
        for each in study.states()
        if study.mask(*each).is_dir()
    }


def left_out(study: Study, rows: Mapping[str, Sequence[Any]]) -> tuple[set[int], list[str]]:
    """The questions that were answered, by their ids, and a sentence on each set of rows left out.

    A study that leaves out none has answers to all.
    """
    asked = list(enumerate(questions(rows), start=1))
    if not study.skip_bad_rows:
        return {number for number, _ in asked}, []
    told = []
    for seed in range(study.seeds):
        file = study.out / "scored" / str(seed) / RESULTS_FILE
        for warning in read_json(file, Maps(Anything()))["warnings"]:
            if warning.startswith(SCORED) and " left out: " in warning:
                told.append(f"Seed {seed}, {warning}.")
    records = Lines(study.out / "answers" / ANSWERS_FILE, RECORD, KEY).read()
    answered = {record["id"] for record in records}
    for name in ASKED:
        own = {number for number, row in asked if row["set"] == name}
        if gone := len(own - answered):
            told.append(f"{name}: {gone} of {len(own)} questions are left out, too long to answer.")
    return answered, told


def price_file(study: Study, name: str, what: str) -> Path:
    return study.out / "price" / f"{name}-{what}.json"


def _rows(study: Study, name: str) -> list[Any]:
    """Of what is asked the texts, of the running text its parts, of what is scored the rows."""
    source, category = study.sources[name], SOURCES[name].category
    if name in SCORED:
        return load_rows(source, skip_bad_rows=study.skip_bad_rows)
    if name == "text":
        if source.endswith(".txt"):
            return [Path(source).expanduser().read_text("utf-8")]
        return _column(load_table(source), "text")
    if name == "benign":
        texts = [row["prompt"] for row in benign_rows(source)[0]]
    elif source == SOURCES[name].usual:
        taken = [row for row in load_table(source) if row.get("2-category") == category]
        texts = _column(taken, "question")
    else:
        skipped: dict[int, str] | None = {} if study.skip_bad_rows else None
        texts = [row["prompt"] for _, row in numbered_rows(source, skipped, prompts=True)]
    return texts[: study.questions]


def _column(rows: Sequence[Mapping[str, Any]], name: str) -> list[str]:
    found = [row[name] for row in rows if isinstance(row.get(name), str)]
    if not found:
        raise ValueError(f"rows must have text in the column {name!r}, got none")
    return found


def scoring_job(study: Study, seed: int) -> Job:
    return Job(
        **study.on,
        **{name: study.sources[name] for name in SCORED},
        examples=study.examples,
        seed=seed,
        ratio=study.ratio,
        min_k=study.min_k,
        max_length=study.max_length,
        skip_bad_rows=study.skip_bad_rows,
        target_modules=TARGET_MODULES,
        template=TEMPLATE,
        # What the table has is measured by the steps that follow.
        eval_examples=0,
    )


def _couple(study: Study, seed: int) -> list[str]:
    """Every mask that can be made of the scores alone, and why others cannot."""
    missing = [name for name in EDITS if not study.mask(name, seed).is_dir()]
    folder = study.out / "scored" / str(seed) / "scores"
    scores = {name: Scores.from_pretrained(folder / name) for name in SCORED if missing}
    notes = []
    for name in missing:
        edit = EDITS[name]
        try:
            mask = couple(
                *(scores[each] for each in edit.sets),
                general=scores["general"] if edit.spares else None,
                ratio=study.ratio,
                rule=edit.rule,
                min_k=study.min_k,
                seed=seed,
            )
        except ValueError as error:
            if name == COUPLED:
                raise
            notes.append(f"{edit.about}, seed {seed}, is left out: {error}.")
        else:
            mask.save_pretrained(study.mask(name, seed))
    return notes


def _answer(study: Study, progress: bool, part: str) -> None:
    made = masks(study)
    places = {state(*each): study.mask(*each) for each in study.states()}
    job = AnswerJob(
        **study.on,
        prompts=str(study.out / _QUESTIONS_FILE),
        # A mask without weights changes no answer.
        mask=tuple(f"{name}={places[name]}" for name, mask in made.items() if len(mask)),
        template=ANSWER_TEMPLATE,
        max_new_tokens=study.max_new_tokens,
        skip_bad_rows=study.skip_bad_rows,
    )
    _once(answering.run, job, study.out / "answers", progress, part)


def verdicts_folder(study: Study, judge: str) -> Path:
    """Where the verdicts of a judge are; its name may hold anything, and is no path."""
    name = quote(judge, safe=" ")
    return study.out / "verdicts" / (name if name.strip(".") else name.replace(".", "%2E"))


def _judge(study: Study, judge: str, progress: bool, part: str) -> None:
    asked = asked_judge(judge)
    folder = verdicts_folder(study, asked.name)
    kept.require_judge(folder, asked, without_port(judge))
    job = JudgeJob(answers=str(study.out / "answers"), judge=(judge,), device=study.device)
    _once(judging.run, job, folder, progress, part)


def _price(study: Study, texts: Sequence[str], progress: bool, part: str) -> None:
    """Perplexity and tasks of the model as it came and under every mask, on one load."""
    edits: dict[str, NeuronMask | None] = {ORIGINAL: None}
    edits |= {name: mask for name, mask in masks(study).items() if len(mask)}
    wanted = [(name, what) for name in edits for what in ("perplexity", *study.tasks)]
    left = [each for each in wanted if not price_file(study, *each).exists()]
    if not left:
        return
    (study.out / "price").mkdir(exist_ok=True)
    manager = task_manager(study.tasks) if study.tasks else None
    at = {"dtype": study.dtype, "device": study.device, "progress": progress}
    print(f"{part}: price", flush=True)
    model, tokenizer = load_model(study.model, **at)
    for number, (name, what) in enumerate(left, start=1):
        print(f"{number} of {len(left)}: {what}, {name}", flush=True)
        mask = edits[name]
        with nullcontext() if mask is None else mask.applied(model):
            if what == "perplexity":
                options = {"window": study.window, "progress": progress}
                text = perplexity_of_text(model, tokenizer, texts, **options)
                sums, tokens = text.nll_sums.tolist(), text.token_counts.tolist()
                found = [{"name": what, "unit": "", "values": sums, "tokens": tokens}]
            else:
                scored = task_scores(model, tokenizer, [what], manager=manager, progress=progress)
                found = [
                    {"name": e.name, "unit": e.unit, "values": e.interval.values.tolist()}
                    for e in scored
                ]
        # A broken model has no finite figure, and JSON no other.
        write_json_atomic(price_file(study, name, what), plain(found))


def _once(run: Callable[..., Any], job: Any, folder: Path, progress: bool, part: str) -> None:
    """Do the job, or go on with it, unless it is finished; its model is gone afterwards."""
    if kept.is_finished(folder):
        return
    print(f"{part}: {folder.parent.name}/{folder.name}", flush=True)
    folder.parent.mkdir(exist_ok=True)
    run(job, folder, command="make reproduce-spin", progress=progress)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
