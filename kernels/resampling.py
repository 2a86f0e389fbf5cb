"""How Pillow resizes, as numbers for `resize`: fixed-point weights, and the two passes that each image takes.

Pillow resamples one axis after the other. A pixel of a pass is a weighted sum of neighbours along its axis: integers of
22 fractional bits times bytes, rounded and cut to 8 bits. The weights come from a filter in float64, whose order of
operations is kept here, since the last bit of a weight shows in the pixels. So the bits are those of Pillow for x86-64;
a compiler that fuses multiply-adds, as for ARM, may round a weight differently.

    wᵢ = f((i − c + ½) / s),  c = (o + ½) n / m,  s = max(n / m, 1)    for output o of m, from n

The filters are the triangle and the cubic convolution with a = −½ (Keys 1981), widened by s where the image shrinks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Filter = Literal["bilinear", "bicubic"]

FRACTION_BITS = 22  # of a weight
FIELDS = 9  # of a step, see `plan`
CHANNELS = 3
_MOST_BYTES = 2**31 - 1  # of an image, before or between its passes: kernels count in 32 bits within one


def _triangle(x: NDArray[Any]) -> NDArray[Any]:
    return np.maximum(1.0 - x, 0.0)


def _cubic(x: NDArray[Any]) -> NDArray[Any]:
    near, far = (1.5 * x - 2.5) * x * x + 1.0, (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


_FILTERS: dict[Filter, tuple[Callable[[NDArray[Any]], NDArray[Any]], float]] = {  # of |x|, and its reach
    "bilinear": (_triangle, 1.0),
    "bicubic": (_cubic, 2.0),
}


class Source(NamedTuple):
    """An image among packed pixels, and the square that is wanted of it."""

    offset: int  # of its first byte
    width: int
    height: int
    resized: tuple[int, int]  # width and height of all of it after resizing
    left: int  # the square's first column and row in that
    top: int
    vertical_first: bool = False


class Plan(NamedTuple):
    """All that `resize` is told of a batch: `steps` int64 (2, B, FIELDS), `tables` int32, `scratch` in bytes."""

    steps: NDArray[Any]
    tables: NDArray[Any]
    scratch: int


class Axis(NamedTuple):
    """The weights along an axis, for the outputs that are kept. They need the inputs from `begin` to before `end`.

    `table` is int32: for each output its first input, counted from `begin`, then `taps` rows of weights.
    """

    begin: int
    end: int
    taps: int
    table: NDArray[Any]

    @property
    def length(self) -> int:
        return self.end - self.begin


@lru_cache(maxsize=1024)
def axis(length: int, resized: int, start: int, side: int, filter: Filter) -> Axis:
    """The weights of `side` outputs from `start` on, where `length` pixels become `resized`."""
    function, reach = _FILTERS[filter]
    scale = length / resized
    stretch = max(scale, 1.0)
    centre = (np.arange(start, start + side) + 0.5) * scale
    first = np.maximum((centre - reach * stretch + 0.5).astype(np.int64), 0)
    end = np.minimum((centre + reach * stretch + 0.5).astype(np.int64), length)
    taps = int((end - first).max())
    begin, far = int(first[0]), int(end[-1])
    start_of = np.minimum(first, far - taps)  # so that no tap is past the last pixel that is needed
    place = start_of + np.arange(taps)[:, None]
    weights = np.where(
        (place >= first) & (place < end), function(np.abs((place - centre + 0.5) * (1.0 / stretch))), 0.0
    )
    total = np.zeros(side)
    for row in weights:  # in this order
        total += row
    weights /= np.where(total == 0.0, 1.0, total)
    fixed = (weights * (1 << FRACTION_BITS) + np.copysign(0.5, weights)).astype(np.int64)  # cut towards zero
    table = np.concatenate([(start_of - begin)[None], fixed]).astype(np.int32).reshape(-1)
    table.flags.writeable = False
    return Axis(begin, far, taps, table)


def plan(sources: Sequence[Source], side: int, filter: Filter = "bicubic") -> Plan:
    """The two passes of each image. Only pixels that the square needs are read and computed.

    A step, a row of `steps`, is one pass of one image:

        0  offset of the first byte that is needed, among the packed pixels or in the memory between the passes
        1  pixels from one row to the next
        2  rows, and
        3  columns of the pass's result
        4  pixels along its axis that are needed
        5  place of its table, an `Axis.table`
        6  taps
        7  1 where the axis is x, 0 where it is y
        8  offset of the result, in the memory between or among the squares

    Raises:
        ValueError: an image has no pixels or too many, or the square is not within the resized image.
    """
    steps = np.empty((2, len(sources), FIELDS), np.int64)
    tables: list[NDArray[Any]] = []
    places: dict[int, int] = {}  # of tables, by identity: the cache gives equal axes one table
    scratch = size = 0
    for i, source in enumerate(sources):
        _check(source, side)
        x = axis(source.width, source.resized[0], source.left, side, filter)
        y = axis(source.height, source.resized[1], source.top, side, filter)
        for each in (x, y):
            if id(each.table) not in places:
                places[id(each.table)] = size
                tables.append(each.table)
                size += len(each.table)
        offset = source.offset + CHANNELS * (y.begin * source.width + x.begin)
        first, second = (y, x) if source.vertical_first else (x, y)
        rows, columns = (side, x.length) if source.vertical_first else (y.length, side)
        steps[0, i] = (
            offset, source.width, rows, columns, first.length, places[id(first.table)], first.taps,
            not source.vertical_first, scratch,
        )  # fmt: skip
        steps[1, i] = (
            scratch, columns, side, side, second.length, places[id(second.table)], second.taps, source.vertical_first,
            i * CHANNELS * side**2,
        )  # fmt: skip
        scratch += CHANNELS * rows * columns
    return Plan(steps, np.concatenate(tables) if tables else np.empty(0, np.int32), scratch)


def joined(plans: Sequence[Plan], sizes: Sequence[int], side: int) -> Plan:
    """The plan of the batches of some plans as one batch, whose packed pixels, `sizes` bytes each, are joined, too."""
    steps: list[NDArray[Any]] = []
    pixels = table = scratch = images = 0
    for plan, size in zip(plans, sizes, strict=True):
        moved = plan.steps.copy()
        moved[0, :, 0] += pixels
        moved[:, :, 5] += table
        moved[0, :, 8] += scratch
        moved[1, :, 0] += scratch
        moved[1, :, 8] += images * CHANNELS * side**2
        steps.append(moved)
        pixels += size
        table += len(plan.tables)
        scratch += plan.scratch
        images += moved.shape[1]
    return Plan(np.concatenate(steps, axis=1), np.concatenate([plan.tables for plan in plans]), scratch)


def _check(source: Source, side: int) -> None:
    if min(source.width, source.height, *source.resized, side) < 1:
        raise ValueError(
            f"images and squares must have pixels, got {source.width}x{source.height} to "
            f"{source.resized[0]}x{source.resized[1]} and a side of {side}"
        )
    most = max(source.width * source.height, side * max(source.width, source.height))  # before and between the passes
    if CHANNELS * most > _MOST_BYTES:
        raise ValueError(f"an image of {source.width}x{source.height} pixels is too large to resize")
    corner = (source.left, source.top)
    if min(corner) < 0 or any(at + side > size for at, size in zip(corner, source.resized, strict=True)):
        raise ValueError(f"a square of {side} at {corner} is not within {source.resized[0]}x{source.resized[1]} pixels")
