"""`clip-fast verify` on folders that are whole, damaged, unfinished, of earlier releases, and no folders of ours."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
from earlier import as_earlier

from clip_fast.bulk import shards as shards_module
from clip_fast.bulk.manifest import RAY_MANIFEST_NAME
from clip_fast.bulk.shards import OutputFolder
from clip_fast.bulk.tables import ParquetWriter, Record, Shard
from clip_fast.cli import main as cli

pytest.importorskip("pyarrow")

SHARDS, ROWS = 4, 5


@pytest.fixture
def shards() -> list[Shard]:
    rows = np.random.default_rng().standard_normal((SHARDS, ROWS, 8)).astype(np.float32)
    records = [[Record(f"{i}/{j}", f"{i}/{j}.png", 3, 4, None) for j in range(ROWS)] for i in range(SHARDS)]
    return [Shard(i, rows[i], records[i]) for i in range(SHARDS)]


@pytest.fixture
def folder(tmp_path: Path, shards: list[Shard], monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    with OutputFolder("out") as output:
        output.begin({"model": "m"})
        for shard in shards:
            output.write(shard)
        output.finish(SHARDS)
    return tmp_path / "out"


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def verified(capsys: pytest.CaptureFixture[str]) -> tuple[int, str, list[str]]:
    """The exit status, the last line, and the problems."""
    status = cli.main(["verify", "out"])
    said = capsys.readouterr()
    return status, said.out.strip(), said.err.splitlines()


def test_a_whole_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert verified(capsys) == (0, "out: 4 shards, 20 images, no damage found", [])
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_disk_that_fails_under_a_file_is_told_with_its_name(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = shards_module.file_digest

    def failing(file: BinaryIO, name: str) -> object:
        if file.name.endswith("_0001.npy"):
            raise OSError(errno.EIO, "Input/output error")
        return digest(file, name)

    monkeypatch.setattr(shards_module, "file_digest", failing)
    flip(folder / "img_emb" / "img_emb_0002.npy", -1)
    status, _, problems = verified(capsys)
    assert status == 1
    assert len(problems) == 2
    assert "out/img_emb/img_emb_0001.npy cannot be read: Input/output error" in problems[0]
    assert "img_emb_0002.npy is damaged" in problems[1]


def test_every_damage_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(folder / "img_emb" / "img_emb_0000.npy", -1)
    (folder / "img_emb" / "img_emb_0001.npy").write_bytes(b"")
    flip(folder / "metadata" / "metadata_0002.parquet", 40)
    (folder / "metadata" / "metadata_0003.parquet").unlink()
    status, last, problems = verified(capsys)
    assert status == 1
    assert last == "out: 3 shards, 0 images, 4 problems"
    for name in ("metadata_0003.parquet: missing", "img_emb_0000.npy is damaged: its contents are not those",
                 "img_emb_0001.npy is damaged: it has 0 bytes", "metadata_0002.parquet is damaged"):  # fmt: skip
        assert sum(name in problem for problem in problems) == 1, problems


@pytest.mark.parametrize("harm", ["missing", "cut", "changed"])
def test_a_list_of_failures_that_is_not_the_shards(
    folder: Path, shards: list[Shard], harm: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shards[1].records[2] = Record("1/2", "1/2.png", 0, 0, "a reason")
    (folder / "metadata" / "metadata_0001.parquet").unlink()

    def run() -> None:
        with OutputFolder("out", resume=True) as output:
            output.begin({"model": "m"})
            if not (folder / "metadata" / "metadata_0001.parquet").exists():
                output.write(shards[1])
            output.finish(SHARDS)

    run()
    errors = folder / "errors.jsonl"
    whole = errors.read_bytes()
    assert verified(capsys)[0] == 0
    if harm == "missing":
        errors.unlink()
    elif harm == "cut":
        errors.write_bytes(whole[:-3])
    else:
        flip(errors, 12)
    status, last, problems = verified(capsys)
    assert (status, last) == (1, "out: 4 shards, 20 images, 1 problems")
    assert "out/errors.jsonl does not have the failures of the shards" in problems[0]
    run()
    assert verified(capsys)[0] == 0
    assert errors.read_bytes() == whole


def test_what_verify_names_resume_makes_again(
    folder: Path, shards: list[Shard], capsys: pytest.CaptureFixture[str]
) -> None:
    flip(folder / "img_emb" / "img_emb_0002.npy", -1)
    assert verified(capsys)[0] == 1
    with OutputFolder("out", resume=True) as output:
        output.begin({"model": "m"})
        output.write(shards[2])
        output.finish(SHARDS)
    assert verified(capsys)[0] == 0


def test_a_folder_without_checksums(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    as_earlier(folder)
    status, last, problems = verified(capsys)
    assert (status, problems) == (0, [])
    assert "4 shards have no checksum: of these only sizes and names were compared, no damage found" in last
    np.save(folder / "img_emb" / "img_emb_0001.npy", np.zeros((2, 8), np.float32))
    status, last, problems = verified(capsys)
    assert status == 1
    assert "img_emb_0001.npy is damaged" in problems[0]


def test_a_folder_that_is_not_finished(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "manifest.json").write_text(json.dumps({"settings": {}}))
    (folder / "metadata" / "metadata_0001.parquet").unlink()
    assert verified(capsys) == (0, "out: 3 shards, 15 images, not finished, no damage found", [])


def test_a_folder_that_is_only_begun(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It lacks images, and nothing in it is damaged."""
    with OutputFolder(tmp_path / "begun") as output:
        output.begin({"model": "m"})
    assert cli.main(["verify", str(tmp_path / "begun")]) == 0
    assert capsys.readouterr().out.endswith("begun: 0 shards, 0 images, not finished, no damage found\n")


def test_tables_of_ray(tmp_path: Path, shards: list[Shard], capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    for shard in shards:
        with ParquetWriter(tmp_path / "out" / f"a_{shard.index}.parquet") as file:
            file.write(shard)
            file.commit()
    done = {"images": SHARDS * ROWS, "failed": 0}
    (tmp_path / "out" / RAY_MANIFEST_NAME).write_text(json.dumps({"settings": {}, "done": done}))
    arguments = ["verify", str(tmp_path / "out")]
    assert cli.main(arguments) == 0
    assert "4 shards have no checksum" in capsys.readouterr().out
    data = (tmp_path / "out" / "a_2.parquet").read_bytes()
    (tmp_path / "out" / "a_2.parquet").write_bytes(data[:-1])
    assert cli.main(arguments) == 1
    assert "a_2.parquet is damaged" in capsys.readouterr().err
    (tmp_path / "out" / "a_2.parquet").unlink()
    assert cli.main(arguments) == 1
    assert "counts 20 images, the files beside it hold 15" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content", [None, "{", '{"settings": {}, "done": 3}', '{"settings": {}, "done": {"images": []}}']
)
def test_what_cannot_be_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None) -> None:
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    assert cli.main(["verify", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "error: " in said
    assert "manifest" in said
    assert "Traceback" not in said
