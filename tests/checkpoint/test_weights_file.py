"""Weights files: what is none, and code in one, which does not run."""

from __future__ import annotations

import functools
import pickle
import resource
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from clip_fast.checkpoint.weights_file import read_weights
from clip_fast.errors import CheckpointError


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"x", "neither a PyTorch file nor safetensors"),
        (b"#!/bin/sh\nexit\n", "neither a PyTorch file nor safetensors"),
        (b"\xff\xd8\xff\xe0 a photograph", "neither a PyTorch file nor safetensors"),
        (b"PK\x03\x04 and no more", "truncated or damaged"),
        (b"\x80\x02 no pickle", "truncated or damaged"),
        (b"\x10\0\0\0\0\0\0\0{not json at all}", "truncated or damaged"),
        (b"\xff\xff\xff\xff\xff\xff\xff\x7f{", "truncated or damaged"),
    ],
)
def test_what_is_no_checkpoint(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(CheckpointError, match=f"file: .*{message}"):
        read_weights(tmp_path / "file")


@pytest.mark.parametrize("content", [[1, 2], torch.zeros(3), "text", {"state_dict": [1]}], ids=str)
def test_what_holds_no_state_dict(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match=r"it holds (list|Tensor|str), not a state dict"):
        read_weights(tmp_path / "m.pt")


class _Malicious:
    """Creates a file when it is unpickled carelessly."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("form", ["zip", "legacy", "bare pickle", "torchscript", "builtin in torchscript"])
def test_code_in_a_file_does_not_run(form: str, tmp_path: Path) -> None:
    marker, path = tmp_path / "marker", tmp_path / "model.pt"
    content = {"visual.conv1.weight": _Malicious(marker)}
    if form in ("zip", "legacy"):
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    elif form == "bare pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        touch = f"c__builtin__\neval\n(V__import__('pathlib').Path({str(marker)!r}).touch()\ntR."
        data = pickle.dumps(content, protocol=2) if form == "torchscript" else touch.encode()
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", data)
            archive.writestr("archive/constants.pkl", pickle.dumps(()))
    with pytest.raises(CheckpointError, match=r"model\.pt: refused: its pickle wants .*could run code"):
        read_weights(path)
    assert not marker.exists()

    if form == "bare pickle":  # the test would see the file if it were made
        pickle.loads(path.read_bytes())
        assert marker.exists()


@pytest.mark.parametrize("suffix", ["safetensors", "pt", "bin"])
def test_a_pointer_of_git_lfs_is_named(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"model.{suffix}"
    path.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 605157884\n")
    with pytest.raises(CheckpointError, match=r"is a pointer of git-lfs.*: run `git lfs pull`"):
        read_weights(path)


# --- archives that are larger than their file ------------------------------------------------------------------------


@functools.cache
def deflated_zeros() -> tuple[bytes, int]:
    """A gigabyte of zeros, deflated, and its CRC. A part that is flushed in full can be repeated."""
    zeros, crc = bytes(1 << 24), 0
    deflate = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    part = deflate.compress(zeros) + deflate.flush(zlib.Z_FULL_FLUSH)
    for _ in range(64):
        crc = zlib.crc32(zeros, crc)
    return part * 64 + deflate.flush(), crc


def write_zeros(archive: zipfile.ZipFile, name: str) -> None:
    """Adds them as a member, as `zipfile` would, which deflates them anew."""
    packed, crc = deflated_zeros()
    info = zipfile.ZipInfo(name)
    info.compress_type, info.file_size, info.compress_size, info.CRC = zipfile.ZIP_DEFLATED, 1 << 30, len(packed), crc
    archive.open(name, "w").close()  # takes the place in the directory
    member = archive.NameToInfo[name]
    file: Any = archive.fp
    file.seek(member.header_offset)
    info.header_offset = member.header_offset
    file.write(info.FileHeader() + packed)
    archive.filelist[archive.filelist.index(member)] = archive.NameToInfo[name] = info
    archive.start_dir = file.tell()


def overlap(path: Path) -> None:
    """Makes every entry of the directory stand for the largest member."""
    with zipfile.ZipFile(path, "a") as archive:
        large = max(archive.infolist(), key=lambda info: info.file_size)
        archive.NameToInfo.clear()
        for number, info in enumerate(archive.filelist):
            info.header_offset, info.file_size, info.compress_size, info.CRC = (
                large.header_offset, large.file_size, large.compress_size, large.CRC,
            )  # fmt: skip
            archive.NameToInfo[f"{number}"] = info
        archive._didModify = True  # type: ignore[attr-defined]


@pytest.mark.parametrize("packed", ["data.pkl", "data/0", "constants.pkl", "version"])
@pytest.mark.parametrize("torchscript", [False, True])
def test_packed_archives_are_refused(torchscript: bool, packed: str, tmp_path: Path) -> None:
    """A megabyte would become a gigabyte."""
    path = tmp_path / "m.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        if torchscript:
            archive.writestr("archive/constants.pkl", b"\x80\x02).", zipfile.ZIP_STORED)
        write_zeros(archive, f"archive/{packed}")
    assert path.stat().st_size < 1 << 21
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match=rf"refused: its archive/{packed} is compressed"):
        read_weights(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024  # KiB


def test_the_packed_archive_holds_a_gigabyte(tmp_path: Path) -> None:
    """Otherwise the refusals above would prove nothing."""
    with zipfile.ZipFile(tmp_path / "m.pt", "w") as archive:
        write_zeros(archive, "archive/version")
    with zipfile.ZipFile(tmp_path / "m.pt") as archive:
        assert archive.testzip() is None  # unpacks it, and compares length and CRC
        assert [info.file_size for info in archive.infolist()] == [1 << 30]


@pytest.mark.parametrize("torchscript", [False, True])
def test_a_packed_archive_that_is_called_code_is_refused(torchscript: bool, tmp_path: Path) -> None:
    """TorchScript's code is packed, and is not read: it is in a folder `code` below the archive's own."""
    whole, packed = tmp_path / "code.pt", tmp_path / "packed.pt"
    if torchscript:
        torch.jit.trace(torch.nn.Linear(8, 8), torch.zeros(1, 8)).save(str(whole))
    else:
        torch.save({"weight": torch.zeros(8, 8)}, whole)
    with zipfile.ZipFile(whole) as archive, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as copy:
        assert {name.partition("/")[0] for name in archive.namelist()} == {"code"}
        for name in archive.namelist():
            copy.writestr(name, archive.read(name))
    assert "weight" in read_weights(whole).entries
    with pytest.raises(CheckpointError, match=r"refused: its code/data.* is compressed"):
        read_weights(packed)


def test_members_that_overlap_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    torch.save({f"visual.{number}": torch.randn(10_000) for number in range(50)}, path)
    read_weights(path)
    overlap(path)
    with pytest.raises(CheckpointError, match="refused: what it claims to hold is larger than the file"):
        read_weights(path)


@pytest.mark.parametrize("depth", [1, 60])
def test_modules_inside_each_other_are_read_once(depth: int, tmp_path: Path) -> None:
    """Each holding the next twice, they would be 2 to the power of `depth`; the last may hold the first."""
    state = b"}"  # a module's attributes: pickled by hand, since they are classes of TorchScript
    header = b"\x80\x02"
    body = b""
    for number in range(depth + 1):
        body += b"c__torch__\nM\n)\x81q" + bytes([number]) + b"0"  # an empty module into the memo
    for number in range(depth):
        here, below = bytes([number]), bytes([number + 1])
        body += b"h" + here + state + b"(X\x01\0\0\0ah" + below + b"X\x01\0\0\0bh" + below + b"ub0"
    body += b"h" + bytes([depth]) + state + b"(X\x01\0\0\0ah\x00ub0"
    with zipfile.ZipFile(tmp_path / "m.pt", "w") as archive:
        archive.writestr("archive/constants.pkl", b"\x80\x02).")
        archive.writestr("archive/data.pkl", header + body + b"h\x00.")
    assert read_weights(tmp_path / "m.pt").entries == {}
