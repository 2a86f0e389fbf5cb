"""Images that travel as they are, and are resized where the model is: workers only decode.

A batch is the pixels of all images behind each other, and the plan of their passes, see `kernels.resampling`. Where an
image's own pixels are too many, its worker resizes it, and the square travels in its place: the bits are the same.

Pillow says what is right, and its releases do not resample in one order: up to 12 along x first, from 13 on along y
first where the image loses more rows than twice its columns. `packing_for` asks the installed Pillow, and packs
nothing if that resizes otherwise.
"""

from __future__ import annotations

import math
import shutil
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFile
from torch import Tensor

from ..inputs.items import Item
from ..kernels import dispatch, ops, oracles
from ..kernels.resampling import CHANNELS, FIELDS, Plan, Source, joined, plan
from ..preprocess import Preprocess
from ..pytorch import shared_zeros
from ..towers.config import sides
from .decoder import Decoder, failure_reason

MOST_OF_IMAGE = 1 << 20  # bytes that travel as they are; 640 x 480 pixels are 0.9 MiB
MOST_OF_BATCH = 256 << 20
_THINNEST = 16  # pixels across an image that travels: a thinner one may have more weights than pixels
_HEADER = 4  # numbers before a plan's steps: images, side, scratch, and none

_SHARED = Path("/dev/shm")
_GPUS = Path("/proc/driver/nvidia/gpus")  # a folder for each


@dataclass(frozen=True)
class Packing:
    """How images are packed. `tall_first` says whether Pillow resamples tall images along y first."""

    tall_first: bool
    most_of_image: int = MOST_OF_IMAGE
    most_of_batch: int = MOST_OF_BATCH


class Rooms:
    """Shared memory that batches take turns in: its pages are there from the first turn on, which saves half a copy.

    A worker that begins a batch is asked for at most `number` − 1 batches that are not done with yet.
    """

    def __init__(self, number: int) -> None:
        self._rooms: deque[Tensor] = deque([torch.empty(0, dtype=torch.uint8)] * number)

    def room(self, size: int) -> Tensor:
        """uint8 (size or more,), with any bytes in it.

        Raises:
            RuntimeError: shared memory is full.
        """
        self._rooms.rotate(-1)
        if len(self._rooms[0]) < size:
            self._rooms[0] = shared_zeros(size)
        return self._rooms[0]


class Packed:
    """A batch of images that is being packed, `count` of them; those that have not come, or failed, are black.

    Without `rooms` it has memory of its own, which is not shared. Raises RuntimeError where shared memory is full.
    """

    def __init__(self, decoder: Decoder, packing: Packing, count: int, rooms: Rooms | None) -> None:
        self._decoder = decoder
        self._packing = packing
        self._side = side = sides(decoder.preprocess.image_size)[0]
        self._square = CHANNELS * side**2  # bytes
        self._to_come = count
        size = (1 + count) * self._square + min(count * packing.most_of_image, packing.most_of_batch)
        self._bytes = torch.empty(size, dtype=torch.uint8) if rooms is None else rooms.room(size)
        self._sources = [Source(0, side, side, (side, side), 0, 0)] * count
        self._bytes[: self._square] = 0  # what is black
        self._end = self._square

    def into(self, number: int, item: Item) -> tuple[tuple[int, int], str | None]:
        """Packs the item, and returns its size and None, or (0, 0) and the reason. Never raises."""
        try:
            with self._decoder.opened(item) as (image, size):
                rgb, source = self._to_travel(image)
                pixels = np.frombuffer(_bytes_of(rgb), np.uint8)
            self._bytes[self._end : self._end + len(pixels)].numpy()[:] = pixels
        except Exception as error:  # as in `Decoder.into`
            return (0, 0), failure_reason(error)
        finally:
            self._to_come -= 1
        self._sources[number] = source
        self._end += len(pixels)
        return size, None

    def _to_travel(self, image: Image.Image) -> tuple[Image.Image, Source]:
        """The image as it is, where it may travel, or its square; not yet decoded."""
        preprocess, side = self._decoder.preprocess, self._side
        size = CHANNELS * math.prod(image.size)
        free = len(self._bytes) - self._end - self._to_come * self._square  # which others may need
        small = size <= min(self._packing.most_of_image, free + self._square) and min(image.size) >= _THINNEST
        rgb = preprocess.unresized(image) if small else None
        if rgb is None:
            return preprocess.fit(image), Source(self._end, side, side, (side, side), 0, 0)
        geometry = preprocess.geometry(rgb.size)
        tall = self._packing.tall_first and tall_first(rgb.size, geometry.resized)
        return rgb, Source(self._end, *rgb.size, *geometry, tall)

    @property
    def pixels(self) -> Tensor:
        """All that was packed, uint8 (bytes,)."""
        return self._bytes[: self._end]

    def plan(self, *, shared: bool) -> Tensor:
        """What `squares` is told of these pixels, int64.

        Raises:
            RuntimeError: shared memory has no room.
        """
        filter = "bilinear" if self._decoder.preprocess.bilinear else "bicubic"
        numbers = _numbers(plan(self._sources, self._side, filter), self._side)
        if not shared:
            return numbers
        return shared_zeros(8 * len(numbers)).view(torch.int64).copy_(numbers)


