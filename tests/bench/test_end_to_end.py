"""The end-to-end benchmark: every system computes the same function, and failures are listed with their reason."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench import end_to_end, systems, timing
from bench.environment import environment
from bench.systems import BASELINE, FLOAT32, OURS, SYSTEMS, System, Task, Unavailable
from bench.timing import Ceilings, Fault
from clip_fast.towers import reference
from clip_fast.towers.config import Activation, Config, ResNetConfig, SiglipConfig, VitConfig

VIT = VitConfig(image_size=32, patch_size=16, width=64, layers=2, heads=1, embed_dim=32)
RESNET = ResNetConfig(layers=(1, 1, 1, 1), width=8, heads=4, image_size=64, embed_dim=32)
SIGLIP = SiglipConfig(image_size=32, patch_size=16, width=64, layers=2, heads=2, mlp_width=112)
CPU = torch.device("cpu")
LIMITS = Ceilings({"fp32": 1e12}, 1e11)
EAGER = [system for system in SYSTEMS if "compiled" not in system.name]


def rows_of(config: Config, batches: Sequence[int], rounds: int, contestants: Sequence[System]) -> list[end_to_end.Row]:
    lacking = dict.fromkeys(batches, contestants)
    rows = [row for heat in end_to_end.heats("tiny", config, "fp32", lacking, rounds, CPU) for row in heat]
    end_to_end.add_ratios(rows, LIMITS)
    return rows


@pytest.fixture(autouse=True)
def own_signal_stack() -> Iterator[None]:
    """Afterwards this thread's stack for signals is as before.

    OpenVINO gives the thread another one, and frees it with its model. Python's next handler of a signal would run on
    it: in a later test a decoding process ended, and the test process with it, without a word.
    """
    set_stack = getattr(ctypes.CDLL(None), "sigaltstack", None)
    before = ctypes.create_string_buffer(64)  # a stack_t, and more
    if set_stack:
        set_stack(None, before)
    yield
    if set_stack:
        set_stack(before, None)


@pytest.mark.parametrize("config", [VIT, RESNET], ids=["vit", "resnet"])
def test_every_system_computes_the_same(config: Config) -> None:
    rows = rows_of(config, [1, 3], 2, EAGER)
    assert [row["batch"] for row in rows] == [1] * len(EAGER) + [3] * len(EAGER)
    by_name = {row["system"]: row for row in rows[len(EAGER) :]}
    for name in (OURS, BASELINE, "open_clip"):
        row = by_name[name]
        assert row["error"] < 1e-5
        assert row["cosine"] > 1 - 1e-9
        assert row["images_per_second"] == pytest.approx(3 / row["seconds"])
        assert row["to_baseline"] == pytest.approx(by_name[BASELINE]["seconds"] / row["seconds"])
    for row in rows:  # every other installed system that has such a model computes the same too
        if "failed" in row:
            assert any(why in row["failed"] for why in ("is not installed", "is measured in", "has no ResNets"))
        else:
            assert row["error"] < 1e-5


@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu"])
def test_every_system_computes_the_same_siglip(activation: Activation) -> None:
    """open_clip's is timm's; openai-clip has none, and is said to have none."""
    rows = rows_of(replace(SIGLIP, activation=activation), [3], 2, EAGER)
    by_name = {row["system"]: row for row in rows}
    assert by_name[BASELINE]["failed"] == "openai-clip has no SigLIP"
    for name in (OURS, "open_clip", "transformers"):
        assert by_name[name]["error"] < 1e-5
        assert by_name[name]["to_baseline"] is None
        assert by_name[name]["to_best_rival"] > 0
    assert all("failed" in row or row["error"] < 1e-5 for row in rows)
    text = end_to_end.markdown(rows, environment(CPU), LIMITS)
    assert "- openai-clip: openai-clip has no SigLIP" in text


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_towers_of_timm_and_transformers_take_the_weights(activation: str) -> None:
    config = VitConfig(32, 16, 64, 2, 1, 32, activation=activation)  # type: ignore[arg-type]
    tower = reference.build(config)
    task = Task(config, tower.state_dict(), CPU, "fp32")
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        wanted = tower(images)
        torch.testing.assert_close(systems._timm_tower(task)(images), wanted, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(systems._transformers(task)(images), wanted, rtol=1e-4, atol=1e-5)


def test_what_fails_is_listed() -> None:
    def raising(task: Task) -> systems.Encode:
        raise OSError("no library of that name")

    def wrong(task: Task) -> systems.Encode:
        return lambda images: torch.randn(len(images), VIT.embed_dim)

    def late(task: Task) -> systems.Encode:
        def encode(images: Tensor) -> Tensor:
            raise RuntimeError("first call\nsecond line")

        return encode

    contestants = [
        SYSTEMS[0],
        System("raising", None, raising),
        System("wrong", None, wrong),
        System("late", None, late),
        System("missing", "a-package-that-is-not", raising),
        System("narrow", None, raising, precisions=("bf16",)),
    ]
    rows = rows_of(VIT, [2], 1, contestants)
    reasons = {row["system"]: row.get("failed") for row in rows}
    assert reasons.pop("wrong").startswith("computes something else: relative error")  # type: ignore[union-attr]
    assert reasons == {
        OURS: None,
        "raising": "OSError: no library of that name",
        "late": "RuntimeError: first call",
        "missing": "a-package-that-is-not is not installed",
        "narrow": "is measured in bf16 only",
    }
    text = end_to_end.markdown(rows, environment(CPU), LIMITS)
    assert "- late: RuntimeError: first call" in text
    assert "| **clip_fast** |" in text
    assert "1 TFLOP/s in fp32, 100 GB/s" in text


def test_rows_of_different_heats_are_compared_by_our_time_in_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(end_to_end, "_HEAT", 0.0)  # a heat for every system
    chosen = [system for system in SYSTEMS if system.name in (OURS, BASELINE, "open_clip")]
    heats = end_to_end.heats("tiny", VIT, "fp32", {2: chosen}, 2, CPU, {2: SYSTEMS[0]})
    rows = [row for heat in heats for row in heat]
    assert [row["system"] for row in rows] == [system.name for system in chosen]
    for row, ours, theirs in zip(rows, (1.0, 2.0, 4.0), (1.0, 3.0, 20.0), strict=True):
        row |= {"beside": ours, "seconds": theirs}  # the machine got slower from heat to heat
    end_to_end.add_ratios(rows, LIMITS)
    assert [row["to_baseline"] for row in rows] == pytest.approx([1.5, 1.0, 0.3])
    assert rows[0]["to_best_rival"] == pytest.approx(1.5)
    assert rows[0]["to_roofline"] == pytest.approx(rows[2]["to_roofline"] * 20)


def test_on_a_cpu_float32_stands_beside_half_precision() -> None:
    chosen = [system for system in EAGER if system.name in (OURS, BASELINE, FLOAT32)]
    (rows,) = end_to_end.heats("tiny", VIT, "bf16", {2: chosen}, 1, CPU)
    end_to_end.add_ratios(rows, Ceilings({"bf16": 1e12}, 1e11))
    ours, halves, wide = rows
    assert wide["error"] < min(ours["error"], halves["error"])
    assert ours["to_float32"] == pytest.approx(wide["seconds"] / ours["seconds"])
    text = end_to_end.markdown(rows, environment(CPU), LIMITS)
    assert f"× {BASELINE} | × {FLOAT32} |" in text
    assert "memory" not in text  # a CPU's libraries do not report it


def test_each_compiled_system_has_a_graph_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two systems with the same code do not share a graph, since each pins another attention when it is compiled.

    The weights are constants, which Inductor packs. So the images are a graph's only input.
    """
    compiled: list[torch.fx.GraphModule] = []

    def record(graph: torch.fx.GraphModule, examples: list[Tensor], options: object) -> object:
        compiled.append(graph)
        assert [tuple(example.shape) for example in examples] == [(1, 3, 32, 32)]
        return graph.forward

    monkeypatch.setattr(torch._inductor, "compile", record)
    tower = reference.build(VIT).eval()
    images = torch.randn(1, 3, 32, 32)
    with torch.inference_mode(), systems.compilations():
        for attention in (None, "MATH"):
            encode = systems._compiled(lambda task: tower, attention)(Task(VIT, {}, CPU, "fp32"))
            torch.testing.assert_close(encode(images), tower(images))
    assert len(compiled) == 2


