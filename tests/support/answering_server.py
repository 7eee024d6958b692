"""A server on this machine that answers as OpenAI's API does, for tests of what asks one."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Asked:
    """What the server was asked: (path, body, headers) of each request but those for models."""

    def __init__(self):
        self.requests, self.at_once, self.most_at_once = [], 0, 0
        self.lock = threading.Lock()


def text_of(body) -> str:
    """What a request gives to be continued or answered."""
    return body["prompt"] if "prompt" in body else body["messages"][-1]["content"]


@contextmanager
def answering(
    reply: Callable[[dict], str | tuple[int, dict, dict]] = lambda body: f"echo {text_of(body)}",
    *,
    models=("tiny",),
) -> Iterator[tuple[str, Asked]]:
    """The server's address, and what it is asked.

    Args:
        reply: body -> the answer's text, or (status, headers, body) of another response; a body may
            be an iterator of bytes, which are sent as they come before the connection is closed.
        models: None: it does not say which there are.
    """
    asked = Asked()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def do_GET(self):
            if models is None:
                self._send(404, {}, {"error": "no such page"})
            else:
                self._send(200, {}, {"data": [{"id": name} for name in models]})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with asked.lock:
                asked.requests.append((self.path, body, dict(self.headers)))
                asked.at_once += 1
                asked.most_at_once = max(asked.most_at_once, asked.at_once)
            found = reply(body)
            with asked.lock:
                asked.at_once -= 1
            if isinstance(found, tuple):
                return self._send(*found)
            chat = self.path.endswith("/chat/completions")
            part = {"message": {"role": "assistant", "content": found}} if chat else {"text": found}
            choice = {"index": 0, "finish_reason": "stop", **part}
            self._send(200, {}, {"choices": [choice], "usage": {"completion_tokens": 3}})

        # Whoever asked may have gone.
        def _send(self, status, headers, body):
            if isinstance(body, Iterator):
                self.close_connection = True
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                with suppress(OSError):
                    self.end_headers()
                    for piece in body:
                        self.wfile.write(piece)
                return
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            with suppress(OSError):
                self.end_headers()
                self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
