"""Files that appear whole or not at all."""

from __future__ import annotations

import fcntl
import glob
import io
import os
import secrets
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, BinaryIO

TEMPORARY_SUFFIX = ".tmp"


class _NamedFile(io.FileIO):
    """A new file whose errors name the file that it becomes, also those of a disk that is full."""

    def __init__(self, path: Path, target: Path) -> None:
        try:
            super().__init__(path, "xb")
        except OSError as error:
            error.filename = str(target)
            raise
        self._target = target

    def write(self, data: Any, /) -> int:
        with naming(self._target):
            return super().write(data)


class NewFile:
    """A file with a temporary name beside `target`, until `move` gives it the target's name or `discard` removes it.

    A context manager: what was not moved is removed in the end.
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        self._temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
        self.file: BinaryIO = io.BufferedWriter(_NamedFile(self._temporary, target))  # `finish` or `discard` closes it

    def finish(self) -> None:
        with naming(self.target):
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()

    def move(self) -> None:
        os.replace(self._temporary, self.target)

    def discard(self) -> None:
        with suppress(OSError):  # closing flushes, which a full disk may have no room for
            self.file.close()
        self._temporary.unlink(missing_ok=True)

    def __enter__(self) -> NewFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()


def check_target(target: Path) -> None:
    """Refuses a name that no file can be moved to, before any work is done for it.

    Raises:
        FileNotFoundError: the folder of `target` does not exist.
        ValueError: `target` is there, and no regular file.
    """
    if not target.parent.is_dir():
        raise FileNotFoundError(f"the output's folder {target.parent} does not exist")
    if target.exists() and not target.is_file():
        raise ValueError(f"{target} exists and is not a regular file")


def claimed_file(target: Path) -> NewFile:
    """A `NewFile` that stays locked while it is written.

    Unlocked temporary files of the same target are left by killed runs; they are removed, except on a file system
    without locks.

    Raises:
        FileNotFoundError, ValueError: as `check_target` raises them.
        OSError: the folder of `target` cannot be written to.
    """
    check_target(target)
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
        BlockingIOError: another process holds the lock.
        OSError: the file system has no locks.
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
    """Locks an open file. The operating system releases the lock when the process ends, even by kill -9.

    Forked children would hold the lock too; worker processes therefore come from a fork server or are spawned.
    """
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextmanager
def new_file(target: Path) -> Generator[BinaryIO, None, None]:
    """A file to write to, which becomes `target` at the end of the block. Nothing is left where the block raises."""
    with NewFile(target) as new:
        yield new.file
        new.finish()
        new.move()


@contextmanager
def naming(path: Path) -> Generator[None, None, None]:
    """Errors of the operating system in the block name `path`, where they name no file."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise
