"""Answers of a model that runs elsewhere, behind OpenAI's API: vLLM, SGLang, TGI and others.

The key comes from an environment variable. It is sent to that server alone, follows no redirection,
and stands in no file and no message.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, TypeVar
from urllib.parse import urlsplit

from fastdean.evaluation.answers.generation import CUT, STOPPED, UNSAID, Answer
from fastdean.files.declared import LARGEST
from fastdean.wording.log import logger
from fastdean.wording.mendable import StateError
from fastdean.wording.numbers import require_real
from fastdean.wording.printable import error_line

Item = TypeVar("Item")
Found = TypeVar("Found")

_RETRIED = (408, 429, 500, 502, 503, 504)
# A bad request, one that is too large, and one that cannot be processed.
_OF_WHAT_WAS_ASKED = (400, 413, 422)
_MOST_BYTES = 1 << 26
_BYTES_AT_A_TIME = 1 << 16
# Seconds that an answer may take; a server that did not answer in time is asked once more.
TIMEOUT_SECONDS = 300.0
_MOST_TIMEOUTS = 2
# What is served is a list that is made already.
_LISTING_SECONDS = 30.0
_LONGEST_PAUSE_SECONDS = 60.0
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_PORT = re.compile(r"(https?://(?:\[[^\]]*\]|[^/:\[\]]+)):\d+")
# Of a server's own words in a message.
_LONGEST_TEXT = 200


class _NoRedirection(urllib.request.HTTPRedirectHandler):
    """A redirection is an error: the key would go to another host."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _listening() -> threading.Event:
    return threading.Event()


