"""What a person reads of a sweep that takes hours; the clock is the test's."""

from __future__ import annotations

import io

import pytest
import tqdm.auto
from tiny_data import batches, make_examples
from tiny_models import llama

import fastdean
from fastdean.coupling.layers import progress
from fastdean.coupling.layers.progress import SweepProgress, sweep_progress
from fastdean.wording.doing import during


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


def sweep(course, clock, *, layers=4, lowest=0, seconds=None, tokens=3000):
    """Every window in two batches."""
    seconds = {"forward": 10, "loss": 20, "backward": 30, **(seconds or {})}
    course.plan(layers, lowest)
    windows = [("forward", k) for k in range(layers)] + [("loss", layers)]
    windows += [("backward", k) for k in reversed(range(lowest, layers))]
    for kind, layer in windows:
        course.begin(kind, layer)
        for _ in range(2):
            clock.now += seconds[kind] / 2
            course.passed(tokens // 2)
        course.end()


def shown_by(**options):
    clock, seen = Clock(), []
    course = SweepProgress("score privacy", lambda *args: seen.append(args), clock)
    sweep(course, clock, **options)
    return seen


def test_a_log_has_one_line_for_each_layer_and_the_loss(capsys):
    clock = Clock()
    with sweep_progress("fairness, privacy", shown=True, clock=clock) as course:
        sweep(course, clock, layers=2)
    assert capsys.readouterr().err.splitlines() == [
        # Nothing but a forward window is measured: a loss and two times back, each three times it.
        "fastdean: fairness, privacy: layer 1 of 2 forward, 300 tokens/s, about 100 s left",
        "fastdean: fairness, privacy: layer 2 of 2 forward, 300 tokens/s, about 90 s left",
        "fastdean: fairness, privacy: loss, 150 tokens/s, about 48 s left",
        "fastdean: fairness, privacy: layer 2 of 2 backward, 100 tokens/s, about 30 s left",
        "fastdean: fairness, privacy: layer 1 of 2 backward, 100 tokens/s",
    ]


def test_the_time_left_is_that_of_the_windows_measured():
    seen = shown_by(layers=40, lowest=10, seconds={"forward": 100, "loss": 100, "backward": 200})
    texts = [text for text, _, ended in seen if ended]
    # 39 forward at 100 s, and a loss and 30 backward that are taken for 300 s.
    assert texts[0].endswith("layer 1 of 40 forward, 30 tokens/s, about 3 h 40 min left")
    # A backward window is measured: 28 more of them at 200 s.
    assert texts[42].endswith("layer 39 of 40 backward, 15 tokens/s, about 93 min left")
    assert texts[-1].endswith("layer 11 of 40 backward, 15 tokens/s")
    halfway = [text for text, _, ended in seen if not ended]
    # In its first half a window of 200 s has 100 s to go, and one more comes.
    assert halfway[-4].endswith("layer 12 of 40 backward, 15 tokens/s, about 5 min left")


def test_the_share_done_only_grows_and_ends_at_one():
    shares = [share for _, share, _ in shown_by(lowest=2)]
    assert shares == sorted(shares) and shares[0] >= 0 and shares[-1] == 1


def test_weights_take_as_long_to_come_in_forward_as_backward():
    clock, seen = Clock(), []
    course = SweepProgress("score", lambda *args: seen.append(args), clock)
    course.plan(3, 0)
    windows = [("forward", k) for k in range(3)] + [("loss", 3)]
    windows += [("backward", k) for k in reversed(range(3))]
    for kind, layer in windows:
        course.begin(kind, layer)
        if kind != "loss":
            clock.now += 30
            course.weights_there()
        clock.now += 10 if kind == "forward" else 30
        course.passed(3000)
        course.end()
    left = [text.partition("about ")[2] for text, _, ended in seen if ended]
    # 290, 250, 210, 180, 120 and 60 s: no jump where the way back begins.
    minutes = [f"{each} min left" for each in (5, 4, 4, 3, 2)]
    assert left == [*minutes, "60 s left", ""]


def test_windows_that_are_not_begun_count_as_done():
    clock, seen = Clock(), []
    course = SweepProgress("score", lambda *args: seen.append(args), clock)
    course.plan(4, 0)
    course.begin("backward", 1)
    clock.now += 20
    course.passed(40)
    course.end()
    text, share, _ = seen[-1]
    assert text == "score: layer 2 of 4 backward, 2 tokens/s, about 20 s left"
    assert share == pytest.approx(1 - 3 / 19)


def test_a_terminal_has_a_bar(monkeypatch):
    class Bar(tqdm.auto.tqdm):
        def __init__(self, **options):
            super().__init__(**options, disable=False)  # the tests disable bars

    terminal, clock = Terminal(), Clock()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setattr(tqdm.auto, "tqdm", Bar)
    with (
        during("step 4 of 9, score privacy"),
        sweep_progress("privacy", shown=True, clock=clock) as course,
    ):
        sweep(course, clock)
    last = terminal.getvalue().split("\r")[-1]
    assert last.startswith("100%|") and "fastdean:" not in terminal.getvalue()
    assert "| step 4 of 9, score privacy: layer 1 of 4 backward, 100 tokens/s" in last


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_what_is_not_to_be_shown_is_silent(monkeypatch, stream):
    stderr = stream()
    monkeypatch.setattr("sys.stderr", stderr)
    loader = batches(make_examples(), 4)
    fastdean.score(llama(), loader, order="layers", progress=False)
    assert stderr.getvalue() == ""


def test_score_tells_of_each_layer(capsys, monkeypatch):
    loader, tokens = list(batches(make_examples(), 4)), sum(len(ids) for ids, _ in make_examples())
    counted = []
    real = progress.SweepProgress.passed

    def passed(self, tokens):
        counted.append(tokens)
        real(self, tokens)

    monkeypatch.setattr(progress.SweepProgress, "passed", passed)
    fastdean.score(llama(), loader, order="layers", tokens_per_batch=20)
    lines = capsys.readouterr().err.splitlines()
    windows = ["layer 1 of 2 forward", "layer 2 of 2 forward", "loss"]
    windows += ["layer 2 of 2 backward", "layer 1 of 2 backward"]
    assert [line.split(",")[0] for line in lines] == [f"fastdean: score: {w}" for w in windows]
    assert all("tokens/s" in line and "|" not in line for line in lines)
    assert sum(counted) == len(windows) * tokens
