"""A hub on this machine: the few answers that huggingface_hub asks for, from files in memory."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef" * 2 + "01234567"


class Hub:
    """Models by name, each a mapping from file name to content; requests are remembered."""

    def __init__(self) -> None:
        self.models: dict[str, dict[str, bytes]] = {}
        self.asked: list[tuple[str, str, str | None]] = []  # (method, path, range)
        self.sent_bytes = 0
        self.url = ""

    def answer(self, path: str) -> tuple[int, bytes]:
        """Status and content of a path without its query."""
        words = path.strip("/").split("/")
        if words[:2] == ["api", "models"]:
            files = self.models.get("/".join(words[2:4]))
            if files is None:
                return 404, b'{"error": "Repository not found"}'
            if len(words) > 4 and words[4] == "tree":
                return 200, json.dumps([_entry(name, content) for name, content in files.items()]).encode()
            known = {"id": "/".join(words[2:4]), "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
            return 200, json.dumps(known).encode()
        files = self.models.get("/".join(words[:2]), {})
        content = files.get("/".join(words[4:])) if words[2:3] == ["resolve"] else None
        return (404, b"") if content is None else (200, content)


def _entry(name: str, content: bytes) -> dict[str, object]:
    return {"type": "file", "oid": hashlib.sha1(content).hexdigest(), "size": len(content), "path": name}


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serve on a free port until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            pass

        def do_HEAD(self) -> None:
            self.reply(body=False)

        def do_GET(self) -> None:
            self.reply(body=True)

        def reply(self, body: bool) -> None:
            path, span = self.path.split("?")[0], self.headers.get("Range")
            hub.asked.append((self.command, path, span))
            status, content = hub.answer(path)
            whole = len(content)
            if status == 200 and span:
                start, _, stop = span.removeprefix("bytes=").partition("-")
                content = content[int(start) : int(stop or whole - 1) + 1]
                status = 206
            self.send_response(status)
            if status == 404:
                missing = path.startswith("/api") or "/".join(path.split("/")[1:3]) not in hub.models
                self.send_header("X-Error-Code", "RepoNotFound" if missing else "EntryNotFound")
            if status == 206:
                self.send_header("Content-Range", f"bytes {start}-{int(start) + len(content) - 1}/{whole}")
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
            self.send_header("Accept-Ranges", "bytes")
            self.send_header(
                "Content-Type", "application/json" if path.startswith("/api") else "application/octet-stream"
            )
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if body:
                hub.sent_bytes += len(content)
                self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
