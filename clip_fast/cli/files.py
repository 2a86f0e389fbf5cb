"""Files that a command line names: those that are read, standard input among them, and those that must not be lost."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from pathlib import Path
from typing import BinaryIO

from ..errors import printable


def opened(name: str, option: str) -> AbstractContextManager[BinaryIO]:
    """The file that `option` names, to be read. A `-` stands for standard input, which stays open.

    Raises:
        OSError: the file cannot be opened.
        ValueError: standard input is closed.
    """
    if name != "-":
        return open(name, "rb")
    if sys.stdin is None:  # pyright: ignore[reportUnnecessaryComparison]  # which a shell may have closed
        raise ValueError(f"{option} -: standard input is closed")
    return nullcontext(sys.stdin.buffer)


def refuse_to_replace(named: Iterable[str | None], found: Iterable[str], targets: Sequence[Path]) -> None:
    """Makes sure that no file that is read is among the files to write.

    Those that were `found` may be millions, on a slow disk: only the ones with a target's suffix are looked at.

    Raises:
        ValueError: a file that is read is a target, under this name or another; the message names it.
    """
    there = [target for target in targets if target.exists()]
    suffixes = tuple(target.suffix.lower() for target in there)
    alike = (name for name in found if name.lower().endswith(suffixes)) if there else ()
    for name in chain(filter(None, named), alike):
        if os.path.exists(name) and any(os.path.samefile(name, target) for target in there):
            raise ValueError(f"{printable(name)} is read by this run, and its output would replace it")
