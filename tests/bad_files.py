"""Broken image files: kind -> a function that makes one at a path, and a part of the reason that is reported for it."""

from __future__ import annotations

import base64
import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, features


def truncated(path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, "JPEG")
    path.write_bytes(path.read_bytes()[:2000])


def broken_png(path: Path) -> None:
    Image.new("RGB", (5, 4)).save(path, "PNG")
    data = bytearray(path.read_bytes())
    data[data.index(b"IDAT") + 6] ^= 0xFF
    path.write_bytes(data)


BAD_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: None, "No such file"),
    "empty": (lambda path: path.touch(), "zero bytes"),
    "text": (lambda path: path.write_text("no image at all"), "not an image"),
    "random bytes": (lambda path: path.write_bytes(np.random.default_rng(0).bytes(5000)), "not an image"),
    "only a header": (lambda path: path.write_bytes(b"\xff\xd8\xff\xe0\x00\x10JFIF"), "Truncated"),
    "truncated": (truncated, "truncated"),
    "broken": (broken_png, "broken"),
    "folder": (lambda path: path.mkdir(), "not a regular file"),
    "pipe": (os.mkfifo, "not a regular file"),
    "dangling link": (lambda path: path.symlink_to("nowhere"), "No such file"),
    "decompression bomb": (lambda path: path.write_bytes(b"P6 20000 20000 255\n"), "decompression bomb"),
    "long and thin": (lambda path: Image.new("L", (1, 400_000)).save(path, "PNG"), "too long and thin"),
}


# --- few bytes that stand for gigabytes ------------------------------------------------------------------------------

WEBP_OF_34_BYTES = base64.b64decode("UklGRhoAAABXRUJQVlA4TA4AAAAvOXQODQcQEf0PRET/Aw==")  # 13370x13370


def saved(image: Image.Image, name: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, name, **options)
    return file.getvalue()


def jpeg2000(side: int) -> bytes:
    """A JPEG 2000 of a few hundred bytes, of any size: that of a small one, written over."""
    data = bytearray(saved(Image.new("RGB", (64, 64)), "JPEG2000", no_jp2=True))
    for at in (8, 12, 24, 28):  # SIZ: the image's size, and the tile's
        data[at : at + 4] = side.to_bytes(4, "big")
    return bytes(data)


def avif(side: int) -> bytes:
    small = bytearray(saved(Image.new("RGB", (64, 64)), "AVIF"))
    at = small.index(b"ispe") + 8
    small[at : at + 8] = struct.pack(">II", side, side)
    return bytes(small)


def tiff(tile: int) -> bytes:
    """An image of 64 by 64 pixels in one tile of any size."""
    pixels = zlib.compress(bytes(1000))
    entries = ((256, 64), (257, 64), (258, 8), (259, 8), (262, 1), (277, 1), (322, tile), (323, tile))
    offset = 8 + 2 + 12 * 10 + 4
    tags = [*entries, (324, offset), (325, len(pixels))]
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + directory + bytes(4) + pixels


def png(side: int) -> bytes:
    data = bytearray(saved(Image.new("L", (64, 64)), "PNG"))
    data[16:24] = struct.pack(">II", side, side)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


GIGABYTES: dict[str, tuple[Callable[[], bytes], str]] = {
    "WEBP": (lambda: WEBP_OF_34_BYTES, "13370x13370 pixels of WEBP take about"),
    "JPEG2000": (lambda: jpeg2000(13_000), "13000x13000 pixels of JPEG2000 take about"),
    "AVIF": (lambda: avif(13_000), "13000x13000 pixels of AVIF take about"),
    "TIFF": (lambda: tiff(23_008), "23008x23008 pixels of TIFF take about"),
    "PNG": (lambda: png(20_000), "decompression bomb"),
}
_FEATURES = {"JPEG2000": "jpg_2000", "AVIF": "avif"}  # that a Pillow may be without


def of_gigabytes(folder: Path) -> dict[str, str]:
    """Writes a file of each kind that this Pillow reads, and gives a part of its reason by its name."""
    reasons: dict[str, str] = {}
    for kind, (data, reason) in GIGABYTES.items():
        if kind not in _FEATURES or features.check(_FEATURES[kind]):
            (folder / f"{kind}.jpg").write_bytes(data())
            reasons[f"{kind}.jpg"] = reason
    return reasons