def test_resnets_are_refused_where_there_are_none() -> None:
    with pytest.raises(Unavailable, match="timm has no ResNets"):
        systems._timm_tower(Task(RESNET, {}, CPU, "fp32"))
    with pytest.raises(Unavailable, match="timm's SigLIP is what open_clip runs"):
        systems._timm_tower(Task(SIGLIP, {}, CPU, "fp32"))


def test_the_command_line_writes_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(end_to_end.ENCODERS, "tiny", VIT)
    monkeypatch.setattr(end_to_end, "ceilings", lambda device, precisions, rounds: LIMITS)
    monkeypatch.setattr(end_to_end, "bf16_on_cpu", lambda: False)
    file = tmp_path / "results" / "cpu.json"
    end_to_end.main(
        ["--models", "tiny", "--batches", "2", "--precisions", "fp32,bf16", "--systems", f"{OURS};{BASELINE}",
         "--rounds", "2", "--device", "cpu", "--json", str(file)]
    )  # fmt: skip
    content = json.loads(file.read_text())
    assert content["bench"] == "end_to_end"
    assert [row["system"] for row in content["rows"]] == [OURS, BASELINE]
    assert {row["precision"] for row in content["rows"]} == {"fp32"}  # this CPU lacks bf16
    assert content["environment"]["cpu"]
    assert "batch 2, fp32" in file.with_suffix(".md").read_text()


