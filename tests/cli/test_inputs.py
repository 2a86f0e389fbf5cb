"""What `clip-fast encode` says of folders, tars and tables as people have them."""

from __future__ import annotations

import base64
import gzip
import io
import json
import tarfile
from pathlib import Path

import pytest
from bad_files import of_gigabytes
from PIL import Image

from clip_fast.cli import main as cli


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def jpeg() -> bytes:
    file = io.BytesIO()
    Image.effect_noise((400, 300), 90).save(file, "JPEG")
    return file.getvalue()


def encode(*arguments: str) -> int:
    return cli.main(["encode", *arguments, "--model", "tiny-digits", "--device", "cpu"])


def test_what_a_folder_holds_besides_photographs_is_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("in/1.JPG", "in/._1.JPG", "in/@eaDir/1.JPG/SYNOPHOTO_THUMB_M.jpg"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(jpeg())
    for name in ("2.HEIC", "3.heic", "4.mov", "Thumbs"):
        Path("in", name).write_bytes(b"no image")
    assert encode("in") == 0
    assert "passed over in folders, by suffix: 2 .heic, 1 without a suffix, 1 .mov\n" in capsys.readouterr().err
    assert Path("paths.txt").read_text() == "in/1.JPG\n"
    assert encode("in", "--quiet") == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("output", ["e.npy", "out/"])
def test_bad_inputs_of_many_images_are_rows_and_the_rest_goes_on(folder: Path, output: str) -> None:
    data = jpeg()
    with tarfile.open("good.TAR", "w") as tar:
        member = tarfile.TarInfo("1.jpg")
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))
    Path("bad.tar").write_bytes(b"\0" * 600 + b"x" * 600)
    Path("packed.tar.gz").write_bytes(gzip.compress(Path("good.TAR").read_bytes()))
    assert encode("bad.tar", "packed.tar.gz", "{0..9999999}.jpg", "good.TAR", "--output", output, "--quiet") == 1
    errors = Path("e.errors.txt" if output == "e.npy" else "out/errors.jsonl").read_text().splitlines()
    assert len(errors) == 3
    assert sorted(words for line in errors for words in ("cut or damaged", "gzip", "names") if words in line) == [
        "cut or damaged",
        "gzip",
        "names",
    ]


@pytest.mark.parametrize("workers", ["0", "1"])
@pytest.mark.parametrize("output", ["e.npy", "e.parquet", "out/"])
def test_a_few_bytes_that_stand_for_gigabytes_are_rows(folder: Path, output: str, workers: str) -> None:
    reasons = of_gigabytes(folder)
    Path("good.jpg").write_bytes(jpeg())
    assert encode(*reasons, "good.jpg", "--output", output, "--workers", workers, "--quiet") == 1
    if output == "e.npy":
        failures = dict(line.split("\t") for line in Path("e.errors.txt").read_text().splitlines())
        assert Path("e.paths.txt").read_text() == "good.jpg\n"
    elif output == "out/":
        lines = map(json.loads, Path("out/errors.jsonl").read_text().splitlines())
        failures = {line["image_path"]: line["reason"] for line in lines}
    else:
        rows = pytest.importorskip("pyarrow.parquet").read_table(output).to_pylist()
        failures = {row["image_path"]: row["error"] for row in rows if row["status"] == "failed"}
        assert len(rows) == len(reasons) + 1
    assert failures.keys() == reasons.keys()
    for name, reason in reasons.items():
        assert reason in failures[name]


def test_a_column_of_base64_is_embedded(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow = pytest.importorskip("pyarrow")
    text = base64.b64encode(jpeg()).decode()
    parquet.write_table(pyarrow.table({"image": [text, text, text[:400], "x y" * 5000]}), "t.parquet")
    assert encode("t.parquet", "--quiet") == 1
    assert max(map(len, capsys.readouterr().err.splitlines())) < 200
    assert Path("paths.txt").read_text() == "t.parquet#0\nt.parquet#1\n"
