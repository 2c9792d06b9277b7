"""A small Hugging Face hub on 127.0.0.1: the few routes by which its client finds and fetches a model."""

import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

COMMIT = "c0ffee" + 34 * "0"
GATED = "owner/gated"


class Hub:
    """models: a folder for each name. requests: when each came, in seconds since the epoch, and what it asked
    for. fetched: how often each file was sent whole."""

    def __init__(self, models: dict[str, Path]) -> None:
        self.models = models
        self.requests: list[tuple[float, str]] = []
        self.fetched: Counter[str] = Counter()

    @contextmanager
    def serving(self) -> Iterator[str]:
        """Its URL, for as long as it serves."""
        hub = self

        class Handler(_Handler):
            served = hub

        with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
            thread.start()
            try:
                yield f"http://127.0.0.1:{server.server_port}"
            finally:
                server.shutdown()
                thread.join(60)


class _Handler(BaseHTTPRequestHandler):
    served: Hub
    protocol_version = "HTTP/1.1"
    timeout = 30

    def do_GET(self) -> None:
        path = urlsplit(self.path).path.strip("/")
        self.served.requests.append((time.time(), f"{self.command} {path}"))
        if path.startswith("api/models/"):
            return self._about(path.removeprefix("api/models/"))
        name, _, rest = path.partition("/resolve/")
        return self._file(name, rest.partition("/")[2])

    do_HEAD = do_GET  # noqa: N815 - the base class's name

    def _about(self, path: str) -> None:
        name = "/".join(path.split("/")[:2])
        if name == GATED:
            return self._send(403, b"{}", {"X-Error-Code": "GatedRepo"})
        if name not in self.served.models:
            return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        folder = self.served.models[name]
        files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
        names = [str(p.relative_to(folder)) for p in files]
        answer: object = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": file} for file in names]}
        if "/tree/" in path:
            answer = [
                {"type": "file", "path": file, "size": p.stat().st_size, "oid": _etag(p)}
                for file, p in zip(names, files, strict=True)
            ]
        return self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _file(self, name: str, file: str) -> None:
        path = self.served.models.get(name, Path("/nowhere")) / file
        if not path.is_file():
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        if self.command == "GET":
            self.served.fetched[file] += 1
        return self._send(200, path.read_bytes(), {"ETag": f'"{_etag(path)}"', "X-Repo-Commit": COMMIT})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


def _etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()
