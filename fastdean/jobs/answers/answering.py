"""The job `answer`: prompts to answers, one line each, that go on where a kill cut them short."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path
from typing import Any

from fastdean.data.skipped import Skipped
from fastdean.data.tokenising import chat_turns
from fastdean.evaluation.answers.generation import STOPPED, Answer, answers_to, encoded_prompt
from fastdean.evaluation.answers.records import (
    KEY,
    ORIGINAL,
    RECORD,
    Answered,
    record,
    require_variant,
)
from fastdean.evaluation.answers.server import Refused, Server, in_order
from fastdean.evaluation.judging.beside import answers_table
from fastdean.files.lines import Lines
from fastdean.files.provenance import public_name
from fastdean.files.storage import held
from fastdean.jobs.answers.job import AnswerJob, patience
from fastdean.jobs.folder import ANSWERS_FILE, RESULTS_FILE
from fastdean.jobs.inputs import described_mask, mask_digest
from fastdean.jobs.published import described_model, published
from fastdean.jobs.rows import NumberedRow, take_rows
from fastdean.jobs.session import Session
from fastdean.masks import NeuronMask
from fastdean.models.identity import json_digest
from fastdean.models.ranks.distributed import Ranks
from fastdean.wording.doing import titled
from fastdean.wording.log import logger
from fastdean.wording.mendable import StateError


def run(
    job: AnswerJob,
    out: str | Path,
    *,
    command: str = "",
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Answer every prompt, in each variant of the model, and count.

    Returns:
        The content of results.json.
    Raises:
        ValueError, RuntimeError, OSError: as the steps; what was answered is kept and not asked
            again.
    """
    Ranks.require_alone("fastdean answer")
    session = Session.open(job, out, command, overwrite, progress, shows=ANSWERS_FILE)
    skipped = Skipped() if job.skip_bad_rows else None
    # Prompts, the model loaded and checked, or the server asked; answers of each variant.
    session.costs.total = 2 + 1 if job.server is not None else 3 + 1 + len(job.mask)
    with session.costs.step("read prompts"):
        rows, _ = take_rows(
            job.prompts, job.examples, job.seed, name="prompts", skipped=skipped, prompts=True
        )
        rows = _with_texts(sorted(rows, key=lambda each: each[0]), skipped)
    session.compare({"prompts": json_digest(rows)})
    with session.writing():
        if job.server is None:
            about, answered = _in_memory(session, rows, skipped)
        else:
            about, answered = _by_server(session, rows, skipped)
        told = set() if skipped is None else set(skipped.rows)
        for sentence in [] if skipped is None else skipped.told("prompts"):
            logger.warning("%s", sentence)
        session.folder.claim()
        with held(session.folder.path, "out"):
            lines = Lines(session.folder.path / ANSWERS_FILE, RECORD, KEY)
            lines.repair()
            variants = [job.variant] if job.server is not None else [ORIGINAL, *about["masks"]]
            known = {(variant, number) for variant in variants for number, _ in rows}
            with closing(answered(lines.read(known))) as batches:
                for batch in batches:
                    lines.add(batch)
            if skipped is not None and set(skipped.rows) != told:
                skipped.warn("prompts")
            records = lines.read(known)
            answers = [Answered(r["id"], r["variant"], r["prompt"], r["answer"]) for r in records]
            results = session.results(
                "FastDEAN: answers",
                {
                    "options": published(job),
                    **about,
                    "variants": _counted(records),
                    "answers": answers_table(answers, seed=job.seed),
                    "skipped": {} if skipped is None else skipped.described(),
                    "files": {"answers": ANSWERS_FILE, "figures": RESULTS_FILE},
                    "cost": session.costs.steps,
                },
            )
            session.finish(results)
    return results


def masks_of(asked: Sequence[str]) -> dict[str, NeuronMask]:
    """Variant -> mask, of what was asked for as FOLDER or NAME=FOLDER.

    Raises:
        ValueError: two variants of one name, or no mask there.
    """
    found: dict[str, NeuronMask] = {}
    for each in asked:
        name, equals, place = each.partition("=")
        # A path may hold the sign too.
        name, place = (name, place) if equals and "/" not in name else (public_name(each), each)
        if name in found or name == ORIGINAL:
            taken = "that of the model itself" if name == ORIGINAL else "given twice"
            raise ValueError(
                f"mask must have a name of its own, got {name!r}, which is {taken}; pass it as "
                "NAME=FOLDER"
            )
        require_variant("mask", name)
        found[name] = NeuronMask.from_pretrained(place)
    return found


def _with_texts(rows: Sequence[NumberedRow], skipped: Skipped | None) -> list[NumberedRow]:
    """Chats with each turn's content as one text; those that are none are refused or left out."""
    found = []
    for number, row in rows:
        try:
            turns = {"messages": chat_turns(row["messages"], number)} if "messages" in row else {}
        except ValueError as error:
            if skipped is None:
                raise
            skipped.rows[number] = str(error)
        else:
            found.append((number, {**row, **turns}))
    if not found:
        raise ValueError("prompts must hold a row that can be used, got none; check the source")
    return found


