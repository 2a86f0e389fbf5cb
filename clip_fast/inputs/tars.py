"""Webdataset tars: the images in an uncompressed tar, each by its offset."""

from __future__ import annotations

import io
import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from ..errors import reason_of
from .containers import Columns
from .items import Item, Unreadable, image_bytes, image_suffixes, may_pass

_TAR_BLOCK = 512  # bytes; an archive ends in at least one block of zeros
_TAR_END = 1 << 20  # bytes of zeros at the end, at most; tar pads to 10 KiB


@dataclass(frozen=True, slots=True)
class TarMember(Item):
    """A member of an uncompressed tar: `size` bytes from `offset`; its key is the webdataset key."""

    tar: str
    offset: int
    size: int

    def source(self) -> io.BytesIO:
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
        tar, found, _ = location.partition(f"{cls.suffix}/")
        return cls(tar + cls.suffix) if found else None

    def count(self) -> None:
        """Unknown: only listing the whole tar tells."""

    def __iter__(self) -> Iterator[Item]:
        suffixes = image_suffixes()
        seen: Counter[str] = Counter()
        try:
            with tarfile.open(self.path, "r:") as tar:
                for member in tar:
                    tar.members = []  # pyright: ignore[reportAttributeAccessIssue]  # tarfile would keep them all
                    folder, name = os.path.split(member.name)
                    sample = name.partition(".")[0]
                    if not sample or member.isdir() or os.path.splitext(name)[1].lower() not in suffixes:
                        continue
                    seen[member.name] += 1
                    number = f"#{seen[member.name]}" if seen[member.name] > 1 else ""
                    key, location = os.path.join(folder, sample), f"{self.path}/{member.name}{number}"
                    kind = _unreadable_kind(member)
                    if kind:
                        yield Unreadable(key, location, f"{kind} in the archive")
                    else:
                        yield TarMember(key, location, self.path, member.offset_data, member.size)
                self._check_end(tar.offset)
        except (tarfile.TarError, OSError, ValueError, OverflowError) as error:  # tarfile lets the last two escape
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


def _unreadable_kind(member: tarfile.TarInfo) -> str | None:
    """The kind of a member whose bytes do not simply follow its header; None for an ordinary file."""
    if member.issparse():
        return "a sparse file"
    if member.islnk() or member.issym():
        return "a link"
    return None if member.isreg() else "no regular file"
