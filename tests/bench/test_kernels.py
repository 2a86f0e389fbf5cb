"""The kernels' contests, interpreted: they measure the ops that encoders call, rivals agree, and each has a row."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import timing
from bench.kernels import __main__ as kernels
from bench.kernels import comparison
from bench.kernels import contests as contests_module
from bench.kernels.comparison import compare
from bench.kernels.contests import COMPILED, OPS, OURS, PRODUCT, SEPARATE, Contest, contests
from bench.models import MODELS, PUBLISHED
from bench.timing import Ceilings, Fault, Times
from clip_fast.kernels import ops
from clip_fast.kernels.dispatch import Op
from clip_fast.towers import convolution, reference
from clip_fast.towers.config import IMAGE_MEAN, IMAGE_STD, VitConfig
from clip_fast.towers.precision import BF16
from clip_fast.towers.resnet import FastResNet
from clip_fast.towers.vit import FastVit

ROOT = Path(__file__).parents[2]
TOYS = {name: MODELS[name] for name in ("toy", "toy-resnet")}
CPU, META = torch.device("cpu"), torch.device("meta")
LIMITS = Ceilings({"fp32": 1e11, "fp16": 1e11, "bf16": 1e11, "tf32": 1e11}, 1e10)


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        monkeypatch.setenv("TRITON_INTERPRET", "1")


def uncompiled(contest: Contest) -> list[str]:
    return [name for name in contest.systems if name != COMPILED]


def test_every_op_has_contests_at_every_model() -> None:
    found = list(contests(PUBLISHED, [1, 256], ["bf16"]))
    assert {contest.op for contest in found} == set(OPS)
    assert {"ViT-B/32", "ViT-L/14", "ViT-B-32", "ViT-H-14", "ViT-bigG-14", "RN50", "RN50x64"} <= {
        c.model for c in found
    }
    names = [contest.name for contest in found]
    assert len(set(names)) == len(names)
    assert all(contest.operations > 0 and contest.traffic > 0 for contest in found)


def recorded(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[object, ...]]:
    """Counts later calls of the ops, by the rows, columns, row strides and dtypes of their operands."""
    calls: Counter[tuple[object, ...]] = Counter()

    def seen(tensor: Tensor | None) -> tuple[object, ...] | None:
        if tensor is None:
            return None
        rows = tensor.reshape(-1, tensor.shape[-1])
        return (*rows.shape, rows.stride(0), tensor.dtype)

    def call(op: Op, impl: str, tensors: tuple[Tensor | None, ...], *options: object) -> Any:
        name = op.name
        told = tuple(option for option in options if not isinstance(option, float))
        calls[name, told, *map(seen, tensors)] += 1
        return getattr(ops, f"_fake_{name}")(*tensors, *options)

    monkeypatch.setattr(Op, "__call__", call)
    monkeypatch.setattr(convolution, "triton_can_run", lambda device: True)
    return calls


@pytest.mark.parametrize("model", ["ViT-B/32", "ViT-H-14", "RN50", "RN50x4"])
def test_the_contests_of_a_model_are_the_ops_that_it_calls(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shapes, the strides, the options and the numbers of calls are the same. A model does not resize."""
    calls, config = recorded(monkeypatch), MODELS[model]
    with META:
        state_dict = reference.build(config).state_dict()
    kind = FastVit if isinstance(config, VitConfig) else FastResNet
    fast: Any = kind.prepare(state_dict, config, BF16, IMAGE_MEAN, IMAGE_STD)
    size = config.image_size
    called: Counter[tuple[object, ...]] = Counter()
    for pixels in (torch.bfloat16, torch.uint8):
        calls.clear()
        fast.encode(torch.empty(4, 3, size, size, dtype=pixels, device=META))
        called |= calls
    contested: Counter[tuple[object, ...]] = Counter()
    for contest in contests({model: config}, [4], ["bf16"], [op for op in OPS if op != "resize"]):
        calls.clear()
        contest.systems[OURS](contest.operands(META))
        (call,) = calls
        contested[call] += contest.count
    assert contested == called


