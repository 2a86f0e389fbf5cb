"""Pictures of results: they show measured systems, and leave failed ones out."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import plot
from bench.environment import environment

pytest.importorskip("matplotlib")


def row(system: str, batch: int, seconds: float, model: str = "ViT-B/32") -> dict[str, Any]:
    return {
        "model": model, "batch": batch, "precision": "fp32", "system": system, "seconds": seconds,
        "images_per_second": batch / seconds, "to_roofline": batch / seconds / 400,
    }  # fmt: skip


ROWS = [row("clip_fast", 1, 0.01), row("clip_fast", 8, 0.04), row("openai-clip", 1, 0.02), row("openai-clip", 8, 0.1)]
FAILED = {"model": "ViT-B/32", "batch": 1, "precision": "fp32", "system": "OpenVINO", "failed": "not installed"}


def document(rows: list[dict[str, Any]], bench: str = "end_to_end") -> dict[str, Any]:
    return {"bench": bench, "environment": asdict(environment(torch.device("cpu"))), "ceilings": None, "rows": rows}


def texts(svg: str) -> str:
    return " ".join(
        "".join(element.itertext()) for element in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")
    )


def test_throughput_and_latency() -> None:
    measured = document([*ROWS, FAILED])  # once: it has the minute in it
    drawn = plot.pictures(measured)
    assert set(drawn) == {"throughput-fp32.svg", "curve-fp32.svg", "latency-fp32.svg"}
    throughput = texts(drawn["throughput-fp32.svg"])
    for wanted in ("clip_fast", "openai-clip", "200", "80", "roofline 400", "ViT-B/32, batch 8", "torch"):
        assert wanted in throughput, wanted
    assert "OpenVINO" not in throughput
    for name, unit in (("latency", "ms"), ("curve", "images per second")):
        assert "openai-clip" in texts(drawn[f"{name}-fp32.svg"])
        assert f" {unit} " in texts(drawn[f"{name}-fp32.svg"])
    assert plot.pictures(measured) == drawn  # the same picture is the same file


def test_a_panel_for_each_model() -> None:
    drawn = plot.pictures(document([*ROWS, row("clip_fast", 4, 0.1, "RN50")]))
    assert "RN50, batch 4" in texts(drawn["throughput-fp32.svg"])


def test_a_panel_for_each_job() -> None:
    jobs = [
        {"model": "stand-in", "kind": kind, "precision": "fp32", "system": system, "images_per_second": speed}
        for kind, system, speed in (("640x480", "clip_fast", 300.0), ("640x480", "openai-clip", 200.0),
                                    ("640x480.tar", "clip_fast", 310.0))
    ]  # fmt: skip
    stages = {"model": "stand-in", "kind": "640x480", "precision": "fp32", "system": "clip_fast", "stages": {}}
    drawn = plot.pictures(document([stages, *jobs, FAILED], "pipeline"))
    assert set(drawn) == {"pipeline-fp32.svg"}
    for wanted in ("stand-in, 640x480", "stand-in, 640x480.tar", "300", "200", "310"):
        assert wanted in texts(drawn["pipeline-fp32.svg"]), wanted


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "cpu.json"
    file.write_text(json.dumps(document(ROWS)))
    assert plot.main([str(file)]) == 0
    assert (tmp_path / "throughput-fp32.svg").exists()
    for rows, bench, message in ((ROWS, "kernels", "expected results of"), ([FAILED], "end_to_end", "nothing was")):
        file.write_text(json.dumps(document(rows, bench)))
        assert plot.main([str(file)]) == 1
        assert message in capsys.readouterr().err
