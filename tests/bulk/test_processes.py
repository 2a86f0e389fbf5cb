"""A process per device: what goes wrong in one is said, with its name. Whole jobs are in test_pipeline.py."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hostile import Counting

from clip_fast.bulk.pipeline import Options, Step
from clip_fast.bulk.processes import ProcessJob, all_devices, run_on_devices, threads_each
from clip_fast.bulk.shards import OutputFolder
from clip_fast.cli.parser import parser
from clip_fast.inputs.inputs import Files, Inputs


@pytest.mark.parametrize(("threads", "processes", "share"), [(8, 1, 8), (8, 2, 4), (7, 2, 3), (2, 4, 1)])
def test_processes_divide_the_threads(
    monkeypatch: pytest.MonkeyPatch, threads: int, processes: int, share: int
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert threads_each([torch.device("cpu")] * processes) == share


@pytest.mark.parametrize(("threads", "processes"), [(1, 1), (4, 1), (7, 1), (8, 2), (64, 16)])
def test_all_devices_of_a_cpu(monkeypatch: pytest.MonkeyPatch, threads: int, processes: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert all_devices() == [torch.device("cpu")] * processes
    assert parser().parse_args(["encode", "--model", "m", "--devices", "all"]).devices == all_devices()


def test_all_devices_where_there_are_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert all_devices() == [torch.device("cuda:0"), torch.device("cuda:1")]


def test_a_process_gets_no_more_workers_than_there_are_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    class Seen(Exception):
        pass

    def process(*, target: object, args: tuple[ProcessJob, object]) -> None:
        raise Seen(args[0].options.workers)

    context = SimpleNamespace(Pipe=multiprocessing.Pipe, Process=process)
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: context)
    job = ProcessJob(
        model="tiny-digits",
        dtype=torch.float32,
        activation=None,
        inputs=Inputs([Files(["a.png", "b.png"])]),
        folder="out",
        options=Options(workers=9, batch_size=1),
        fast_decode=False,
        threads=1,
    )
    with pytest.raises(Seen, match="2"):
        run_on_devices([torch.device("cpu")], job, lambda _: None)


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_each_process_has_its_share(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    with OutputFolder(tmp_path / "out") as output:
        output.begin({})
        job = ProcessJob(
            model="tiny-digits",
            dtype=torch.float32,
            activation=None,
            inputs=Inputs([Files([Counting(name, name) for name in "ab"])]),
            folder=str(output.folder),
            options=Options(workers=0, shard_size=1),
            fast_decode=False,
            threads=3,
        )
        run_on_devices([torch.device("cpu")] * 2, job, lambda _: None)
        assert output.finish(2).failed == 2
    assert (tmp_path / "out" / "errors.jsonl").read_text().count('"3 threads"') == 2


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_an_error_in_a_process_is_an_error_here(tmp_path: Path) -> None:
    steps: list[Step] = []
    job = ProcessJob(
        model=str(tmp_path / "gone.pt"),
        dtype=torch.float32,
        activation=None,
        inputs=Inputs([]),
        folder=str(tmp_path),
        options=Options(workers=0),
        fast_decode=False,
        threads=1,
    )
    with pytest.raises(RuntimeError, match=r"cpu: .*gone\.pt"):
        run_on_devices([torch.device("cpu")], job, steps.append)
    assert steps == []
