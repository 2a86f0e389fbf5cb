"""Sizes of tiles, grids and strides on the host, where Triton's own functions take twenty times as long."""

from __future__ import annotations

from torch import Tensor


def cdiv(size: int, tile: int) -> int:
    """The number of tiles that cover `size`."""
    return -(-size // tile)


def next_power_of_2(size: int) -> int:
    """The least power of two that is `size` or more."""
    return 1 << (size - 1).bit_length()


def reached_in_32_bits(x: Tensor) -> Tensor:
    """x (B, N, W), or a copy: no element of an image is 2³¹ or more from the image's first, so far do kernels count."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape[1:], x.stride()[1:], strict=True))
    return x if last < 2**31 else x.contiguous()
