"""The folder of shards: its layout, its lock, its manifest, and what must not be overwritten."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from earlier import as_earlier
from numpy.testing import assert_array_equal

from clip_fast.bulk.atomic import NewFile
from clip_fast.bulk.shards import OutputFolder, read_footer, read_records
from clip_fast.bulk.tables import ParquetWriter, Record, Shard, Totals
from clip_fast.inputs.items import ImageFile, Item
from clip_fast.search.index import Index

pq = pytest.importorskip("pyarrow.parquet")

SETTINGS = {"model": "m", "size": 2}


def shard(index: int, *errors: str | None) -> tuple[Shard, list[Item]]:
    names = [f"{index}-{i}" for i in range(len(errors))]
    records = [Record(name, f"{name}.png", 3, 4, error) for name, error in zip(names, errors, strict=True)]
    rows = np.full((len(errors), 5), index, np.float32)
    return Shard(index, rows, records), [ImageFile(name, f"{name}.png") for name in names]


def filled(folder: Path, settings: dict[str, object] = SETTINGS, resume: bool = False) -> OutputFolder:
    output = OutputFolder(folder, resume)
    output.begin(settings)
    return output


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What clip_fast logged: a thread of Ray, which another test started, may log at any time."""
    return [record.getMessage() for record in caplog.records if record.name.startswith("clip_fast")]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_layout(tmp_path: Path) -> None:
    with filled(tmp_path / "a" / "out") as output:
        output.write(shard(0, None, "broken")[0])
        output.write(shard(1, None)[0])
        assert output.finish(2) == Totals(3, 1, 2)
    assert set(contents(tmp_path / "a" / "out")) == {
        ".lock",
        "manifest.json",
        "errors.jsonl",
        "img_emb/img_emb_0000.npy",
        "img_emb/img_emb_0001.npy",
        "metadata/metadata_0000.parquet",
        "metadata/metadata_0001.parquet",
    }
    folder = tmp_path / "a" / "out"
    assert_array_equal(np.load(folder / "img_emb" / "img_emb_0001.npy", mmap_mode="r"), [[1] * 5])
    table = pq.read_table(folder / "metadata" / "metadata_0000.parquet")
    assert table.to_pydict() == {
        "key": ["0-0", "0-1"],
        "image_path": ["0-0.png", "0-1.png"],
        "width": [3, 3],
        "height": [4, 4],
        "status": ["ok", "failed"],
        "error": [None, "broken"],
        "norm": [0, 0],
    }
    assert read_records(folder / "metadata" / "metadata_0000.parquet") == shard(0, None, "broken")[0].records
    error = {"key": "0-1", "image_path": "0-1.png", "reason": "broken"}
    assert [json.loads(line) for line in (folder / "errors.jsonl").read_text().splitlines()] == [error]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest == {"settings": SETTINGS, "done": {"images": 3, "failed": 1, "shards": 2}}


def test_finished_shards_are_known_by_their_inputs(tmp_path: Path) -> None:
    first, items = shard(0, None, "broken")
    with filled(tmp_path) as output:
        assert output.finished(0, items) is None
        output.write(first)
        assert output.finished(0, items) == Totals(2, 1, 1)
        with pytest.raises(ValueError, match="the inputs have changed"):
            output.finished(0, [*items[:1], ImageFile("other", "other.png")])
        output.embeddings_path(0).unlink()
        assert output.finished(0, items) is None


def test_errors_are_there_at_once_and_in_order_in_the_end(tmp_path: Path) -> None:
    with filled(tmp_path) as output:
        output.write(shard(1, "b")[0])
        output.write(shard(0, "a")[0])
        reasons = [json.loads(line)["reason"] for line in (tmp_path / "errors.jsonl").read_text().splitlines()]
        assert reasons == ["b", "a"]
        output.finish(2)
        reasons = [json.loads(line)["reason"] for line in (tmp_path / "errors.jsonl").read_text().splitlines()]
        assert reasons == ["a", "b"]


