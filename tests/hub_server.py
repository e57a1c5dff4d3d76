"""A stand-in for the hub's HTTP interface on localhost: repositories are made, asked about and written to."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_aSecretThatNobodyMaySee"
_COMMIT = "1" * 40


@dataclass
class Repository:
    """What the hub would hold of one repository."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    n_commits: int = 0


@dataclass
class Hub:
    """The server's state, which tests look into."""

    address: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)  # LFS: SHA-256 -> content
    closed: bool = False  # no repository is made: HTTP 503
    broken: bool = False  # uploads of large files end in an error that repeats the request's header


@contextmanager
def hub_server() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *args: object) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        if self._denied():
            return
        path = self.path.split("?")[0]
        if path == "/api/whoami-v2":
            self._send({"type": "user", "name": "me", "orgs": [], "auth": {"type": "access_token"}})
            return
        name = path.removeprefix("/api/models/").split("/revision/")[0]
        found = self.hub.repositories.get(name)
        if found is None:
            self._send({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
            return
        siblings = [{"rfilename": file} for file in found.files]
        self._send({"id": name, "sha": _COMMIT, "private": found.private, "siblings": siblings})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self._denied():
            return
        path = self.path.split("?")[0]
        if path == "/api/repos/create":
            self._create(json.loads(body))
        elif path == "/api/validate-yaml":
            self._send({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            self._modes(json.loads(body))
        elif path.endswith("/info/lfs/objects/batch"):
            self._batch(json.loads(body))
        elif "/commit/" in path:
            self._commit(path, body)
        else:
            self._send({"error": f"nothing at {path}"}, 404)

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.hub.objects[self.path.rpartition("/")[2]] = content
        self._send({})

    def _denied(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return False
        self._send({"error": "Invalid credentials"}, 401, {"X-Error-Message": "Invalid credentials"})
        return True

    def _create(self, asked: dict[str, Any]) -> None:
        if self.hub.closed:
            self._send({"error": "busy"}, 503)
            return
        name = f"{asked['organization'] or 'me'}/{asked['name']}"
        if name in self.hub.repositories:
            self._send({"error": "exists", "url": f"{self.hub.address}/{name}"}, 409)
            return
        first = {".gitattributes": b""}
        self.hub.repositories[name] = Repository(asked["visibility"] == "private", first)
        self._send({"url": f"{self.hub.address}/{name}", "name": name})

    def _modes(self, asked: dict[str, Any]) -> None:
        """As on the hub: text is committed as it is, the rest goes to the store of large files."""
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".gguf")) else "regular",
                "shouldIgnore": False,
            }
            for file in asked["files"]
        ]
        self._send({"files": files})

    def _batch(self, asked: dict[str, Any]) -> None:
        if self.hub.broken:
            self._send({"error": f"refused: {self.headers['Authorization']}"}, 403)
            return
        objects = [
            {**item, "actions": {"upload": {"href": f"{self.hub.address}/lfs/{item['oid']}"}}}
            for item in asked["objects"]
        ]
        self._send({"transfer": "basic", "objects": objects})

    def _commit(self, path: str, body: bytes) -> None:
        name = path.removeprefix("/api/models/").split("/commit/")[0]
        repository = self.hub.repositories[name]
        for line in body.decode().splitlines():
            item = json.loads(line)
            if item["key"] == "file":
                value = item["value"]
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                repository.files[item["value"]["path"]] = self.hub.objects[item["value"]["oid"]]
        repository.n_commits += 1
        self._send({"commitUrl": f"{self.hub.address}/{name}/commit/{_COMMIT}", "commitOid": _COMMIT})

    def _send(self, answer: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(data)
