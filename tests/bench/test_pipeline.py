"""The pipeline's benchmark at toy size: every stage has a time, and all systems give the same embeddings."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench import jobs, pipeline
from bench.photographs import make_photographs

pytest.importorskip("pyarrow")
ARGUMENTS = ["--models", "toy", "--batch-size", "2", "--rounds", "1", "--device", "cpu"]
DEFAULTS = argparse.Namespace(count=None, batch_size=None, workers=None)
RIVALS = {"openai-clip", "clip-retrieval"}


def needs(*packages: str) -> None:
    for package in packages:
        if package not in sys.modules and importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}, of tests/requirements-peers.txt")


def measured(tmp_path: Path, *arguments: str) -> list[dict[str, Any]]:
    file = tmp_path / "pipeline.json"
    assert pipeline.main([*ARGUMENTS, *arguments, "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert [row.get("failed") for row in rows] == [None] * len(rows)
    assert "| openai-clip |" in file.with_suffix(".md").read_text()
    return rows


def test_stages_and_whole_jobs(tmp_path: Path) -> None:
    needs("clip", "clip_retrieval")
    rows = measured(tmp_path, "--kinds", "given", "--workers", "0", "--count", "5")
    stages = {row["system"]: row["stages"] for row in rows if "stages" in row}
    assert set(stages) == {"clip_fast", "openai-clip"}
    for times in stages.values():
        assert set(times) == set(pipeline.STAGES)
        assert all(seconds > 0 for seconds in times.values())
    whole = {row["system"]: row for row in rows if "images_per_second" in row}
    assert set(whole) == {"clip_fast", "clip_fast, fast decode"} | RIVALS
    assert all(whole[rival]["cosine"] > 0.9999 for rival in RIVALS)
    assert 0.9 < whole["clip_fast, fast decode"]["cosine"] <= 1
    assert whole["openai-clip"]["to_baseline"] == 1


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_tars(tmp_path: Path) -> None:
    needs("clip", "clip_retrieval", "webdataset")
    rows = measured(tmp_path, "--kinds", "80x60.tar", "--workers", "2", "--count", "17")
    whole = {row["system"]: row for row in rows}
    assert set(whole) == {"clip_fast", "clip_fast, fast decode"} | RIVALS  # each once: tars have no stages
    assert all(row["cosine"] > 0.9999 for row in whole.values())  # the same photographs, in the same order


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_ray(tmp_path: Path) -> None:
    needs("clip", "clip_retrieval", "ray")
    rows = measured(tmp_path, "--kinds", "80x60", "--workers", "0", "--count", "49")  # files of 16, 16, 16 and 1
    (row,) = [row for row in rows if row["system"] == "clip_fast on Ray"]
    assert row["cosine"] > 0.9999
    assert row["start_up"] < row["seconds"]


@pytest.mark.parametrize("cores", [1, 2, 16, 192])
def test_the_default_jobs_have_batches_enough(monkeypatch: pytest.MonkeyPatch, cores: int) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    for device in map(torch.device, ("cpu", "cuda")):
        for model in ("stand-in", "ViT-B/32"):
            for kind in pipeline.KINDS.split(","):
                count, batch_size, workers = pipeline.numbers(model, kind, DEFAULTS, device)
                assert count >= 8 * batch_size
                assert count >= 2 * workers * batch_size  # the first of each process is not timed
                assert 1 <= workers <= cores
                clock = jobs.Clock(workers)
                for start in range(0, count, batch_size):
                    clock.tick(min(batch_size, count - start))
                clock.result(np.empty(0))


def test_the_default_jobs_of_few_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    assert pipeline.numbers("stand-in", "640x480", DEFAULTS, torch.device("cpu")) == (1024, 32, 4)
    assert pipeline.numbers("ViT-B/32", "4000x3000", DEFAULTS, torch.device("cpu")) == (64, 8, 2)
    assert pipeline.numbers("ViT-B/32", "640x480", DEFAULTS, torch.device("cuda")) == (8192, 256, 4)


def test_every_decoding_process_has_a_tar(tmp_path: Path) -> None:
    made = make_photographs("8x6.tar", 45, [], tmp_path / "many", workers=20)
    members: list[str] = []
    for path in made.paths:
        with tarfile.open(path) as tar:
            assert tar.getnames()
            members += tar.getnames()
    assert len(made.paths) == 20
    assert [int(Path(name).stem) for name in members] == list(range(45))
    assert len(make_photographs("8x6.tar", 45, [], tmp_path / "few", workers=2).paths) == 16
    assert len(make_photographs("8x6.tar", 3, [], tmp_path / "three", workers=2).paths) == 3


def test_a_rival_that_fails_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(task: object) -> object:
        raise ModuleNotFoundError("No module named 'clip'")

    monkeypatch.setattr(pipeline, "rival_of", missing)
    file = tmp_path / "pipeline.json"
    arguments = [*ARGUMENTS, "--kinds", "given", "--workers", "0", "--count", "3"]
    assert pipeline.main([*arguments, "--json", str(file)]) == 0
    for name in ("openai-clip", "clip-retrieval"):
        assert f"- {name}: ModuleNotFoundError: No module named 'clip'" in file.with_suffix(".md").read_text()


def test_no_photographs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no photographs"):
        pipeline.main([*ARGUMENTS, "--kinds", "given", "--photos", str(tmp_path)])


@pytest.mark.parametrize("kind", ["", "640", "0x480", "given.tar", "640x480.zip"])
def test_unknown_kinds_of_photographs(kind: str) -> None:
    with pytest.raises(ValueError, match="photographs are"):
        pipeline.main([*ARGUMENTS, "--kinds", kind])


def test_a_clock_leaves_the_first_batches_out(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(jobs.time, "perf_counter", lambda: now)
    clock = jobs.Clock(2)
    for moment in (1.0, 5.0, 6.0, 7.0):
        now = moment
        clock.tick(10)
    run = clock.result(np.empty(0))
    assert (run.seconds, run.start_up, run.images_per_second) == (7.0, 5.0, 10.0)
    with pytest.raises(ValueError, match="more than 4 batches"):
        jobs.Clock(4).result(np.empty(0))
