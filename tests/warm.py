"""A process that has finished its imports, and forks children that run command lines of `clip-fast`.

With it tests can start, kill and restart the command some dozens of times. It takes two requests, each a line of JSON:

    {"start": ARGUMENTS, "new": BOOL}                         forks a child, in a session of its own
    {"end": SIGNAL or null, "after": SECONDS, "group": BOOL}  sends the child, or its group, a signal; waits for it

The answer to the first is `started ID`. The answer to the second is `status N`, −n for signal n. A child that has ended
is waited for only at `end`. Until then no other process can have its number, so the signal cannot reach another one.

The processes that the command starts in turn, of decoders and devices, are new interpreters where "new" is true. Else
each is a fork of the one that starts it. It runs the same code, and does not wait seconds for its imports, in which a
random moment would mostly lie.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing import forkserver, resource_tracker, util
from typing import Any

import pyarrow
import pyarrow.parquet
import torch
from PIL import Image

import clip_fast
from clip_fast.cli import encode  # noqa: F401
from clip_fast.cli import main as cli


def warm_up() -> None:
    """Imports the modules that a first run would import. It must start no threads, since a fork loses them."""
    Image.init()
    pyarrow.array(["a"])  # imports pandas, where it is installed
    model, _ = clip_fast.load("tiny-digits", "cpu")
    with torch.no_grad():
        model.encode_image(torch.zeros(3, 3, 32, 32, dtype=torch.uint8))


def start_forks() -> None:
    """From here on, a new interpreter that multiprocessing starts is a fork of this process, and runs the same code."""
    replaced: Any = util
    replaced.spawnv_passfds = fork_to_run


def fork_to_run(path: bytes, arguments: Sequence[str | bytes], files: Sequence[int]) -> int:
    """`util.spawnv_passfds`: the new process has the `files` of those that are open; its number."""
    opened = {int(name) for name in os.listdir("/proc/self/fd")}
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        for file in opened - {0, 1, 2, *files}:
            with suppress(OSError):  # the one that the list was read from
                os.close(file)
        for inherited in (forkserver.ensure_running, resource_tracker.ensure_running):
            owner: Any = inherited.__self__  # in the middle of a start, with its lock held
            owner.__init__()
        for number in signal.valid_signals():  # as a new interpreter has them
            if callable(signal.getsignal(number)):
                first = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
                signal.signal(number, first)
        told = [os.fsdecode(argument) for argument in arguments]
        code = told.index("-c") + 1
        sys.argv = ["-c", *told[code + 1 :]]
        exec(told[code], {})
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())  # pyright: ignore[reportArgumentType]
    finally:
        os._exit(status)


if __name__ == "__main__":
    warm_up()
    child = 0
    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            assert child == 0, "one child at a time"
            child = os.fork()
            if child == 0:
                os.setsid()
                signal.signal(signal.SIGINT, signal.default_int_handler)  # background tests ignore SIGINT
                status = 70
                try:
                    if not request["new"]:
                        start_forks()
                    status = cli.main(request["start"])
                finally:
                    os._exit(status)
            print("started", child, flush=True)
        else:
            time.sleep(request["after"])
            if request["end"] is not None:
                assert child > 1
                (os.killpg if request["group"] else os.kill)(child, request["end"])
            print("status", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
            child = 0
