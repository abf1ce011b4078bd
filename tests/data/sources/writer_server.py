"""An endpoint on this machine that answers as OpenAI's chat completions do, with whatever a test wants it to say."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Texts = dict[str, str]


@dataclass
class Reply:
    """What goes back: a model's text, or a status with a body of its own."""

    text: str = ""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: Any = None

    def encoded(self) -> bytes:
        body = self.body
        if body is None:
            choice = {"index": 0, "message": {"role": "assistant", "content": self.text}, "finish_reason": "stop"}
            body = {"object": "chat.completion", "choices": [choice], "usage": {"total_tokens": 100}}
        return body.encode() if isinstance(body, str) else json.dumps(body).encode()


Answerer = Callable[[dict[str, Any]], Reply]


def asked_texts(request: dict[str, Any]) -> Texts:
    """The texts that a request wants reworded."""
    texts: Texts = json.loads(request["messages"][1]["content"])["rewrite"]
    return texts


def reword(change: Callable[[str, str], str]) -> Answerer:
    """An endpoint that answers with change(name, text) for every text."""
    return lambda request: Reply(json.dumps({k: change(k, v) for k, v in asked_texts(request).items()}))


def good(name: str, text: str) -> str:
    """New words around the same facts."""
    return f"Alright, {text[0].lower()}{text[1:]}" if name == "response" else f"Let me think. {text}"


@dataclass
class Endpoint:
    """A running server."""

    url: str
    answerer: Answerer
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)


@contextmanager
def endpoint(answerer: Answerer) -> Iterator[Endpoint]:
    """A server for the length of a test; `answerer` may be exchanged while it runs."""
    running = Endpoint("", answerer)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert self.path == "/v1/chat/completions"
            running.requests.append(request)
            running.headers.append(dict(self.headers))
            reply = running.answerer(request)
            encoded = reply.encoded()
            self.send_response(reply.status)
            for name, value in {"Content-Length": str(len(encoded)), **reply.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(encoded)

        def log_message(self, *_: Any) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    running.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield running
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)
