"""One image to raw pixels: read, decode and resize, with a reason in words where that fails."""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from ..errors import reason_of
from ..inputs.items import Item
from ..preprocess import Preprocess
from ..pytorch import shared_zeros
from ..towers.config import sides


class _Unremarked:
    """Silences Pillow's large-image warning (twice the limit stays an error), for any number of threads.

    The warning is off while any thread is inside. With a `warnings.catch_warnings` for each thread, the last to leave
    would put back the filter that another had set.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._caught = ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._caught.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._caught.close()


UNREMARKED = _Unremarked()


@dataclass(frozen=True)
class Decoder:
    """Reads and resizes items as `preprocess` does.

    `fast` lets JPEGs decode at a reduced scale: the smallest of 1/2, 1/4 and 1/8 that has at least twice the pixels
    needed along each side. Pixels then differ a little from those of `clip`.
    """

    preprocess: Preprocess
    fast: bool = False

    def __call__(self, item: Item, pixels: Tensor) -> tuple[int, int]:
        """Writes the item's pixels, uint8 (3, height, width); its size. Raises whatever decoders raise."""
        with self.opened(item) as (image, size):
            self.preprocess.uint8(image, pixels)
            return size

    @contextmanager
    def opened(self, item: Item) -> Generator[tuple[Image.Image, tuple[int, int]], None, None]:
        """The item's image, which is yet to be decoded, and its size. Raises whatever decoders raise."""
        with UNREMARKED, item.open() as image:
            size = image.size
            self.check(size)
            if self.fast:
                height, width = sides(self.preprocess.image_size)
                image.draft(None, (2 * width, 2 * height))  # pyright: ignore[reportArgumentType]
            yield image, size

    def check(self, size: tuple[int, int]) -> None:
        """Refuses an image that resizing would make larger than Pillow opens.

        Raises:
            ValueError: says so.
        """
        limit = Image.MAX_IMAGE_PIXELS
        if limit is None or 0 in size:
            return
        resized = self.preprocess.resized(size)
        if resized[0] * resized[1] > 2 * limit:
            raise ValueError(
                f"too long and thin: {size[0]}x{size[1]} pixels, resized to {min(resized)} by {max(resized)}"
            )

    def into(self, pixels: Tensor, item: Item) -> tuple[tuple[int, int], str | None]:
        """Writes the item's pixels and returns its size and None, or (0, 0) and the reason. Never raises."""
        try:
            return self(item, pixels), None
        except Exception as error:  # decoders fed with broken files raise whatever their parsing stumbles on
            return (0, 0), failure_reason(error)

    def black(self, count: int, *, shared: bool = False) -> Tensor:
        """Black pixels of a batch, uint8 (count, 3, height, width), for `into` to write to.

        Raises:
            RuntimeError: shared memory has no room for them.
        """
        shape = (count, 3, *sides(self.preprocess.image_size))
        return shared_zeros(math.prod(shape)).view(shape) if shared else torch.zeros(shape, dtype=torch.uint8)


class Squares:
    """A batch of resized images, `pixels` uint8 (count, 3, height, width). Those that failed are black.

    Raises:
        RuntimeError: shared memory has no room for them.
    """

    def __init__(self, decoder: Decoder, count: int, *, shared: bool) -> None:
        self._decoder = decoder
        self.pixels = decoder.black(count, shared=shared)

    def into(self, number: int, item: Item) -> tuple[tuple[int, int], str | None]:
        """As `Decoder.into`, for the image of this number."""
        return self._decoder.into(self.pixels[number], item)


def failure_reason(error: Exception) -> str:
    """Why an image could not be decoded, in the same words at every run."""
    if isinstance(error, UnicodeEncodeError):
        return "bytes in the name that are not UTF-8"
    return reason_of(error)