@dataclass(frozen=True)
class Server:
    """A server and the model that is asked there.

    url: up to what stands before `/completions`, such as "http://localhost:8000/v1".
    model: its name there.
    key: sent as a bearer token; None: none is.
    timeout_seconds: that one answer may take in all, from the connection to its last byte.
    attempts: how often a request is made that ends in 408, 429 or a server's error, or in none; one
        that was not answered in time is made twice at most.
    pause: called with the seconds to wait before the next attempt; None: they are waited.
    """

    url: str
    model: str
    key: str | None = field(default=None, repr=False)
    timeout_seconds: float = TIMEOUT_SECONDS
    attempts: int = 6
    pause: Callable[[float], object] | None = field(default=None, repr=False, compare=False)
    _stopped: threading.Event = field(default_factory=_listening, repr=False, compare=False)

    def __post_init__(self) -> None:
        require_timeout("timeout_seconds", self.timeout_seconds)

    @classmethod
    def open(
        cls, url: str, model: str | None, key_from: str | None = None, **options: Any
    ) -> Server:
        """The server at `url`, once it has said that it serves the model.

        Args:
            model: None: the only one that is served there.
            key_from: the environment variable that holds the key.
        Raises:
            ValueError: no such variable, an address of another form, or another model.
            RuntimeError: the server cannot be reached, or refuses the request.
        """
        url = checked_url(url)
        key = _key(key_from)
        parts = urlsplit(url)
        if key and parts.scheme == "http" and parts.hostname not in _LOOPBACK:
            logger.warning("the key goes to %s unencrypted; use https where others listen", url)
        server = cls(url, model or "", key, **options)
        served = server._served()
        if model is None and len(served) != 1:
            listed = ", ".join(map(repr, served[:5])) or "none"
            raise ValueError(
                f"server must serve one model where none is named, got {listed} at {url}; name it"
            )
        if model is None:
            return cls(url, served[0], key, **options)
        if served and model not in served:
            raise ValueError(
                f"model must be one that {url} serves ({', '.join(map(repr, served[:5]))}), got "
                f"{model!r}; name it as the server does"
            )
        return server

    def complete(self, prompt: str, max_new_tokens: int) -> Answer:
        """Continue a text greedily."""
        found = self._asked("completions", {"prompt": prompt}, max_new_tokens)
        return self._answer(found, lambda choice: choice["text"])

    def chat(self, turns: Sequence[Mapping[str, Any]], max_new_tokens: int) -> Answer:
        """Answer a chat greedily, in the template that the server has for the model."""
        found = self._asked("chat/completions", {"messages": list(turns)}, max_new_tokens)
        # null where the limit was reached before the answer began.
        return self._answer(found, lambda choice: choice["message"]["content"] or "")

    def stop(self) -> None:
        """Make no further attempt."""
        self._stopped.set()

    def _asked(self, what: str, asked: Mapping[str, Any], max_new_tokens: int) -> Any:
        body = {"model": self.model, **asked, "max_tokens": max_new_tokens, "temperature": 0}
        return self._request(what, body)

    def _answer(self, found: Any, text_of: Callable[[Any], Any]) -> Answer:
        try:
            choice = found["choices"][0]
            text, reason = text_of(choice), choice.get("finish_reason")
            tokens = (found.get("usage") or {}).get("completion_tokens")
        except (KeyError, IndexError, TypeError, AttributeError):
            text = None
        if not isinstance(text, str):
            raise self._error(f"an answer in the form of OpenAI's API, got {found!r:.120}")
        # JSON can name halves of characters, which no file of text holds.
        text = text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
        said = UNSAID if reason is None else str(reason)[:40]
        finish = {"stop": STOPPED, "length": CUT}.get(said, said)
        known = type(tokens) is int and 0 <= tokens <= LARGEST
        return Answer(text, tokens if known else None, finish)

    def _served(self) -> list[str]:
        try:
            found = self._request("models", None, attempts=1)
        except Refused as error:
            if error.status in (404, 405, 501):
                # It need not say; what it does not serve it refuses when it is asked.
                return []
            raise
        rows = found.get("data") if isinstance(found, Mapping) else None
        rows = rows if isinstance(rows, list) else []
        named = (row.get("id") for row in rows if isinstance(row, Mapping))
        return [name for name in named if isinstance(name, str)]

    def _request(self, what: str, body: Any, attempts: int | None = None) -> Any:
        seconds = self.timeout_seconds if body is not None else self._listing_seconds
        attempts, timeouts = self.attempts if attempts is None else attempts, 0
        for attempt in range(attempts):
            try:
                return self._once(what, body, seconds)
            except _Again as again:
                timeouts += again.is_timeout
                last = attempt + 1 == attempts or timeouts == _MOST_TIMEOUTS
                if last or self._stopped.is_set():
                    raise again.error from None
                self._wait(again.after if again.after is not None else 2.0**attempt)
        raise AssertionError("there is at least one attempt")

    @property
    def _listing_seconds(self) -> float:
        return min(self.timeout_seconds, _LISTING_SECONDS)

    def _once(self, what: str, body: Any, seconds: float) -> Any:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}/{what}", data, headers)
        end = time.monotonic() + seconds
        try:
            with self._opener().open(request, timeout=seconds) as response:
                text = _read(response, _MOST_BYTES, end)
        except urllib.error.HTTPError as error:
            with error:
                said = self._said(error, end)
            refused = self._error(f"an answer to {what}, got {said}", Refused)
            refused.status = error.code
            if error.code in _RETRIED:
                raise _Again(refused, _seconds(error.headers.get("Retry-After"))) from None
            raise refused from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, TimeoutError):
                late = self._error(
                    f"an answer to {what} within {seconds:g} seconds, got none",
                    advice="look at its log, or raise server_timeout where answers take longer",
                )
                raise _Again(late, is_timeout=True) from None
            found = self._error(f"a connection, got {_words(reason)}")
            if isinstance(reason, ssl.SSLCertVerificationError):
                raise found from None
            raise _Again(found) from None
        if len(text) > _MOST_BYTES:
            raise self._error(f"an answer of at most {_MOST_BYTES:,} bytes, got a longer one")
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            raise self._error(f"an answer in JSON, got {text[:80]!r}") from None

    def _opener(self) -> urllib.request.OpenerDirector:
        handlers: list[Any] = [_NoRedirection()]
        if urlsplit(self.url).hostname in _LOOPBACK:
            # A proxy would look for the server on its own machine.
            handlers.append(urllib.request.ProxyHandler({}))
        return urllib.request.build_opener(*handlers)

    def _wait(self, seconds: float) -> None:
        seconds = min(seconds, _LONGEST_PAUSE_SECONDS)
        if self.pause is not None:
            self.pause(seconds)
        else:
            self._stopped.wait(seconds)

    def _said(self, error: urllib.error.HTTPError, end: float) -> str:
        try:
            text = _read(error, _BYTES_AT_A_TIME, end).decode(errors="replace")
        except (OSError, http.client.HTTPException):
            text = ""
        try:
            found = json.loads(text)
            inside = found.get("error", found) if isinstance(found, dict) else found
            message = inside.get("message", inside) if isinstance(inside, dict) else inside
        except (ValueError, RecursionError):
            message = text
        return f"{error.code} {' '.join(str(message).split())[:_LONGEST_TEXT]}".strip()

    def _error(
        self,
        text: str,
        kind: type[Refused] | type[StateError] = StateError,
        advice: str = "check its address and its log",
    ) -> Any:
        """The refusal in one line; a server may repeat the key, and it must not stand there."""
        shown = text if not self.key else text.replace(self.key, "***")
        return kind(f"server must give {shown} from {self.url}; {advice}")


