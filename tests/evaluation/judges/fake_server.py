"""A server that speaks the chat completions protocol and misbehaves on demand."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any

from tests.local_server import LocalServer

KEY = "sk-a-secret-0123456789"


@dataclass
class Misdeed:
    """What is done instead of answering: ``status`` and ``body`` as they are, after ``delay`` seconds; or nothing at all."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    hang_up: bool = False
    cut: int = 0  # bytes of the body that are announced and never sent


def says(text: Any) -> bytes:
    return json.dumps({"choices": [{"index": 0, "message": {"role": "assistant", "content": text}}]}).encode()


def same_or_not(question: str) -> str:
    """5 where the given answer is the correct one, word for word, else 1."""
    lines = dict(line.split(": ", 1) for line in question.splitlines() if ": " in line)
    return '{"score": 5}' if lines["Given answer"] == lines["Correct answer"] else '{"score": 1}'


class FakeServer(LocalServer):
    """Attributes:
    requests: (headers in small letters, body) of every request.
    misdeeds: done one after another, before anything is answered.
    busiest: the most requests that were under way at once.
    """

    def __init__(self, answer: Callable[[str], str] = same_or_not, key: str | None = None) -> None:
        self.answer, self.key = answer, key
        self.requests: list[tuple[dict[str, str], dict[str, Any]]] = []
        self.times: list[float] = []
        self.misdeeds: list[Misdeed] = []
        self.always: Callable[[str], Misdeed | None] = lambda question: None
        self.slow = 0.0
        self.busiest = self._busy = 0
        self._lock = threading.Lock()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                fake._serve(self)

            def log_message(self, format: str, *args: Any) -> None: ...

        super().__init__(Handler)
        self.url += "/v1"

    @property
    def questions(self) -> list[str]:
        return [body["messages"][-1]["content"] for _, body in self.requests]

    def _serve(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        question = body["messages"][-1]["content"]
        with self._lock:
            self.requests.append(({name.lower(): value for name, value in handler.headers.items()}, body))
            self.times.append(time.monotonic())
            self._busy += 1
            self.busiest = max(self.busiest, self._busy)
            misdeed = self.misdeeds.pop(0) if self.misdeeds else self.always(question)
        time.sleep(self.slow)
        with self._lock:
            self._busy -= 1  # before the reply leaves: whoever asks next is not counted beside this one
        if handler.path != "/v1/chat/completions":
            misdeed = Misdeed(404, b'{"error": {"message": "no such path"}}')
        elif self.key and handler.headers["Authorization"] != f"Bearer {self.key}":
            told = f"Incorrect API key provided: {handler.headers['Authorization']}"
            misdeed = Misdeed(401, json.dumps({"error": {"message": told}}).encode())
        self._reply(handler, misdeed or Misdeed(body=says(self.answer(question))))

    def _reply(self, handler: BaseHTTPRequestHandler, reply: Misdeed) -> None:
        time.sleep(reply.delay)
        if reply.hang_up:
            handler.connection.close()
            return
        handler.send_response(reply.status)
        for name, value in ({"Content-Length": str(len(reply.body) + reply.cut)} | reply.headers).items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(reply.body)