def test_names_that_are_no_text_are_escaped(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    with filled(tmp_path) as output:
        output.write(Shard(0, np.zeros((1, 2), np.float16), [Record(name, name, 0, 0, "no text")]))
        assert output.finished(0, [ImageFile(name, name)]) == Totals(1, 1, 1)
        assert "\\\\udce9" in (tmp_path / "errors.jsonl").read_text()


def test_the_lock_keeps_others_out(tmp_path: Path) -> None:
    with filled(tmp_path), pytest.raises(BlockingIOError, match="another process is writing to"):
        OutputFolder(tmp_path, resume=True)
    OutputFolder(tmp_path, resume=True).close()


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError, match=r"cannot be locked \(Function not implemented\).*choose a folder"):
        OutputFolder(tmp_path)


def test_an_earlier_run_is_only_resumed_when_asked_and_with_its_settings(tmp_path: Path) -> None:
    filled(tmp_path).close()
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="earlier run"):
        OutputFolder(tmp_path)
    with (
        OutputFolder(tmp_path, resume=True) as output,
        pytest.raises(ValueError, match="other settings: extra was None, is 1; size was 2, is 3"),
    ):
        output.begin({"model": "m", "size": 3, "extra": 1})
    assert contents(tmp_path) == before
    filled(tmp_path, resume=True).close()


@pytest.mark.parametrize("content", ["", "[]", '{"name": "another tool\'s"}', '{"settings": 1}'])
def test_a_damaged_manifest_is_named(tmp_path: Path, content: str) -> None:
    filled(tmp_path).close()
    (tmp_path / "manifest.json").write_text(content)
    with (
        OutputFolder(tmp_path, resume=True) as output,
        pytest.raises(ValueError, match=r"manifest\.json is no manifest of clip-fast encode"),
    ):
        output.begin({"model": "m"})
    with pytest.raises(ValueError, match=r"manifest\.json is no manifest of clip-fast encode"):
        Index(tmp_path)


def test_what_a_killed_run_left_is_removed(tmp_path: Path) -> None:
    filled(tmp_path).close()
    for name in (".manifest.json.1.tmp", "img_emb/.img_emb_0000.npy.2.tmp", "metadata/.metadata_0000.parquet.3.tmp"):
        (tmp_path / name).touch()
    (tmp_path / "errors.jsonl").write_text("of a shard that was never finished")
    filled(tmp_path, resume=True).close()
    assert set(contents(tmp_path)) == {".lock", "manifest.json"}


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").touch()
    for resume in (False, True):
        with pytest.raises(ValueError, match="not empty and holds no earlier run"):
            OutputFolder(tmp_path, resume)
    assert set(contents(tmp_path)) == {"photo.jpg"}
    with pytest.raises(NotADirectoryError, match="photo"):
        OutputFolder(tmp_path / "photo.jpg")


def test_missing_or_surplus_shards_are_noticed_in_the_end(tmp_path: Path) -> None:
    with filled(tmp_path) as output:
        output.write(shard(0, None)[0])
        for shards in (0, 2):
            with pytest.raises(ValueError, match=f"should hold {shards} shards"):
                output.finish(shards)


@pytest.mark.parametrize("failing", [1, 2])
def test_a_full_disk_leaves_no_part_of_a_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    sync, calls = os.fsync, []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == failing:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    first, items = shard(0, None)
    with filled(tmp_path) as output:
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            output.write(first)
        assert output.finished(0, items) is None
        assert not list(tmp_path.rglob("*.tmp"))
        output.write(first)
        assert output.finished(0, items) == Totals(1, 0, 1)


class Killed(BaseException):
    """What nothing in between catches, as a kill -9 is."""


@pytest.mark.parametrize("stopped", range(3))
def test_a_shard_is_extended_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped: int) -> None:
    """Wherever a kill stops it: what is there can be searched and verified, and `--resume` makes the rest."""
    short, _ = shard(1, None)
    long, more = shard(1, None, None)
    with filled(tmp_path) as output:
        output.write(shard(0, None)[0])
        output.write(short)
        output.finish(2)
    replace, calls = os.replace, []

    def killed(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) > stopped:
            raise Killed
        replace(source, target)

    with filled(tmp_path, resume=True) as output:
        monkeypatch.setattr(os, "replace", killed)
        with suppress(Killed):
            output.write(long)
        assert len(Index(tmp_path)) == (3 if stopped == 2 else 1)
        assert output.finished(0, shard(0, None)[1]) == Totals(1, 0, 1)
        assert (output.finished(1, more) is None) == (stopped < 2)
        monkeypatch.undo()
        output.write(long)
        output.finish(2)
    assert len(Index(tmp_path)) == 3


