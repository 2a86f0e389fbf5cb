"""The process that decoders are forked from: it has their imports done, and neither a GPU nor a folder's lock.

It is multiprocessing's fork server. Python starts it as a new interpreter, which imports PyTorch anew: two fifths of
the CPU time of a job of ten images. The command `clip-fast` forks it from itself instead, once it has its own imports.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from multiprocessing import forkserver, resource_tracker, util
from multiprocessing.context import ForkServerContext
from typing import Any

_STANDARD_STREAMS = (0, 1, 2)


def start(*, as_fork: bool) -> None:
    """Starts the fork server ahead of need. Raises what `context` raises.

    Args:
        as_fork: as a fork of this process, which must have begun and opened nothing yet but its imports: what it has,
            its forks have too. Elsewhere than on Linux, beside threads, and where a fork fails, a new interpreter is
            started all the same. It imports while the caller goes on.
    """
    context(as_fork=as_fork and sys.platform == "linux" and threading.active_count() == 1)


def context(*, as_fork: bool = False) -> ForkServerContext:
    """Multiprocessing with the fork server. Where there is none it is started, as a fork of this process or anew.

    Raises:
        OSError: it cannot be started, as where the path of the folder for temporary files is too long.
    """
    chosen = multiprocessing.get_context("forkserver")
    chosen.set_forkserver_preload([f"{__package__}.preloaded"])
    _allow_open_files()
    try:
        with interrupts_blocked(), _forked_for_spawned() if as_fork else nullcontext():
            forkserver.ensure_running()
    except OSError as error:
        if error.errno is None:  # Python's own check: sockets have paths of about 100 characters at most
            folder = tempfile.gettempdir()
            raise OSError(
                f"the path {folder} is too long for processes to meet there: set TMPDIR to another folder, such as /tmp"
            ) from error
        raise
    return chosen


@contextmanager
def _forked_for_spawned() -> Generator[None, None, None]:
    """A new interpreter that multiprocessing starts in the block is a fork of this process, and runs the same code."""
    spawn: Any = getattr(util, "spawnv_passfds", None)
    if spawn is None:  # of another release of Python
        yield
        return
    setattr(util, "spawnv_passfds", partial(_fork_to_run, spawn))  # noqa: B010
    try:
        yield
    finally:
        setattr(util, "spawnv_passfds", spawn)  # noqa: B010


def _fork_to_run(spawn: Any, path: str | bytes, arguments: Sequence[str], files: Sequence[int]) -> int:
    """`util.spawnv_passfds`, which is `spawn`: the new process has the `files` of those that are open; its number."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.flush()  # or both processes would write what is in its buffer
    try:
        opened = {int(name) for name in os.listdir("/proc/self/fd")}
        process = os.fork()
    except OSError:  # as where memory must be there for a copy of all that this process has
        return spawn(path, arguments, files)
    if process:
        return process
    status = 1
    try:
        for file in opened - {*_STANDARD_STREAMS, *files}:
            with suppress(OSError):  # the one that the list was read from
                os.close(file)
        # As a new interpreter has them. The parent's are in the middle of this start, with their locks held.
        for inherited in (forkserver.ensure_running, resource_tracker.ensure_running):
            owner: Any = inherited.__self__
            owner.__init__()
        exec(arguments[-1], {})
    except SystemExit:
        status = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())  # pyright: ignore[reportArgumentType]
    finally:
        os._exit(status)  # nothing that this process would do at its end is the fork's to do


def _allow_open_files() -> None:
    """Raises the limit of open files as far as this process may: each batch that waits is a few files."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):  # macOS calls its limit infinite, and refuses that
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


@contextmanager
def interrupts_blocked() -> Generator[None, None, None]:
    """Processes that are started in the block never see Ctrl-C, not even while they import; this one sees it after.

    The block's signals are noted, too: another thread, which blocks none, may be given one, and Python would then
    interrupt the main thread in the middle of a start.
    """
    resource_tracker.ensure_running()  # its own start, which every other one makes sure of, ends by unblocking SIGINT
    noted: list[int] = []
    handler = None
    if threading.current_thread() is threading.main_thread():
        handler = signal.signal(signal.SIGINT, lambda number, _: noted.append(number))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if handler is not None:
            signal.signal(signal.SIGINT, handler)
        if noted:
            signal.raise_signal(signal.SIGINT)
