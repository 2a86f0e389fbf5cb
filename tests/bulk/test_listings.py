"""Kept listings of tars: the same items from them as from the tars, and never of a tar that was changed."""

from __future__ import annotations

import io
import multiprocessing
import os
import random
import tarfile
import threading
import time
from pathlib import Path

import pytest
import torch
from mutations import mutated
from PIL import Image
from tar_seeds import tars as seeds

from clip_fast.bulk import processes
from clip_fast.bulk.listings import LISTINGS_FOLDER, ListedTar, listed, with_listings
from clip_fast.bulk.pipeline import Options
from clip_fast.bulk.processes import ProcessJob
from clip_fast.cli import main as cli
from clip_fast.inputs.inputs import SpanReader, find_inputs, items_at, spans_of
from clip_fast.inputs.tars import Tar

pytest.importorskip("pyarrow")


def write_tar(path: Path, names: list[str]) -> Path:
    with tarfile.open(path, "w") as tar:
        for i, name in enumerate(names):
            image = io.BytesIO()
            Image.new("RGB", (9, 8), (i % 256, 1, 2)).save(image, "PNG")
            member = tarfile.TarInfo(name)
            member.size = len(image.getvalue())
            tar.addfile(member, io.BytesIO(image.getvalue()))
    return path


class Listed:
    """Counts how often tars themselves are listed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.times = 0
        members = Tar._members

        def counted(tar: Tar) -> object:
            self.times += 1
            return members(tar)

        monkeypatch.setattr(Tar, "_members", counted)


def test_a_listing_gives_the_items_of_the_tar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of good tars and damaged ones: links, names that are no text, members of one name."""
    files = seeds()
    names = ["b.png", "a.png", "b.png", os.fsdecode(b"a/\xff\xfe.png"), "ä.png", "x\ny.png"]
    files.append(write_tar(tmp_path / "t.tar", names).read_bytes())
    for i in range(60):
        path = tmp_path / f"{i}.tar"
        path.write_bytes(mutated(random.choice(files), files) if i >= len(files) else files[i])
        wanted = list(Tar(str(path)))
        inputs = with_listings(find_inputs([path]), tmp_path)
        assert list(inputs) == wanted
        with monkeypatch.context() as patch:
            times = Listed(patch)
            assert list(inputs) == list(listed(Tar(str(path)), tmp_path)) == wanted
            assert inputs.expected() == len(wanted)
            assert times.times == 0
    assert not list((tmp_path / LISTINGS_FOLDER).glob(".*"))


def test_a_tar_that_was_changed_is_listed_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tar(tmp_path / "t.tar", [f"{i}.png" for i in range(5)])
    tar = with_listings(find_inputs([path]), tmp_path).parts[0]
    assert isinstance(tar, ListedTar)
    before, status = list(tar), path.stat()
    times = Listed(monkeypatch)
    time.sleep(0.02)  # more than the clock's tick
    write_tar(path, [f"{i + 5}.png" for i in range(5)])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # the same size and time
    assert tar.count() is None
    after = list(tar)
    assert [item.key for item in after] == ["5", "6", "7", "8", "9"] != [item.key for item in before]
    assert times.times == 1
    assert (list(tar), times.times, tar.count()) == (after, 1, 5)
    listing = Path(tar.listing)
    data = listing.read_bytes()
    for damage in (data[:-20], data[:100], b"", bytes(len(data)), data[:60] + b"\xff" + data[61:]):
        times.times = 0
        listing.write_bytes(damage)
        assert (list(tar), times.times) == (after, 1)
        assert listing.read_bytes() == data
    footer = range(8 * (len(data) - 1000), 8 * len(data))  # its numbers and types have no checksum
    for bit in [*random.sample(range(8 * len(data)), 300), *random.sample(footer, 300)]:
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        listing.write_bytes(damaged)
        assert list(tar) == after, bit


def test_a_listing_that_is_not_gone_through_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tar(tmp_path / "t.tar", [f"{i}.png" for i in range(5)])
    tar = with_listings(find_inputs([path, tmp_path / "gone.tar"]), tmp_path).parts
    next(iter(tar[0]))
    assert len(list(tar[1])) == 1
    assert not list((tmp_path / LISTINGS_FOLDER).iterdir())
    items = iter(tar[0])
    monkeypatch.setattr("clip_fast.bulk.listings._ROWS", 2)
    next(items)
    path.touch()  # while it is listed
    assert len(list(items)) == 4
    assert not list((tmp_path / LISTINGS_FOLDER).iterdir())


