"""A server that answers: what it is asked, how often, with which key, and what is refused."""

from __future__ import annotations

import math
import threading
import time
from contextlib import closing

import pytest
from answering_server import answering
from forked import run

from fastdean.evaluation.answers.generation import Answer
from fastdean.evaluation.answers.server import Server, checked_url, in_order, without_port
from fastdean.wording.mendable import StateError

TURNS = [{"role": "user", "content": "who?"}]


def opened(url, pauses=None, **options):
    return Server.open(url, "tiny", pause=(pauses if pauses is not None else []).append, **options)


def test_texts_are_continued_and_chats_answered_greedily():
    with answering() as (url, asked):
        server = opened(url)
        assert server.complete("the cat", 7) == Answer("echo the cat", 3, "stop")
        assert server.chat(TURNS, 9) == Answer("echo who?", 3, "stop")
    (path, body, headers), (chat, turns, _) = asked.requests
    assert path.endswith("/v1/completions") and chat.endswith("/v1/chat/completions")
    greedy = {"model": "tiny", "max_tokens": 7, "temperature": 0}
    assert body == {**greedy, "prompt": "the cat"}
    assert turns == {**greedy, "max_tokens": 9, "messages": TURNS}
    assert "Authorization" not in headers


def test_a_busy_server_is_asked_again_and_given_the_time_it_asks_for():
    replies = [(429, {"Retry-After": "3"}, {}), (503, {}, {}), (500, {}, {}), "fine"]
    pauses: list[float] = []
    with answering(lambda _: replies.pop(0)) as (url, asked):
        assert opened(url, pauses).complete("x", 1).text == "fine"
    assert pauses == [3.0, 2.0, 4.0] and len(asked.requests) == 4


def test_a_server_that_stays_busy_is_an_error_after_the_last_attempt():
    pauses: list[float] = []
    with answering(lambda _: (503, {}, {"error": {"message": "full"}})) as (url, asked):
        server = opened(url, pauses, attempts=3)
        with pytest.raises(StateError, match="got 503 full from http://127.0.0.1"):
            server.complete("x", 1)
    assert len(asked.requests) == 3 and pauses == [1.0, 2.0]


@pytest.mark.parametrize("status", [400, 401, 404, 302])
def test_what_is_refused_is_not_asked_again(status):
    reply = (status, {"Location": "http://127.0.0.1:9/"}, {})
    with (
        answering(lambda _: reply) as (url, asked),
        pytest.raises(StateError, match=f"an answer to completions, got {status}"),
    ):
        opened(url).complete("x", 1)
    assert len(asked.requests) == 1


