"""`python -m tests.emulator`: the table of results; `count`, `break` and `hazard` are its other commands."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # for helpers that tests share, as pytest has it

from .command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
