"""The job `judge`: answers to verdicts, judge after judge, and what they come to."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fastdean.evaluation.answers.records import Answered, read_answers, variants_of
from fastdean.evaluation.answers.server import Server, checked_url, is_url, without_port
from fastdean.evaluation.judging.beside import answers_table
from fastdean.evaluation.judging.judges import (
    Verdicts,
    verdicts_of_classifier,
    verdicts_of_model,
    verdicts_of_phrases,
    verdicts_of_server,
)
from fastdean.evaluation.judging.phrases import PHRASES, phrases_version
from fastdean.evaluation.judging.tables import verdict_table
from fastdean.evaluation.judging.templates import (
    CAUSAL,
    JudgeTemplate,
    read_template,
    template_names,
)
from fastdean.evaluation.judging.verdicts import (
    KEY,
    RECORD,
    agreements,
    compared,
    record,
    summary,
)
from fastdean.files.lines import Lines
from fastdean.files.provenance import now, public_command, public_source, versions
from fastdean.files.storage import held, write_text_atomic
from fastdean.jobs.answers.job import JudgeJob, patience
from fastdean.jobs.costs import Costs
from fastdean.jobs.folder import (
    ANSWERS_FILE,
    NOT_READ_YET,
    RESULTS_FILE,
    TABLE_FILE,
    VERDICTS_FILE,
    RunFolder,
    run_state,
)
from fastdean.jobs.options import asked
from fastdean.jobs.published import published
from fastdean.jobs.session import plain, publish
from fastdean.models.identity import json_digest, model_identity
from fastdean.models.loading import load_classifier, load_model, load_tokenizer
from fastdean.models.ranks.distributed import Ranks
from fastdean.wording.log import logger
from fastdean.wording.mendable import StateError

_SERVED = "::model="
# Above this share what is left may be another kind of answers.
MUCH_UNPARSED = 0.05


@dataclass(frozen=True)
class AskedJudge:
    """A judge as it was asked for.

    template: None: the list of phrases.
    model: which judges, or its name on the server; None there: the only one that is served.
    url: of a server; None: the model is loaded.
    """

    template: JudgeTemplate | None
    model: str | None = None
    url: str | None = None

    @property
    def name(self) -> str:
        return PHRASES if self.template is None else self.template.name

    @property
    def digest(self) -> str:
        """Of what it is shown and how it is read."""
        if self.template is None:
            return json_digest([PHRASES, phrases_version()])
        return json_digest(_described(self.template))

    @property
    def model_input(self) -> str:
        return f"model of judge {self.name}"


def asked_judge(text: str) -> AskedJudge:
    """From NAME_OR_FILE or NAME_OR_FILE=MODEL; MODEL may be URL or URL::model=SERVED.

    Raises:
        ValueError: no such template, or an address of another form.
    """
    if text == PHRASES:
        return AskedJudge(None)
    name, equals, model = text.partition("=")
    if not equals or not (name in template_names() or name.endswith(".json")):
        # The path of a file may hold the sign.
        template = read_template(text)
        return AskedJudge(template, template.model)
    template = read_template(name)
    if not is_url(model):
        if not model:
            raise ValueError(f"judge must name a model after '=', got {text!r}; give it")
        return AskedJudge(template, model)
    if template.kind != CAUSAL:
        raise ValueError(
            f"judge must be one that writes its verdict to be asked on a server, got {text!r}, a "
            "classifier; have it loaded"
        )
    url, said, served = model.partition(_SERVED)
    return AskedJudge(template, served if said else None, checked_url(url))


def require_judges(judges: Sequence[AskedJudge], trust_remote_code: bool = False) -> None:
    """Raise ValueError if the model of a judge that is to be loaded is not there to load.

    Its tokenizer is read and no weight: what is missing is said before other judges, or a model
    that is yet to answer, have worked for hours. Servers are not asked; one may be started later.
    """
    for each in judges:
        if each.model is not None and each.url is None:
            with _naming(each):
                load_tokenizer(each.model, trust_remote_code=trust_remote_code)


def run(
    job: JudgeJob,
    out: str | Path,
    *,
    command: str = "",
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Have every judge judge every answer, and count.

    Returns:
        The content of results.json.
    Raises:
        ValueError, RuntimeError, OSError: as the steps; verdicts there are are kept and not asked
            for again.
    """
    Ranks.require_alone("fastdean judge")
    judges = [asked_judge(each) for each in job.judge]
    names = [each.name for each in judges]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"judge must have a name of its own, got {name!r} twice; copy its template to a "
                "file and name it otherwise there"
            )
    if job.key_from is not None and all(each.url is None for each in judges):
        raise ValueError(
            f"key_from must come with a judge on a server, got {job.key_from!r} and none; leave it "
            "out, or pass NAME=http://..."
        )
    if job.server_timeout is not None and all(each.url is None for each in judges):
        raise ValueError(
            f"server_timeout must come with a judge on a server, got {job.server_timeout:g} and "
            "none; leave it out, or pass NAME=http://..."
        )
    costs = Costs(total=len(judges) + 1, shown=progress)
    with costs.step("read answers"):
        answers = read_answers(job.answers)
    unfinished = _unfinished(job.answers)
    for sentence in unfinished:
        logger.warning("%s", sentence)
    options = plain(asked(job))
    # A server that is started again may get another port; its model's name identifies it.
    options["judge"] = [without_port(each) for each in job.judge]
    folder = RunFolder(Path(out).expanduser(), options, overwrite, shows=TABLE_FILE)
    folder.inputs = {
        "answers": json_digest([asdict(each) for each in answers]),
        **{f"template of judge {each.name}": each.digest for each in judges},
    }
    folder.check()
    resumes = folder.resumes
    folder.inputs |= {
        each.model_input: (resumes and folder.kept_input(each.model_input)) or NOT_READ_YET
        for each in judges
        if each.template is not None
    }
    try:
        folder.claim()
        with held(folder.path, "out"):
            lines = Lines(folder.path / VERDICTS_FILE, RECORD, KEY)
            lines.repair()
            known = {(name, a.variant, a.id) for name in names for a in answers}
            done = {(r["judge"], r["variant"], r["id"]) for r in lines.read(known)}
            left = {
                each.name: [a for a in answers if (each.name, a.variant, a.id) not in done]
                for each in judges
            }
            working = [each for each in judges if left[each.name]]
            require_judges(working, job.trust_remote_code)
            for each in working:
                own = left[each.name]
                with (
                    costs.step(f"judge {each.name}"),
                    closing(_verdicts(each, job, folder, own, progress)) as batches,
                ):
                    for batch in batches:
                        lines.add(record(each.name, own[i], verdict) for i, verdict in batch)
                _forget_models()
            results = _results(job, judges, answers, lines.read(known), command, costs)
            results["warnings"] = [*unfinished, *results["warnings"]]
            write_text_atomic(folder.path / TABLE_FILE, results["table"] + "\n")
            publish(results, folder)
            folder.finish()
    except BaseException:
        folder.release_if_empty()
        raise
    return results


