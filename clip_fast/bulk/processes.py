"""One process for each device, with the shards divided among them."""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess

import torch

from ..inputs.inputs import Inputs
from ..loading import load
from ..towers.config import Activation
from .decoder import Decoder
from .pipeline import Options, Step, run
from .shards import ShardFolder
from .workers import end_with_parent, interrupts_blocked


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


def run_on_devices(devices: Sequence[torch.device], job: ProcessJob, report: Callable[[Step], None]) -> None:
    """Runs `pipeline.run` in a process for each device, into a folder that the caller has locked.

    Raises:
        RuntimeError: a process failed or died; the message names the device, and the type of the error there, whose
            traceback is the cause. The shards that were written stay.
    """
    context = multiprocessing.get_context(
        "spawn"
    )  # CUDA needs new processes, and they must not inherit the folder's lock
    names: dict[Connection, str] = {}
    processes: list[SpawnProcess] = []
    try:
        for part, device in enumerate(devices):
            receiving, sending = context.Pipe(duplex=False)
            process = context.Process(target=_serve, args=(job, device, part, len(devices), sending))
            with interrupts_blocked():
                process.start()
                processes.append(process)
            sending.close()
            names[receiving] = str(device)
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
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()


def _serve(job: ProcessJob, device: torch.device, part: int, parts: int, channel: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and ends this process
    end_with_parent()  # otherwise it would write to a folder that is no longer locked
    try:
        model, preprocess = load(job.model, device, job.dtype, activation=job.activation)
        decoder = Decoder(preprocess, job.fast_decode)
        run(model, decoder, job.inputs, ShardFolder(job.folder), job.options, channel.send, part, parts)
        channel.send(None)
    except Exception as error:
        channel.send((f"{type(error).__name__}: {error}", traceback.format_exc()))