def test_a_full_disk_leaves_the_shard_that_was_to_be_extended(tmp_path: Path) -> None:
    with filled(tmp_path) as output:
        output.write(shard(0, None)[0])
        before = contents(tmp_path)
        names = [f"{i}" * 100 for i in range(10)]
        long = Shard(0, np.zeros((10, 5), np.float32), [Record(name, name, 1, 1, None) for name in names])
        with small_files(1500), pytest.raises(OSError, match=r"File too large: .*metadata_0000\.parquet'$"):
            output.write(long)
    assert contents(tmp_path) == before


def test_without_pyarrow_the_extra_is_named_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for make in (OutputFolder, ParquetWriter):
        with pytest.raises(ImportError, match=r'pip install "clip_fast\[parquet\]"'):
            make(tmp_path / "out.parquet")
    assert not list(tmp_path.iterdir())


def test_one_parquet_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "e.parquet"
    with ParquetWriter(path) as file:
        file.write(shard(0, None, "broken")[0])
        file.write(shard(1, None)[0])
    assert not list(tmp_path.iterdir())
    with ParquetWriter(path) as file:
        file.write(shard(0, None, "broken")[0])
        file.write(shard(1, None)[0])
        file.commit()
    assert [each.name for each in tmp_path.iterdir()] == ["e.parquet"]
    table = pq.read_table(path)
    assert table["embedding"].to_pylist() == [[0] * 5, [0] * 5, [1] * 5]
    assert table["status"].to_pylist() == ["ok", "failed", "ok"]
    with pytest.raises(FileNotFoundError, match="gone does not exist"):
        ParquetWriter(tmp_path / "gone" / "e.parquet")


# --- damage ----------------------------------------------------------------------------------------------------------


def test_a_shard_has_a_checksum(tmp_path: Path) -> None:
    rows = np.random.default_rng().standard_normal((3, 5))
    for dtype in (np.float16, np.float32):
        with filled(tmp_path / np.dtype(dtype).name) as output:
            output.write(Shard(0, rows.astype(dtype), shard(0, None, None, None)[0].records))
            path = output.embeddings_path(0)
            assert_array_equal(np.load(path), rows.astype(dtype))
            np.save(tmp_path / "by_numpy.npy", rows.astype(dtype))
            assert path.read_bytes() == (tmp_path / "by_numpy.npy").read_bytes()
            footer = read_footer(output.metadata_path(0))
        assert footer.sha256 == sha256(path.read_bytes()).hexdigest()
        assert footer.bytes == path.stat().st_size


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "a byte of the data": lambda data: data[:-3] + bytes([data[-3] ^ 1]) + data[-2:],
    "a byte of the header": lambda data: data[:6] + bytes([data[6] ^ 1]) + data[7:],
    "cut": lambda data: data[:-1],
    "longer": lambda data: data + b"\0",
    "empty": lambda data: b"",
    "zeros": lambda data: bytes(len(data)),
}


@pytest.mark.parametrize("name", DAMAGES)
@pytest.mark.parametrize("file", ["img_emb/img_emb_0001.npy", "metadata/metadata_0001.parquet"])
def test_a_damaged_shard_is_made_again(tmp_path: Path, name: str, file: str, caplog: pytest.LogCaptureFixture) -> None:
    """And named."""
    shards = [shard(index, None, "broken") for index in range(2)]
    with filled(tmp_path) as output:
        for each, _ in shards:
            output.write(each)
        output.finish(2)
    before = contents(tmp_path)
    (tmp_path / file).write_bytes(DAMAGES[name](before[file]))
    with filled(tmp_path, resume=True) as output:
        assert output.finished(0, shards[0][1]) == Totals(2, 1, 1)
        assert not warned(caplog)
        assert output.finished(1, shards[1][1]) is None
        assert str(tmp_path / file) in caplog.text
        assert "the shard is made again" in caplog.text
        output.write(shards[1][0])
        output.finish(2)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("count", [100, pytest.param(3000, marks=pytest.mark.slow)])
