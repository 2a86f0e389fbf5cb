"""The contests under pytest-benchmark, for its tables, its histograms and its comparisons of runs.

    pytest bench/kernels --models ViT-L/14 --batches 256 -k "linear and not compiled" --benchmark-autosave

A contest is a group of benchmarks. When the first of a group runs, all chosen rivals of the contest are timed together,
in interleaved rounds (`bench.timing`). Each benchmark then reports its own samples. They move a clock, and
pytest-benchmark reads that clock. `pytest` without arguments does not collect this folder.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch

from ..environment import environment
from ..models import MODELS
from ..timing import Ceilings, ceilings
from .comparison import Row, compare
from .contests import PIXELS, Contest, contests

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Clock:
    """A clock that only samples move."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def move(self, samples: Iterator[float]) -> None:
        self.now += next(samples)


CLOCK = Clock()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option: Any = metafunc.config.getoption
    precisions = (option("precisions") or ("bf16" if DEVICE.type == "cuda" else "fp32")).split(",")
    models = {name: MODELS[name] for name in option("models").split(",")}
    batches = [int(batch) for batch in option("batches").split(",")]
    found = list(contests(models, batches, precisions))
    metafunc.parametrize(
        ("contest", "system"),
        [
            pytest.param(
                contest, system, id=f"{contest.name}: {system}",
                marks=pytest.mark.benchmark(group=contest.name, timer=CLOCK, warmup=False),
            )
            for contest in found
            for system in contest.systems
        ],
    )  # fmt: skip


@cache
def limits(precision: str) -> Ceilings:
    return ceilings(DEVICE, [] if precision == PIXELS else [precision])


_MEASURED: dict[str, list[Row]] = {}


def test_contest(contest: Contest, system: str, benchmark: Any, request: pytest.FixtureRequest) -> None:
    if contest.name not in _MEASURED:
        rounds: Any = request.config.getoption("rounds")
        chosen: list[Any] = request.session.items
        params = [item.callspec.params for item in chosen]
        systems = [each["system"] for each in params if each["contest"] is contest]
        _MEASURED[contest.name] = compare(contest, systems, rounds, limits(contest.precision), DEVICE)
    row = next(row for row in _MEASURED[contest.name] if row["system"] == system)
    if "failed" in row:
        pytest.skip(row["failed"])
    samples = iter(row["samples"])
    benchmark.pedantic(CLOCK.move, args=(samples,), rounds=len(row["samples"]), iterations=1)
    benchmark.extra_info |= {name: row[name] for name in ("flops", "bytes", "of_ceiling", "error", "to_best_rival")}
    benchmark.extra_info["environment"] = environment(DEVICE).line()
