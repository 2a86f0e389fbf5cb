"""A small Hugging Face hub on the loopback device: what huggingface_hub asks of the real one, and no more."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import unquote, urlsplit

from huggingface_hub import constants, file_download

LARGE = (".safetensors", ".bin", ".pt")  # files that the real hub has on another host, to which it redirects


class LoopbackHub:
    """Repositories by name, each with folders by branch, tag or commit.

    `requests` are those that came, as "METHOD path". `cut_after` bytes of a large file the connection is broken, once.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, Path]] = {}
        self.gated: dict[str, str] = {}  # by repository, the token that is let in
        self.requests: list[str] = []
        self.ranges: list[str] = []
        self.cut_after: int | None = None
        self.address = ""

    def add(self, repository: str, folder: Path, *, revision: str = "main", token: str | None = None) -> str:
        """Serves a folder, and gives its commit, by which it is served too."""
        commit = hashlib.sha1(f"{repository} {folder}".encode()).hexdigest()
        self.repositories.setdefault(repository, {}).update({revision: folder, commit: folder})
        if token is not None:
            self.gated[repository] = token
        return commit

    def downloads(self) -> list[str]:
        """The files whose contents were asked for, in their order, and each once."""
        found = (
            re.search(r"^GET (?:/[^/]+/[^/]+/resolve|/large/[^/]+/[^/]+)/[^/]+/(.+)$", line) for line in self.requests
        )
        return list(dict.fromkeys(match[1] for match in found if match))


@contextmanager
def loopback_hub() -> Iterator[LoopbackHub]:
    """A hub that answers at its `address`."""
    hub = LoopbackHub()

    class Handler(_Handler):
        served = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def visit(hub: LoopbackHub, cache: Path, patch: Any, *, offline: bool = False) -> None:
    """Points huggingface_hub of this process, which has read its environment already, at a hub and a cache."""
    patch.setattr(constants, "ENDPOINT", hub.address)
    template = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
    for module in (constants, file_download):  # releases before 1.0 have it in both
        patch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))
    patch.setattr(constants, "HF_HUB_OFFLINE", offline)
    patch.delenv("HF_TOKEN", raising=False)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    served: ClassVar[LoopbackHub]

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.served.requests.append(f"{self.command} {path}")
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path)
        resolve = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        large = re.fullmatch(r"/large/([^/]+/[^/]+)/([^/]+)/(.+)", path)
        match = api or resolve or large
        if match is None or match[1] not in self.served.repositories:
            return self._refuse(401, "RepoNotFound", "Invalid username or password.")
        folders = self.served.repositories[match[1]]
        revision = match[2] or "main"
        if revision not in folders:
            return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        folder = folders[revision]
        commit = next(name for name, other in folders.items() if other == folder and len(name) == 40)
        if api:
            names = [{"rfilename": str(file.relative_to(folder))} for file in folder.rglob("*") if file.is_file()]
            return self._send(json.dumps({"id": match[1], "sha": commit, "siblings": names}).encode())
        token = self.served.gated.get(match[1])
        if token and self.headers.get("Authorization") != f"Bearer {token}":
            return self._refuse(403, "GatedRepo", "Access to this model is restricted.")
        file = folder / match[3]
        if not file.is_file():
            return self._refuse(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
        content = file.read_bytes()
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        if resolve and file.name.endswith(LARGE):
            location = f"{self.served.address}/large/{match[1]}/{commit}/{match[3]}"
            headers = {"Location": location, "X-Linked-ETag": etag, "X-Linked-Size": str(len(content))}
            return self._send(b"", 302, {"X-Repo-Commit": commit, **headers})
        return self._send(content, headers={"ETag": etag, "X-Repo-Commit": commit, "Accept-Ranges": "bytes"})

    def _refuse(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        self._send(b"{}", status, {"X-Error-Code": code, "X-Error-Message": message, **(headers or {})})

    def _send(self, content: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        wanted, total = self.headers.get("Range"), len(content)
        if wanted and status == 200:
            self.served.ranges.append(wanted)
            start = int(wanted.removeprefix("bytes=").split("-")[0])
            content, status = content[start:], 206
            headers = {**(headers or {}), "Content-Range": f"bytes {start}-{total - 1}/{total}"}
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.served.cut_after is not None and self.path.startswith("/large/"):
            content, self.served.cut_after = content[: self.served.cut_after], None
            self.close_connection = True
        self.wfile.write(content)
