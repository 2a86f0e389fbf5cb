"""The files that arguments name: folders, patterns, braces and lists of paths."""

from __future__ import annotations

import codecs
import glob
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import cache
from itertools import chain
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


class ExactPath(str):
    """An argument that is a path as it stands: no pattern, and without braces to write out."""

    __slots__ = ()


def is_leftover(path: str) -> bool:
    """Whether a file or folder is none of a person's own, though it may have an image's suffix."""
    names = path.split(os.sep)
    return names[-1].startswith(_LEFTOVER_PREFIX) or not _LEFTOVER_FOLDERS.isdisjoint(names)


def read_list(file: BinaryIO) -> list[str]:
    """The arguments in a file: one a line, or exact paths between zero bytes where it has any, as of `find -print0`.

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
    if b"\0" in data:
        return [ExactPath(os.fsdecode(entry)) for entry in data.split(b"\0") if entry]
    lines = (line.rstrip(b"\r") for line in data.split(b"\n"))
    return [os.fsdecode(line) for line in lines if line]


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
        if "{" in name and not isinstance(name, ExactPath) and not os.path.lexists(name):
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
        self._counted: set[str] = set()  # folders whose files are in `passed_over`
        self._real = cache(os.path.realpath)  # asked of folders only

    def __call__(self, argument: str) -> Iterator[str | Failure]:
        is_folder = _is_folder(argument)
        named: dict[str, bool] = {}
        if is_folder is not None:
            named = {str(Path(argument)): is_folder}
        elif glob.has_magic(argument) and not isinstance(argument, ExactPath):
            named = {path: os.path.isdir(path) for path in _sorted(str(Path(path)) for path in _matched(argument))}
        nothing = True
        for path, is_folder in named.items():
            for found in self._below(path) if is_folder else [path]:
                nothing = False
                if isinstance(found, Failure) or self._is_new(found):
                    yield found
        if nothing:
            yield Failure(str(argument), self._nothing_in(named))

    def _is_new(self, path: str) -> bool:
        folder, name = os.path.split(path)
        before = len(self._seen)
        self._seen.add(os.path.join(self._real(folder), name))
        return len(self._seen) > before

    def _below(self, folder: str) -> Iterator[str | Failure]:
        suffixes = image_suffixes()
        images: list[str] = []
        failures: list[Failure] = []

        def cannot_list(error: OSError) -> None:
            _raise_if_passing(error)
            failures.append(Failure(str(error.filename), reason_of(error)))

        for root, real, files in _folders(folder, cannot_list):
            is_counted = real in self._counted
            self._counted.add(real)
            for name in files:
                suffix = os.path.splitext(name)[1].lower()
                if name.startswith(_LEFTOVER_PREFIX):
                    continue
                if suffix in suffixes:
                    images.append(os.path.join(root, name))
                elif not is_counted and os.path.join(real, name) not in self._seen:
                    self.passed_over[suffix] += 1
        yield from failures
        yield from _sorted(image.removeprefix(_HERE) for image in images)

    def _nothing_in(self, folders: Collection[str]) -> str:
        """The reason why an argument that stands for `folders` gives no file."""
        if not folders:
            return "no such file or folder"
        names = (name for folder in folders for _, _, files in _folders(folder, _raise_if_passing) for name in files)
        if self._containers and any(name.lower().endswith(self._containers) for name in names):
            return f"no image below it; {' and '.join(self._containers)} files are to be named themselves"
        return "no image below it"


def _matched(pattern: str) -> Iterable[str]:
    """The paths that a pattern stands for, as `glob.glob` has them, without leftovers that it does not name itself.

    Links may lead back up: below a `**`, each folder is entered once. A `**` at the end stands for its folder, and for
    all files below it.
    """
    parts = [part for part in pattern.split(os.sep) if part]
    paths = [os.sep if pattern.startswith(os.sep) else ""]
    for number, part in enumerate(parts, 1):
        if part == "**":
            found = (each for path in paths for each in _folders(path, _raise_if_passing, hidden=False))
            if number < len(parts):
                below = (folder for folder, _, _ in found)
            else:
                files = (os.path.join(folder, name) for folder, _, names in found for name in names)
                below = chain(filter(os.path.isdir, paths), files)
            paths = list(dict.fromkeys(below))
        else:
            paths = [
                os.path.join(path, name)
                for path in paths
                for name in glob.glob(part, root_dir=path)
                if not is_leftover(name) or is_leftover(part)
            ]
    return filter(os.path.isdir, paths) if pattern.endswith(os.sep) else paths


def _folders(
    top: str, cannot_list: Callable[[OSError], object], *, hidden: bool = True
) -> Iterator[tuple[str, str, list[str]]]:
    """Each folder from `top` down, its real path, and the names of the files in it; no leftover folders.

    Links to folders are followed, and no folder is entered twice, since a link may lead back up. The depth has no
    bound, as it has in `os.walk`, which calls itself in Python 3.11. `hidden` is for names that begin with a dot.
    """
    waiting = [(top, os.path.realpath(top))]
    entered = {waiting[0][1]}
    while waiting:
        folder, real = waiting.pop()
        below: list[tuple[str, str]] = []
        files: list[str] = []
        try:
            with os.scandir(folder or os.curdir) as entries:
                for entry in entries:
                    name, path = entry.name, os.path.join(folder, entry.name)
                    if name.startswith(".") and not hidden:
                        continue
                    if not _leads_to_folder(entry):
                        files.append(name)
                    elif name not in _LEFTOVER_FOLDERS:
                        is_link = entry.is_symlink()
                        below.append((path, os.path.realpath(path) if is_link else os.path.join(real, name)))
        except OSError as error:
            cannot_list(error)
            continue
        yield folder, real, files
        new: list[tuple[str, str]] = []
        for path, real in sorted(below):
            if real not in entered:
                entered.add(real)
                new.append((path, real))
        waiting += reversed(new)


def _leads_to_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # such as a link to itself
        return False


def _raise_if_passing(error: OSError) -> None:
    if may_pass(error):
        raise error


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