BROKEN = {
    "no JSON": (b"<html>", "an answer in JSON, got b'<html>'"),
    "no choices": ({"choices": []}, "an answer in the form of OpenAI's API"),
    "a list": ([1], "an answer in the form of OpenAI's API"),
    "no text": ({"choices": [{"text": None}]}, "an answer in the form of OpenAI's API"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_an_answer_of_another_form_is_one_line(case):
    body, text = BROKEN[case]
    with (
        answering(lambda _: (200, {}, body)) as (url, _),
        pytest.raises(StateError, match="server must give") as refused,
    ):
        opened(url).complete("x", 1)
    assert text in str(refused.value) and "\n" not in str(refused.value)


def test_a_model_that_is_cut_while_it_reasons_has_said_nothing():
    body = {"choices": [{"message": {"content": None}, "finish_reason": "length"}]}
    with answering(lambda _: (200, {}, body)) as (url, _):
        assert opened(url).chat(TURNS, 4) == Answer("", None, "length")


def test_the_key_comes_from_the_environment_and_stands_in_no_message(monkeypatch):
    monkeypatch.setenv("A_KEY", "sk-secret")
    repeated = (401, {}, {"error": {"message": "wrong key sk-secret"}})
    with answering(lambda _: repeated) as (url, asked):
        server = opened(url, key_from="A_KEY")
        with pytest.raises(StateError, match=r"got 401 wrong key \*\*\*") as refused:
            server.complete("x", 1)
    assert asked.requests[0][2]["Authorization"] == "Bearer sk-secret"
    assert "secret" not in repr(server) + str(refused.value)
    with pytest.raises(ValueError, match="key_from must name an environment variable"):
        Server.open("http://127.0.0.1:9", "tiny", "NO_SUCH_KEY")


def test_the_model_is_one_that_is_served():
    with answering(models=("a", "b")) as (url, _):
        with pytest.raises(ValueError, match=r"serves \('a', 'b'\), got 'c'; name it"):
            Server.open(url, "c")
        with pytest.raises(ValueError, match="must serve one model where none is named, got 'a'"):
            Server.open(url, None)
    with answering(models=(None, 3)) as (url, _), pytest.raises(ValueError, match="got none at"):
        Server.open(url, None)
    with answering() as (url, _):
        assert Server.open(url, None).model == "tiny"
    with answering(models=None) as (url, _):
        assert Server.open(url, "c").complete("x", 1).text == "echo x"


def test_a_server_that_is_not_there_is_said_at_once():
    with answering() as (url, _):
        pass
    with pytest.raises(StateError, match="server must give a connection, got .*refused"):
        opened(url)


BAD_URLS = {
    "localhost:8000": "must be an address like http://localhost:8000/v1, got",
    "ftp://host/v1": "must be an address like",
    "http://": "must be an address like",
    "http://host:99999": "must be an address like",
    "https://me:sk-secret@host/v1": "without a name, password or query",
    "https://host/v1?key=sk-secret": "without a name, password or query",
    "http://[::1/v1": "must be an address like",
    "http://local host/v1": "must be an address like",
    "http://host/v\u00fc": "must be an address like",
    "http://host/v1\n": "must be an address like",
    "http://me:sk-secret@[::1/v1": "without a name, password or query",
}


@pytest.mark.parametrize("url", BAD_URLS)
def test_an_address_of_another_form_is_refused_without_what_is_secret_in_it(url):
    with pytest.raises(ValueError, match="server must be an address") as refused:
        checked_url(url)
    assert BAD_URLS[url] in str(refused.value) and "secret" not in str(refused.value)


def test_a_server_that_hangs_is_asked_once_more_and_no_more():
    released, pauses = threading.Event(), []
    with answering(lambda _: released.wait(60) and "late") as (url, asked):
        server = Server(url, "tiny", timeout_seconds=0.2, pause=pauses.append)
        late = "completions within 0.2 seconds, got none from .*; .* or raise server_timeout"
        with pytest.raises(StateError, match=late):
            server.complete("x", 1)
        released.set()
        assert len(asked.requests) == 2 and pauses == [1.0]


def test_an_answer_that_never_ends_is_none_however_often_a_byte_of_it_comes():
    released = threading.Event()

    def dribbling():
        while not released.wait(0.01):
            yield b" "

    with answering(lambda _: (200, {"Content-Length": str(10**9)}, dribbling())) as (url, _):
        server = Server(url, "tiny", timeout_seconds=0.2, pause=lambda _: None)
        with pytest.raises(StateError, match="completions within 0.2 seconds, got none"):
            server.complete("x", 1)
        released.set()


def test_an_answer_that_is_cut_off_is_asked_for_again():
    replies = [(200, {"Content-Length": "90"}, iter([b'{"choices": [{"text": "fi'])), "fine"]
    with answering(lambda _: replies.pop(0)) as (url, asked):
        assert opened(url).complete("x", 1).text == "fine"
    assert len(asked.requests) == 2


@pytest.mark.parametrize("seconds", [0, -1, math.nan, math.inf, 1e300, "5", True, None])
def test_a_time_that_nobody_can_wait_is_refused(seconds):
    with pytest.raises((ValueError, TypeError), match="timeout_seconds must be a number"):
        Server("http://localhost:1/v1", "tiny", timeout_seconds=seconds)


def test_requests_are_bounded_and_answers_in_order():
    both = threading.Barrier(2, timeout=20)

    def reply(body):
        both.wait()  # Only two requests at a time get through.
        return f"echo {body['prompt']}"

    with answering(reply) as (url, asked):
        server = opened(url)
        found = list(in_order(lambda p: server.complete(p, 1), list("abcdefgh"), concurrency=2))
    assert [(n, answer.text) for n, answer in found] == [
        (n, f"echo {letter}") for n, letter in enumerate("abcdefgh")
    ]
    assert asked.most_at_once == 2


def test_the_first_error_ends_the_others():
    def reply(body):
        return (400, {}, {}) if body["prompt"] == "b" else "fine"

    with answering(reply) as (url, asked):
        server, found = opened(url), []
        with pytest.raises(StateError, match="400"):
            for number, _ in in_order(
                lambda p: server.complete(p, 1), ["a", "b", *"cdefghij"], concurrency=1,
                stop=server.stop,
            ):  # fmt: skip
                found.append(number)
        assert found == [0] and server._stopped.is_set()
    assert len(asked.requests) < 10


def leaves_while_a_request_hangs():
    began = threading.Event()

    def ask(prompt):
        if prompt == "hangs":
            began.set()
            time.sleep(30)

    with closing(in_order(ask, ["fine", "hangs"], concurrency=2)) as found:
        next(found)
        began.wait()
        print(time.monotonic())


def test_a_process_does_not_wait_for_a_request_that_hangs():
    done = run(leaves_while_a_request_hangs)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - float(done.stdout) < 20


@pytest.mark.parametrize("usage", [-1, True, 10**30, 1.5, "three"])
def test_a_number_of_tokens_that_is_none_is_not_known(usage):
    said = {"choices": [{"text": "fine"}], "usage": {"completion_tokens": usage}}
    with answering(lambda _: (200, {}, said)) as (url, _):
        assert opened(url).complete("x", 1) == Answer("fine", None, "unknown")


def test_a_server_that_does_not_say_why_it_ended_is_not_told_in_pythons_words():
    for reason in ({"finish_reason": None}, {}):
        body = {"choices": [{"text": "so", **reason}]}
        with answering(lambda _, body=body: (200, {}, body)) as (url, _):
            assert Server.open(url, "tiny").complete("w", 4).finish == "unknown"


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("http://localhost:8000/v1", "http://localhost/v1"),
        ("https://[::1]:8000", "https://[::1]"),
        ("wildguard=http://h:1/v1::model=a:2", "wildguard=http://h/v1::model=a:2"),
        ("http://host/v1:8", "http://host/v1:8"),
        ("folder:1", "folder:1"),
    ],
)
def test_an_address_without_its_port(address, expected):
    assert without_port(address) == expected
