"""Exit statuses, results on standard output, and messages on standard error."""

from __future__ import annotations

import select
import sys
from collections.abc import Generator, Iterable
from contextlib import contextmanager

from ..bulk.standard_error import give_up, tell
from ..inputs.items import Failure
from .interrupt import INTERRUPTED

EXIT_OK = 0
EXIT_SOME_FAILED = 1
EXIT_DAMAGED = 1
EXIT_NOTHING_DONE = 2
EXIT_TOO_MANY_ERRORS = 3
EXIT_INTERRUPTED = INTERRUPTED
EXIT_READER_GONE = 141  # 128 + SIGPIPE
EXIT_TERMINATED = 143  # 128 + SIGTERM


class ReaderGoneError(Exception):
    """The program that read our standard output has enough, as `head` has."""


def say(text: str) -> None:
    """Prints a line on standard error, as `tell` does."""
    tell(f"clip-fast: {text}")


def report(failures: Iterable[Failure]) -> None:
    """Prints a line for each failure."""
    for failure in failures:
        say(str(failure))


def show(text: str) -> None:
    """Prints results on standard output; characters that its encoding lacks become backslash escapes.

    Raises:
        OSError: standard output cannot be written to, for example a file on a full disk.
        ReaderGoneError: it is a pipe that nobody reads any more.
    """
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    with _to_standard_output():
        print(text.encode(encoding, "backslashreplace").decode(encoding))


def flush() -> None:
    """Writes out what is left of the results.

    Raises:
        OSError, ReaderGoneError: as in `show`.
    """
    if sys.stdout is not None:  # pyright: ignore[reportUnnecessaryComparison]  # which a shell may have closed
        with _to_standard_output():
            sys.stdout.flush()


@contextmanager
def _to_standard_output() -> Generator[None, None, None]:
    """Names standard output in its errors, and drops what is left of it: Python would try again at its exit."""
    try:
        yield
    except OSError as error:
        error.filename = "standard output"
        give_up(sys.stdout)
        if isinstance(error, BrokenPipeError):
            raise ReaderGoneError from error
        raise


def nobody_listens() -> bool:
    """Whether standard error is a pipe that nobody reads any more."""
    poll = select.poll()
    try:
        poll.register(sys.stderr.fileno(), 0)  # of no event but an error, which is always reported
    except (AttributeError, OSError, ValueError):  # closed, or no file
        return False
    return bool(poll.poll(0))
