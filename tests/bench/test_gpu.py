"""`bench/gpu.sh`: every stage at toy size, so that nothing in it breaks for the first time on a GPU."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "bench" / "gpu.sh"


def run(*arguments: str, python: str = sys.executable) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHON": python}
    return subprocess.run([SCRIPT, *arguments], capture_output=True, text=True, env=environment, timeout=570)


@pytest.mark.slow
@pytest.mark.timeout(580)
def test_a_dry_run_does_every_stage(tmp_path: Path) -> None:
    archive = tmp_path / "all.tar.gz"
    done = run("--dry-run", "--output", str(tmp_path / "out"), "--archive", str(archive))
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    shutil.unpack_archive(archive, tmp_path / "unpacked")
    folder = tmp_path / "unpacked"
    for name in ("end_to_end", "kernels", "pipeline"):
        rows = json.loads((folder / f"{name}.json").read_text())["rows"]
        ours = [row for row in rows if row["system"] == "clip_fast"]
        assert ours
        assert not any("failed" in row for row in ours), ours
        assert (folder / f"{name}.md").read_text()
    assert "linear float32" in (folder / "tune.log").read_text()
    assert "passed" in (folder / "tests.log").read_text()
    assert (folder / "throughput-fp32.svg").exists()


def test_a_stage_that_fails_is_said_and_the_next_one_runs(tmp_path: Path) -> None:
    fake = tmp_path / "python"
    fake.write_text(
        '#!/bin/sh\ncase "$*" in *find_spec*) exit 0 ;; *pytest*) echo broken; exit 3 ;; *) echo fine ;; esac\n'
    )
    fake.chmod(0o755)
    chosen = ["--stage", "tests", "--stage", "environment"]
    done = run("--dry-run", "--output", str(tmp_path / "out"), *chosen, python=str(fake))
    assert done.returncode == 1
    assert "== tests: failed with exit status 3" in done.stdout
    assert (tmp_path / "out" / "environment.log").read_text() == "fine\n"


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\nexit 1\n")
    fake.chmod(0o755)
    done = run("--dry-run", "--output", str(tmp_path), "--stage", "tests", "--stage", "plot", python=str(fake))
    assert "pytest is not installed" in done.stdout
    assert "matplotlib is not installed" in done.stdout
    assert done.returncode == 0


@pytest.mark.parametrize("arguments", [["--stage", "nothing"], ["--what"]])
def test_an_unknown_argument_is_an_error(tmp_path: Path, arguments: list[str]) -> None:
    assert run("--dry-run", "--output", str(tmp_path), *arguments).returncode == 2
