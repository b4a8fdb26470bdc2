"""A conversation as a small web page, and as JSON for programs: `ask --serve`.

    curl -H "Content-Type: application/json" -d '{"question": "Who?"}' http://127.0.0.1:8000/answer

Questions are answered one at a time. Nothing is kept of them, and the page loads nothing else.
"""

import contextlib
import json
import logging
import re
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from src.evaluation.answers import answer_spans
from src.runtime.errors import InputError, first_line
from src.runtime.terminal import say
from src.tools.frame import frame
from src.tools.replies import Reply, clean

LARGEST_BODY = 1 << 16  # bytes
_MOST_READ = 1 << 25  # of a larger body, so that its sender reads the refusal
_LOOPBACK = {"127.0.0.1", "localhost"}
_METHODS = {"/": "GET", "/answer": "POST"}
Answer = Callable[[str], Reply]


class Refusal(Exception):
    """A request that is not answered: its HTTP status, and why."""


def as_json(question: str, reply: Reply) -> dict[str, Any]:
    """A reply for programs. `marks` are the answer's [start, end) in the passage's characters."""
    about = reply._asdict() | {"question": question, "probability": reply.probability}
    marks = [answer_spans([reply.answer], passage.text) for passage in reply.passages]
    passages = zip(reply.passages, marks, strict=True)
    return about | {"passages": [p._asdict() | {"marks": spans} for p, spans in passages]}


class _Handler(BaseHTTPRequestHandler):
    """One request: it is checked, then answered by the server's `ask`."""

    server: "Server"
    server_version, sys_version = "ask", ""
    timeout = 20  # seconds until a client that sends nothing is left

    def _handle(self) -> None:
        try:
            self._check()
            if self.command == "GET":
                return self._send(200, self.server.page, "text/html")
            status, content = 200, self.server.ask(self._read_question())
        except Refusal as refusal:
            status, content = refusal.args[0], {"error": refusal.args[1]}
        except InputError as error:
            status, content = 500, {"error": str(error)}
        text = json.dumps(content, allow_nan=False).encode()
        return self._send(status, text, "application/json")

    do_GET = do_POST = _handle

    def _check(self) -> None:
        """Refuse what is not one of the two requests. A page of another site can make a browser
        send requests here, under a name of its own (DNS rebinding) or as a form, which is no JSON
        and needs no permission."""
        named = self.headers.get("Host", "").split(":")[0]
        if self.server.is_local and named.lower() not in _LOOPBACK:
            raise Refusal(403, "this page is at 127.0.0.1 and localhost alone")
        path = self.path.split("?")[0]
        if path not in _METHODS:
            raise Refusal(404, "only / and /answer are here")
        if self.command != _METHODS[path]:
            raise Refusal(405, f"{path} takes {_METHODS[path]}")
        if path == "/answer" and self.headers.get_content_type() != "application/json":
            raise Refusal(415, "send JSON, with Content-Type: application/json")

    def _read_question(self) -> str:
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch("[0-9]{1,18}", length):
            raise Refusal(411, "send the body's Content-Length")
        body = self.rfile.read(min(int(length), _MOST_READ))
        if int(length) > LARGEST_BODY:
            raise Refusal(413, f"a body has at most {LARGEST_BODY:,} bytes")
        with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError, RecursionError):
            if question := json.loads(body)["question"].strip():
                return question
        raise Refusal(400, 'the body must be JSON such as {"question": "Who named polonium?"}')

    def _send(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Security-Policy", self.server.policy)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, form: str, *values: object) -> None:
        """Nothing: questions are logged when they have been answered."""


class Server(ThreadingHTTPServer):
    """The page at an address. Threads, because a browser keeps connections open that it may never
    use; but one question at a time."""

    def __init__(self, answer: Answer, host: str, port: int, log: logging.Logger):
        self._answer, self._log, self._lock = answer, log, threading.Lock()
        page, policy = frame(Path(__file__).with_suffix(".html"))
        self.page, self.policy = page.encode(), f"{policy}; connect-src 'self'"
        super().__init__((host, port), _Handler)
        self.is_local = self.server_address[0] in _LOOPBACK

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is no news; anything else is a bug."""
        if not isinstance(sys.exception(), (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)

    def ask(self, question: str) -> dict[str, Any]:
        with self._lock:
            start = time.perf_counter()
            reply = self._answer(question)
            seconds = time.perf_counter() - start
        say(self._log, "answered", "%s (%.2f s)", clean(question)[:100], seconds)
        return as_json(question, reply)


def serve(answer: Answer, host: str, port: int, log: logging.Logger) -> None:
    """Answer until Ctrl-C. Errors: `InputError` for an address that cannot be taken."""
    try:
        server = Server(answer, host, port, log)
    except OSError as error:
        problem = f"cannot be served ({first_line(error)}); give another --host or --port"
        raise InputError(f"{host}, port {port}: {problem}") from None
    say(log, "page", "http://%s:%d/ (Ctrl-C stops)", host, server.server_address[1])
    if not server.is_local:
        risk = "everyone who reaches this address can ask and read passages: no password, no "
        say(log, "warning", "--host %s: %s", host, risk + "encryption, your hardware")
    with server:
        server.serve_forever()
