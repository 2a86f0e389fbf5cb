"""The table of results."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from .commands import json_of, require_emulator
from .gate import Row


def test_the_same_ptx_is_emulated_once() -> None:
    """Triton makes the same for sm_89 as for sm_86."""
    options = ("--op", "mean_token", "--dtype", "fp16", "--each", "1", "--quick")
    rows = [Row(**row) for row in json_of("--arch", "sm_86", "sm_89", *options)]
    assert [(row.arch, row.like, row.adversaries) for row in rows] == [("sm_86", "", 2), ("sm_89", "sm_86", 2)]
    assert not any(row.problems for row in rows)
    assert rows[0].instructions == rows[1].instructions > 0


def test_one_table_of_several_runs(tmp_path: Path) -> None:
    require_emulator()
    rows = [
        Row("mean_token", "sm_120", "fp16", "a", "3.9.0", problems=[("RACE", "before this was mended")]),
        Row("mean_token", "sm_120", "fp16", "a", "3.9.0", adversaries=5, ratio=0.5),
        Row("mean_token", "sm_120", "fp16", "b", "3.9.0", adversaries=2, ratio=0.75, problems=[("RACE", "there")]),
        Row("mean_token", "sm_89", "fp16", "a", "3.9.0", like="sm_86", adversaries=5, ratio=1.0),
        Row("mean_token", "sm_89", "fp16", "a", "3.6.0", adversaries=5),  # an error before there was a result
    ]
    files = [tmp_path / "new.jsonl", tmp_path / "old.jsonl"]
    for path, part in zip(files, (rows[:4], rows[4:]), strict=True):
        path.write_text("".join(f"{json.dumps(row.as_json())}\n" for row in part))
    command = [sys.executable, str(Path(__file__).parent), "table", *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert [line.split(" | ") for line in lines if line.startswith("| 3")] == [
        ["| 3.6.0", "mean_token", "sm_89", "fp16", "1 of 2", "5", "nan", "0 |"],
        ["| 3.9.0", "mean_token", "sm_89, as sm_86", "fp16", "1 of 2", "5", "1.000", "0 |"],
        ["| 3.9.0", "mean_token", "sm_120", "fp16", "2 of 2", "2", "0.750", "1 |"],
    ]
    left = next(line for line in lines if line.startswith("Not run with Triton 3.6.0: "))
    assert "mean_token sm_120 fp16" in left
    assert "mean_token sm_89 fp16" not in left
