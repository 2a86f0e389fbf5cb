"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

TEMPORARY_SUFFIX = ".tmp"


class NewFile:
    """A file under a temporary name beside `target`, until `move` gives it the target's or `discard` drops it."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self._temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
        self.file = open(self._temporary, "xb")  # noqa: SIM115 (`finish` or `discard` closes it)

    def finish(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()

    def move(self) -> None:
        os.replace(self._temporary, self.target)

    def discard(self) -> None:
        with suppress(OSError):  # closing flushes, for which a full disk may have no room
            self.file.close()
        self._temporary.unlink(missing_ok=True)


@contextmanager
def new_file(target: Path) -> Generator[BinaryIO, None, None]:
    """A file to write to, `target` from the end of the block on; where the block raises, nothing is left."""
    new = NewFile(target)
    try:
        yield new.file
        new.finish()
        new.move()
    finally:
        new.discard()
