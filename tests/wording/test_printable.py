"""Names that would steer a terminal, a card or a page: none of them does."""

from __future__ import annotations

import json
import logging
import re

import pytest
import torch
import typer
from typer.testing import CliRunner

from fastdean import cli
from fastdean.cli.running import command, tell
from fastdean.debias import Effect, model_card
from fastdean.masks import MaskEntry, NeuronMask
from fastdean.masks import mask as masks
from fastdean.report import render_report
from fastdean.wording import markdown
from fastdean.wording.log import logger
from fastdean.wording.printable import one_line, printable

# Clears the screen, retitles the window, deletes, turns the reading direction, breaks the line.
STEERING = "a\x1b[2J\x1b]0;owned\x07b\x9b1mc\x7f\u202ed\u2066e\u2028f\u200ef\x00g\ud800h\U000e0041"
UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u2028\u202e\u2066\ud800\U000e0041]")
MARKUP = "x`</code>\n---\n```\n# Owned\n<script>alert(1)</script> [a](javascript:b) | b *c*"


def test_what_steers_is_written_out_as_json_does():
    found = printable(STEERING)
    assert not UNSAFE.search(found)
    assert r"\u001b[2J" in found and r"\u202e" in found and r"\udb40\udc41" in found
    assert json.loads(f'"{found}"') == STEERING


@pytest.mark.parametrize(
    "text", ["plain", "Ünïcödé 模型 ✓ −1", "می\u200cخواهم", "a\n\tb", "👩\u200d🔬"]
)
def test_what_is_read_stays(text):
    assert printable(text) == text


def test_a_line_stays_one():
    assert one_line("a\nfastdean: done\r\n\tb") == r"a\nfastdean: done\u000d\n\tb"


@pytest.mark.parametrize("kind", ["told", "refused", "a fault", "result"])
def test_a_command_does_not_let_names_steer_the_terminal(kind):
    app = typer.Typer()

    @app.command()
    @command()
    def run() -> dict:
        if kind == "told":
            tell(f"written to {STEERING}")
        if kind == "refused":
            raise ValueError(f"name must be plain, got {STEERING}\nfastdean: all is well")
        if kind == "a fault":
            raise KeyError(STEERING)
        return {"name": STEERING}

    result = CliRunner().invoke(app, ["--json"])
    shown = result.stdout + result.stderr
    assert not UNSAFE.search(shown) and "owned" in shown
    if kind == "refused":
        assert len(result.stderr.splitlines()) == 1
    if kind == "result":
        assert json.loads(result.stdout) == {"name": STEERING}


def test_the_log_does_not_let_names_steer_whoever_shows_it(caplog):
    with caplog.at_level(logging.WARNING):
        logger.warning("%s has %d rows", STEERING + "\nfastdean: done", 3)
    (message,) = caplog.messages
    assert not UNSAFE.search(message) and "\n" not in message and message.endswith("has 3 rows")


def test_a_copied_file_is_named_in_one_line(tmp_path, monkeypatch):
    from fastdean.jobs.edit import editing
    from fastdean.masks.checkpoint import PatchResult

    name = f"{STEERING[:-3]}\nfastdean: nothing else.bin"
    patched = PatchResult(tmp_path, (), 0, {}, (name,))
    monkeypatch.setattr(editing, "patch", lambda *_, **__: patched)
    arguments = ["patch", "--checkpoint", "c", "--mask", "m", "--out", str(tmp_path / "o")]
    result = CliRunner().invoke(cli.app, arguments)
    # What was copied, how many values, and how an edit is measured.
    assert len(result.stderr.splitlines()) == 3 and not UNSAFE.search(result.stderr)


def outside_of_code(card: str) -> str:
    """A card without its fenced blocks and without code in its lines, as CommonMark reads them."""
    lines, fence = [], None
    for line in card.split("\n"):
        mark = re.match(r"(`{3,})[^`]*$", line)
        if fence is None and mark:
            fence = mark[1]
        elif fence is None:
            lines.append(re.sub(r"(?<!`)(`+)(?!`)(.*?)(?<!`)\1(?!`)", "", line))
        elif re.fullmatch(rf"`{{{len(fence)},}}\s*", line):
            fence = None
    assert fence is None
    return "\n".join(lines)


def assert_sound(card: str) -> None:
    import yaml

    _, head, body = card.split("---\n", 2)
    assert {"library_name", "tags"} <= yaml.safe_load(head).keys()
    shown = outside_of_code(body)
    assert "<script" not in shown and not UNSAFE.search(shown)
    assert not re.search(r"^---|^# Owned|(?<!\\)\[a\]", shown, re.MULTILINE)
    assert len(re.findall("^# ", shown, re.MULTILINE)) == 1
    for row in (line for line in shown.split("\n") if line.startswith("| ")):
        assert len(re.findall(r"(?<!\\)\|", row)) == 7, row


@pytest.mark.parametrize("text", [MARKUP, STEERING, "a```b", "`", "", "--- \n---"])
def test_a_model_card_holds_names_as_text(text):
    card = model_card(
        f"org/{text}",
        base_model=f"org/{text}",
        method="bec",
        strength=1.0,
        data=text,
        regularised=text,
        command=f"fastdean {text}",
        effects=[Effect(f"SS, {text}", 1.0, 2.0, 0.5, 1.5)],
    )
    assert_sound(card)


@pytest.mark.parametrize("text", [MARKUP, STEERING.replace("\ud800", ""), '");', "`" * 5])
def test_a_mask_card_holds_names_as_text(text, monkeypatch):
    sent = {}
    monkeypatch.setattr(masks.storage, "push_folder", lambda *_, **options: sent.update(options))
    entry = MaskEntry(torch.tensor([0]), torch.ones(1), (2, 2))
    mask = NeuronMask({"layers.²\x1b.weight": entry}, manifest={"rule": text, "ratio": text})
    mask.push_to_hub(f"me/{text}")
    assert_sound(sent["card_text"])
    (call,) = re.findall(r"from_pretrained\((.*)\)$", sent["card_text"], re.MULTILINE)
    assert json.loads(call) == f"me/{text}"
    assert len(sent["commit_message"].splitlines()) == 1


def test_code_and_blocks_hold_any_ticks():
    assert markdown.code("a`b") == "``a`b``"
    assert markdown.code("`") == "`` ` ``"
    assert markdown.block("```\nx", "text") == "````text\n```\nx\n````"


def test_a_page_holds_nothing_that_steers():
    named = {STEERING: {"source": STEERING, "examples": 1}}
    page = render_report({"title": STEERING, "data": named, "warnings": [STEERING]})
    assert not re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200e\u2028\u202e\u2066]", page)
