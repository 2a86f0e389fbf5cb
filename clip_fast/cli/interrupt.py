"""Ctrl-C while the command is still importing PyTorch: the line that it gives later, in place of a traceback.

`clip_fast/__init__.py` imports this file first. It watches only in the command's own process: from here until
`stop_watching`, Ctrl-C ends the command at once, which has nothing to clean up yet.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from functools import cache

INTERRUPTED = 130  # exit status: 128 + SIGINT, as shells have it


@cache
def is_command() -> bool:
    """Whether this process was started as `clip-fast` or `python -m clip_fast`; first asked while that is imported."""
    if multiprocessing.parent_process() is not None:
        return False
    as_module = "-m" in sys.orig_argv and sys.orig_argv[sys.orig_argv.index("-m") + 1 :][:1] == ["clip_fast"]
    # While Python looks for the module to run, the first argument is "-m". Later it is a path, as of a script.
    first = sys.argv[0] if sys.argv else ""  # a program that embeds Python may have none
    return (as_module and first == "-m") or os.path.basename(first) == "clip-fast"


def _end(*_: object) -> None:
    os.write(2, b"clip-fast: interrupted\n")
    os._exit(INTERRUPTED)  # an exception might be taken for another one by the import that it stops


def stop_watching() -> None:
    """From here on Ctrl-C is Python's KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


if is_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _end)
