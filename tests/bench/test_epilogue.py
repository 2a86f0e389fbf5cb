"""`bench.epilogue`: the line through two times, and the command at toy size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import epilogue


def test_the_epilogue_is_where_the_line_meets_no_columns() -> None:
    loop, rest = 2e-6, 30e-6  # seconds a column, and whatever K is
    assert epilogue.epilogue_seconds({64: rest + 64 * loop, 1024: rest + 1024 * loop}) == pytest.approx(rest)
    assert epilogue.epilogue_seconds({1024: rest + 1024 * loop, 64: rest + 64 * loop}) == pytest.approx(rest)


@pytest.mark.slow
def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    file = tmp_path / "epilogue.json"
    size = ["--model", "toy", "--batch", "1", "--precision", "fp32", "--ks", "64,128", "--rounds", "1"]
    epilogue.main([*size, "--device", "cpu", "--json", str(file)])
    rows = json.loads(file.read_text())["rows"]
    assert [row["part"] for row in rows] == ["ln+qkv", "out+residual", "ln+fc1+quick_gelu"]
    for row in rows:
        assert row["seconds"].keys() == {"64", "128"}
        # Written: 5 tokens of 192 columns and more; the weight's own columns are in it, x's are not.
        assert 0 < row["memory"] < min(row["seconds"].values())
    assert "K = 128, µs" in capsys.readouterr().out
    assert file.with_suffix(".md").read_text().startswith("|")


@pytest.mark.parametrize("arguments", [["--model", "RN50"], ["--ks", "64,64"], ["--ks", "64"]])
def test_what_cannot_be_measured_is_said(arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        epilogue.main(arguments)
