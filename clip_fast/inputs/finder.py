"""The files that arguments name: folders, patterns, braces and lists of paths."""

from __future__ import annotations

import codecs
import glob
import os
import re
import stat
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import BinaryIO

from ..errors import reason_of
from .images import image_suffixes
from .items import Failure, may_pass

_BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")  # {0000..0099} or {train,test}
_MOST_NAMES = 1_000_000  # that the braces of one argument may stand for
_MOST_CHARACTERS = 1 << 28  # of all these names together
_HERE = os.path.join(os.curdir, "")
_WIDE_MARKS = {  # UTF-32's before UTF-16's, which it begins with
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}

# Folders that a NAS or a Mac makes beside photographs: thumbnails, what was deleted, and other attributes.
_LEFTOVER_FOLDERS = {"@eaDir", ".@__thumb", "#recycle", "@Recycle", "__MACOSX", ".AppleDouble"}
_LEFTOVER_PREFIX = "._"  # of a Mac's files of attributes, beside the file of that name


def is_leftover(path: str) -> bool:
    """Whether a file is none of a person's own, though it has an image's suffix."""
    *folders, name = path.split(os.sep)
    return name.startswith(_LEFTOVER_PREFIX) or not _LEFTOVER_FOLDERS.isdisjoint(folders)


def read_list(file: BinaryIO) -> list[str]:
    """The paths in a file: one a line, or between zero bytes where it has any, as `find -print0` writes them.

    A byte order mark is no part of the first path. UTF-16 is known with or without one.

    Raises:
        ValueError: the file is in UTF-16 or UTF-32, and damaged.
    """
    data = file.read()
    encoding = _wide_encoding(data)
    if encoding:
        try:
            text = data.decode(encoding)
        except UnicodeDecodeError as error:
            raise ValueError(f"the list of paths is not readable: {error}") from error
        return [line for line in text.removeprefix("\ufeff").replace("\r\n", "\n").split("\n") if line]
    data = data.removeprefix(codecs.BOM_UTF8)
    entries = data.split(b"\0") if b"\0" in data else [line.rstrip(b"\r") for line in data.split(b"\n")]
    return [os.fsdecode(entry) for entry in entries if entry]


def _wide_encoding(data: bytes) -> str | None:
    """The encoding of a list whose characters have several bytes each; None for all others.

    Without a mark, a list is in UTF-16 if most of what stands between zero bytes is one byte or none: an ASCII
    character. Paths between zero bytes are longer, and a list of letters would be a walk over the whole disk.
    """
    for mark, encoding in _WIDE_MARKS.items():
        if data.startswith(mark):
            return encoding
    between = data.split(b"\0")
    if len(between) < 3 or sum(len(each) < 2 for each in between) * 2 <= len(between):
        return None
    return "utf-16-le" if data[1::2].count(0) >= data[::2].count(0) else "utf-16-be"


def without_braces(arguments: Iterable[str | os.PathLike[str]]) -> Iterator[str | Failure]:
    """The arguments with their braces written out. An argument that names a file as it stands is left alone."""
    for argument in arguments:
        name = os.fspath(argument)
        if "{" in name and not os.path.lexists(name):
            yield from _names(name)
        else:
            yield name


def _names(pattern: str) -> Iterable[str | Failure]:
    """The different names that a pattern stands for, or a failure where they are too many to be meant."""
    names: dict[str, None] = {}  # braces in braces give some twice
    characters = 0
    try:
        for count, name in enumerate(_written_out(pattern), 1):
            characters += len(name)
            if count > _MOST_NAMES or characters > _MOST_CHARACTERS:
                return [Failure(pattern, f"braces that stand for more than {_MOST_NAMES} names, or for too long ones")]
            names[name] = None
    except (ValueError, RecursionError):  # a number of thousands of digits; hundreds of braces
        return [Failure(pattern, "braces that are too many, or numbers in them that are too long")]
    return names


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
        inside = (f"{number:0{width}d}" for number in range(int(first), int(last) + step, step))
    else:
        inside = words.split(",")
    for each in inside:
        yield from _written_out(pattern[: found.start()] + each + pattern[found.end() :])


# --- Files -----------------------------------------------------------------------------------------------------------


class Finder:
    """The paths of the files that an argument names and no earlier argument has named; and failures.

    Args:
        containers: suffixes of the files that hold many images. They are not looked for in folders.

    Raises:
        OSError: at a call, where a folder cannot be read at the moment.
    """

    def __init__(self, containers: tuple[str, ...] = ()) -> None:
        self.passed_over: Counter[str] = Counter()  # files in folders that are no images, by their suffix
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
            if may_pass(error):
                raise error
            failures.append(Failure(str(error.filename), reason_of(error)))

        for root, folders, files in os.walk(folder, onerror=cannot_list, followlinks=True):
            for name in files:
                suffix = os.path.splitext(name)[1].lower()
                if name.startswith(_LEFTOVER_PREFIX):
                    continue
                if suffix in suffixes:
                    images.append(os.path.join(root, name))
                else:
                    self.passed_over[suffix] += 1
            below = {
                name: os.path.realpath(os.path.join(root, name))
                for name in sorted(folders)
                if name not in _LEFTOVER_FOLDERS
            }
            folders[:] = [name for name, real in below.items() if real not in entered]
            entered.update(below.values())
        yield from failures
        yield from _sorted(image.removeprefix(_HERE) for image in images)

    def _nothing_in(self, folders: Collection[str]) -> str:
        """The reason why an argument that stands for `folders` gives no file."""
        if not folders:
            return "no such file or folder"
        names = (name for folder in folders for _, _, files in os.walk(folder) for name in files)
        if self._containers and any(name.lower().endswith(self._containers) for name in names):
            return f"no image below it; {' and '.join(self._containers)} files are to be named themselves"
        return "no image below it"


def _is_folder(path: str) -> bool | None:
    """None where there is nothing. One question to the disk: a list may name millions of files."""
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except (OSError, ValueError) as error:
        if may_pass(error):
            raise
        return False if os.path.lexists(path) else None  # a dangling link is a file that cannot be read


def _sorted(paths: Iterable[str]) -> list[str]:
    """Sorted by path component: the files of `a/` stand together, before those of `a-b/`."""
    return sorted(paths, key=lambda path: path.replace(os.sep, "\0"))
