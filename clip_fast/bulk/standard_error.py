"""Lines on standard error, between those of a progress bar; and streams that cannot be written to."""

from __future__ import annotations

import os
import sys
from typing import TextIO

from tqdm import tqdm


def tell(lines: str) -> None:
    """Prints lines on standard error without breaking a bar. Where that fails, as on a full disk, no more is told.

    Nothing is told where standard error is closed: tqdm would take standard output.

    Raises:
        BrokenPipeError: nobody reads it any more.
    """
    if sys.stderr is None:  # pyright: ignore[reportUnnecessaryComparison]  # which a shell may have closed
        return
    try:
        tqdm.write(lines, file=sys.stderr)
    except BrokenPipeError:
        raise
    except OSError:
        give_up(sys.stderr)


def give_up(stream: TextIO) -> None:
    """From here on all that is written to a stream is lost."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
