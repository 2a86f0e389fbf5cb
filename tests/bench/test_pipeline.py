"""The pipeline's benchmark at toy size: every stage has a time, and all systems give the same embeddings."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from bench import pipeline

pytest.importorskip("pyarrow")
ARGUMENTS = ["--model", "toy", "--batch-size", "2", "--workers", "0", "--rounds", "1", "--device", "cpu"]


def test_stages_and_whole_runs(tmp_path: Path) -> None:
    for package in ("clip", "clip_retrieval"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}, of tests/requirements-peers.txt")
    file = tmp_path / "pipeline.json"
    assert pipeline.main([*ARGUMENTS, "--count", "5", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert [row.get("failed") for row in rows] == [None] * len(rows)
    stages = {row["system"]: row["stages"] for row in rows if "stages" in row}
    assert set(stages) == {"clip_fast", "openai-clip"}
    for times in stages.values():
        assert set(times) == set(pipeline.STAGES)
        assert all(seconds > 0 for seconds in times.values())
    whole = {row["system"]: row for row in rows if "images_per_second" in row}
    assert set(whole) == {"clip_fast", "clip_fast, fast decode", "openai-clip", "clip-retrieval"}
    assert whole["openai-clip"]["cosine"] > 0.9999
    assert whole["clip-retrieval"]["cosine"] > 0.9999
    assert 0.9 < whole["clip_fast, fast decode"]["cosine"] <= 1
    assert "| openai-clip |" in file.with_suffix(".md").read_text()


def test_a_rival_that_fails_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(job: pipeline.Job) -> object:
        raise ModuleNotFoundError("No module named 'clip'")

    monkeypatch.setattr(pipeline.Job, "rival", missing)
    file = tmp_path / "pipeline.json"
    assert pipeline.main([*ARGUMENTS, "--count", "2", "--json", str(file)]) == 0
    for name in ("openai-clip", "clip-retrieval"):
        assert f"- {name}: ModuleNotFoundError: No module named 'clip'" in file.with_suffix(".md").read_text()


def test_no_photographs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no photographs"):
        pipeline.main([*ARGUMENTS, "--photos", str(tmp_path)])
