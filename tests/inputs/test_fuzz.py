"""Damaged tars, tables and lists: the good one after them is read, what a damage left is read or refused in words."""

from __future__ import annotations

import io
import random
import tarfile
import tracemalloc
import uuid
from contextlib import suppress
from itertools import islice
from pathlib import Path

import pytest
from mutations import mutated
from PIL import Image

from clip_fast.bulk.decoder import failure_reason
from clip_fast.inputs import tars as tars_module
from clip_fast.inputs.finder import read_list
from clip_fast.inputs.inputs import find_inputs
from clip_fast.inputs.items import Unreadable
from clip_fast.inputs.tars import Tar

MOST = 10_000  # items of a file whose seed has a few


def png(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (5, 4), (value, 1, 2)).save(file, "PNG")
    return file.getvalue()


def tars() -> list[bytes]:
    found = []
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w", format=form) as tar:
            for i, kind in enumerate([tarfile.REGTYPE] * 4 + [tarfile.SYMTYPE, tarfile.FIFOTYPE]):
                name = f"{i}.png" if form == tarfile.USTAR_FORMAT or i % 2 else f"{'long é/' * 30}{i}.png"
                member = tarfile.TarInfo(name)
                member.type = kind
                member.size = len(png(i)) if kind == tarfile.REGTYPE else 0
                tar.addfile(member, io.BytesIO(png(i)))
        found.append(file.getvalue())
    sparse = tarfile.TarInfo("sparse.png")
    sparse.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "2000"}
    sparse.size = 1024
    found.append(sparse.tobuf(tarfile.PAX_FORMAT) + b"1\n0\n512\n".ljust(1024, b"\0") + found[0])
    return found


def tables() -> list[bytes]:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    images = {
        "bytes": pa.array([png(i) for i in range(6)]),
        "paths": pa.array([f"{i}.png" for i in range(5)] + [None]),
        "structs": pa.array([{"bytes": png(i), "path": None} for i in range(6)]),
        "dictionary": pa.array([png(i % 2) for i in range(6)]).dictionary_encode(),
    }
    keys = [pa.array(range(6)), pa.array([uuid.UUID(int=random.getrandbits(128)).hex for _ in range(6)])]
    found = []
    for column in images.values():
        for compression in ("none", "zstd"):
            file = io.BytesIO()
            table = pa.table({"image": column, "key": random.choice(keys)})
            pq.write_table(table, file, compression=compression, row_group_size=random.choice([2, 6]))
            found.append(file.getvalue())
    return found


def check(folder: Path, suffix: str, files: list[bytes], count: int) -> None:
    good = folder / "good.png"
    good.write_bytes(png(7))
    damaged = folder / f"x.{suffix}"
    refused = 0
    for _ in range(count):
        damaged.write_bytes(mutated(random.choice(files), files))
        tracemalloc.start()
        key_column = random.choice([None, "key"]) if suffix == "parquet" else None
        items = list(islice(find_inputs([damaged, good], key_column=key_column), MOST))
        assert 0 < len(items) < MOST  # a tar may come to hold no image
        assert items[-1].location == str(good)
        for item in items[:-1]:
            assert isinstance(item.key, str)
            try:
                item.source()
            except Exception as error:  # as `Decoder.into` takes them
                refused += bool(failure_reason(error))
        assert all(item.reason for item in items if isinstance(item, Unreadable))
        assert tracemalloc.get_traced_memory()[1] < 1 << 26
        tracemalloc.stop()
    assert refused > count / 10


@pytest.mark.parametrize("count", [100, pytest.param(4000, marks=pytest.mark.slow)])
def test_headers_are_read_as_tarfile_reads_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    files = tars()
    damaged = tmp_path / "x.tar"
    ordinary, known = tars_module._ordinary, 0
    for i in range(count):
        damaged.write_bytes(mutated(random.choice(files), files) if i >= len(files) else files[i])
        monkeypatch.setattr(tars_module, "_ordinary", ordinary)
        got = list(islice(Tar(str(damaged)), MOST))
        known += any(ordinary(damaged.read_bytes()[at : at + 512]) for at in range(0, damaged.stat().st_size, 512))
        monkeypatch.setattr(tars_module, "_ordinary", lambda header: None)
        assert got == list(islice(Tar(str(damaged)), MOST))
    assert known > count / 10


@pytest.mark.parametrize("suffix", ["tar", "parquet"])
def test_a_hundred_damaged_files_of_many_images(tmp_path: Path, suffix: str) -> None:
    check(tmp_path, suffix, tars() if suffix == "tar" else tables(), 100)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["tar", "parquet"])
def test_thousands_of_damaged_files_of_many_images(tmp_path: Path, suffix: str) -> None:
    check(tmp_path, suffix, tars() if suffix == "tar" else tables(), 4000)


def test_a_thousand_damaged_lists() -> None:
    text = "photos/ä.jpg\r\n/data/b c.png\n写真.jpg\n"
    files = [text.encode(each) for each in ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32")]
    files.append(text.replace("\n", "\0").encode())
    for _ in range(1000):
        data = mutated(random.choice(files), files)
        with suppress(ValueError):  # where it is in UTF-16, and damaged
            assert all(read_list(io.BytesIO(data)))
