"""The files that arguments name: folders, patterns, braces and lists of paths."""

from __future__ import annotations

import glob
import os
import re
import stat
from collections.abc import Collection, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import BinaryIO

from ..errors import reason_of
from .items import Failure, image_suffixes

_BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")  # {0000..0099} or {train,test}
_HERE = os.path.join(os.curdir, "")


def read_list(file: BinaryIO) -> list[str]:
    """The paths in a file: one a line, or between zero bytes where it has any, as `find -print0` writes them."""
    data = file.read()
    entries = data.split(b"\0") if b"\0" in data else [line.rstrip(b"\r") for line in data.split(b"\n")]
    return [os.fsdecode(entry) for entry in entries if entry]


def without_braces(arguments: Iterable[str | os.PathLike[str]]) -> Iterator[str]:
    """The arguments with their braces written out. An argument that names a file as it stands is left alone."""
    for argument in arguments:
        name = os.fspath(argument)
        if "{" in name and not os.path.lexists(name):
            yield from dict.fromkeys(_written_out(name))  # braces in braces give some twice
        else:
            yield name


def _written_out(pattern: str) -> Iterator[str]:
    """The names that the braces of `pattern` stand for. Leading zeros at an end of a range pad all its numbers."""
    found = _BRACES.search(pattern)
    if not found:
        yield pattern
        return
    first, last, words = found.groups()
    if words is None:
        padded = any(len(end) > 1 and end[0] == "0" for end in (first, last))
        width = max(len(first), len(last)) if padded else 1
        step = 1 if int(first) <= int(last) else -1
        inside = [f"{number:0{width}d}" for number in range(int(first), int(last) + step, step)]
    else:
        inside = words.split(",")
    for each in inside:
        yield from _written_out(pattern[: found.start()] + each + pattern[found.end() :])


# --- Files -----------------------------------------------------------------------------------------------------------


class Finder:
    """The paths of the files that an argument names and no earlier argument has named; and failures.

    Args:
        containers: suffixes of the files that hold many images. They are not looked for in folders.
    """

    def __init__(self, containers: tuple[str, ...] = ()) -> None:
        self._containers = containers
        self._seen: set[str] = set()
        self._real = cache(os.path.realpath)  # asked of folders only

    def __call__(self, argument: str) -> Iterator[str | Failure]:
        is_folder = _is_folder(argument)
        if is_folder is not None:
            named = {str(Path(argument)): is_folder}
        else:
            matched = _sorted(str(Path(name)) for name in glob.glob(argument, recursive=True))
            named = {path: os.path.isdir(path) for path in matched}
        nothing = True
        for path, is_folder in named.items():
            for found in self._below(path) if is_folder else [path]:
                nothing = False
                if isinstance(found, Failure) or self._is_new(found):
                    yield found
        if nothing:
            yield Failure(argument, self._nothing_in(named))

    def _is_new(self, path: str) -> bool:
        folder, name = os.path.split(path)
        before = len(self._seen)
        self._seen.add(os.path.join(self._real(folder), name))
        return len(self._seen) > before

    def _below(self, folder: str) -> Iterator[str | Failure]:
        suffixes = image_suffixes()
        entered = {os.path.realpath(folder)}  # since a link may lead back up
        images: list[str] = []
        failures: list[Failure] = []

        def cannot_list(error: OSError) -> None:
            failures.append(Failure(str(error.filename), reason_of(error)))

        for root, folders, files in os.walk(folder, onerror=cannot_list, followlinks=True):
            images += [os.path.join(root, name) for name in files if os.path.splitext(name)[1].lower() in suffixes]
            below = {name: os.path.realpath(os.path.join(root, name)) for name in sorted(folders)}
            folders[:] = [name for name, real in below.items() if real not in entered]
            entered.update(below.values())
        yield from failures
        yield from _sorted(image.removeprefix(_HERE) for image in images)

    def _nothing_in(self, folders: Collection[str]) -> str:
        """The reason why an argument that stands for `folders` gives no file."""
        if not folders:
            return "no such file or folder"
        names = (name for folder in folders for _, _, files in os.walk(folder) for name in files)
        if self._containers and any(name.endswith(self._containers) for name in names):
            return f"no image below it; {' and '.join(self._containers)} files are to be named themselves"
        return "no image below it"


def _is_folder(path: str) -> bool | None:
    """None where there is nothing. One question to the disk: a list may name millions of files."""
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False if os.path.lexists(path) else None  # a dangling link is a file that cannot be read


def _sorted(paths: Iterable[str]) -> list[str]:
    """Sorted by path component: the files of `a/` stand together, before those of `a-b/`."""
    return sorted(paths, key=lambda path: path.replace(os.sep, "\0"))
