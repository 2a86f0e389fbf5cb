"""The command line: `clip-fast encode`, `search`, `verify`, `demo`, `warm` and `models`."""

from __future__ import annotations

import argparse
import traceback
from collections.abc import Callable, Sequence

from ..bulk.progress import TooManyErrors
from ..errors import CheckpointError
from .encode import encode
from .interrupt import stop_watching
from .messages import (
    EXIT_INTERRUPTED,
    EXIT_NOTHING_DONE,
    EXIT_READER_GONE,
    EXIT_TOO_MANY_ERRORS,
    ReaderGoneError,
    flush,
    nobody_listens,
    say,
)
from .models import models
from .parser import DTYPES, parser
from .verify import verify


def _search(arguments: argparse.Namespace) -> int:
    from .search import search  # imported here, since the other commands do not need it

    return search(arguments)


def _demo(arguments: argparse.Namespace) -> int:
    from . import demo  # imported here, since the other commands do not need it

    return demo.run(arguments.device, DTYPES.get(arguments.dtype))


def _warm(arguments: argparse.Namespace) -> int:
    from .warm import warm  # imported here, since the other commands do not need it

    return warm(arguments)


_COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "encode": encode,
    "search": _search,
    "verify": verify,
    "demo": _demo,
    "warm": _warm,
    "models": models,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv`, by default the process's own, and returns its exit status.

    Raises:
        SystemExit: for `--help`, `--version` and a command line that does not parse (status 2), as argparse does.
    """
    stop_watching()
    try:
        return _run(argv)
    except BrokenPipeError:  # of standard error, while one of these was told
        return EXIT_READER_GONE


def _run(argv: Sequence[str] | None) -> int:
    debug = False
    try:
        try:
            arguments = parser().parse_args(argv)
            debug = arguments.debug
            return _COMMANDS[arguments.command](arguments)
        finally:
            flush()
    except (CheckpointError, ImportError, OSError, RuntimeError, ValueError) as error:
        if isinstance(error, BrokenPipeError) and nobody_listens():
            return EXIT_READER_GONE
        if debug:
            traceback.print_exc()
        say(f"error: {str(error) or type(error).__name__}")
        return EXIT_NOTHING_DONE
    except ReaderGoneError:
        return EXIT_READER_GONE
    except TooManyErrors as error:
        say(f"stopped: {error}")
        return EXIT_TOO_MANY_ERRORS
    except KeyboardInterrupt:
        say("interrupted")
        return EXIT_INTERRUPTED
    except Exception:  # Python's own exit status 1 would mean "some failed, the others are embedded"
        traceback.print_exc()
        return EXIT_NOTHING_DONE
