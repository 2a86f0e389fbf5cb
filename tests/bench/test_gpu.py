"""`bench/gpu.sh`: every stage at toy size, so that nothing in it breaks for the first time on a GPU."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "bench" / "gpu.sh"


def run(*arguments: str, python: str = sys.executable, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHON": python}
    return subprocess.run([SCRIPT, *arguments], capture_output=True, text=True, env=environment, timeout=1150, cwd=cwd)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_dry_run_does_every_stage(tmp_path: Path) -> None:
    archive = tmp_path / "all.tar.gz"
    done = run("--dry-run", "--minutes", "18", "--output", str(tmp_path / "out"), "--archive", str(archive))
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
    (row, *_) = json.loads((folder / "epilogue.json").read_text())["rows"]
    assert row["seconds"].keys() == {"64", "128"}
    for name in ("tests", "all_tests"):
        assert re.search(r"\d+ passed", (folder / f"{name}.log").read_text())
    stages = dict(line.split()[:2] for line in (folder / "stages").read_text().splitlines())
    assert len(stages) == 12
    assert set(stages.values()) == {"done"}, done.stdout[-5000:]
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


FAKE = """#!/bin/sh
echo "$*" >>"$0.calls"
case "$*" in
    *find_spec*) exit 0 ;;
    *--code*) echo "$CODE" ;;
    "-m pytest "*) printf 'PASSED tests/a.py::b[c d]\\nPASSED tests/a.py::e\\n' ;;
    *bench.roofline*) exit "${RESULT:-0}" ;;
esac
"""


def calls(fake: Path, *arguments: str, **variables: str) -> tuple[str, list[str]]:
    """What a call prints, and which commands it runs by the fake Python."""
    log = fake.with_name("python.calls")
    log.unlink(missing_ok=True)
    environment = os.environ | {"PYTHON": str(fake), "CODE": "one"} | variables
    done = subprocess.run([SCRIPT, *arguments], capture_output=True, text=True, env=environment, timeout=60)
    return done.stdout, log.read_text().splitlines()


def test_the_first_call_has_what_tells_most_and_the_next_goes_on(tmp_path: Path) -> None:
    fake, output = tmp_path / "python", tmp_path / "out"
    fake.write_text(FAKE)
    fake.chmod(0o755)
    output.mkdir()
    (output / "end_to_end.json").touch()  # which the pictures are drawn from
    said, run_ = calls(fake, "--output", str(output), RESULT="124")  # the ceilings are cut
    order = [line for line in run_ if re.match("-m (pytest|bench.epilogue|bench.end_to_end)", line)]
    assert "-n 14" in order[0]
    assert "bf16 or batch" in order[0]
    assert "bench.epilogue" in order[1]
    assert all("--models ViT-L/14,ViT-B/32 --batches 256,1 --precisions bf16" in line for line in order[2:4])
    assert "compiled" not in order[2]
    assert "compiled" in order[3]
    assert "== ceilings: cut by the time limit" in said
    assert "== ceilings cut" in said
    assert "not finished: ceilings" in said
    assert "PASSED" not in said

    said, run_ = calls(fake, "--output", str(output))
    assert "== first: done already" in said
    assert "== ceilings (" in said
    assert "not finished" not in said
    assert not any(re.match("-m (pytest|bench.epilogue|bench.end_to_end)", line) for line in run_)

    calls(fake, "--output", str(output), "--stage", "all_tests")
    assert (output / "tests.passed").read_text().splitlines()[:3] == ["one", "tests/a.py::b[c d]", "tests/a.py::e"]
    said, run_ = calls(fake, "--output", str(output), CODE="two")  # other code: everything anew
    assert "done already" not in said


def test_what_ends_in_time_is_done(tmp_path: Path) -> None:
    """Only a benchmark that has --minutes ends by itself because they are over."""
    fake = tmp_path / "python"
    fake.write_text(
        FAKE.replace("    *bench.roofline", '    "-m bench.e"*" --json "*) sleep 3 ;;\n    *bench.roofline')
    )
    fake.chmod(0o755)
    script = (
        SCRIPT.read_text()
        .replace("limit - 25", "limit - 58")
        .replace('cd "$(dirname "$0")/.."', f"cd {SCRIPT.parents[1]}")
    )
    (tmp_path / "gpu.sh").write_text(script)
    stages = ("--stage", "epilogue", "--stage", "first")
    environment = os.environ | {"PYTHON": str(fake), "CODE": "one"}
    done = subprocess.run(
        ["bash", tmp_path / "gpu.sh", "--minutes", "1", "--output", tmp_path / "out", *stages],
        capture_output=True, text=True, env=environment, timeout=120,
    )  # fmt: skip
    assert "== epilogue done" in done.stdout
    assert "== first cut" in done.stdout


def test_tests_that_have_passed_are_not_run_again(tmp_path: Path) -> None:
    fake, output = tmp_path / "python", tmp_path / "out"
    kept = FAKE.replace('"-m pytest "*)', '"-m pytest "*) for last; do :; done; cat "${last#@}" >"$0.deselected";')
    fake.write_text(kept)
    fake.chmod(0o755)
    calls(fake, "--output", str(output), "--stage", "tests")
    assert fake.with_name("python.deselected").read_text() == ""
    calls(fake, "--output", str(output), "--stage", "tests")
    deselected = fake.with_name("python.deselected").read_text().splitlines()
    assert deselected == ["--deselect=tests/a.py::b[c d]", "--deselect=tests/a.py::e"]


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\ncase "$*" in *--code*) echo one ;; *) exit 1 ;; esac\n')
    fake.chmod(0o755)
    done = run("--dry-run", "--output", str(tmp_path), "--stage", "tests", "--stage", "plot", python=str(fake))
    assert "pytest is not installed" in done.stdout
    assert "matplotlib is not installed" in done.stdout
    assert done.returncode == 0


@pytest.mark.parametrize("arguments", [["--stage", "nothing"], ["--what"]])
def test_an_unknown_argument_is_an_error(tmp_path: Path, arguments: list[str]) -> None:
    assert run("--dry-run", "--output", str(tmp_path), *arguments).returncode == 2


@pytest.mark.parametrize("python", ["", "exit 1", "exit 0"])
@pytest.mark.parametrize("arguments", [["--output", "out"], []])
def test_without_a_python_that_has_pytorch_nothing_is_written(
    tmp_path: Path, python: str, arguments: list[str]
) -> None:
    """Without a folder's name, files would go to the file system's root."""
    fake = tmp_path / "python"
    if python:
        fake.write_text(f"#!/bin/sh\n{python}\n")
        fake.chmod(0o755)
    done = run("--stage", "environment", *arguments, python=str(fake), cwd=tmp_path)
    assert done.returncode == 1
    assert f"gpu.sh: `{fake} -m bench.environment --" in done.stderr
    assert done.stdout == ""
    assert set(tmp_path.iterdir()) <= {fake}


def test_relative_paths_are_of_the_callers_folder(tmp_path: Path) -> None:
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\necho one\n")
    fake.chmod(0o755)
    done = run("--stage", "environment", "--output", "out", "--archive", "all.tar", python=str(fake), cwd=tmp_path)
    assert done.returncode == 0
    assert f"results are in {tmp_path / 'out'}" in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"python", "out", "all.tar"}
    assert (tmp_path / "out" / "environment.log").read_text() == "one\n"
