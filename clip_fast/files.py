"""Files that appear whole or not at all."""

from __future__ import annotations

import fcntl
import glob
import os
import secrets
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, BinaryIO

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


def claimed_file(target: Path) -> NewFile:
    """A `NewFile`, locked while it is written; what killed runs left of this target, locked no more, is removed.

    On a file system without locks nothing is removed.
    """
    for leftover in target.parent.glob(f".{glob.escape(target.name)}.*{TEMPORARY_SUFFIX}"):
        with suppress(OSError), locked(leftover):
            leftover.unlink()
    new = NewFile(target)
    with suppress(OSError):
        _lock(new.file)
    return new


def locked(path: Path) -> IO[bytes]:
    """The open file that holds a lock on `path`.

    Raises:
        BlockingIOError: another process holds it.
        OSError: its file system has no locks.
    """
    file = open(path, "ab")  # noqa: SIM115
    try:
        _lock(file)
    except BlockingIOError:
        file.close()
        raise BlockingIOError(f"another process is writing to {path.parent}") from None
    except OSError as error:
        file.close()
        raise OSError(
            f"{path.parent} cannot be locked ({error.strerror}), so that another process might write to it as well: "
            "choose a folder on a file system that has locks"
        ) from error
    return file


def _lock(file: IO[bytes]) -> None:
    """Locks an open file; the kernel lets go of it when the process ends, even by kill -9.

    Children that are forked would hold it too: worker processes come from a fork server or are spawned.
    """
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


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