def _unfinished(source: str) -> list[str]:
    """A sentence where the answers are those of a run that is not finished."""
    place = Path(source).expanduser()
    own = place.is_dir() or place.name == ANSWERS_FILE
    state = run_state(place if place.is_dir() else place.parent) if own else None
    if state is None or state["finished"]:
        return []
    return ["The run that gives the answers is not finished: those it has so far are judged."]


def _verdicts(
    each: AskedJudge,
    job: JudgeJob,
    folder: RunFolder,
    answers: Sequence[Answered],
    progress: bool,
) -> Verdicts:
    template = each.template
    if template is None:
        yield from verdicts_of_phrases(answers)
        return
    if each.url is not None:
        server = Server.open(each.url, each.model, job.key_from, **patience(job))
        _compare(folder, each, json_digest([without_port(server.url), server.model]))
        with closing(
            verdicts_of_server(
                template, server, answers, concurrency=job.concurrency, progress=progress
            )
        ) as found:
            yield from found
        return
    model, tokenizer = _loaded(each, job)
    _compare(folder, each, json_digest(model_identity(model, tokenizer)))
    if template.kind == CAUSAL:
        found = verdicts_of_model(
            template,
            model,
            tokenizer,
            answers,
            tokens_per_batch=job.tokens_per_batch,
            progress=progress,
        )
    else:
        found = verdicts_of_classifier(template, model, tokenizer, answers, progress=progress)
    with closing(found):
        yield from found


