"""A process that has finished its imports, and forks children that run command lines of `clip-fast`.

With it tests can start, kill and restart the command some dozens of times. It takes two requests, each a line of JSON:

    {"start": ARGUMENTS}                                      forks a child, in a session of its own
    {"end": SIGNAL or null, "after": SECONDS, "group": BOOL}  sends the child, or its group, a signal; waits for it

The answer to the first is `started ID`. The answer to the second is `status N`, −n for signal n. A child that has ended
is waited for only at `end`. Until then no other process can have its number, so the signal cannot reach another one.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time

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
