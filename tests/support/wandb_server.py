"""A stand-in for W&B's server, which cannot run here: it answers what a run asks and keeps rows.

Rows are kept as the real one documents it: a client says at which line its rows go (`offset`), and
those that were there from that line on are replaced.
"""

import gzip
import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Server(ThreadingHTTPServer):
    """`rows`: lines of history by run id; `asked`: (operation, variables) of every question."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.rows: dict[str, list[dict[str, Any]]] = {}
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client: Any) -> None:
        """A client that has left."""

    def answer(self, operation: str, variables: dict[str, Any]) -> dict[str, Any]:
        self.asked.append((operation, variables))
        match operation:
            case "Viewer":
                return {"viewer": {"id": "u", "entity": "e", "username": "u", "flags": "{}"}}
            case "ArtifactType":
                return {"project": None}
            case "RunResumeStatus":
                rows = self.rows.get(variables["name"])
                return {
                    "model": {
                        "id": "p",
                        "name": "p",
                        "bucket": _bucket(variables["name"], rows) if rows else None,
                    }
                }
            case "UpsertBucket":
                rows = self.rows.setdefault(variables["name"], [])
                return {"upsertBucket": {"bucket": _bucket(variables["name"], rows)}}
            case "CreateRunFiles":
                files = [
                    {"name": name, "uploadUrl": f"{self.url}/upload"} for name in variables["files"]
                ]
                return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
            case "CreateArtifact":
                artifact = {"id": "a", "state": "COMMITTED", "artifactSequence": {"id": "s"}}
                return {"createArtifact": {"artifact": artifact}}
        return {}

    def stream(self, id: str, files: dict[str, Any]) -> None:
        chunk = files.get("wandb-history.jsonl")
        if chunk:
            rows = self.rows.setdefault(id, [])
            rows[chunk["offset"] :] = map(json.loads, chunk["content"])


def _bucket(name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    project = {"id": "p", "name": "p", "entity": {"id": "e", "name": "e"}}
    return {
        "id": name,
        "name": name,
        "project": project,
        "historyLineCount": len(rows),
        "eventsLineCount": 0,
        "logLineCount": 0,
        "historyTail": json.dumps([json.dumps(row) for row in rows[-1:]]),
        "eventsTail": "[]",
        "summaryMetrics": "{}",
        "config": "{}",
        "tags": [],
        "wandbConfig": '{"t": 1}',  # by which W&B knows a run that has begun
    }


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        answer: dict[str, Any] = {}
        if self.path == "/graphql":
            question = json.loads(body)
            operation = re.search(r"(?:query|mutation)\s+(\w+)", question["query"])
            variables = question.get("variables") or {}
            answer = {"data": self.server.answer(operation[1] if operation else "", variables)}
        elif self.path.endswith("/file_stream"):
            self.server.stream(self.path.split("/")[-2], json.loads(body).get("files") or {})
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_PUT = do_POST

    def log_message(self, format: str, *arguments: Any) -> None:
        pass