class Refused(StateError):
    """The server answered with an error.

    status: its HTTP status.
    """

    status: int = 0

    @property
    def is_of_what_was_asked(self) -> bool:
        """Whether another prompt may be answered: this one is too long, for example."""
        return self.status in _OF_WHAT_WAS_ASKED


class _Again(Exception):
    """An attempt that may be made again."""

    def __init__(
        self, error: StateError, after: float | None = None, is_timeout: bool = False
    ) -> None:
        super().__init__(str(error))
        self.error, self.after, self.is_timeout = error, after, is_timeout


def require_timeout(name: str, seconds: Any) -> None:
    """Raise TypeError or ValueError unless it is a number of seconds that can be waited."""
    require_real(name, seconds)
    if not 0.0 < seconds <= threading.TIMEOUT_MAX:
        raise ValueError(
            f"{name} must be a number of seconds above 0, got {seconds:g}; "
            f"{TIMEOUT_SECONDS:g} is usual"
        )


def _read(response: Any, most: int, end: float) -> bytes:
    """What a response holds, and a byte more than `most` if that is more.

    Raises:
        TimeoutError: it was still coming at `end`: a limit of each piece alone is none of all.
        http.client.IncompleteRead: the connection was closed before its end.
    """
    pieces, size = [], 0
    while size <= most and (piece := response.read1(_BYTES_AT_A_TIME)):
        pieces.append(piece)
        size += len(piece)
        if time.monotonic() > end:
            raise TimeoutError("it was still coming")
    if size <= most and getattr(response, "length", None):
        raise http.client.IncompleteRead(b"", response.length)
    return b"".join(pieces)


def checked_url(url: str) -> str:
    """The address without a slash at its end; ValueError where it is of another form."""
    try:
        parts = urlsplit(url)
        fine = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        parts, fine = urlsplit(""), False
    unread = "@" in url and not parts.netloc
    if parts.username is not None or parts.query or unread:
        raise ValueError(
            "server must be an address without a name, password or query, which would be written "
            "down; give the key in an environment variable (key_from)"
        )
    # `urlsplit` passes over signs that no request takes.
    plain = url.isascii() and url.isprintable() and " " not in url
    if not fine or not plain or parts.fragment:
        raise ValueError(
            f"server must be an address like http://localhost:8000/v1, got {url!r}; correct it"
        )
    return url.rstrip("/")


def without_port(text: str) -> str:
    """A text with the addresses in it without their ports: a restarted server may have another."""
    return _PORT.sub(r"\1", text)


def is_url(text: str) -> bool:
    return text.startswith(("http://", "https://"))


def in_order(
    ask: Callable[[Item], Found],
    items: Sequence[Item],
    *,
    concurrency: int,
    stop: Callable[[], object] = lambda: None,
) -> Generator[tuple[int, Found], None, None]:
    """(number, `ask(item)`) in the order of the items, at most `concurrency` at a time.

    Args:
        stop: called where the caller leaves before the end, or one of them raises.
    """
    todo: SimpleQueue[tuple[Future[Found], Item] | None] = SimpleQueue()
    waiting: deque[tuple[int, Future[Found]]] = deque()
    threads = 0

    def work() -> None:
        while (given := todo.get()) is not None:
            future, item = given
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(ask(item))
            except BaseException as error:
                future.set_exception(error)

    try:
        for number, item in enumerate(items):
            if threads < concurrency:
                # Not of a pool, whose threads a process waits for at its end: a server may hang.
                threading.Thread(target=work, name=f"ask-{threads}", daemon=True).start()
                threads += 1
            future: Future[Found] = Future()
            waiting.append((number, future))
            todo.put((future, item))
            # As many again may be done before an earlier one is.
            if len(waiting) >= 2 * concurrency:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    except BaseException:
        stop()
        raise
    finally:
        for _, future in waiting:
            future.cancel()
        for _ in range(threads):
            todo.put(None)


def _key(variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ValueError(
            f"key_from must name an environment variable that holds the key, got {variable!r}, "
            "which is not set; set it, or leave key_from out"
        )
    if not key.isprintable() or not key.isascii():
        raise ValueError(
            f"key_from must name a variable that holds a key in plain ASCII, got {variable!r} with "
            "other characters; set it again"
        )
    return key


def _seconds(text: str | None) -> float | None:
    """Of the header Retry-After; None for a date or nothing."""
    try:
        return max(0.0, float(text)) if text else None
    except ValueError:
        return None


def _words(reason: Any) -> str:
    return error_line(reason) if isinstance(reason, BaseException) else str(reason)
