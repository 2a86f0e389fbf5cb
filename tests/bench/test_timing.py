"""Interleaved rounds, and the counts behind the rooflines."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import timing
from bench.report import table
from bench.roofline import least_seconds, operations, traffic, weights
from bench.timing import Ceilings, Failed, Fault, Times, interleaved, measure
from clip_fast.checkpoint.published import OPENAI_MODELS
from clip_fast.towers import reference
from clip_fast.towers.config import Config, VitConfig

CPU = torch.device("cpu")


def test_every_round_has_everyone_and_another_first() -> None:
    order: list[str] = []

    def sample(name: str) -> timing.Sampler:
        def take() -> float:
            order.append(name)
            return float(len(order))

        return take

    results = interleaved({name: sample(name) for name in "abc"}, 4, CPU)
    assert "".join(order) == "abcbcacababc"
    assert results["a"] == Times((1.0, 6.0, 8.0, 10.0))


def test_who_fails_stops_and_the_others_go_on() -> None:
    calls = 0

    def breaks() -> float:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise ValueError("worn out")
        return 1.0

    results = interleaved({"good": lambda: 2.0, "breaks": breaks}, 5, CPU)
    assert results["breaks"] == Failed("ValueError: worn out")
    assert results["good"] == Times((2.0,) * 5)
    assert calls == 2

    def at_once() -> object:
        raise RuntimeError

    assert measure({"a": [at_once]}, CPU, 2) == {"a": Failed("RuntimeError")}


@pytest.mark.parametrize("at", [1, 6])  # the warm-up, and a sample
def test_nobody_is_measured_after_a_fault_of_the_gpu(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """CUDA answers all later calls with the same error, whoever makes them."""
    calls, lost = 0, False

    def faults() -> None:
        nonlocal calls, lost
        calls += 1
        lost = calls >= at
        good()

    def good() -> None:
        if lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(timing, "lost", lambda device: lost)
    monkeypatch.setattr(timing, "_SAMPLE_SECONDS", 0.0)
    monkeypatch.setattr(timing, "_UNTIMED_SECONDS", 0.0)
    with pytest.raises(Fault, match=r"^it faults the GPU, so .* nothing more: RuntimeError: CUDA") as raised:
        measure({"first": [good], "it": [faults], "good": [good]}, CPU, 3)
    assert raised.value.system == "it"


def test_a_sample_is_seconds_of_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def call() -> None:
        nonlocal now
        now += 0.003

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now)
    results = measure({"two buffers": [call, call]}, CPU, 3)
    times = results["two buffers"]
    assert isinstance(times, Times)
    assert times.median == pytest.approx(0.003)
    assert times.spread == pytest.approx(0)


def test_what_the_rival_before_left_behind_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    now, busy, last = 0.0, 0.0, ""

    def call(name: str) -> None:
        nonlocal now, busy, last
        if name != last:
            last, busy = name, now + 0.09  # its weights are not in the caches, and its predecessor's threads spin
        now += 0.04 if now < busy else 0.02

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now)
    results = measure({"a": [lambda: call("a")], "b": [lambda: call("b")]}, CPU, 4)
    for times in results.values():
        assert isinstance(times, Times)
        assert times.samples == pytest.approx((0.02,) * 4)


@pytest.mark.parametrize("name", ["ViT-B/32", "RN50"])
def test_operations_are_those_that_pytorch_counts(name: str) -> None:
    """The operations that one query saves are taken off PyTorch's count, since the plain towers compute them."""
    config: Config = OPENAI_MODELS[name]
    if isinstance(config, VitConfig):
        config = dataclasses.replace(config, layers=4)
    with torch.device("meta"):
        tower, images = reference.build(config), torch.empty(1, 3, config.image_size, config.image_size)
        with FlopCounterMode(display=False) as counter:
            tower(images)
    counted = counter.get_total_flops()
    assert 0.7 * counted < operations(config) < counted
    assert weights(config) == sum(parameter.numel() for parameter in tower.parameters())


def test_the_lower_ceiling_counts() -> None:
    config = OPENAI_MODELS["ViT-B/32"]
    moved = traffic(config, 8, "bf16")
    assert moved == 2 * (weights(config) + 8 * (3 * 224**2 + 512))
    work = 8 * operations(config)
    assert least_seconds(work, moved, "bf16", Ceilings({"bf16": 1e12}, 1e30)) == pytest.approx(work / 1e12)
    assert least_seconds(work, moved, "bf16", Ceilings({"bf16": 1e30}, 1e12)) == pytest.approx(moved / 1e12)


def test_tables() -> None:
    assert table(["a", "b"], [["x|y", "1"]]) == "| a | b |\n| --- | ---: |\n| x/y | 1 |"
