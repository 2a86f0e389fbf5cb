"""Webdataset tars: the images in an uncompressed tar, each by its offset."""

from __future__ import annotations

import io
import os
import re
import tarfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import ClassVar

from ..errors import reason_of
from .containers import Columns
from .finder import is_leftover
from .images import PACKED, check_bytes, image_suffixes, kind_of
from .items import Item, Unreadable, image_bytes, may_pass, size_of_file
from .tar_headers import BLOCK, Member, plain_files

_TAR_END = 1 << 20  # bytes of zeros at the end, at most; tar pads to 10 KiB
_TAR_HEADERS = 1 << 20  # bytes of one member's headers, at most; names are a few kilobytes


def sample_key(member: str) -> str | None:
    """The webdataset key of a tar's member, given by its path in the tar; None where it is no image's."""
    if member[member.rfind(".") :].lower() not in image_suffixes():  # of most members this alone is asked
        return None
    start = member.rfind("/") + 1
    sample, dot, _ = member[start:].partition(".")
    if not sample or not dot or (start and is_leftover(member)):
        return None
    if "//" in member:
        return os.path.join(os.path.dirname(member), sample)
    return member[:start] + sample


@dataclass(frozen=True, slots=True)
class TarMember(Item):
    """A member of an uncompressed tar: `size` bytes from `offset`; its key is the webdataset key."""

    tar: str
    offset: int
    size: int

    def source(self) -> io.BytesIO:
        check_bytes(self.size)
        with open(self.tar, "rb") as file:
            file.seek(self.offset)
            return image_bytes(file.read(self.size), self.size)


@dataclass(frozen=True)
class Tar:
    """The images in an uncompressed tar, in its order, chosen by the suffixes that Pillow reads.

    As in webdataset, a sample's key is the member's path up to the first dot of its name. A member whose name starts
    with a dot is no sample. A link, a sparse file or a device is an unreadable sample. An archive that was appended to
    may have several members of one name: the location of the second ends in `#2`, where no suffix of an image does.
    """

    suffix: ClassVar[str] = ".tar"

    path: str

    @classmethod
    def named(cls, path: str, columns: Columns) -> Tar:
        return cls(path)

    @classmethod
    def around(cls, location: str, columns: Columns) -> Tar | None:
        ends = (found.end() for found in re.finditer(rf"{re.escape(cls.suffix)}(?=/)", location, re.IGNORECASE))
        return next((cls(location[:end]) for end in ends if os.path.isfile(location[:end])), None)

    def count(self) -> int | None:
        """None: only listing the whole tar tells."""

    def __iter__(self) -> Iterator[Item]:
        seen = _Seen(self._images)
        empty = True
        try:
            for key, member in self._images():
                empty = False
                number = seen.again(member.name)
                location = f"{self.path}/{member.name}#{number}" if number > 1 else f"{self.path}/{member.name}"
                if member.problem:
                    yield Unreadable(key, location, f"{member.problem} in the archive")
                else:
                    yield TarMember(key, location, self.path, member.offset, member.size)
        except Exception as error:  # tarfile raises whatever its parsing stumbles on
            if may_pass(error):
                raise
            reason = reason_of(error)
            if isinstance(error, tarfile.ReadError):
                reason = kind_of(Path(self.path), PACKED) or reason
            yield Unreadable(self.path, self.path, f"not a readable, uncompressed tar: {reason}")
        else:
            if empty:  # said once for a tar, whoever goes through it
                warnings.warn(f"{self.path}: holds no image, by the suffixes that Pillow reads", stacklevel=1)

    def _images(self) -> Iterator[tuple[str, Member]]:
        """The members that are images by their names, with their keys."""
        for member in self._members():
            key = sample_key(member.name)
            if key is not None:
                yield key, member

    def _members(self) -> Iterator[Member]:
        """What may be images: from our own scanner up to the first header that is not plain, then from `tarfile`."""
        size_of_file(self.path)
        with _Headers(self.path) as file:
            last = yield from plain_files(file.fileno(), image_suffixes())
            file.seek(last or 0)
            with tarfile.open(self.path, "r:", file) as tar:
                known = last is not None
                for member in tar:
                    if tar.offset <= member.offset:
                        raise tarfile.ReadError("a size below zero")  # tarfile would come back to this header forever
                    file.left = _TAR_HEADERS
                    tar.members = []  # pyright: ignore[reportAttributeAccessIssue]  # tarfile would keep them all
                    if not known and not member.isdir():
                        yield Member(member.name, member.offset_data, member.size, _unreadable_kind(member))
                    known = False
                self._check_end(tar.offset)

    def _check_end(self, offset: int) -> None:
        """Refuses an archive that does not end at `offset`, where `tarfile` stopped.

        It ends in at least one block of zeros. `tarfile` stops without a word at a cut or a damaged header, and loses
        the members behind it.
        """
        with open(self.path, "rb") as file:
            file.seek(offset)
            end = file.read(_TAR_END + 1)
        if not BLOCK <= len(end) <= _TAR_END or end.strip(b"\0"):
            raise tarfile.ReadError(f"cut or damaged at byte {offset}, and what may follow is lost")


class _Seen:
    """Counts how often a name came.

    While names ascend, as in most webdatasets, none is kept. At the first that does not, `images` tells them again.
    """

    def __init__(self, images: Callable[[], Iterable[tuple[str, Member]]]) -> None:
        self._images = images
        self._ascended = 0
        self._last = ""
        self._counts: Counter[str] | None = None

    def again(self, name: str) -> int:
        """How often `name` has come, with this time."""
        if self._counts is None:
            if name > self._last:
                self._last = name
                self._ascended += 1
                return 1
            self._counts = Counter(member.name for _, member in islice(self._images(), self._ascended))
        self._counts[name] += 1
        return self._counts[name]


class _Headers(io.FileIO):
    """A tar whose headers are read. `tarfile` would take a name of any length into memory, from a sparse file too."""

    left = _TAR_HEADERS  # bytes that may still be read for the next member

    def read(self, size: int | None = -1, /) -> bytes:
        self.left -= _TAR_HEADERS if size is None or size < 0 else size
        if self.left < 0:
            raise tarfile.ReadError(f"headers of more than {_TAR_HEADERS} bytes for one member")
        return super().read(size) or b""


def _unreadable_kind(member: tarfile.TarInfo) -> str | None:
    """The kind of a member whose bytes do not simply follow its header; None for an ordinary file."""
    if member.issparse():
        return "a sparse file"
    if member.islnk() or member.issym():
        return "a link"
    if member.size >> 63:
        return "an impossible size"
    return None if member.isreg() else "no regular file"
