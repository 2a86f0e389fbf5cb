"""The tuner without a GPU: its steps, the winners, launches with bad machine code, and the table that it writes."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from bench import tune
from bench.models import MODELS
from bench.timing import Failed, Fault, Times
from clip_fast.kernels import targets
from clip_fast.kernels.launches import TABLE
from clip_fast.kernels.statistics import STATISTICS_TILE
from clip_fast.kernels.targets import TARGETS, Launch, LaunchTable

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
ENTRIES = {entry.name: entry for entry in tune.entries()}
TOY = replace(ENTRIES["linear float32"], models={"toy": MODELS["toy"]})
SETTINGS = tune.Settings(CPU, [1], 1, math.inf, 1)
A, B = (Launch(64, n, 32, num_warps=4, num_stages=2) for n in (64, 128))


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.fixture
def committed() -> Iterator[None]:
    """Restores the table after a test."""
    before = {op: {kind: dict(launches) for kind, launches in kinds.items()} for op, kinds in TABLE.items()}
    yield
    for op, kinds in before.items():
        for kind, launches in kinds.items():
            TABLE[op][kind].clear()
            TABLE[op][kind].update(launches)


def imported(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("clip_fast.kernels.written_launches", path)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    # Python would take bytecode of a file that was as long and was written within the same second.
    exec(compile(path.read_text(), path, "exec"), module.__dict__)
    return module


def test_every_entry_of_the_table_is_tuned() -> None:
    assert {(entry.op, entry.kind) for entry in ENTRIES.values()} == {(op, kind) for op in TABLE for kind in TABLE[op]}


def test_every_entry_has_machine_code_and_shapes() -> None:
    known = {case.name for case in tune.cases()}
    for entry in ENTRIES.values():
        assert known.issuperset(entry.cases)
        assert entry.shapes([1])


def run_compiling(program: str) -> None:
    """Runs a program in a process of its own, in which Triton compiles and does not interpret."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_entrys_cases_are_launched_as_it_says() -> None:
    program = """
from dataclasses import replace
from bench import tune
from bench.machine_code import jobs_of
from clip_fast.kernels.launches import TABLE
from clip_fast.kernels.targets import TARGETS
known = {case.name: case for case in tune.cases()}
for entry in tune.entries():
    launch = replace(TABLE.entry(entry.op, entry.kind, TARGETS["sm_90"])[0], num_warps=2)
    with tune.trial(entry, "sm_90", launch):
        jobs = [job for name in entry.cases for job in jobs_of(known[name], "sm_90")]
    assert {dict(job.options)["num_warps"] for job in jobs} == {2}, (entry.name, jobs)
"""
    run_compiling(program)


def test_a_shape_weighs_what_its_model_spends_on_it() -> None:
    shapes = ENTRIES["linear half"].shapes([256, 1])
    assert (shapes[0].model, shapes[0].batch, shapes[0].count) == ("ViT-L/14", 256, 23)
    assert {"ViT-L/14", "ViT-B/32", "ViT-B/16"} == {shape.model for shape in shapes}
    assert not any("last block" in shape.part or "ln_post" in shape.part or shape.batch == 1 for shape in shapes)


@pytest.mark.parametrize("name", ENTRIES)
def test_what_is_tried(name: str) -> None:
    entry = ENTRIES[name]
    current = TABLE.entry(entry.op, entry.kind, TARGETS["sm_90"])[0]
    candidates = entry.candidates(current)
    assert candidates[0] == current
    assert len(set(candidates)) == len(candidates) > 20
    assert {launch.block_k for launch in candidates} == {current.block_k}  # the reduction step is not varied
    assert {launch.num_warps for launch in candidates} == {4, 8, 16}
    assert {launch.blocks for launch in candidates} == ({1, 2} if entry.op == "linear" else {1, current.blocks})
    if entry.op == "linear":  # each half of a tile has a tile of statistics
        assert all(launch.block_n // 2 >= STATISTICS_TILE for launch in candidates)


def test_a_trial_ends() -> None:
    entry = ENTRIES["linear half"]
    before = dict(TABLE["linear"]["half"])
    for arch in ("sm_90", "sm_89"):  # one architecture is in the table, the other is not
        with tune.trial(entry, arch, A):
            assert TABLE.entry("linear", "half", targets.TARGETS[arch]) == (A,)
        assert TABLE["linear"]["half"] == before


def finals(shape: str, count: int, **samples: list[float] | str) -> list[tune.Row]:
    """Rows of launches A and B at one shape: their samples, or the reason why there are none."""
    rows = []
    for launch, found in zip((A, B), samples.values(), strict=True):
        row = {"stage": "final", "shape": shape, "count": count, "launch": asdict(launch)}
        rows.append(row | ({"failed": found} if isinstance(found, str) else {"samples": found}))
    return rows


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (finals("one", 1, a=[1.0], b=[0.9]), B),
        (finals("one", 1, a=[1.0], b=[1.1]), None),
        (finals("slow", 1, a=[1.0], b=[0.9]) + finals("fast", 1, a=[0.01], b=[0.02]), B),  # seconds decide, not ratios
        (finals("rare", 1, a=[1.0], b=[0.9]) + finals("often", 23, a=[0.1], b=[0.12]), None),  # so do counts
        (finals("one", 1, a=[1.0, 1.1, 0.9], b=[0.99, 1.06, 0.89]), None),  # within the noise
        (finals("one", 1, a=[1.0, 1.01, 0.99], b=[0.9, 0.91, 0.89]), B),
        # The noise is that of the sum: the noise of a light shape does not hide the gain at a heavy one.
        (finals("heavy", 1, a=[1.0] * 3, b=[0.9] * 3) + finals("light", 1, a=[0.01, 0.02, 0.03], b=[0.02] * 3), B),
        (finals("one", 1, a=[1.0], b=[0.9]) + finals("large", 1, a=[1.0], b="too large"), None),
        (finals("one", 1, a=[1.0], b=[2.0]) + finals("large", 1, a="too large", b=[2.0]), B),
        (finals("one", 1, a=[1.0], b=[0.9]) + finals("large", 1, a="too large", b="too large"), B),
        (finals("one", 1, a="too large", b="too large"), None),
    ],
)  # fmt: skip
def test_what_wins(rows: list[tune.Row], expected: Launch | None) -> None:
    assert tune.winner(rows) == expected


