"""The command line: `clip-fast encode`, `search`, `verify`, `demo`, `warm` and `models`."""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections.abc import Callable, Sequence

from ..bulk.standard_error import tell
from ..errors import CheckpointError, TooManyErrors
from .garbage import imports_end
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
    show,
)
from .parser import dtype_of, parser

Command = Callable[[argparse.Namespace], int]

# Each command imports what it needs. --help, and a command line that does not parse, do not wait for PyTorch.


def _encode() -> Command:
    from .encode import encode

    return encode


def _search() -> Command:
    from .search import search

    return search


def _verify() -> Command:
    from .verify import verify

    return verify


def _demo() -> Command:
    from . import demo

    return lambda arguments: demo.run(arguments.device, dtype_of(arguments.dtype))


def _warm() -> Command:
    from .warm import warm

    return warm


def _models() -> Command:
    from .models import models

    return models


_COMMANDS: dict[str, Callable[[], Command]] = {
    "encode": _encode,
    "search": _search,
    "verify": _verify,
    "demo": _demo,
    "warm": _warm,
    "models": _models,
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


def _parsed(argv: Sequence[str]) -> argparse.Namespace:
    """The command line; where it does not parse, --json has its line all the same."""
    try:
        return parser().parse_args(argv)
    except SystemExit as end:
        if end.code and argv[:1] == ["encode"] and "--json" in argv:
            show(json.dumps({"output": None, "complete": False, "error": "the command line does not parse"}))
        raise


def _run(argv: Sequence[str] | None) -> int:
    debug = False
    try:
        try:
            arguments = _parsed(sys.argv[1:] if argv is None else argv)
            debug = arguments.debug
            run = _COMMANDS[arguments.command]()
            imports_end()
            return run(arguments)
        finally:
            flush()
    except (CheckpointError, ImportError, OSError, RuntimeError, ValueError) as error:
        if isinstance(error, BrokenPipeError) and nobody_listens():
            return EXIT_READER_GONE
        if debug:
            tell(traceback.format_exc().rstrip())
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
        tell(traceback.format_exc().rstrip())
        return EXIT_NOTHING_DONE
