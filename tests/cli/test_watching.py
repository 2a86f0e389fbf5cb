"""What scripts and people see of a job: help without a wait, a summary at every end, and a run that is extended."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from clip_fast.cli import encode
from clip_fast.cli import main as cli

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "clip_fast"]


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for folder in "ab":
        (tmp_path / folder).mkdir()
        for i in range(3):
            Image.new("RGB", (40, 30), (i * 50, ord(folder), 9)).save(tmp_path / folder / f"{i}.png")
    return tmp_path


def arguments(*inputs: str) -> list[str]:
    return ["encode", *inputs, "--model", "tiny-digits", "--output", "out/", "--workers", "0", "--json"]


@pytest.mark.parametrize("words", [["--help"], ["encode", "--help"], ["encode", "photos"], ["nothing"], ["--version"]])
def test_help_and_wrong_usage_do_not_import_pytorch(photos: Path, words: list[str]) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "clip_fast", *words]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode in (0, 2)
    imported = {line.split("|")[-1].strip() for line in ended.stderr.splitlines() if line.startswith("import time:")}
    assert "argparse" in imported
    assert not imported & {"torch", "triton", "pyarrow"}


def test_a_summary_ends_every_run(
    photos: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def ended(words: list[str]) -> tuple[int, dict[str, object]]:
        try:
            status = cli.main(words)
        except SystemExit as end:
            status = int(str(end.code))
        (line,) = capsys.readouterr().out.splitlines()
        return status, json.loads(line)

    status, summary = ended(arguments("a"))
    assert (status, summary["complete"], summary["images"], "error" in summary) == (0, True, 3, False)
    status, summary = ended(arguments("a"))
    assert (status, summary["complete"]) == (2, False)
    assert "--resume continues it" in str(summary["error"])
    status, summary = ended(arguments("gone", "--resume"))
    assert (status, summary["complete"]) == (2, False)
    status, summary = ended([*arguments("a"), "--nonsense"])
    assert (status, summary["complete"]) == (2, False)
    Path("a/broken.png").write_bytes(b"no image")
    status, summary = ended([*arguments("a"), "--output", "x/", "--max-errors", "0"])
    assert (status, summary["complete"], summary["failed"]) == (3, False, 1)
    status, summary = ended([*arguments("a")[:-2], "0", "--json", "--output", "x.npy", "--max-errors", "0"])
    assert (status, summary["complete"]) == (3, False)
    for raised, wanted in ((KeyboardInterrupt(), 130), (ZeroDivisionError(), 2)):

        def failing(*_: object, error: BaseException = raised) -> None:
            raise error

        monkeypatch.setattr(encode, "_inputs", failing)
        status, summary = ended([*arguments("a"), "--output", "y/"])
        assert (status, summary["complete"]) == (wanted, False)
        assert type(raised).__name__ in str(summary["error"])


@pytest.mark.slow
def test_a_summary_ends_a_run_that_is_terminated(photos: Path) -> None:
    os.mkfifo("list")
    process = subprocess.Popen([*COMMAND, *arguments("--files-from", "list")], stdout=subprocess.PIPE, text=True)
    with open("list", "w"):  # it reads, and waits for the end
        time.sleep(1)
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 143
    assert json.loads(out)["complete"] is False


def test_a_finished_run_is_extended(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """To the bytes of a run that had all inputs from the start. Full shards stay."""
    size = ["--shard-size", "2", "--batch-size", "2"]
    assert cli.main([*arguments("a"), *size]) == 0
    first = Path("out/img_emb/img_emb_0000.npy").stat().st_ino
    assert cli.main([*arguments("b", "a"), *size, "--resume"]) == 2
    assert "A run is extended by inputs behind those that it had" in capsys.readouterr().err
    assert cli.main([*arguments("a", "b"), *size, "--resume"]) == 0
    assert json.loads(capsys.readouterr().out)["resumed"] == 2
    assert Path("out/img_emb/img_emb_0000.npy").stat().st_ino == first
    assert cli.main([*arguments("a", "b"), *size, "--output", "whole/"]) == 0
    files = [path.relative_to("whole") for path in Path("whole").rglob("*.*") if path.is_file()]
    assert len(files) == 7 + 1
    assert all((Path("out") / path).read_bytes() == (Path("whole") / path).read_bytes() for path in files)
    assert cli.main(["verify", "out"]) == 0
    # The same weights by another name, and braces that stand for more.
    weights = str(ROOT / "clip_fast" / "assets" / "tiny-digits" / "model.safetensors")
    assert cli.main([*arguments("{a,b}"), *size, "--output", "braces/"]) == 0
    shutil.copytree("a", "c")
    assert cli.main([*arguments("{a,b,c}"), *size, "--output", "braces/", "--model", weights, "--resume"]) == 0
    assert cli.main([*arguments("{b,a}"), *size, "--output", "braces/", "--resume"]) == 2