@pytest.mark.parametrize(
    "contest",
    [
        pytest.param(contest, marks=pytest.mark.slow) if "toy-resnet" in contest.name else contest
        for contest in contests(TOYS, [2], ["fp32", "bf16"], [op for op in OPS if op != "resize"])
    ],
    ids=lambda contest: contest.name,
)
def test_all_systems_compute_the_same(contest: Contest) -> None:
    compute_the_same(contest)


def test_all_systems_resize_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("bench.photographs", "bench.kernels.contests"):
        monkeypatch.setattr(f"{module}.PHOTOGRAPH", (96, 72))  # the interpreter takes minutes for a larger one
    (contest,) = contests({"toy": TOYS["toy"]}, [2], ["fp32"], ["resize"])
    compute_the_same(contest)


def compute_the_same(contest: Contest) -> None:
    rows = {row["system"]: row for row in compare(contest, uncompiled(contest), 1, LIMITS, CPU)}
    assert "failed" not in rows[OURS], rows[OURS]
    assert rows[OURS]["error"] < 2 * rows[SEPARATE]["error"]
    assert rows[SEPARATE]["to_best_rival"] <= 1
    assert rows[OURS]["flops"] == contest.operations / rows[OURS]["seconds"]
    if PRODUCT in rows:
        assert rows[PRODUCT]["error"] is None
    if "SDPA, cuDNN" in rows:
        assert rows["SDPA, cuDNN"]["failed"]  # it does not run on a CPU, and the row has the reason


def test_a_system_that_computes_something_else_is_said() -> None:
    contest = next(contests(TOYS, [1], ["fp32"], ["layer_norm"]))
    wrong = dataclasses.replace(contest, systems={**contest.systems, OURS: lambda o: o["x"] * 3})
    rows = {row["system"]: row for row in compare(wrong, uncompiled(contest), 1, LIMITS, CPU)}
    assert "something else" in rows[OURS]["failed"]


@pytest.mark.parametrize("part", ["operands", "the truth"])
def test_what_does_not_fit_is_a_row_for_every_system(part: str) -> None:
    contest = next(contests(TOYS, [1], ["fp32"], ["layer_norm"]))

    def too_large(_: object) -> Any:
        raise torch.OutOfMemoryError("so many GiB")

    if part == "operands":
        contest = dataclasses.replace(contest, operands=too_large)
    else:
        contest = dataclasses.replace(contest, systems={**contest.systems, SEPARATE: too_large})
    rows = compare(contest, contest.systems, 1, LIMITS, CPU)
    assert [row["system"] for row in rows] == list(contest.systems)
    assert {row["failed"] for row in rows} == {"OutOfMemoryError: so many GiB"}


def test_a_system_is_timed_on_every_set_of_operands(monkeypatch: pytest.MonkeyPatch) -> None:
    contest = next(contests(TOYS, [1], ["fp32"], ["layer_norm"]))
    asked: list[int] = []

    def rotated(make: Any, footprint: int, device: torch.device) -> list[Any]:
        asked.append(footprint)
        return [make() for _ in range(3)]

    def measure(calls: Any, device: torch.device, rounds: int, *, graph: bool) -> dict[str, Times]:
        for name in (OURS, SEPARATE):
            assert len({call.args[0]["x"].data_ptr() for call in calls[name]}) == 3
        return dict.fromkeys(calls, Times((1.0,)))

    monkeypatch.setattr(comparison, "rotated", rotated)
    monkeypatch.setattr(comparison, "measure", measure)
    compare(contest, uncompiled(contest), 1, LIMITS, CPU)
    assert asked == [contest.traffic]


