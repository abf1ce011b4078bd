"""The part of W&B's server that its client asks for, on loopback: it keeps the lines of every run's history by their place.

Real W&B cannot be asked by a test. This is what `wandb`'s own client sends and expects; the client is the real one.
"""

from __future__ import annotations

import gzip
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

USER = {"id": "u", "entity": "me", "username": "me", "email": "", "flags": "{}", "teams": {"edges": []}}


class WandbServer:
    """`with WandbServer() as server`: `server.url`, `server.runs[id]`."""

    def __init__(self, *, broken: bool = False) -> None:
        self.runs: dict[str, dict[str, Any]] = {}
        self.broken = broken
        """Answers that are not what the client expects: they crash its service."""
        handler = type("Handler", (_Handler,), {"wandb": self})
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def __enter__(self) -> WandbServer:
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.http.shutdown()
        self.http.server_close()

    def run(self, name: str) -> dict[str, Any]:
        return self.runs.setdefault(name, {"history": {}, "config": {}, "summary": {}})

    def history(self, name: str) -> list[dict[str, Any]]:
        """A run's lines in the order of their places."""
        lines = self.run(name)["history"]
        return [json.loads(lines[k]) for k in sorted(lines)]

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        """GraphQL."""
        if "upsertBucket" in query:
            run = self.run(variables["name"])
            run["config"] |= json.loads(variables.get("config") or "{}")
            project = {"id": "p", "name": "coalm", "entity": {"id": "e", "name": "me"}}
            bucket = {"id": "r", "name": variables["name"], "displayName": "n", "project": project}
            return {"upsertBucket": {"bucket": bucket | {"config": "{}", "historyLineCount": 0}, "inserted": True}}
        if "RunResumeStatus" in query:
            return {
                "model": {
                    "id": "p",
                    "name": "coalm",
                    "entity": {"id": "e", "name": "me"},
                    "bucket": self._bucket(variables),
                }
            }
        if "createRunFiles" in query and not self.broken:
            files = [{"name": name, "uploadUrl": f"{self.url}/storage/{name}"} for name in variables["files"]]
            return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
        return {"viewer": USER} if "viewer" in query else {}

    def _bucket(self, variables: dict[str, Any]) -> dict[str, Any] | None:
        run = self.runs.get(variables["name"])
        if run is None or not run["history"]:
            return None
        tail = [run["history"][max(run["history"])]]
        return {
            "id": "r", "name": variables["name"], "displayName": "n", "summaryMetrics": json.dumps(run["summary"]),
            "logLineCount": 0, "historyLineCount": max(run["history"]) + 1, "eventsLineCount": 0,
            "historyTail": json.dumps(tail), "eventsTail": "[]", "config": json.dumps(run["config"]), "tags": [],
            "notes": "", "wandbConfig": '{"t": 1}',
        }  # fmt: skip

    def stream(self, name: str, body: dict[str, Any]) -> None:
        """Lines of files, each file's from an offset on."""
        run = self.run(name)
        history = body.get("files", {}).get("wandb-history.jsonl")
        if history:
            run["history"].update({history["offset"] + i: line for i, line in enumerate(history["content"])})
        summary = body.get("files", {}).get("wandb-summary.json")
        if summary:
            run["summary"] |= json.loads(summary["content"][0])


class _Handler(BaseHTTPRequestHandler):
    wandb: WandbServer

    def log_message(self, *_: object) -> None: ...

    def do_POST(self) -> None:
        body = self._body()
        if self.path == "/graphql":
            asked = json.loads(body)
            self._reply({"data": self.wandb.answer(asked["query"], asked.get("variables") or {})})
        elif self.path.endswith("/file_stream"):
            self.wandb.stream(self.path.split("/")[-2], json.loads(body))
            self._reply({})
        else:
            self._reply({})

    def do_PUT(self) -> None:
        self._body()
        self._reply({})

    def do_GET(self) -> None:
        self._reply({})

    def _body(self) -> bytes:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def _reply(self, answer: dict[str, Any]) -> None:
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
