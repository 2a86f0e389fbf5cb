"""One process for each device, with the shards divided among them.

On a CPU, several processes of few threads each do more than one of many, which wait for each other after every layer:
`--devices cpu,cpu,cpu,cpu`. They divide the threads that one process would have.
"""

from __future__ import annotations

import multiprocessing
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess

import torch

from ..inputs.inputs import Inputs, SpanReader, spans_of
from ..inputs.items import Item
from ..loading import default_device, load
from ..towers.config import Activation
from .decoder import Decoder
from .fork_server import interrupts_blocked
from .pipeline import Options, Step, run_shards, without_idle_workers
from .shards import ShardFolder
from .workers import end_with_parent

# Threads of a process, where a CPU is divided. Other CPU runtimes give their streams about as many, for throughput.
_THREADS = 4


class _ErrorThere(Exception):
    """The cause of an error here: the traceback of the one in a device's process."""


@dataclass(frozen=True)
class ProcessJob:
    """The settings that every process needs."""

    model: str
    dtype: torch.dtype
    activation: Activation | None
    inputs: Inputs
    folder: str
    options: Options
    fast_decode: bool
    threads: int  # of PyTorch, on a CPU


def all_devices() -> list[torch.device]:
    """All GPUs that PyTorch can use; without one the CPU, as often as it has four threads."""
    if default_device().type == "cuda":
        return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return [torch.device("cpu")] * max(1, torch.get_num_threads() // _THREADS)


def threads_each(devices: Sequence[torch.device]) -> int:
    """PyTorch's threads in each of the processes for `devices`, which share this machine's CPU."""
    return max(1, torch.get_num_threads() // len(devices))


def run_on_devices(devices: Sequence[torch.device], job: ProcessJob, report: Callable[[Step], None]) -> None:
    """Runs `pipeline.run` in a process for each device, into a folder that the caller has locked.

    Raises:
        RuntimeError: a process failed or died; the message names the device, and the type of the error there, whose
            traceback is the cause. The shards that were written stay.
    """
    # CUDA needs new processes, and they must not inherit the folder's lock.
    context = multiprocessing.get_context("spawn")
    job = replace(job, options=without_idle_workers(job.options, job.inputs))
    names: dict[Connection, str] = {}
    processes: list[SpawnProcess] = []
    hands: list[Connection] = []
    stopped = threading.Event()
    try:
        for device in devices:
            receiving, sending = context.Pipe(duplex=False)
            taking, dealing = context.Pipe(duplex=False)
            process = context.Process(target=_serve, args=(job, device, taking, sending))
            with interrupts_blocked():
                process.start()
                processes.append(process)
            sending.close()
            taking.close()
            names[receiving] = str(device)
            hands.append(dealing)
        receiving, sending = context.Pipe(duplex=False)
        names[receiving] = "the listing of the inputs"
        threading.Thread(target=_deal, args=(job, hands, sending, stopped), name="deal", daemon=True).start()
        while names:
            for connection in wait(list(names)):
                assert isinstance(connection, Connection)
                try:
                    message = connection.recv()
                except EOFError:
                    raise RuntimeError(f"the process of {names[connection]} died") from None
                if isinstance(message, Step):
                    report(message)
                elif message is None:
                    del names[connection]
                else:
                    problem, trace = message
                    raise RuntimeError(f"{names[connection]}: {problem}") from _ErrorThere(trace)
    finally:
        stopped.set()
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()


def _deal(job: ProcessJob, hands: Sequence[Connection], channel: Connection, stopped: threading.Event) -> None:
    """Deals the shards, as spans of the inputs, to the processes in turn. Tars are listed here, once for all."""
    try:
        for index, spans in enumerate(spans_of(job.inputs, job.options.shard_size)):
            if stopped.is_set():
                return
            hands[index % len(hands)].send((index, spans))
        for hand in hands:
            hand.send(None)
        channel.send(None)
    except Exception as error:
        if not stopped.is_set():  # otherwise the processes are gone
            channel.send(_told(error))


def _dealt(job: ProcessJob, hand: Connection) -> Iterator[tuple[int, list[Item]]]:
    reader = SpanReader(job.inputs)
    while (shard := hand.recv()) is not None:
        index, spans = shard
        yield index, [item for span in spans for item in reader.read(span)]


def _told(error: Exception) -> tuple[str, str]:
    """An exception for another process: its type and text, and its traceback."""
    return f"{type(error).__name__}: {error}", "".join(traceback.format_exception(error))


def _serve(job: ProcessJob, device: torch.device, hand: Connection, channel: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and ends this process
    end_with_parent()  # otherwise it would write to a folder that is no longer locked
    if device.type == "cpu":
        torch.set_num_threads(job.threads)
    try:
        model, preprocess = load(job.model, device, job.dtype, activation=job.activation)
        decoder = Decoder(preprocess, job.fast_decode)
        run_shards(model, decoder, _dealt(job, hand), ShardFolder(job.folder), job.options, channel.send)
        channel.send(None)
    except Exception as error:
        channel.send(_told(error))