def _in_memory(
    session: Session[AnswerJob], rows: Sequence[NumberedRow], skipped: Skipped | None
) -> tuple[dict[str, Any], Any]:
    """What is said of the model, and a function from the answers there are to those still to come.

    Everything that can be refused is, before the first answer.
    """
    job = session.job
    masks = masks_of(job.mask)
    model, tokenizer = session.load_model()
    session.compare_model(
        model, tokenizer, **{f"mask {n}": mask_digest(m) for n, m in masks.items()}
    )
    usable: list[NumberedRow] = []
    prompts: list[list[int]] = []
    for number, row in rows:
        try:
            ids = encoded_prompt(row, tokenizer, model, job.template, number, job.max_new_tokens)
        except ValueError as error:
            if skipped is None:
                raise ValueError(f"prompts {job.prompts!r}: {error}") from None
            skipped.rows[number] = str(error)
            continue
        usable.append((number, row))
        prompts.append(ids)
    if not usable:
        assert skipped is not None, "the first bad row is an error"
        raise ValueError(f"every prompt had to be left out: {next(iter(skipped.rows.values()))}")
    for mask in masks.values():
        with mask.applied(model):
            pass

    def answered(before: Sequence[Mapping[str, Any]]) -> Iterator[list[dict[str, Any]]]:
        for variant, mask in {ORIGINAL: None, **masks}.items():
            left = _left(usable, variant, before)
            if not left:
                continue
            place: AbstractContextManager = nullcontext() if mask is None else mask.applied(model)
            with (
                session.costs.step(f"answers, {variant}"),
                place,
                closing(
                    answers_to(
                        model,
                        tokenizer,
                        [prompts[i] for i in left],
                        max_new_tokens=job.max_new_tokens,
                        tokens_per_batch=job.tokens_per_batch,
                        progress=session.progress,
                    )
                ) as batches,
            ):
                for batch in batches:
                    yield _records([(left[i], answer) for i, answer in batch], usable, variant)

    about = {
        "model": described_model(job.model, model),
        "masks": {name: described_mask(mask) for name, mask in masks.items()},
    }
    return about, answered


def _by_server(
    session: Session[AnswerJob], rows: Sequence[NumberedRow], skipped: Skipped | None
) -> tuple[dict[str, Any], Any]:
    """As `_in_memory`; which prompts the server refuses is only known once it is asked."""
    job = session.job
    assert job.server is not None
    with session.costs.step("ask the server what it serves"):
        server = Server.open(job.server, job.model, job.key_from, **patience(job))

    def ask(numbered: NumberedRow) -> Answer | Refused:
        number, row = numbered
        try:
            return answer_to(row)
        except Refused as error:
            if not error.is_of_what_was_asked:
                raise
            if skipped is None:
                raise StateError(
                    f"prompts {job.prompts!r}: row {number}: {error}; pass skip_bad_rows to leave "
                    "such rows out"
                ) from None
            return error

    def answer_to(row: Mapping[str, Any]) -> Answer:
        if "messages" in row or job.template == "chat":
            turns = row.get("messages", [{"role": "user", "content": row.get("prompt")}])
            return server.chat(turns, job.max_new_tokens)
        return server.complete(row["prompt"], job.max_new_tokens)

    def answered(before: Sequence[Mapping[str, Any]]) -> Iterator[list[dict[str, Any]]]:
        from tqdm.auto import tqdm

        left = _left(rows, job.variant, before)
        asked = [rows[i] for i in left]
        answered_any = len(left) < len(rows)
        with (
            session.costs.step(f"answers, {job.variant}"),
            tqdm(
                total=len(left),
                desc=titled("answers"),
                unit="answers",
                disable=not session.progress,
            ) as bar,
            closing(in_order(ask, asked, concurrency=job.concurrency, stop=server.stop)) as answers,
        ):
            for i, answer in answers:
                bar.update()
                if isinstance(answer, Refused):
                    assert skipped is not None, "the first refused row is an error"
                    skipped.rows[rows[left[i]][0]] = str(answer)
                    continue
                answered_any = True
                yield _records([(left[i], answer)], rows, job.variant)
        if not answered_any:
            assert skipped is not None, "there are rows, and each is answered or left out"
            reason = next(iter(skipped.rows.values()))
            raise StateError(f"every prompt had to be left out: {reason}")

    return {"model": {"name": job.model, "server": server.url}}, answered


def _left(
    rows: Sequence[NumberedRow], variant: str, before: Sequence[Mapping[str, Any]]
) -> list[int]:
    """Places of the rows that have no answer of the variant yet."""
    done = {each["id"] for each in before if each["variant"] == variant}
    return [place for place, (number, _) in enumerate(rows) if number not in done]


def _records(
    answers: Iterable[tuple[int, Answer]], rows: Sequence[NumberedRow], variant: str
) -> list[dict[str, Any]]:
    return [record(*rows[place], variant, answer) for place, answer in answers]


def _counted(records: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """By variant: answers, those that the model ended, and those without a word."""
    found: dict[str, dict[str, int]] = {}
    for each in records:
        counts = found.setdefault(each["variant"], {"answers": 0, "ended": 0, "empty": 0})
        counts["answers"] += 1
        counts["ended"] += each["finish"] == STOPPED
        counts["empty"] += not each["answer"].strip()
    return found
