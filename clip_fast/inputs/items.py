"""Items: the place of one image each, small enough to be sent to another process.

An item's bytes are read where the image is decoded. An image that is known not to be readable is an `Unreadable` item,
so that every input has its row.
"""

from __future__ import annotations

import errno
import io
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ..errors import printable
from .images import check_bytes, open_image

# The errno values that a retry will not change. EINVAL comes from a tar whose sizes lead beyond the largest file.
_LASTING = {
    errno.ENOENT,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.EACCES,
    errno.EPERM,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENXIO,
    errno.EINVAL,
}


@dataclass(frozen=True, slots=True)
class Item:
    """One image: `key` names its row, `location` tells people where it lies."""

    key: str
    location: str

    def source(self) -> Path | io.BytesIO:
        """What `open_image` takes.

        Raises:
            OSError, ValueError: the bytes cannot be read.
        """
        raise NotImplementedError

    def open(self) -> Image.Image:
        """The image, to be decoded; raises what `source` and `open_image` raise."""
        return open_image(self.source())

    def prepare(self) -> None:
        """Does the part of `source` whose time is not the image's own; raises what `source` raises. Optional."""


@dataclass(frozen=True, slots=True)
class ImageFile(Item):
    """A file; key and location are its path unless a table gives it another key."""

    def source(self) -> Path:
        path = Path(self.location)
        size = size_of_file(path)
        if not size:
            raise ValueError("not an image: zero bytes")
        check_bytes(size)
        return path


@dataclass(frozen=True, slots=True)
class Unreadable(Item):
    """An input that cannot be read, and the reason."""

    reason: str

    def source(self) -> Path:
        raise ValueError(self.reason)


@dataclass(frozen=True)
class Failure:
    """A path that gave no embedding, and the reason."""

    path: str
    reason: str

    def __str__(self) -> str:
        return f"{printable(self.path)}: {printable(self.reason)}"


def size_of_file(path: str | os.PathLike[str]) -> int:
    """The bytes of a file that can be opened without waiting.

    Raises:
        OSError: there is none.
        ValueError: it is no regular file. Opening a pipe would wait for its other end.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("not a regular file")
    return status.st_size


def image_bytes(data: bytes, size: int) -> io.BytesIO:
    """`data` as a file.

    Raises:
        ValueError: there are no bytes, or fewer than the archive promised.
    """
    if not size:
        raise ValueError("not an image: zero bytes")
    if len(data) < size:
        raise ValueError(f"the archive ends inside it, after {len(data)} of {size} bytes")
    return io.BytesIO(data)


def may_pass(error: Exception) -> bool:
    """Whether the same read may succeed later. Errors about a file's contents carry no errno."""
    return isinstance(error, OSError) and error.errno is not None and error.errno not in _LASTING
