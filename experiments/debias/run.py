"""The second paper's table for one model and method, with and without its term.

Trained from the same weights with the paper's settings (`settings.py`), once for each seed: without
the term, with it on the gender words, and with it on two kinds of control words. Each training is
measured by the columns of the paper, and so is the model before any. A measure that was taken is
not taken again, and a training that was cut off goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.harness import command, gate, store
from benchmarks.harness.session import Session
from benchmarks.harness.store import say
from experiments.debias import measures, outcome
from experiments.debias.figures import held_out_figures, metrics_of
from experiments.debias.measures import TRAINING
from experiments.debias.settings import MEASURES, PUBLISHED, SEEDS, SHIFT, WARMUP
from experiments.debias.subject import ARMS, Arm, Subject, load_subject, split_rows, texts_of
from fastdean.debias import augment
from fastdean.debias.objectives import require_method
from fastdean.evaluation import glue
from fastdean.files.atomic import write_text_atomic
from fastdean.files.hub import ask_the_cache_where_unreachable, cached_commit
from fastdean.files.provenance import public_name, public_source
from fastdean.files.storage import held, remove_folder
from fastdean.models.identity import json_digest, model_files_digest
from fastdean.models.loading import load_tokenizer
from fastdean.models.model_state import max_tokens
from fastdean.wording.verdicts import FEWEST

OP = "nc3"
# Collapse and fluency, on rows that are held out of the training's own.
_HELD_OUT = "held_out"
_TASKS = [f"glue:{task}" for task in glue.TASKS]
_MOST_HELD_OUT = 512


def add_options(parser: argparse.ArgumentParser) -> None:
    command.model_options(parser)
    add, number = parser.add_argument, {"type": command.positive, "metavar": "N"}
    said = "instead a small masked model, trained first, from scratch: to try the command out"
    add("--masked", action="store_true", help=said)
    add("--pretraining-steps", **number, default=400, help="of --masked")
    add("--method", choices=PUBLISHED, required=True)
    add("--seeds", **number, default=SEEDS.value, help="trainings of each arm")
    named = {"nargs": "+", "action": "extend", "default": []}
    said = f"in place of a default source: {TRAINING}, snli, {', '.join(MEASURES)}"
    add("--source", **named, metavar="NAME=SRC", help=said)
    said = "measures or tasks of GLUE (glue:mrpc) to leave out"
    add("--without", **named, metavar="NAME", help=said)
    said = "the first so many rows of each source: to try the command out"
    add("--rows", **number, help=said)
    add("--steps", **number, help="optimizer steps in place of the paper's epochs")
    add("--learning-rate", type=command.above_zero, metavar="X", help="in place of the paper's")
    said = "optimizer steps between checkpoints of a training"
    add("--save-every", **number, default=500, help=said)


def tests(options: argparse.Namespace, on_gpu: bool) -> Sequence[str]:
    collapse = ("collapse_regularizer", "collapse_measuring", "collapse_controls")
    columns = [f"bias_{name}" for name in ("stereoset", "crows_pairs", "winobias", "seat")]
    return gate.test_files(*collapse, *columns, "bias_bec_pro", "bias_nli", "glue", "fine_tune")


def require(options: argparse.Namespace) -> None:
    """Asked before any test runs.

    Raises:
        ValueError: a name is unknown, a source cannot be read, or there is no such model.
    """
    names = [*MEASURES, TRAINING, "snli"]
    for entry in options.source:
        name, _, source = entry.partition("=")
        if name not in names or not source:
            raise ValueError(
                f"source must be NAME=SRC of one of {', '.join(names)}, got {entry!r}; "
                "see docs/guide/second-paper.md"
            )
    names = [*MEASURES, *_TASKS]
    for name in options.without:
        if name not in names:
            raise ValueError(
                f"without must be one of {', '.join(names)}, got {name!r}; leave out one of these"
            )
    ask_the_cache_where_unreachable()
    if options.model is not None and not options.masked:
        load_tokenizer(options.model)
    _read(options)


def _read(options: argparse.Namespace) -> tuple[list[str], dict[str, Any], dict[str, Any]]:
    """The names of the measures, the source of each name that is read, and what the sources hold.

    Raises:
        ValueError: see `measures.read_all`.
    """
    names = _measures(options.without, "causal" if options.method == "causal" else "masked")
    given: dict[str, Any] = {}
    for name, _, source in (entry.partition("=") for entry in options.source):
        given[name] = [*given.get(name, []), source] if name == TRAINING else source
    sources = measures.sources_of(names[1:], options.method, given)
    return names, sources, measures.read_all(sources, options.method, options.rows)


def run(session: Session) -> int:
    """Append a record for each arm, seed and measure; write the table as it stands."""
    study = _Study(session)
    out = session.options.out
    out.mkdir(parents=True, exist_ok=True)
    # Two at once would train in each other's folders.
    with held(out, "out"):
        return _run(session, study)


def _run(session: Session, study: _Study) -> int:
    arms = _arms(session.options.seeds, study.settings["strength"])
    for line in study.estimate():
        say(line)
    left = {arm: due for arm in arms if (due := study.due(arm))}
    for arm in [arm for arm in arms if arm not in left]:
        study.forget(arm)
    for arm in session.due(list(left), "trainings"):
        study.append(arm, left[arm])
    study.write()
    return 0


def _measures(without: Sequence[str], kind: str) -> list[str]:
    """The names of the measures, of GLUE its tasks, in the order of the columns."""
    chosen = [name for name, each in MEASURES.items() if kind in each.kinds]
    names = [part for name in chosen for part in (_TASKS if name == "glue" else [name])]
    left_out = {*without, *(_TASKS if "glue" in without else [])}
    return [_HELD_OUT, *(name for name in names if name not in left_out)]


def _arms(seeds: int, strength: float) -> list[Arm]:
    """Seed after seed, so that a run that is cut off has whole seeds."""
    return [
        Arm(name, strength if name in ARMS and name != outcome.NONE else 0.0, seed)
        for seed in range(seeds)
        for name in (outcome.BASE, *ARMS)
    ]


class _Study:
    """One model and method; nothing is loaded but rows before the first training is due.

    Attributes:
        settings: all that decides a training, without folders of this machine.
    """

    def __init__(self, session: Session) -> None:
        self._session, self._options = session, session.options
        self._is_given = any(e.partition("=")[0] == TRAINING for e in self._options.source)
        self._names, sources, self._data = _read(self._options)
        # The sources of each name, and a digest of what they hold.
        self._read = {
            name: [*map(public_source, [source] if isinstance(source, str) else source)]
            + [json_digest(list(_leaves(self._data[name])))]
            for name, source in sources.items()
        }
        rows = self._data[TRAINING]
        self._trained, self._held_out = split_rows(rows, most=_MOST_HELD_OUT)
        self.settings = self._settings()

    def estimate(self) -> list[str]:
        """What is to be done, counted; how long it takes is not known before it is done."""
        settings, seeds = self.settings, self._options.seeds
        is_pairs, per_step = settings["method"] == "mabel", settings["batch_size"]
        examples = len(self._trained if is_pairs else augment(self._trained))
        per_epoch = math.ceil(examples / (per_step * settings["accumulation"]))
        steps = settings.get("steps") or settings["epochs"] * per_epoch
        trainings = len(ARMS) * seeds
        heads = {name: measures.head_steps(name, self._data) for name in self._names}
        total = sum(heads.values())
        return [
            f"{trainings} trainings ({', '.join(ARMS)}; {seeds} seeds) of {steps} optimizer steps "
            f"on {len(self._trained)} rows and their copies: {trainings * steps} steps",
            f"measured after each, and once before: {', '.join(self._names)}",
            f"heads of {', '.join(name for name in heads if heads[name]) or 'none'}: {total} steps "
            f"each time, {(trainings + seeds) * total} in all",
            "time: not known; what is done is kept, and --resume goes on",
            f"a verdict takes {FEWEST} seeds at least, and more in a large table",
        ]

    def due(self, arm: Arm) -> list[str]:
        """The measures of an arm that were not taken yet.

        Before training nothing but the heads depends on the seed.
        """
        once = arm.name == outcome.BASE and arm.seed != 0
        return [
            name
            for name in self._names
            if not (once and not measures.head_steps(name, self._data))
            and not self._session.earlier(OP, {arm.name}, self._setup(arm, name))
        ]

    def append(self, arm: Arm, due: Sequence[str]) -> None:
        """Train, and take what is due; the checkpoint goes when all of it is recorded."""
        subject, settings = self._subject, self.settings
        say(f"{arm.name}, seed {arm.seed}")
        classes = None
        if arm.name == outcome.BASE:
            subject.restart()
        else:
            names = ("learning_rate", "batch_size", "accumulation", "max_length", "warmup")
            length = "steps" if "steps" in settings else "epochs"
            course = {name: settings[name] for name in (length, *names)}
            limit = max_tokens(subject.model) or course["max_length"]
            course["max_length"] = min(course["max_length"], limit)
            kept = {"out": self._folder(arm), "save_every": self._options.save_every}
            classes = subject.train(arm, settings["method"], **course, **kept)
        told = {
            "model": subject.name,
            "classes": 0 if classes is None else len(classes),
            "labelled": 0 if classes is None else subject.labelled(classes),
        }
        for name in self._session.due(due, "measures"):
            say(f"  {name}")
            setup = self._setup(arm, name) | told
            if name == _HELD_OUT:
                figures = held_out_figures(subject)
            else:
                model, tokenizer = subject.model, subject.tokenizer
                figures = measures.taken(name, self._data, model, tokenizer, arm.seed)
            parts = {"setup": setup, "metrics": metrics_of(figures)}
            self._session.append(OP, outcome.case(settings), arm.name, **parts)
            if name == due[-1]:
                self.forget(arm)

    def forget(self, arm: Arm) -> None:
        """Remove the checkpoint, three times the model in size, of a training that is recorded."""
        if self._folder(arm).exists():
            remove_folder(self._folder(arm))

    def write(self) -> None:
        """nc3.md and nc3.json beside the records, of what these settings have so far."""
        session, out = self._session, self._options.out
        rows = [
            row
            for row in store.read(out, OP)
            if row.setup.get("settings") == self.settings
            and store.stands_for(row, session.environment, session.gate)
        ]
        if rows:
            text = outcome.as_markdown(rows)
            write_text_atomic(out / f"{OP}.md", text + "\n")
            write_text_atomic(out / f"{OP}.json", outcome.as_json(rows) + "\n")
            print(text)

    @cached_property
    def _subject(self) -> Subject:
        options, heard = self._options, []
        if options.masked:
            leaves = _leaves([*self._data.values()])
            heard = [leaf for leaf in leaves if isinstance(leaf, str)]
        # Measured as text, whatever is trained on.
        held_out = [{"text": text} for text in texts_of(self._held_out)]
        subject = load_subject(options, self._trained, held_out, heard, SHIFT.value)
        require_method(subject.model, options.method)
        return subject

    def _settings(self) -> dict[str, Any]:
        options = self._options
        # Where neither is given, that of the installed wheel is loaded.
        file = options.gguf.name if options.gguf else "smollm2-135m-instruct"
        model = public_name(options.model or "") or file
        published = PUBLISHED[options.method].values()
        # Two models may have one name; of a hub id there are no files to tell them apart.
        place = options.gguf or options.model
        files = None if place is None or options.masked else model_files_digest(str(place))
        commit = None if options.masked else cached_commit(options.model or "")
        own = {name: getattr(options, name) for name in ("learning_rate", "steps", "rows")}
        own = {name: value for name, value in own.items() if value is not None}
        # Where the paper's text is known by its hub id.
        given = ["data"] if published["data"] and self._is_given else []
        return {
            "model": f"masked, {options.pretraining_steps} steps" if options.masked else model,
            **({} if files is None else {"files of the model": files}),
            **({} if commit is None else {"revision of the model": commit}),
            "method": options.method,
            **published,
            "warmup": WARMUP.value,
            "shift": SHIFT.value,
            "data": self._read[TRAINING],
            **own,
            "not the paper's": sorted([*own, *given]),
        }

    def _setup(self, arm: Arm, name: str) -> dict[str, Any]:
        """What tells a measure of a training from all others."""
        also = () if name == _HELD_OUT else measures.reads(name)
        return {
            "settings": self.settings,
            "strength": arm.strength,
            "seed": arm.seed,
            "measure": name,
            "read": {source: self._read[source] for source in also},
        }

    def _folder(self, arm: Arm) -> Path:
        return self._options.out / "training" / f"{self.settings['method']}-{arm.name}-{arm.seed}"


def _leaves(data: Any) -> Iterator[Any]:
    """Every text and number in rows of any form."""
    if isinstance(data, glue.Labelled):
        data = [data.texts, data.targets]
    if isinstance(data, Mapping):
        data = [*data.values()]
    if isinstance(data, list | tuple):
        for part in data:
            yield from _leaves(part)
    else:
        yield data