def _bytes_of(image: Image.Image) -> bytes:
    """The pixels of an image. Pillow would copy them in blocks, and join these: one block is taken as it is."""
    image.load()
    block, ImageFile.MAXBLOCK = ImageFile.MAXBLOCK, len(image.getbands()) * math.prod(image.size)
    try:
        return image.tobytes()
    finally:
        ImageFile.MAXBLOCK = block


def _numbers(plan: Plan, side: int) -> Tensor:
    """A plan as it travels: the header, the steps, and the tables, filled up to whole numbers of 64 bits."""
    tables = np.append(plan.tables, np.zeros(len(plan.tables) % 2, np.int32))
    header = np.array([plan.steps.shape[1], side, plan.scratch, 0])
    return torch.as_tensor(np.concatenate([header, plan.steps.reshape(-1), tables.view(np.int64)]))


def joined_plans(plans: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """What `squares` is told of the pixels of several `Packed`, `sizes` bytes each, one behind the other."""
    side = header_of(plans[0])[1]
    parts: list[Plan] = []
    for numbers in plans:
        count, _, scratch = header_of(numbers)
        steps, tables = _steps_and_tables(numbers, count)
        parts.append(Plan(steps.numpy(), tables.numpy(), scratch))
    return _numbers(joined(parts, sizes, side), side)


def _steps_and_tables(plan: Tensor, count: int) -> tuple[Tensor, Tensor]:
    end = _HEADER + 2 * count * FIELDS
    return plan[_HEADER:end].view(2, count, FIELDS), plan[end:].view(torch.int32)


def squares(pixels: Tensor, plan: Tensor, header: tuple[int, int, int]) -> Tensor:
    """The resized images, uint8 (B, 3, image_size, image_size), on the device that pixels and plan are on.

    Args:
        pixels, plan: of a `Packed`.
        header: what `header_of` gives for the plan.
    """
    count, side, scratch = header
    return ops.resize(pixels, *_steps_and_tables(plan, count), scratch, side)


def header_of(plan: Tensor) -> tuple[int, int, int]:
    """A plan's numbers for the host: images, side and scratch. The plan is still in the memory of the CPU."""
    count, side, scratch, _ = (int(number) for number in plan[:_HEADER].numpy())
    return count, side, scratch


# --- whether, and how ------------------------------------------------------------------------------------------------


def packing_for(preprocess: Preprocess, device: torch.device, rooms: int, batch_size: int) -> Packing | None:
    """How images are packed for `device`; None where workers resize them.

    They do for a CPU, where the kernel does not run, where the model's images are not square, where the installed
    Pillow resizes otherwise, and where `rooms` for batches of this size would take more than half of the shared memory,
    of which each GPU may want a share.
    """
    if device.type != "cuda" or not dispatch.triton_can_run(device) or not _SHARED.exists():
        return None
    if len(set(sides(preprocess.image_size))) > 1:
        return None
    wanted = rooms * min(batch_size * MOST_OF_IMAGE, MOST_OF_BATCH)
    if 2 * wanted * _gpus() > shutil.disk_usage(_SHARED).free:
        return None
    order = tall_images_first()
    return None if order is None else Packing(order)


def _gpus() -> int:
    """This machine's GPUs: also those that this process does not see, as a worker of Ray sees its own alone."""
    listed = len(list(_GPUS.iterdir())) if _GPUS.is_dir() else 0
    return max(listed, torch.cuda.device_count())


def tall_first(size: tuple[int, int], resized: tuple[int, int]) -> bool:
    """Whether Pillow 13 resamples along y first: where more than twice as many rows as columns are lost."""
    columns, rows = (before - after for before, after in zip(size, resized, strict=True))
    return rows > 0 and rows > 2 * columns


_PROBES = (  # sizes before and after, on either side of where the order changes
    ((10, 40), (9, 20)), ((40, 10), (20, 9)), ((13, 17), (21, 30)), ((40, 40), (21, 38)), ((24, 40), (20, 32)),
    ((24, 40), (21, 32)), ((12, 30), (20, 31)), ((30, 12), (60, 5)), ((9, 9), (9, 9)),
)  # fmt: skip


@cache
def tall_images_first() -> bool | None:
    """Whether the installed Pillow resamples tall images along y first; None if it resizes in some other way."""
    noise = np.random.default_rng(0)
    asked: list[tuple[Tensor, Source, Tensor]] = []
    for (width, height), resized in _PROBES:
        pixels = noise.integers(0, 256, (height, width, CHANNELS), dtype=np.uint8)
        side = min(resized)
        by_pillow = Image.fromarray(pixels).resize(resized, Image.Resampling.BICUBIC).crop((0, 0, side, side))
        source = Source(0, width, height, resized, 0, 0)
        asked.append((torch.as_tensor(pixels).flatten(), source, torch.as_tensor(np.array(by_pillow))))

    def agrees(order: bool) -> bool:
        for pixels, source, wanted in asked:
            first = order and tall_first((source.width, source.height), source.resized)
            steps, tables, scratch = plan([source._replace(vertical_first=first)], len(wanted))
            got = oracles.resize(pixels, torch.as_tensor(steps), torch.as_tensor(tables), scratch, len(wanted))
            if not torch.equal(got[0].permute(1, 2, 0), wanted):
                return False
        return True

    return next((order for order in (True, False) if agrees(order)), None)