def test_the_table_stands_in_its_file_as_it_is_written(tmp_path: Path) -> None:
    assert tune.rendered(TABLE) == tune.LAUNCHES_FILE.read_text()
    changed = LaunchTable({op: {kind: dict(some) for kind, some in kinds.items()} for op, kinds in TABLE.items()})
    changed["linear"]["half"] |= {"sm_90": (A,), "sm_89": (replace(B, blocks=2), A)}
    copied = tmp_path / "launches.py"
    copied.write_text(tune.rendered(changed))
    written = imported(copied)
    assert {name: list(map(asdict, launches)) for name, launches in written.TABLE["linear"]["half"].items()} == {
        name: list(map(asdict, launches)) for name, launches in changed["linear"]["half"].items()
    }


def test_a_launch_that_fails_has_its_reason() -> None:
    current = TABLE.entry(TOY.op, TOY.kind, TARGETS["sm_80"])[0]
    broken = replace(current, block_n=48)  # not a power of two
    shape = TOY.shapes([1])[-1]
    found = tune._times(TOY, TARGETS["sm_80"], shape, [current, broken, B], 1, CPU)
    assert [type(found[launch]) for launch in (current, broken, B)] == [Times, Failed, Times]


class Steps:
    """Replaces `_times`: notes the launches that are timed, makes B the fastest, and counts steps down from `left`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.timed: list[tuple[str, Launch]] = []
        self.left = 0.0
        monkeypatch.setattr(tune, "_times", self.times)
        monkeypatch.setattr(tune.Settings, "in_time", lambda settings: self.left > 0)
        monkeypatch.setattr(tune, "_AT_A_TIME", 2)
        monkeypatch.setattr(tune.Entry, "candidates", lambda entry, current: [current, A, B])

    def times(self, entry: object, target: object, shape: tune.Contest, launches: list[Launch], *_: object) -> object:
        self.left -= 1
        self.timed += [(shape.name, launch) for launch in launches]
        return {launch: Times((0.5 if launch == B else 1.0,)) for launch in launches}


@pytest.mark.usefixtures("committed")
def test_a_search_stops_in_time_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two screenings and two finals run in three calls, none twice. Then a call finds the winner without timing any."""
    steps, table, file = Steps(monkeypatch), tmp_path / "launches.py", tmp_path / "tune.json"
    before = tune.LAUNCHES_FILE.read_text()
    current, *others = TABLE["linear"]["float32"]["sm_80"]

    def call(left: float) -> Launch:
        TABLE["linear"]["float32"]["sm_80"] = (current, *others)
        table.write_text(before)
        steps.left = left
        tune.tune([TOY, ENTRIES["patch_embed float32"]], SETTINGS, file, True, table, only="linear")
        first, *rest = imported(table).TABLE["linear"]["float32"]["sm_80"]
        assert list(map(asdict, rest)) == list(map(asdict, others))  # those for fewer rows stay
        return first

    assert asdict(call(1)) == asdict(current)
    assert "linear float32: out of time" in capsys.readouterr().out
    assert asdict(call(2)) == asdict(current)
    assert asdict(call(1)) == asdict(B)  # the last step completes the search, even when no time is left
    heavy, next_one = (shape.name for shape in TOY.shapes([1])[:2])
    screened = [(heavy, launch) for launch in (current, A, B)]
    last = [(shape, launch) for shape in (heavy, next_one) for launch in (current, A, B)]
    assert sorted(map(str, steps.timed)) == sorted(map(str, screened + last))
    assert asdict(call(0)) == asdict(B)
    assert len(steps.timed) == len(screened + last)
    assert "patch_embed" not in capsys.readouterr().out


