"""Images in base64, as tables of text hold them."""

from __future__ import annotations

import base64
import binascii
import re

# The first characters of a JPEG, PNG, GIF, WebP, TIFF, BMP, AVIF and JPEG 2000, in either alphabet of base64.
_IMAGE = re.compile(
    rb"\s*(?:data:[^,]{0,200},)?"
    rb"(?:[/_]9j[/_]|iVBORw0KGgo|R0lGOD[dl]h|UklGR|SUkqA|TU0AK|Qk[0-3]|AAAA[\w+/-]GZ0eX|AAAADGpQICA)[\w+/\s=-]*"
)
_LOOKED_AT = 4096  # characters: what is longer is no path
_SHORTEST = 32  # characters: a path could begin so, and end before the first dot


def is_base64(text: bytes) -> bool:
    """Whether `text` is an image in base64, or a data URL of one, and no path."""
    return len(text) >= _SHORTEST and _IMAGE.fullmatch(text[:_LOOKED_AT]) is not None


def without_base64(data: bytes) -> bytes:
    """The bytes of an image: decoded where they are in base64, else as they are.

    Raises:
        ValueError: they are in base64, and damaged.
    """
    if not is_base64(data):
        return data
    text = b"".join(data.rpartition(b",")[2].split()).translate(bytes.maketrans(b"-_", b"+/")).rstrip(b"=")
    try:
        return base64.b64decode(text + b"=" * (-len(text) % 4), validate=True)
    except binascii.Error as error:
        raise ValueError(f"not an image: damaged base64 ({error})") from error