def test_the_command_writes_tables_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "ceilings", lambda device, precisions, rounds: LIMITS)
    file = tmp_path / "kernels.json"

    def rows(ops: str, *more: str) -> list[dict[str, Any]]:
        kernels.main(
            ["--models", "toy", "--batches", "1", "--precisions", "fp32", "--rounds", "1", "--device", "cpu",
             "--json", str(file), "--resume", "--ops", ops, *more]
        )  # fmt: skip
        return json.loads(file.read_text())["rows"]

    first = rows("layer_norm", "--without-compiled")
    both = rows("layer_norm,flash_attention", "--without-compiled")
    assert [row for row in both if row["op"] == "layer_norm"] == first
    assert {row["op"] for row in both} == {"layer_norm", "flash_attention"}
    text = file.with_suffix(".md").read_text()
    assert "**flash_attention, fp32**" in text
    assert "- SDPA, cuDNN: " in text
    assert "Ceilings of this run: 0.1 TFLOP/s in fp32" in text

    # Systems that were left out before are measured now, together with their rivals. Each has one row.
    monkeypatch.setattr(contests_module, "_compiled", lambda compute: compute)
    whole = rows("layer_norm")
    of_norm = [row for row in whole if row["op"] == "layer_norm"]
    assert sorted(row["system"] for row in of_norm) == sorted([OURS, SEPARATE, COMPILED])
    assert not any(row in first for row in of_norm)
    assert [row for row in whole if row["op"] != "layer_norm"] == [row for row in both if row["op"] != "layer_norm"]
    assert rows("layer_norm") == whole

    # All rows are compared with the highest ceilings that any run reached.
    monkeypatch.setattr(kernels, "ceilings", lambda device, precisions, rounds: Ceilings({"fp32": 2e11}, 2e10))
    higher = [row for row in rows("layer_norm,mean_token,patch_embed", "--without-compiled") if "failed" not in row]
    old = {(row["op"], row["system"]): row["of_ceiling"] for row in whole if "failed" not in row}
    assert {(row["op"], row["system"]): 2 * row["of_ceiling"] for row in higher if row["op"] != "patch_embed"} == old
    assert any(row["op"] == "patch_embed" for row in higher)


@pytest.mark.parametrize("faulty", [OURS, SEPARATE + "2"])
def test_the_command_goes_on_behind_a_fault_of_the_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, faulty: str
) -> None:
    monkeypatch.setattr(kernels, "ceilings", lambda device, precisions, rounds: LIMITS)
    first, second = contests(TOYS, [1], ["fp32"], ["layer_norm", "mean_token"])
    lost = False

    def faults(_: object) -> Any:
        nonlocal lost
        lost = True
        raise RuntimeError("CUDA error")

    first = dataclasses.replace(first, systems={OURS: first.systems[OURS], **first.systems, faulty: faults})
    monkeypatch.setattr(kernels, "contests", lambda *_: [first, second])
    monkeypatch.setattr(timing, "lost", lambda device: lost)
    file = tmp_path / "kernels.json"

    def call() -> None:
        nonlocal lost
        lost = False
        kernels.main(["--device", "cpu", "--rounds", "1", "--without-compiled", "--json", str(file), "--resume"])

    def rows() -> list[dict[str, Any]]:
        return json.loads(file.read_text())["rows"]

    with pytest.raises(Fault, match=f"^{faulty} faults the GPU"):
        call()
    (row,) = rows()
    assert (row["op"], row["system"], row["failed"]) == (first.op, faulty, "faults the GPU: RuntimeError: CUDA error")
    call()
    assert {row["op"] for row in rows()} == {"layer_norm", "mean_token"}
    assert [row["system"] for row in rows() if "failed" in row] == [faulty]


@pytest.mark.slow
def test_pytest_runs_the_contests_that_are_chosen(tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark")
    file = tmp_path / "benchmark.json"
    command = [
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "bench/kernels", "--models", "toy",
        "--batches", "1", "--rounds", "2", "-k", "layer_norm and not compiled", "--benchmark-json", str(file),
    ]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}  # not xdist's
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert "2 passed" in done.stdout, done.stdout + done.stderr
    found = json.loads(file.read_text())["benchmarks"]
    assert {each["param"].split(": ")[-1] for each in found} == {OURS, SEPARATE}
    assert all(each["stats"]["rounds"] == 2 and each["extra_info"]["error"] < 1e-6 for each in found)
