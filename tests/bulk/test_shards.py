"""The folder of shards: its layout, its lock, its manifest, and what must not be overwritten."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from clip_fast.bulk.shards import OutputFolder, read_records
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
