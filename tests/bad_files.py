"""Broken image files: kind -> a function that makes one at a path, and a part of the reason that is reported for it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image


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
