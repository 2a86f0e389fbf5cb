"""What a launch passes for a tensor descriptor, in place of a CUtensorMap."""

from __future__ import annotations

import struct
from typing import Any

MAGIC = 0x50414D524F534E54  # which engine/vocabulary.h has, too
_ROW_OF_SWIZZLE = {1: 32, 2: 64, 3: 128}  # bytes


def encode(descriptor: Any, meta: dict[str, Any]) -> bytes:
    """The tensor map of a `TensorDescriptor`, after the checks that cuTensorMapEncodeTiled makes."""
    address, size, swizzle = descriptor.base.data_ptr(), meta["elem_size"], meta["swizzle"]
    # A tensor map begins with the dimension that is contiguous.
    shape = [int(n) for n in descriptor.shape][::-1]
    strides = [int(n) * size for n in descriptor.strides][::-1]
    box = [int(n) for n in meta["block_size"]][::-1]
    rank = len(shape)
    for holds, wanted in (
        (rank <= 3, "at most three dimensions here"),
        (strides[0] == size, "a contiguous last dimension"),
        (address % 16 == 0, "an address that is a multiple of 16"),
        (all(stride % 16 == 0 for stride in strides[1:]), "strides that are multiples of 16 bytes"),
        (all(0 < n <= 256 for n in box), f"a box of at most 256 along each dimension, not {box}"),
        (box[0] * size % 16 == 0, "a box whose rows are multiples of 16 bytes"),
        (not swizzle or box[0] * size <= _ROW_OF_SWIZZLE[swizzle], "a box whose rows are no wider than the swizzle"),
        (descriptor.padding == "zero", "zeros outside the tensor"),
    ):
        if not holds:
            raise ValueError(f"a tensor map must have {wanted}")
    padding = [0] * (3 - rank)
    packed = struct.pack("<QQIIII", MAGIC, address, rank, size, swizzle, 0)
    packed += struct.pack("<3Q3Q3II", *shape, *padding, *strides, *padding, *box, *[1] * (3 - rank), 0)
    return packed.ljust(128, b"\0")
