"""Images that are served: their formats, opened by these alone, and within bounds of memory."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image, ImageFile, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

MEMORY_LIMIT = 1 << 30  # bytes that one image may take to be read, and again to be decoded

# Formats that Pillow knows by name and does not read by itself. Some start another program; IPTC opens what is in it by
# its content, whatever that is.
_NOT_SERVED = {"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}

# Bytes that a decoder takes for each pixel at its peak, as measured, where that is more than 6: with 6, the largest
# image that Pillow opens is just within the limit. A TIFF's are for each pixel of a tile, which may be larger than the
# image. JPEG 2000's are for each band.
_PEAK_BYTES = {"WEBP": 16, "AVIF": 12, "DDS": 10, "TIFF": 6}
_PEAK_BYTES_OF_BAND = {"JPEG2000": 6}
_TILE_WIDTH, _TILE_LENGTH = 322, 323  # TIFF 6.0, section 15

# Files that people take for tars: where their mark stands, the mark, and what they are.
PACKED = (
    (0, b"\x1f\x8b", "it is compressed with gzip, and a tar is read uncompressed: unpack it"),
    (0, b"BZh", "it is compressed with bzip2, and a tar is read uncompressed: unpack it"),
    (0, b"\xfd7zXZ\0", "it is compressed with xz, and a tar is read uncompressed: unpack it"),
    (0, b"\x28\xb5\x2f\xfd", "it is compressed with zstd, and a tar is read uncompressed: unpack it"),
    (0, b"PK\x03\x04", "it is a zip archive: unpack it"),
    (0, b"7z\xbc\xaf\x27\x1c", "it is a 7z archive: unpack it"),
    (0, b"Rar!", "it is a rar archive: unpack it"),
)

# And those that they take for images.
_OTHERS = (
    *PACKED,
    (257, b"ustar", "it is a tar archive, and its name must end in .tar"),
    (0, b"PAR1", "it is a parquet file, and its name must end in .parquet"),
    (4, b"ftyphe", "it is HEIC: convert it to JPEG"),
    (4, b"ftypmif1", "it is HEIF: convert it to JPEG"),
    (4, b"ftyp", "it is a video"),
    (0, b"%PDF", "it is PDF"),
    (0, b"%!PS", "it is PostScript"),
    (0, b"\xc5\xd0\xd3\xc6", "it is PostScript"),
    (0, b"<svg", "it is SVG"),
    (0, b"<?xml", "it is XML, as SVG is"),
    (0, b"<!doctype", "it is a web page"),
    (0, b"<html", "it is a web page"),
    (0, b"version https://git-lfs", "it is a pointer of Git LFS: git lfs pull fetches the file"),
    (0, b"\0\5\x16\7", "it is a Mac's AppleDouble file"),
)


@cache
def image_formats() -> tuple[str, ...]:
    """The names of the formats that Pillow reads by itself."""
    Image.init()
    return tuple(name for name in Image.OPEN if name not in _NOT_SERVED)


@cache
def image_suffixes() -> frozenset[str]:
    """The suffixes of `image_formats`, in lower case, with their dot."""
    served = {*image_formats(), "MPO"}  # several JPEGs in one file, which Pillow opens as a JPEG first
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in served)


def open_image(source: Path | io.BytesIO) -> Image.Image:
    """An image that is not yet decoded, in one of `image_formats` by its content.

    Raises:
        ValueError: it is in no such format, or decoding would take more than `MEMORY_LIMIT`.
        OSError: it cannot be read.
        Exception: whatever Pillow raises for a broken file.
    """
    try:
        image = Image.open(source, formats=image_formats())
    except UnidentifiedImageError:
        kind = kind_of(source)
        raise ValueError(f"not an image, or not in a format that Pillow reads{kind and f': {kind}'}") from None
    try:
        _check_memory(image)
    except BaseException:
        image.close()
        raise
    return image


def check_bytes(size: int) -> None:
    """Refuses a file, or a part of one, of more than `MEMORY_LIMIT` bytes.

    Raises:
        ValueError: says so.
    """
    if size > MEMORY_LIMIT:
        raise ValueError(f"{size} bytes: an image may have {MEMORY_LIMIT}")


def _check_memory(image: ImageFile.ImageFile) -> None:
    bands = len(image.getbands())
    pixel = _PEAK_BYTES.get(image.format or "") or _PEAK_BYTES_OF_BAND.get(image.format or "", 0) * bands
    tags: Mapping[int, Any] = image.tag_v2 if isinstance(image, TiffImageFile) else {}
    width, height = max(image.width, tags.get(_TILE_WIDTH, 0)), max(image.height, tags.get(_TILE_LENGTH, 0))
    needed = width * height * pixel
    if needed > MEMORY_LIMIT:
        raise ValueError(
            f"{width}x{height} pixels of {image.format} take about {needed >> 20} MiB to decode: an image "
            f"may take {MEMORY_LIMIT >> 20}"
        )
    if any(tile[0] == "fits_gzip" for tile in image.tile):  # Pillow unpacks it whole, whatever its size
        raise ValueError("compressed FITS: unpack it")


def kind_of(source: Path | io.BytesIO, kinds: Sequence[tuple[int, bytes, str]] = _OTHERS) -> str:
    """Words on the kind of a file that is no image, or no tar; none where it is of no known kind."""
    if isinstance(source, Path):
        with open(source, "rb") as file:
            head = file.read(512)
    else:
        head = source.getvalue()[:512]
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    for place, mark, words in kinds:
        if (head[place:] if place else text).lower().startswith(mark.lower()):
            return words
    return ""
