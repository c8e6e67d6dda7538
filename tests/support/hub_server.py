"""A stand-in for the Hugging Face Hub: it makes repositories, takes commits and gives files.

Only small files are committed as here, in the request itself; the real Hub takes weights by Xet.
"""

import base64
import hashlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

SHA = 40 * "a"  # of every repository's one commit


class Server(ThreadingHTTPServer):
    """`repositories`: bytes of files by repository and path; `token`: of the last commit.

    `refuses`: the status that commits are answered with.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.token: str | None = None
        self.refuses: int | None = None
        self.url = f"http://127.0.0.1:{self.server_port}"

    def post(self, path: list[str], body: bytes) -> Any:
        match path:
            case ["api", "repos", "create"]:
                asked = json.loads(body)
                name = f"{asked['organization']}/{asked['name']}"
                self.repositories.setdefault(name, {})
                return {"url": f"{self.url}/{name}"}
            case ["api", "validate-yaml"]:
                return {"errors": [], "warnings": []}
            case ["api", "models", _, _, "preupload", "main"]:
                files = [{"path": each["path"]} for each in json.loads(body)["files"]]
                how = {"uploadMode": "regular", "shouldIgnore": False}
                return {"files": [each | how for each in files]}
            case ["api", "models", user, name, "commit", "main"]:
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        content = base64.b64decode(line["value"]["content"])
                        self.repositories[f"{user}/{name}"][line["value"]["path"]] = content
                address = f"{self.url}/{user}/{name}/commit/{SHA}"
                return {"commitUrl": address, "commitOid": SHA, "hookOutput": "", "success": True}
        return None

    def get(self, path: list[str]) -> Any:
        match path:
            case ["api", "models", user, name, "revision", "main"]:
                if f"{user}/{name}" in self.repositories:
                    return {"id": f"{user}/{name}", "sha": SHA, "siblings": []}
            case ["api", "models", user, name, "tree", _]:
                files = self.repositories[f"{user}/{name}"].items()
                return [
                    {"type": "file", "path": file, "size": len(content), "oid": "b"}
                    for file, content in files
                ]
            case [user, name, "resolve", _, file]:
                return self.repositories[f"{user}/{name}"][file]
        return None


class _Handler(BaseHTTPRequestHandler):
    server: Server  # in HTTP/1.0: no connection outlives the server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self._path()
        if "commit" in path:
            self.server.token = self.headers.get("Authorization")
        if self.server.refuses and "commit" in path:
            self._answer(self.server.refuses, b"{}")
        else:
            self._say(self.server.post(path, body))

    def do_GET(self) -> None:
        self._say(self.server.get(self._path()))

    do_HEAD = do_GET

    def _path(self) -> list[str]:
        return unquote(urlsplit(self.path).path).strip("/").split("/")

    def _say(self, answer: Any) -> None:
        if answer is None:
            self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif isinstance(answer, bytes):
            tag = {"ETag": hashlib.sha256(answer).hexdigest(), "X-Repo-Commit": SHA}
            self._answer(200, answer, tag)
        else:
            self._answer(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _answer(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Say nothing."""