def test_flipped_bits_are_noticed_or_change_nothing(tmp_path: Path, count: int) -> None:
    """At any place of either file."""
    first, items = shard(0, *(None if i % 3 else f"reason {i}" for i in range(20)))
    noticed = 0
    with filled(tmp_path) as output:
        output.write(first)
        paths = [output.embeddings_path(0), output.metadata_path(0)]
        whole = [path.read_bytes() for path in paths]
        for _ in range(count):
            which = random.randrange(2)
            place, bit = random.randrange(len(whole[which])), 1 << random.randrange(8)
            damaged = bytearray(whole[which])
            damaged[place] ^= bit
            paths[which].write_bytes(damaged)
            finished = output.finished(0, items)
            noticed += finished is None
            if finished:
                assert which == 1
                assert finished == Totals(20, 7, 1)
                assert read_records(paths[1]) == first.records
            paths[which].write_bytes(whole[which])
        assert output.finished(0, items) == Totals(20, 7, 1)
    assert noticed > count / 2


def test_shards_without_checksums_are_finished_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, items = shard(0, None, "broken")
    with filled(tmp_path) as output:
        output.write(first)
        as_earlier(tmp_path)
        assert read_footer(output.metadata_path(0)).sha256 is None
        assert output.finished(0, items) == Totals(2, 1, 1)
        assert output.finish(1) == Totals(2, 1, 1)
        assert not warned(caplog)
        output.embeddings_path(0).write_bytes(output.embeddings_path(0).read_bytes()[:-1])
        assert output.finished(0, items) is None


def test_a_run_that_goes_on_is_not_complete(tmp_path: Path) -> None:
    with filled(tmp_path) as output:
        output.write(shard(0, None)[0])
        output.finish(1)
    assert "done" in json.loads((tmp_path / "manifest.json").read_text())
    filled(tmp_path, resume=True).close()
    assert json.loads((tmp_path / "manifest.json").read_text()) == {"settings": SETTINGS}


def test_names_that_are_no_shards(tmp_path: Path) -> None:
    """As of copies that someone made."""
    with filled(tmp_path) as output:
        output.write(shard(0, None)[0])
        for name in ("metadata_0000 (1).parquet", "metadata_old.parquet"):
            (tmp_path / "metadata" / name).touch()
        assert output.finished_shards() == [0]
        assert output.finish(1) == Totals(1, 0, 1)


@contextmanager
def small_files(size: int) -> Iterator[None]:
    """The operating system refuses longer files, as a full disk does, in the middle of a write."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize(("rows", "file"), [(5000, "img_emb_0000.npy"), (10, "metadata_0000.parquet")])
def test_a_full_disk_is_told_with_the_files_name(tmp_path: Path, rows: int, file: str) -> None:
    """Not as NumPy has it, "12800 requested and 3968 written"."""
    records = [Record(f"{i}", f"{i}" * 100, 1, 1, None) for i in range(rows)]
    with filled(tmp_path) as output, small_files(1500), pytest.raises(OSError, match=f"File too large: .*{file}'$"):
        output.write(Shard(0, np.zeros((rows, 8), np.float32), records))
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_file_that_cannot_be_made_is_told_with_its_own_name(tmp_path: Path) -> None:
    """And not with that of the temporary file beside it."""
    with pytest.raises(FileNotFoundError) as error:
        NewFile(tmp_path / "gone" / "x")
    assert error.value.filename == str(tmp_path / "gone" / "x")


def test_a_full_disk_under_one_parquet(tmp_path: Path) -> None:
    large = shard(0, *[f"reason {i}" for i in range(2000)])[0]
    full = pytest.raises(OSError, match=r"File too large: .*e\.parquet'$")
    with ParquetWriter(tmp_path / "e.parquet") as file, small_files(1500), full:
        file.write(large)
        file.commit()
    assert not list(tmp_path.iterdir())
