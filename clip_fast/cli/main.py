"""The command line: `clip-fast encode`, `clip-fast search`, `clip-fast demo`, `clip-fast warm`,
`clip-fast models`."""

from __future__ import annotations

import argparse
import traceback
from collections.abc import Callable, Sequence

from ..bulk.progress import TooManyErrors
from ..checkpoint.published import available_models
from ..errors import CheckpointError
from .encode import encode
from .messages import EXIT_INTERRUPTED, EXIT_NOTHING_DONE, EXIT_OK, EXIT_TOO_MANY_ERRORS, say
from .parser import DTYPES, parser


def _search(arguments: argparse.Namespace) -> int:
    from .search import search  # imported here, since the other commands do not need it

    return search(arguments)


def _demo(arguments: argparse.Namespace) -> int:
    from . import demo  # imported here, since the other commands do not need it

    return demo.run(arguments.device, DTYPES.get(arguments.dtype))


def _warm(arguments: argparse.Namespace) -> int:
    from .warm import warm  # imported here, since the other commands do not need it

    return warm(arguments)


def _models(arguments: argparse.Namespace) -> int:
    print("\n".join(available_models()))
    return EXIT_OK


_COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "encode": encode,
    "search": _search,
    "demo": _demo,
    "warm": _warm,
    "models": _models,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv`, by default the process's own, and returns its exit status.

    Raises:
        SystemExit: for `--help`, `--version` and a command line that does not parse (status 2), as argparse does.
    """
    arguments = parser().parse_args(argv)
    try:
        return _COMMANDS[arguments.command](arguments)
    except (CheckpointError, ImportError, OSError, RuntimeError, ValueError) as error:
        say(f"error: {error}")
        return EXIT_NOTHING_DONE
    except TooManyErrors as error:
        say(f"stopped: {error}")
        return EXIT_TOO_MANY_ERRORS
    except KeyboardInterrupt:
        say("interrupted")
        return EXIT_INTERRUPTED
    except Exception:  # Python's own exit status 1 would mean "some failed, the others are embedded"
        traceback.print_exc()
        return EXIT_NOTHING_DONE
