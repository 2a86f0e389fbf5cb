"""Webdataset tars: the images in an uncompressed tar, each by its offset."""

from __future__ import annotations

import io
import os
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from ..errors import reason_of
from .containers import Columns
from .finder import is_leftover
from .images import check_bytes, image_suffixes
from .items import Item, Unreadable, image_bytes, may_pass, size_of_file

_TAR_BLOCK = 512  # bytes; an archive ends in at least one block of zeros
_TAR_END = 1 << 20  # bytes of zeros at the end, at most; tar pads to 10 KiB
_TAR_HEADERS = 1 << 20  # bytes of one member's headers, at most; names are a few kilobytes
_ADLER = 65521  # the modulus of Adler-32's sums (RFC 1950)
_FOLDER = "a folder"


def sample_key(member: str) -> str | None:
    """The webdataset key of a tar's member, given by its path in the tar; None where it is no image's."""
    if member[member.rfind(".") :].lower() not in image_suffixes():  # first, since most members are no images
        return None
    folder, name = os.path.split(member)
    sample = name.partition(".")[0]
    if not sample or is_leftover(member):
        return None
    return os.path.join(folder, sample)


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
        found = re.search(rf"{re.escape(cls.suffix)}(?=/)", location, re.IGNORECASE)
        return cls(location[: found.end()]) if found else None

    def count(self) -> None:
        """Unknown: only listing the whole tar tells."""

    def __iter__(self) -> Iterator[Item]:
        seen: Counter[str] = Counter()
        try:
            size_of_file(self.path)
            with _Headers(self.path) as file, tarfile.open(self.path, "r:", file) as tar:
                for name, offset, size, kind in _members(file, tar):
                    key = sample_key(name)
                    if key is None or kind == _FOLDER:
                        continue
                    seen[name] += 1
                    number = f"#{seen[name]}" if seen[name] > 1 else ""
                    location = f"{self.path}/{name}{number}"
                    if kind:
                        yield Unreadable(key, location, f"{kind} in the archive")
                    else:
                        yield TarMember(key, location, self.path, offset, size)
                self._check_end(tar.offset)
        except Exception as error:  # tarfile raises whatever its parsing stumbles on
            if may_pass(error):
                raise
            yield Unreadable(self.path, self.path, f"not a readable, uncompressed tar: {reason_of(error)}")

    def _check_end(self, offset: int) -> None:
        """Refuses an archive that does not end at `offset`, where `tarfile` stopped.

        `tarfile` stops without a word at a cut or a damaged header, and loses the members behind it.
        """
        with open(self.path, "rb") as file:
            file.seek(offset)
            end = file.read(_TAR_END + 1)
        if not _TAR_BLOCK <= len(end) <= _TAR_END or end.strip(b"\0"):
            raise tarfile.ReadError(f"cut or damaged at byte {offset}, and what may follow is lost")


class _Headers(io.FileIO):
    """A tar whose headers are read. `tarfile` would take a name of any length into memory, from a sparse file too."""

    left = _TAR_HEADERS  # bytes that may still be read for the next member

    def read(self, size: int | None = -1, /) -> bytes:
        self.left -= _TAR_HEADERS if size is None or size < 0 else size
        if self.left < 0:
            raise tarfile.ReadError(f"headers of more than {_TAR_HEADERS} bytes for one member")
        return super().read(size) or b""


def _members(file: _Headers, tar: tarfile.TarFile) -> Iterator[tuple[str, int, int, str | None]]:
    """Name, offset, size and kind, None for an ordinary file, of each member.

    `tarfile` takes five times as long for a header as reading it, so it is given only those that `_ordinary` leaves to
    it, and all that follow a header for the whole archive.
    """
    at = 0
    while True:
        header = os.pread(file.fileno(), _TAR_BLOCK, at) if not tar.pax_headers else b""
        if ordinary := _ordinary(header):
            name, size = ordinary
            yield name.decode(tar.encoding or "utf-8", tar.errors or "surrogateescape"), at + _TAR_BLOCK, size, None
            at += _TAR_BLOCK + -(-size // _TAR_BLOCK) * _TAR_BLOCK
            continue
        file.left = _TAR_HEADERS
        if at:  # it has read the first by itself
            tar.firstmember = None  # pyright: ignore[reportAttributeAccessIssue]
            tar.offset = at
        tar.members = []  # pyright: ignore[reportAttributeAccessIssue]  # tarfile would keep them all
        member = tar.next()
        if member is None:
            return
        yield member.name, member.offset_data, member.size, _kind(member)
        at = tar.offset


def _ordinary(header: bytes) -> tuple[bytes, int] | None:
    """Name and size of a file whose header says no more than these (POSIX.1-1988, ustar); None for another header."""
    if len(header) < _TAR_BLOCK or header[156] not in b"0\0" or header[257:262] != b"ustar" or header[345]:
        return None
    name, size, stored = header[:100].partition(b"\0")[0], header[124:135], header[148:154]
    if not (size.isdigit() and stored.isdigit()) or header[135] not in b" \0" or name[-1:] in (b"", b"/"):
        return None
    try:
        length, checksum = int(size, 8), int(stored, 8)
    except ValueError:
        return None
    # The checksum is the sum of all bytes, with spaces in its own place. Adler-32 has that sum, and one more.
    expected = checksum - 8 * ord(" ") + sum(header[148:156])
    if ((zlib.adler32(header) & 0xFFFF) - 1 - expected) % _ADLER:
        return None
    return name, length


def _kind(member: tarfile.TarInfo) -> str | None:
    """The kind of a member whose bytes do not simply follow its header; None for an ordinary file."""
    if member.isdir():
        return _FOLDER
    if member.issparse():
        return "a sparse file"
    if member.islnk() or member.issym():
        return "a link"
    return None if member.isreg() else "no regular file"
