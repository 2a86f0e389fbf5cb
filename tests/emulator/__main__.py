"""`python -m tests.emulator`: the table of results; `table`, `count`, `break` and `hazard` are its other commands.

`python tests/emulator` is the same where another package is installed that calls itself `tests`.
"""

from __future__ import annotations

import sys
from pathlib import Path

_TESTS = Path(__file__).parents[1]
sys.path[:1] = [str(_TESTS.parent), str(_TESTS)]  # for the project, and for helpers that tests share

from emulator.command import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