def _loaded(each: AskedJudge, job: JudgeJob) -> tuple[Any, Any]:
    assert each.template is not None and each.model is not None
    load = load_model if each.template.kind == CAUSAL else load_classifier
    with _naming(each):
        return load(
            each.model, dtype=job.dtype, device=job.device, trust_remote_code=job.trust_remote_code
        )


@contextmanager
def _naming(each: AskedJudge) -> Iterator[None]:
    """Errors of a judge's model say whose it is."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"judge {each.name!r}: {error}") from error


def _forget_models() -> None:
    """Give back the memory of a judge that is done: two need not fit together."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _compare(folder: RunFolder, each: AskedJudge, digest: str) -> None:
    """Note which model judges; refuse another one than judged the answers before."""
    kept = folder.kept_input(each.model_input)
    if kept in (None, NOT_READ_YET):
        folder.note({each.model_input: digest})
    elif kept != digest:
        raise StateError(
            f"judge {each.name!r} must be the model that gave the verdicts in "
            f"{str(folder.path)!r}, got another; choose another folder or pass --overwrite"
        )


def _results(
    job: JudgeJob,
    judges: Sequence[AskedJudge],
    answers: Sequence[Answered],
    records: Sequence[Mapping[str, Any]],
    command: str,
    costs: Costs,
) -> dict[str, Any]:
    judged = []
    for each in judges:
        for variant in variants_of(answers):
            own = [r for r in records if r["judge"] == each.name and r["variant"] == variant]
            judged.append({"judge": each.name, "variant": variant, **summary(own)})
    alike = agreements(records)
    changed, refusing, tests = compared(records)
    # Of the same refusals no second test, in a family of its own with another p.
    by_phrases = {row["variant"]: row["change"] for row in refusing if row["judge"] == PHRASES}
    warnings = [
        f"{row['judge']} on {row['variant']}: {row['unparsed']} of {row['answers']} verdicts could "
        "not be parsed; look at their output in " + VERDICTS_FILE
        for row in judged
        if row["unparsed"] > MUCH_UNPARSED * row["answers"]
    ]
    return plain(
        {
            "title": "FastDEAN: verdicts on answers",
            "created": now(),
            "command": public_command(command),
            "versions": versions(),
            "options": published(job),
            "judges": {each.name: _about(each) for each in judges},
            "phrases_version": phrases_version(),
            "judged": judged,
            "agreement": alike,
            "changes": changed,
            "refusal_changes": refusing,
            "tests": tests,
            "answers": answers_table(answers, records, changes=by_phrases),
            "warnings": warnings,
            "table": verdict_table(judged, alike, [*changed, *refusing]),
            "files": {"verdicts": VERDICTS_FILE, "table": TABLE_FILE, "figures": RESULTS_FILE},
            "cost": costs.steps,
        }
    )


def _about(each: AskedJudge) -> dict[str, Any]:
    """What is said of a judge in the results."""
    if each.template is None:
        return {"kind": PHRASES, "version": phrases_version()}
    return {
        "kind": each.template.kind,
        "version": each.template.version,
        "model": None if each.model is None else public_source(each.model),
        "server": each.url,
        "template_sha256": each.digest,
    }


def _described(template: JudgeTemplate) -> dict[str, Any]:
    rules = {
        name: None if rule is None else [rule.pattern.pattern, dict(rule.values)]
        for name, rule in (("verdict", template.verdict), ("refusal", template.refusal))
    }
    return {**asdict(replace(template, verdict=None, refusal=None)), **rules}
