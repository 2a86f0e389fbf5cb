"""The files of a tar whose headers are plain, many times faster than `tarfile` reads them.

A header is a block of 512 bytes with numbers in octal digits (POSIX.1-1988, ustar). It is plain where `tarfile` cannot
read it in another way: a file or a folder, a name that fits, numbers of digits alone, a checksum that is right. A pax
header that tells times alone is plain too, since webdataset's writer puts one before every member.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Collection, Generator
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

BLOCK = 512  # bytes
# Bytes that are read at once: the headers of small members lie near each other. Behind a large member lie those of its
# sample's captions and of the next image. Of a file that is mapped into memory, each page behind a large member would
# be a page fault, which takes longer.
_NEAR, _FAR = 1 << 13, 1 << 12
_AT_ONCE = 1024  # headers that are checked together

_FILE, _OLD_FILE, _FOLDER, _PAX = ord("0"), 0, ord("5"), ord("x")
_NAME, _PREFIX = slice(0, 100), slice(345, 500)
_KIND = 156
_SIZE = slice(124, 135)  # eleven digits; a twelfth byte ends them
_CHECKSUM = slice(148, 156)
_NUMBERS = [range(*ends) for side in ((100, 108, 116, 124, 136, 148, 156), (329, 337, 345)) for ends in pairwise(side)]

_DIGIT, _END, _OTHER = 0, 1, 2  # classes of the bytes of a number: digits, then what ends them
_CLASSES = np.full(256, _OTHER, np.uint8)
_CLASSES[list(b"01234567")] = _DIGIT
_CLASSES[list(b"\0 ")] = _END
_NUMBER_BYTES = np.concatenate(_NUMBERS)
_BEGINS = np.isin(_NUMBER_BYTES, [field.start for field in _NUMBERS])[1:, None]
_OF_SIZE = slice(24, 36)  # of these bytes
_FULL_SIZE = np.array([_DIGIT] * 11 + [_END], np.uint8)[:, None]

_TEXT = (tarfile.ENCODING, "surrogateescape")
_TIME = re.compile(rb"([0-9]{1,3}) [amc]time=[0-9.]+\n")  # a record of a pax header, which begins with its length


class Member(NamedTuple):
    """A member of a tar that is no folder: its name, the place of its bytes, and why it is no ordinary file."""

    name: str
    offset: int
    size: int
    problem: str | None = None


def plain_files(descriptor: int, suffixes: Collection[str]) -> Generator[Member, None, int | None]:
    """The files of an open tar, from its start to the first header that is not plain or cannot be read.

    Args:
        suffixes: only files whose names end in one of these, in letters of any case, are given.

    Returns:
        The place of the last member before that header, if there is one. `tarfile` goes on from there: it looks at the
        end of a member only when it reads the next one.
    """
    place: int | None = 0
    last = None
    while place is not None:
        headers, places, place = _chain(descriptor, place)
        blocks = np.frombuffer(b"".join(headers), np.uint8).reshape(-1, BLOCK)
        names = _texts(blocks, _NAME)
        prefixes = _texts(blocks, _PREFIX) if blocks[:, _PREFIX.start].any() else None
        plain = _are_plain(blocks, names, prefixes)
        good = len(headers)
        if not plain.all():
            good, place = int(plain.argmin()), None
        kinds = blocks[:good, _KIND].tolist()
        wanted: dict[bytes, bool] = {}
        for i, name in enumerate(names[:good]):
            suffix = name[name.rfind(b".") :]
            if suffix not in wanted:
                wanted[suffix] = suffix.decode(*_TEXT).lower() in suffixes
            if wanted[suffix] and kinds[i] != _FOLDER and kinds[i] != _PAX:
                path = (prefixes[i] + b"/" + name if prefixes and prefixes[i] else name).decode(*_TEXT)
                yield Member(path, places[i] + BLOCK, int(headers[i][_SIZE], 8))
        whole = good - (good > 0 and kinds[-1] == _PAX)  # without a pax header whose member is not plain
        if whole:
            last = places[whole - 1 - (whole > 1 and kinds[whole - 2] == _PAX)]
    return last


def _chain(descriptor: int, place: int) -> tuple[list[bytes], list[int], int | None]:
    """Some headers from `place` on, not checked yet; their places; and that of the next, if there may be one."""
    headers: list[bytes] = []
    places: list[int] = []
    window, start, kind = b"", place, _FILE
    try:
        while len(headers) < _AT_ONCE or kind == _PAX:
            at = place - start
            if not 0 <= at <= len(window) - 2 * BLOCK:
                window, start, at = os.pread(descriptor, _NEAR if at < 2 * _NEAR else _FAR, place), place, 0
            header = window[at : at + BLOCK]
            if len(header) < BLOCK:
                return headers, places, None
            size = int(header[_SIZE], 8)
            kind = header[_KIND]
            if kind == _PAX and not _tells_times(window[at + BLOCK : at + 2 * BLOCK], size):
                return headers, places, None
            headers.append(header)
            places.append(place)
            place += BLOCK if kind == _FOLDER else BLOCK + (size + BLOCK - 1) // BLOCK * BLOCK
    except (OSError, ValueError):  # `tarfile` meets it too; its error tells whether it may pass
        return headers, places, None
    return headers, places, place


def _tells_times(body: bytes, size: int) -> bool:
    """Whether the block behind a pax header holds records of times, `size` bytes, and nothing else."""
    records = body.rstrip(b"\0")
    at = 0
    while (found := _TIME.match(records, at)) and int(found[1]) == len(found[0]):
        at = found.end()
    return 0 < at == len(records) == size


def _are_plain(blocks: NDArray[np.uint8], names: list[bytes], prefixes: list[bytes] | None) -> NDArray[np.bool_]:
    """Which of headers (n, 512) are plain, (n,)."""
    kinds = blocks[:, _KIND]
    plain = (kinds == _FILE) | (kinds == _PAX) | (kinds == _FOLDER) | (kinds == _OLD_FILE)
    classes = _CLASSES.take(blocks.take(_NUMBER_BYTES, axis=1).T, mode="clip")  # (bytes, n); faster than an index
    plain &= (classes.max(axis=0) < _OTHER) & ((classes[1:] >= classes[:-1]) | _BEGINS).all(axis=0)
    plain &= (classes[_OF_SIZE] == _FULL_SIZE).all(axis=0)
    plain &= _checksums(blocks) == _written_checksums(blocks)
    if b"\0" in b"".join(names if prefixes is None else names + prefixes):  # what follows a zero is no text
        plain &= [b"\0" not in name for name in names]
        plain &= True if prefixes is None else [b"\0" not in prefix for prefix in prefixes]
    for i in np.flatnonzero(kinds == _OLD_FILE):  # when that was the kind of folders, too
        plain[i] &= not names[i].endswith(b"/")
    return plain


def _checksums(blocks: NDArray[np.uint8]) -> NDArray[np.uint32]:
    """The sums of all bytes, with spaces in place of the checksum."""
    field = blocks[:, _CHECKSUM]
    return blocks.sum(axis=1, dtype=np.uint32) - field.sum(axis=1, dtype=np.uint32) + field.shape[1] * ord(" ")


def _written_checksums(blocks: NDArray[np.uint8]) -> NDArray[np.uint32]:
    value = np.zeros(len(blocks), np.uint32)
    for column in blocks[:, _CHECKSUM].T:
        value = np.where(_CLASSES[column] == _DIGIT, value * 8 + column - ord("0"), value)
    return value


def _texts(blocks: NDArray[np.uint8], field: slice) -> list[bytes]:
    """A field of each header, without the zeros at its end."""
    return np.ascontiguousarray(blocks[:, field]).view(f"S{field.stop - field.start}").reshape(-1).tolist()