def test_a_resumed_run_measures_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(end_to_end.ENCODERS, "tiny", VIT)
    monkeypatch.setattr(end_to_end, "ceilings", lambda device, precisions, rounds: LIMITS)
    file = tmp_path / "cpu.json"

    def rows(batches: str, *more: str) -> list[dict[str, object]]:
        end_to_end.main(
            ["--models", "tiny", "--batches", batches, "--precisions", "fp32", "--systems", OURS, "--rounds", "1",
             "--device", "cpu", "--json", str(file), "--resume", *more]
        )  # fmt: skip
        return json.loads(file.read_text())["rows"]

    first = rows("1")
    assert rows("1,2", "--minutes", "0") == first
    both = rows("1,2")
    assert both[0] == first[0]  # not measured again
    assert [row["batch"] for row in both] == [1, 2]
    more = rows("1", "--rounds", "2")  # a row of fewer rounds is measured again
    assert [(row["batch"], row["rounds"]) for row in more] == [(2, 1), (1, 2)]
    assert rows("1") == more
    content = json.loads(file.read_text())
    content["environment"]["python"] = "2.7"
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"cannot resume .*another python"):
        rows("4")


def test_a_resumed_run_asks_only_the_systems_that_lack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(end_to_end.ENCODERS, "tiny", VIT)
    monkeypatch.setattr(end_to_end, "ceilings", lambda device, precisions, rounds: LIMITS)
    file = tmp_path / "cpu.json"
    arguments = ["--models", "tiny", "--batches", "2", "--precisions", "fp32", "--rounds", "1", "--device", "cpu"]
    found: list[list[dict[str, object]]] = []
    for chosen in (OURS, f"{OURS};{BASELINE}"):
        end_to_end.main([*arguments, "--systems", chosen, "--json", str(file), "--resume"])
        found.append(json.loads(file.read_text())["rows"])
    (first,), both = found
    assert [row["system"] for row in both] == [OURS, BASELINE]
    assert both[0]["seconds"] == first["seconds"]
    assert both[1]["beside"] != first["seconds"]  # our time in its own rounds


