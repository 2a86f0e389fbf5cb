"""Images of any size to squares, bit for bit as Pillow resizes them: one pass along each axis.

    T[a] = clip8((½ + Σ_t w_a,t · P[first_a + t]) / 2²²)    w in fixed point, by `resampling.axis`; both passes alike

The first pass reads packed RGB bytes, and leaves the columns (or rows) of the square for those rows (or columns) that
the second pass needs; most images are resampled along x first. The second pass leaves planes, (B, 3, S, S).

One program takes one image, and of a pass's result every n-th tile, where n programs share an image. Lanes lie along x,
where the bytes are. Each result is a sum of integers of 32 bits, which has the same bits in any order.

A photograph of 640 × 480 pixels and S = 224 is 0.92 MB to read, 0.32 MB to leave and read between, 0.15 MB to write.
Of its 5 M multiply-adds three share 14 instructions, as compiled for Hopper, and these decide, by calculation.
"""

# pyright: reportArgumentType=false, reportCallIssue=false
# (at a launch, plain values become constexprs and the options of the launch join the arguments)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .direct import launch_kernel
from .primitives import dependent_launch, wait_for_the_last
from .resampling import FIELDS, FRACTION_BITS
from .sizes import cdiv

_FIELDS: tl.constexpr = tl.constexpr(FIELDS)
_FRACTION_BITS: tl.constexpr = tl.constexpr(FRACTION_BITS)
_HALF: tl.constexpr = tl.constexpr(1 << (FRACTION_BITS - 1))
_BLOCK_Y, _BLOCK_X = 16, 32
_MOST_PROGRAMS = 64  # for an image


@triton.jit
def _resize_kernel(
    source_ptr,  # bytes: pixels of 3, row by row
    steps_ptr,  # (2, B, FIELDS), contiguous: both passes of the images, see `resampling.plan`
    tables_ptr,  # `Axis.table` behind each other
    out_ptr,  # bytes: pixels of 3, or (B, 3, S, S) of the second pass
    side,
    PASS: tl.constexpr,  # 0 or 1
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One pass over all images: a program for each image and share of its tiles."""
    wait_for_the_last(DEPENDENT)
    step = steps_ptr + (PASS * tl.num_programs(0) + tl.program_id(0)) * _FIELDS
    source_ptr += tl.load(step)
    row_stride = tl.load(step + 1).to(tl.int32)
    rows = tl.load(step + 2).to(tl.int32)
    columns = tl.load(step + 3).to(tl.int32)
    tables_ptr += tl.load(step + 5)
    taps = tl.load(step + 6).to(tl.int32)
    along_x = tl.load(step + 7) == 1
    out_ptr += tl.load(step + 8)

    pixel_stride = tl.where(along_x, 1, row_stride)  # of neighbours along the axis
    tiles_x = (columns + BLOCK_X - 1) // BLOCK_X
    tiles = (rows + BLOCK_Y - 1) // BLOCK_Y * tiles_x
    for tile in range(tl.program_id(1), tiles, tl.num_programs(1)):
        row = tile // tiles_x * BLOCK_Y + tl.arange(0, BLOCK_Y)[:, None]
        column = tile % tiles_x * BLOCK_X + tl.arange(0, BLOCK_X)[None, :]
        inside = (row < rows) & (column < columns)
        y, x = tl.minimum(row, rows - 1), tl.minimum(column, columns - 1)  # what is beside repeats the last one
        along = tl.where(along_x, x, y)
        first = tl.load(tables_ptr + along)
        weights = tables_ptr + side + along
        pixels = source_ptr + 3 * (tl.where(along_x, y * row_stride, x) + first * pixel_stride)
        red = tl.full((BLOCK_Y, BLOCK_X), _HALF, tl.int32)
        green, blue = red, red
        for _ in range(taps):
            weight = tl.load(weights)
            red += weight * tl.load(pixels).to(tl.int32)
            green += weight * tl.load(pixels + 1).to(tl.int32)
            blue += weight * tl.load(pixels + 2).to(tl.int32)
            weights += side
            pixels += 3 * pixel_stride
        result = row * columns + column
        if PASS == 1:
            tl.store(out_ptr + result, _clip8(red), mask=inside)
            tl.store(out_ptr + side * side + result, _clip8(green), mask=inside)
            tl.store(out_ptr + 2 * side * side + result, _clip8(blue), mask=inside)
        else:
            tl.store(out_ptr + 3 * result, _clip8(red), mask=inside)
            tl.store(out_ptr + 3 * result + 1, _clip8(green), mask=inside)
            tl.store(out_ptr + 3 * result + 2, _clip8(blue), mask=inside)


@triton.jit
def _clip8(total):
    """The whole part of a number in fixed point, as a byte."""
    return tl.minimum(tl.maximum(total >> _FRACTION_BITS, 0), 255).to(tl.uint8)


def resize(pixels: Tensor, steps: Tensor, tables: Tensor, scratch: int, side: int) -> Tensor:
    batch = steps.shape[1]
    out = pixels.new_empty((batch, 3, side, side))
    if batch == 0:
        return out
    between = pixels.new_empty((scratch,), dtype=torch.uint8)
    programs = min(cdiv(side, _BLOCK_Y) * cdiv(side, _BLOCK_X), _MOST_PROGRAMS)
    for number, (source, result) in enumerate(((pixels, between), (between, out))):
        launch_kernel(
            _resize_kernel,
            pixels.device,
            (batch, programs),
            source,
            steps,
            tables,
            result,
            side,
            PASS=number,
            BLOCK_Y=_BLOCK_Y,
            BLOCK_X=_BLOCK_X,
            num_warps=4,
            **dependent_launch(pixels.device),
        )
    return out