def test_what_is_condemned_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps(monkeypatch)
    steps.left = math.inf
    asked: list[Launch] = []

    def problems_of(entry: object, arch: str, launches: list[Launch], workers: int) -> dict[Launch, list[str]]:
        asked.extend(launches)
        return {launch: ["spills 8 bytes a thread"] if launch == A else [] for launch in launches}

    monkeypatch.setattr(tune, "problems_of", problems_of)
    rows: list[tune.Row] = []
    settings = replace(SETTINGS, device=torch.device("cuda"))
    list(tune.search(TOY, TARGETS["sm_80"], rows, settings))
    assert asked == [A, B]  # the current launch is not judged
    assert A not in {launch for _, launch in steps.timed}
    assert [row["failed"] for row in rows if row["launch"] == asdict(A)] == ["spills 8 bytes a thread"]
    assert tune.finished(TOY, TARGETS["sm_80"], rows, settings)
    assert tune.winner(rows) == B


@pytest.mark.usefixtures("committed")
@pytest.mark.parametrize("stage", ["screening", "final"])
@pytest.mark.parametrize("at_fault", ["current", "A"])
def test_a_search_goes_on_behind_a_fault_of_the_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, at_fault: str
) -> None:
    steps, table, file = Steps(monkeypatch), tmp_path / "launches.py", tmp_path / "tune.json"
    steps.left = math.inf
    current = TABLE.entry("linear", "float32", TARGETS["sm_80"])[0]
    launch = current if at_fault == "current" else A
    _, second = (shape.name for shape in TOY.shapes([1])[:2])

    def times(entry: tune.Entry, target: object, shape: tune.Contest, launches: list[Launch], *more: object) -> object:
        if launch in launches and (stage == "screening" or shape.name == second):
            raise Fault(str(launch), "CUDA error")
        return steps.times(entry, target, shape, launches, *more)

    monkeypatch.setattr(tune, "_times", times)
    with pytest.raises(Fault, match="faults the GPU"):
        tune.tune([TOY], SETTINGS, file, True, table)
    rows = json.loads(file.read_text())["rows"]
    assert rows[0]["launch"] == asdict(current)
    assert [row["launch"] for row in rows if row["stage"] == "fault"] == [asdict(launch)]
    tune.tune([TOY], SETTINGS, file, True, table)
    rows = json.loads(file.read_text())["rows"]
    assert tune.finished(TOY, TARGETS["sm_80"], rows, SETTINGS)
    assert tune.winner(rows) == B


@pytest.mark.usefixtures("committed")
def test_a_search_without_a_launch_that_runs_comes_to_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps, table, file = Steps(monkeypatch), tmp_path / "launches.py", tmp_path / "tune.json"
    steps.left = math.inf
    current = TABLE.entry("linear", "float32", TARGETS["sm_80"])[0]

    def times(entry: object, target: object, shape: object, launches: list[Launch], *more: object) -> object:
        if launches == [current]:
            raise Fault(str(current), "CUDA error")
        return {launch: Times((1.0,)) if launch == current else Failed("no room") for launch in launches}

    monkeypatch.setattr(tune, "_times", times)
    with pytest.raises(Fault, match="faults the GPU"):
        tune.tune([TOY], SETTINGS, file, True, table)
    tune.tune([TOY], SETTINGS, file, True, table)
    rows = json.loads(file.read_text())["rows"]
    assert tune.finished(TOY, TARGETS["sm_80"], rows, SETTINGS)
    assert tune.winner(rows) is None


@pytest.mark.slow
def test_what_the_machine_code_condemns() -> None:
    program = """
from bench import tune
from clip_fast.kernels.targets import Launch
entry = tune.Entry("flash_attention_64", "half", ("flash_attention fp16 N=257 D=64",), {})
sound = Launch(128, 64, 0, num_warps=4, num_stages=3)
large = Launch(128, 128, 0, num_warps=8, num_stages=5)
odd = Launch(64, 48, 0, num_warps=4, num_stages=2)
problems = tune.problems_of(entry, "sm_86", [sound, large, odd], 2)
assert problems[sound] == [], problems
assert "of shared memory, 101376 are there" in problems[large][0], problems
assert problems[odd][0].startswith("is not compiled: CompilationError"), problems
entry = tune.Entry("linear", "half", ("linear fp16 1x1+residual+relu",), {})
crowded = Launch(128, 128, 32, num_warps=4, num_stages=3, blocks=3)
problems = tune.problems_of(entry, "sm_86", [crowded], 1)
assert problems[crowded] == ["2 blocks fit a multiprocessor, 3 are wanted"], problems
"""
    run_compiling(program)


def test_a_process_that_dies_or_hangs_takes_nothing_along(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tune.isolated(len, "four") == 4
    with pytest.raises(ChildProcessError, match="TypeError"):
        tune.isolated(len, 4)
    with pytest.raises(ChildProcessError, match="died"):
        tune.isolated(os.abort)
    monkeypatch.setattr(tune, "_COMPILE_SECONDS", 0.1)
    with pytest.raises(ChildProcessError, match="not within"):
        tune.isolated(time.sleep, 600)
