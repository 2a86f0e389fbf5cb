"""PIL image -> tensor (3, height, width), bit for bit what openai-clip's own transform makes of it.

That transform is torchvision's Resize(bicubic) -> CenterCrop -> RGB -> ToTensor -> Normalize. Its pixels come from
Pillow, its arithmetic from PyTorch; what is rebuilt here is the geometry: which size, which crop, in which order. With
`squash`, it is open_clip's with resize_mode "squash": Resize to the square, no crop. With a size that is not square it
is open_clip's too. With `on_white`, RGB comes first, as transformers' image processors have it.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from . import extras
from .towers.config import IMAGE_MEAN, IMAGE_STD, ImageSize, check_normalisation, sides


class Geometry(NamedTuple):
    """Sizes of one image's way to its result, which begins at (left, top) of the image of (width, height) `resized`."""

    resized: tuple[int, int]
    left: int
    top: int


@dataclass(frozen=True)
class Preprocess:
    """Turns a PIL image of any mode and shape into the input of an image tower.

    `image_size` is the side of the square result in pixels, or its height and width; `mean` and `std` are per RGB
    channel of pixels scaled to [0, 1], those of the model's training. `squash` resizes the whole image to that size,
    whatever its aspect ratio, as some models were trained; otherwise the middle is cut out. `on_white` converts to RGB
    before resizing, with what is transparent on white, and rounds the crop's corner down, as transformers does.
    `bilinear` resizes bilinearly, as for CLIPA, and not bicubically. An EXIF orientation is not applied, as `clip` does
    not; only a TIFF is turned, by Pillow itself.

    As in `clip`, the whole image is resized before that crop, so memory grows with the aspect ratio: about
    4 image_size² bytes times long side / short side.
    """

    image_size: ImageSize
    mean: tuple[float, float, float] = IMAGE_MEAN
    std: tuple[float, float, float] = IMAGE_STD
    squash: bool = False
    on_white: bool = field(default=False, repr=False)
    bilinear: bool = field(default=False, repr=False)

    def __post_init__(self) -> None:
        if min(sides(self.image_size)) < 1:
            raise ValueError(f"image_size must be positive, got {self.image_size}")
        check_normalisation(self.mean, self.std)

    def __call__(self, image: Image.Image) -> Tensor:
        """The normalised image, float32 (3, height, width), contiguous; raises what `uint8` raises."""
        return self.normalised(self.uint8(image))

    def normalised(self, pixels: Tensor) -> Tensor:
        """Pixels as `uint8` gives them, (..., 3, H, W), as `__call__` gives them: float32, of the same shape."""
        mean = torch.tensor(self.mean, dtype=torch.float32, device="cpu").view(3, 1, 1)
        std = torch.tensor(self.std, dtype=torch.float32, device="cpu").view(3, 1, 1)
        # Three roundings, as in clip: folded into one multiply and one add, the last bit would differ.
        return pixels.to(torch.float32).div_(255).sub_(mean).div_(std)

    @property
    def transforms(self) -> list[Any]:
        """The same steps as torchvision's transforms, in a new list, as `clip`'s `Compose` has them.

        Raises:
            ModuleNotFoundError: torchvision is not installed.
        """
        transforms = extras.torchvision_transforms()
        size, modes = self.image_size, transforms.InterpolationMode
        mode = modes.BILINEAR if self.bilinear else modes.BICUBIC
        if self.squash or isinstance(size, int):
            resize = transforms.Resize(sides(size) if self.squash else size, interpolation=mode)
        else:  # torchvision has no such transform
            resize = self._resize
        crop = self._crop if self.on_white else transforms.CenterCrop(size)
        geometry = [_rgb_on_white, resize, crop] if self.on_white else [resize, crop, _rgb]
        return [*geometry, transforms.ToTensor(), transforms.Normalize(self.mean, self.std)]

    def uint8(self, image: Image.Image, out: Tensor | None = None) -> Tensor:
        """The resized image in RGB, before scaling and normalising: a quarter of the bytes to move.

        Args:
            image: not changed, apart from being loaded where it was opened lazily.
            out: uint8 (3, height, width) on the CPU, to write to.

        Returns:
            `out`, or a contiguous tensor with memory of its own, uint8 (3, height, width).

        Raises:
            TypeError: `image` is not a PIL image.
            ValueError: it has no pixels, or Pillow cannot resize its mode or convert it to RGB.
            OSError: Pillow cannot read the file behind it, for example because it is truncated.
        """
        rgb = self.fit(image)
        out = torch.empty((3, rgb.height, rgb.width), dtype=torch.uint8, device="cpu") if out is None else out
        for plane, band in zip(out.numpy(), rgb.split(), strict=True):
            plane[:] = band  # Pillow takes an image apart faster than NumPy and PyTorch transpose one
        return out

    def fit(self, image: Image.Image) -> Image.Image:
        """As `uint8`, the image in mode RGB."""
        with _refused(image):
            fit = self._fit(_rgb_on_white(image) if self.on_white else image)
            return fit if fit.mode == "RGB" else _rgb(fit)

    def unresized(self, image: Image.Image) -> Image.Image | None:
        """The image in mode RGB, from whose pixels `geometry` alone leads to the result; None where there is none.

        There is one where RGB comes first, and where each band of RGB is resized as the image's own would be. It may be
        `image` itself, not yet loaded. Raises what `uint8` raises.
        """
        with _refused(image):
            if image.mode == "RGB" and not (self.on_white and _is_transparent(image)):
                return image
            if self.on_white:
                return _rgb_on_white(image)
            return _rgb(image) if image.mode == "L" else None

    def geometry(self, size: tuple[int, int]) -> Geometry:
        """Where the result lies in an image of this width and height, once that is resized."""
        resized = self.resized(size)
        return Geometry(resized, *self._corner(resized))

    def resized(self, size: tuple[int, int]) -> tuple[int, int]:
        """Width and height of an image of this width and height after it was resized, and before a crop."""
        height, width = sides(self.image_size)
        if self.squash:
            return width, height
        if height == width:  # rounded down, as torchvision does; never less than the side
            scaled_long = int(height * max(size) / min(size))
            return (width, scaled_long) if size[0] <= size[1] else (scaled_long, height)
        ratio = min(size[1] / height, size[0] / width)  # rounded to the nearest, as open_clip does
        return round(size[0] / ratio), round(size[1] / ratio)

    def _corner(self, resized: tuple[int, int]) -> tuple[int, int]:
        """Left and top of the middle of an image of this width and height."""
        height, width = sides(self.image_size)
        rounded = int if self.on_white else round  # which takes a half to the even neighbour
        return rounded((resized[0] - width) / 2), rounded((resized[1] - height) / 2)

    def _resize(self, image: Image.Image) -> Image.Image:
        filters = Image.Resampling
        return image.resize(self.resized(image.size), filters.BILINEAR if self.bilinear else filters.BICUBIC)

    def _fit(self, image: Image.Image) -> Image.Image:
        """The middle of `image` in its own mode, after it was resized to cover the result; or all, squashed.

        Before the conversion to RGB, because clip does so and the order shows: a palette is resized by nearest
        neighbour, transparent pixels do not bleed into opaque ones, 16-bit pixels are clipped to 8 bits last.
        """
        return self._crop(self._resize(image))

    def _crop(self, image: Image.Image) -> Image.Image:
        (left, top), (height, width) = self._corner(image.size), sides(self.image_size)
        return image if image.size == (width, height) else image.crop((left, top, left + width, top + height))


@contextmanager
def _refused(image: Image.Image) -> Generator[None, None, None]:
    """Refuses what is no image, or has no pixels; names the image where Pillow refuses it in the block."""
    if not isinstance(image, Image.Image):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"image must be a PIL image, got {type(image).__module__}.{type(image).__qualname__}")
    if 0 in image.size:
        raise ValueError(f"image must have pixels, got one of {image.width}x{image.height}")
    try:
        yield
    except ValueError as error:
        raise ValueError(
            f"cannot make RGB pixels of an image of mode {image.mode!r}, {image.width}x{image.height}: {error}"
        ) from error


def _rgb(image: Image.Image) -> Image.Image:
    return image.convert("RGB")


def _rgb_on_white(image: Image.Image) -> Image.Image:
    """`image` in RGB, with what is transparent on white."""
    if _is_transparent(image):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _is_transparent(image: Image.Image) -> bool:
    return "A" in image.getbands() or image.info.get("transparency") is not None
