"""A process that has its imports done and forks children that run command lines of `clip-fast`.

So that tests can start, kill and restart the command some dozens of times. Two requests, a line of JSON each:

    {"start": ARGUMENTS}                                      forks a child, in a session of its own
    {"end": SIGNAL or null, "after": SECONDS, "group": BOOL}  sends the child, or its group, a signal; waits for it

The first is answered with `started ID`, the second with `status N`, −n for signal n. A child that has ended is not
waited for before `end`, so that its number cannot be another process's when the signal is sent.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time

import pyarrow.parquet  # noqa: F401
import torch
from PIL import Image

import clip_fast
from clip_fast.cli import main as cli


def warm_up() -> None:
    """What a first run imports on its way; it must not start threads, which a fork does not take along."""
    Image.init()
    model, _ = clip_fast.load("tiny-digits", "cpu")
    model.encode_image(torch.zeros(3, 3, 32, 32, dtype=torch.uint8))


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
                signal.signal(signal.SIGINT, signal.default_int_handler)  # which tests in the background ignore
                status = 70
                try:
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