@pytest.mark.parametrize("faulty", [OURS, BASELINE])
@pytest.mark.parametrize("when", ["judged", "timed"])
def test_a_resumed_run_goes_on_behind_a_fault_of_the_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, faulty: str, when: str
) -> None:
    """CUDA answers all later calls with the same error. So what stood beside the fault is measured by a later call."""
    monkeypatch.setitem(end_to_end.ENCODERS, "tiny", VIT)
    monkeypatch.setattr(end_to_end, "ceilings", lambda device, precisions, rounds: LIMITS)
    lost = False

    def faults(task: Task) -> systems.Encode:
        calls = 0

        def encode(images: Tensor) -> Tensor:
            nonlocal calls, lost
            calls += 1
            if calls > (when == "timed"):
                lost = True
                raise RuntimeError("CUDA error")
            return good.encode(task)(images)

        (good,) = (system for system in SYSTEMS if system.name == faulty)
        return encode

    faulting = [replace(s, build=faults, package=None) if s.name == faulty else s for s in SYSTEMS]
    monkeypatch.setattr(end_to_end, "SYSTEMS", faulting)
    monkeypatch.setattr(timing, "lost", lambda device: lost)
    file = tmp_path / "gpu.json"

    def call() -> list[dict[str, object]]:
        nonlocal lost
        lost = False
        end_to_end.main(
            ["--models", "tiny", "--batches", "1,2", "--precisions", "fp32", "--rounds", "1", "--device", "cpu",
             "--systems", f"{OURS};{BASELINE};open_clip", "--json", str(file), "--resume"]
        )  # fmt: skip
        return json.loads(file.read_text())["rows"]

    for batch in (1, 2):
        with pytest.raises(Fault, match=f"^{faulty} faults the GPU"):
            call()
        rows = json.loads(file.read_text())["rows"]
        failed = {(row["batch"], row["system"]): row["failed"] for row in rows if "failed" in row}
        assert failed == {(b, faulty): "faults the GPU: RuntimeError: CUDA error" for b in range(1, batch + 1)}
    assert len(call()) == 6
    assert [row for row in call() if "failed" in row] == [row for row in rows if "failed" in row]


def test_our_system_that_faults_the_gpu_beside_a_rival(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has its row already. The fault takes that row's place, so that the rival is measured without it."""
    monkeypatch.setitem(end_to_end.ENCODERS, "tiny", VIT)
    monkeypatch.setattr(end_to_end, "ceilings", lambda device, precisions, rounds: LIMITS)
    file = tmp_path / "gpu.json"

    def rows_after(chosen: str) -> dict[object, object]:
        end_to_end.main(
            ["--models", "tiny", "--batches", "1", "--precisions", "fp32", "--rounds", "1", "--device", "cpu",
             "--systems", chosen, "--json", str(file), "--resume"]
        )  # fmt: skip
        return rows()

    def rows() -> dict[object, object]:
        found = json.loads(file.read_text())["rows"]
        assert len({row["system"] for row in found}) == len(found)
        return {row["system"]: row.get("failed") for row in found}

    def faults(task: Task) -> systems.Encode:
        raise RuntimeError("CUDA error")

    assert rows_after(OURS) == {OURS: None}
    with monkeypatch.context() as patched:
        faulting = [replace(s, build=faults, package=None) if s.name == OURS else s for s in SYSTEMS]
        patched.setattr(end_to_end, "SYSTEMS", faulting)
        patched.setattr(timing, "lost", lambda device: True)
        with pytest.raises(Fault, match=f"^{OURS} faults the GPU"):
            rows_after(f"{OURS};{BASELINE}")
    assert rows() == {OURS: "faults the GPU: RuntimeError: CUDA error"}
    assert rows_after(f"{OURS};{BASELINE}") == {OURS: "faults the GPU: RuntimeError: CUDA error", BASELINE: None}