@pytest.mark.parametrize("size", [1, 3, 7, 100])
def test_spans_cover_the_items_in_shards(tmp_path: Path, size: int) -> None:
    for name, count in (("a", 4), ("b", 0), ("c", 9), ("d", 1)):
        write_tar(tmp_path / f"{name}.tar", [f"{name}{i}.png" for i in range(count)])
    Image.new("RGB", (3, 3)).save(tmp_path / "x.png")
    found = find_inputs([tmp_path / f"{name}" for name in ("x.png", "a.tar", "b.tar", "gone", "c.tar", "d.tar")])
    items = list(found)
    for inputs in (found, with_listings(found, tmp_path)):
        shards = list(spans_of(inputs, size))
        whole = SpanReader(inputs)
        assert [[i for span in spans for i in whole.read(span)] for spans in shards] == [
            items[start : start + size] for start in range(0, len(items), size)
        ]
        some = SpanReader(inputs)
        assert [item for spans in shards[1::2] for span in spans for item in some.read(span)] == [
            item for start in range(size, len(items), 2 * size) for item in items[start : start + size]
        ]


def test_a_tar_that_has_lost_images_since_they_were_counted(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "t.tar", [f"{i}.png" for i in range(9)])
    inputs = find_inputs([path])
    shards = list(spans_of(inputs, 4))
    reader = SpanReader(inputs)
    assert len([item for span in shards[0] for item in reader.read(span)]) == 4
    write_tar(path, ["0.png", "1.png"])
    with pytest.raises(ValueError, match=r"t\.tar has fewer images than when they were counted"):
        SpanReader(inputs).read(shards[0][0])


def test_a_second_run_and_a_page_list_no_tar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        write_tar(tmp_path / f"{name}.tar", [f"{name}{i}.png" for i in range(6)])
    arguments = ["encode", "{a,b}.tar", "--model", "tiny-digits", "--output", "out/", "--workers", "0", "--quiet"]
    arguments += ["--shard-size", "5", "--resume"]
    assert cli.main(arguments) == 0
    times = Listed(monkeypatch)
    assert cli.main(arguments) == 0
    assert times.times == 1  # the first image of the first tar, since there must be one
    found = items_at(["b.tar/b3.png"], reading=lambda tar: listed(tar, tmp_path / "out"))
    assert ([item.key for item in found.values()], times.times) == (["b3"], 1)


def test_processes_list_no_tar_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [write_tar(tmp_path / f"{i}.tar", [f"{i}{j}.png" for j in range(7)]) for i in range(4)]
    inputs = with_listings(find_inputs(paths), tmp_path)
    job = ProcessJob("m", torch.float32, None, inputs, str(tmp_path), Options(shard_size=5), False, 1)
    hands = [multiprocessing.Pipe(duplex=False) for _ in range(2)]
    told, telling = multiprocessing.Pipe(duplex=False)
    times = Listed(monkeypatch)
    processes._deal(job, [dealing for _, dealing in hands], telling, threading.Event())
    assert (told.recv(), times.times) == (None, 4)
    shards = dict(shard for taking, _ in hands for shard in processes._dealt(job, taking))
    assert times.times == 4
    items = list(inputs)
    assert shards == {i: items[5 * i : 5 * i + 5] for i in range(6)}


def test_an_impossible_size_is_a_row_of_a_listing(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "t.tar", ["0.png"])
    member = tarfile.TarInfo("1.png")
    member.size = 1 << 70
    path.write_bytes(path.read_bytes()[:1024] + member.tobuf(tarfile.GNU_FORMAT) + bytes(10240))
    inputs = find_inputs([path])
    assert list(with_listings(inputs, tmp_path / "out")) == list(inputs)
    assert list(with_listings(inputs, tmp_path / "out")) == list(inputs)


def test_where_no_listing_can_be_written_the_tar_is_read(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "t.tar", ["0.png", "1.png"])
    (tmp_path / "out").write_text("no folder")
    inputs = find_inputs([path])
    assert list(with_listings(inputs, tmp_path / "out")) == list(inputs)


@pytest.mark.parametrize("column", ["bytes", "paths", "none", "nested"])
@pytest.mark.parametrize("key", [None, "key", "gone"])
def test_spans_of_tables_are_their_items(tmp_path: Path, column: str, key: str | None) -> None:
    """Of a table that is one failed row, too."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    cells = {"bytes": [b"x"] * 25, "paths": ["a.png"] * 25, "nested": [[1]] * 25}
    table = {"key": [str(i) for i in range(25)], "image": cells.get(column)}
    pq.write_table(pa.table({name: cell for name, cell in table.items() if cell}), tmp_path / "t.parquet")
    inputs = find_inputs([tmp_path / "t.parquet", tmp_path / "gone.png"], key_column=key)
    reader = SpanReader(inputs)
    shards = [[item for span in spans for item in reader.read(span)] for spans in spans_of(inputs, 10)]
    items = list(inputs)
    assert shards == [items[start : start + 10] for start in range(0, len(items), 10)]
