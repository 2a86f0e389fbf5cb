"""Exit statuses, and messages on standard error."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from tqdm import tqdm

from ..inputs.items import Failure

EXIT_OK = 0
EXIT_SOME_FAILED = 1
EXIT_NOTHING_DONE = 2
EXIT_TOO_MANY_ERRORS = 3
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells have it


def say(text: str) -> None:
    """Prints a line without breaking a progress bar."""
    tqdm.write(f"clip-fast: {text}", file=sys.stderr)


def report(failures: Iterable[Failure]) -> None:
    """Prints a line for each failure."""
    for failure in failures:
        say(str(failure))
