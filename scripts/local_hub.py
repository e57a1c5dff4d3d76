"""A Hugging Face hub of config.json files on localhost, for a tool that takes no local folder."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0" * 40


class _Handler(BaseHTTPRequestHandler):
    folders: dict[str, Path]

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def log_message(self, *args: object) -> None:
        """Quiet: the tools' own output is what is recorded."""

    def _answer(self, body: bool) -> None:
        content = self._content()
        self.send_response(404 if content is None else 200)
        data = b"{}" if content is None else content
        for key, value in (
            ("Content-Length", str(len(data))),
            ("Content-Type", "application/json"),
            ("X-Repo-Commit", COMMIT),
            ("ETag", f'"{hashlib.sha1(data).hexdigest()}"'),
        ):
            self.send_header(key, value)
        if content is None:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.end_headers()
        if body:
            self.wfile.write(data)

    def _content(self) -> bytes | None:
        path = self.path.split("?")[0].strip("/")
        for model, folder in self.folders.items():
            config = (folder / "config.json").read_bytes()
            if path in (f"{model}/resolve/main/config.json", f"{model}/resolve/{COMMIT}/config.json"):
                return config
            if path in (f"api/models/{model}", f"api/models/{model}/revision/main"):
                kind = json.loads(config)["model_type"]
                about = {"id": model, "sha": COMMIT, "library_name": "transformers", "siblings": []}
                return json.dumps({**about, "config": {"model_type": kind}}).encode()
        return None


def serve(folders: dict[str, Path]) -> ThreadingHTTPServer:
    """Answers for these model ids, each with its folder's config.json, until shutdown() is called."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"folders": folders}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server
