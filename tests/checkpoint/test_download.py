"""Downloads from a local server: whole and verified, or nothing."""

from __future__ import annotations

import hashlib
import http.server
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from clip_fast.checkpoint import download
from clip_fast.checkpoint.download import Pretrained
from clip_fast.checkpoint.published import OPENAI_CHECKPOINTS, resolve
from clip_fast.errors import CheckpointError


class _Server:
    """A server for one file, and what it was asked."""

    def __init__(self) -> None:
        self.body = b"the weights of a model" * 1000
        self.length: int | None = None  # what it says the body's length is, where that is not the truth
        self.status = 200
        self.asked = 0
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.asked += 1
                self.send_response(server.status)
                self.send_header("Content-Length", str(server.length or len(server.body)))
                self.end_headers()
                self.wfile.write(server.body)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/folder/model.pt"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Server]:
    server = _Server()
    thread = threading.Thread(target=server.http.serve_forever, daemon=True)
    thread.start()
    source = Pretrained(server.url, hashlib.sha256(server.body).hexdigest())
    monkeypatch.setitem(OPENAI_CHECKPOINTS, "RN50", source)
    for proxy in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(proxy, raising=False)
    yield server
    server.http.shutdown()
    server.http.server_close()


def test_a_download_is_kept_and_not_asked_for_again(server: _Server, tmp_path: Path) -> None:
    cache = tmp_path / "deep" / "cache"
    path = resolve("RN50", cache)
    assert path == cache / "model.pt"
    assert path.read_bytes() == server.body
    assert resolve("RN50", cache) == path
    assert server.asked == 1
    assert list(cache.iterdir()) == [path]


def test_the_default_cache_is_that_of_clip(server: _Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("RN50") == tmp_path / ".cache" / "clip" / "model.pt"


def test_a_damaged_copy_in_the_cache_is_fetched_again(server: _Server, tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(b"damaged")
    with pytest.warns(UserWarning, match="downloading it again"):
        assert resolve("RN50", tmp_path).read_bytes() == server.body


@pytest.mark.parametrize("case", ["wrong hash", "truncated", "not found", "refused"])
def test_a_failed_download_leaves_nothing(case: str, server: _Server, tmp_path: Path) -> None:
    message = f"model\\.pt: cannot be downloaded from {server.url}.*place it as model.pt in {tmp_path}"
    if case == "wrong hash":
        server.body = b"something else"
        message = "not whole or not genuine: its 14 bytes have SHA-256 [0-9a-f]{64}, wanted [0-9a-f]{64}"
    elif case == "truncated":
        server.length = len(server.body)
        server.body = server.body[:-100]
        message = "model\\.pt: .*not whole"
    elif case == "not found":
        server.status = 404
    else:
        server.http.shutdown()
        server.http.server_close()
    with pytest.raises(CheckpointError, match=message):
        resolve("RN50", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_download_keeps_what_was_there(server: _Server, tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(b"an older copy")
    server.status = 500
    with pytest.warns(UserWarning, match="downloading it again"), pytest.raises(CheckpointError):
        resolve("RN50", tmp_path)
    assert (tmp_path / "model.pt").read_bytes() == b"an older copy"


def test_an_interrupted_download_leaves_nothing(
    server: _Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(source: Pretrained, partial: Path) -> str:
        partial.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(download, "_fetch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        resolve("RN50", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_killed_downloads_left_is_removed(server: _Server, tmp_path: Path) -> None:
    for name in ("model.pt.1.part", "model.pt.2.part", "other.pt.3.part"):
        (tmp_path / name).touch()
    os.utime(tmp_path / "model.pt.1.part", (0, 0))
    os.utime(tmp_path / "other.pt.3.part", (0, 0))
    resolve("RN50", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.pt", "model.pt.2.part", "other.pt.3.part"]


def test_a_folder_that_cannot_be_is_said(server: _Server, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"file/model\.pt: cannot be downloaded .*place it as model\.pt in "):
        resolve("RN50", tmp_path / "file")


def test_what_another_user_left_is_left(server: _Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = tmp_path / "model.pt.1.part"
    theirs.touch()
    os.utime(theirs, (0, 0))
    unlink = Path.unlink

    def forbidden(path: Path, missing_ok: bool = False) -> None:
        if path == theirs:
            raise PermissionError(1, "Operation not permitted", str(path))
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", forbidden)
    assert resolve("RN50", tmp_path).is_file()
    assert theirs.exists()


def test_another_download_may_end_meanwhile(server: _Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its file is gone between the listing of the folder and the look at its age."""
    (tmp_path / "model.pt.another.part").touch()
    listed = Path.glob

    def glob(folder: Path, pattern: str) -> list[Path]:
        found = list(listed(folder, pattern))
        (tmp_path / "model.pt.another.part").unlink()
        return found

    monkeypatch.setattr(Path, "glob", glob)
    assert resolve("RN50", tmp_path).read_bytes() == server.body
