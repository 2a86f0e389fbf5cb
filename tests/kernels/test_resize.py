"""`resize` against Pillow: every byte equal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kernel_checks import DEVICE, Guards, assert_same_bits
from PIL import Image
from torch import Tensor

from clip_fast.kernels import ops
from clip_fast.kernels.dispatch import Impl
from clip_fast.kernels.resampling import Filter, Plan, Source, joined, plan

DATA = Path(__file__).parents[1] / "data"
PHOTOGRAPHS = sorted(path for path in DATA.iterdir() if path.suffix in (".jpg", ".png"))
FILTERS: dict[Filter, Image.Resampling] = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The oracle makes many small steps, between which threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def noise(width: int, height: int) -> Image.Image:
    """Bytes at random, of which half are the darkest and the brightest: a bicubic result leaves 8 bits at many."""
    pixels = torch.randint(-128, 384, (height, width, 3)).clamp(0, 255).to(torch.uint8)
    return Image.fromarray(pixels.numpy())


def shortest_side(image: Image.Image, side: int, vertical_first: bool = False) -> Source:
    """CLIP's geometry."""
    long = side * max(image.size) // min(image.size)
    size = (side, long) if image.width <= image.height else (long, side)
    return Source(0, *image.size, size, (size[0] - side) // 2, (size[1] - side) // 2, vertical_first)


def squashed(image: Image.Image, side: int, vertical_first: bool = False) -> Source:
    """SigLIP's geometry."""
    return Source(0, *image.size, (side, side), 0, 0, vertical_first)


def by_pillow(image: Image.Image, source: Source, side: int, filter: Filter) -> Tensor:
    """The square, (3, side, side). Pillow is asked for one axis after the other, in the order that is wanted."""
    width, height = source.resized
    between = (image.width, height) if source.vertical_first else (width, image.height)
    resized = image.resize(between, FILTERS[filter]).resize((width, height), FILTERS[filter])
    square = resized.crop((source.left, source.top, source.left + side, source.top + side))
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).to(DEVICE)


def packed(images: Sequence[Image.Image], sources: Sequence[Source]) -> tuple[Tensor, list[Source]]:
    """The pixels of all behind each other, and where each begins."""
    parts = [torch.from_numpy(np.array(image)).flatten() for image in images]
    ends = np.cumsum([len(part) for part in parts])
    each = zip(sources, ends, parts, strict=True)
    placed = [source._replace(offset=int(end) - len(part)) for source, end, part in each]
    return torch.cat(parts).to(DEVICE), placed


def tensors(made: Plan) -> tuple[Tensor, Tensor, int]:
    return torch.from_numpy(made.steps).to(DEVICE), torch.from_numpy(made.tables).to(DEVICE), made.scratch


def resized(
    guards: Guards,
    images: Sequence[Image.Image],
    sources: Sequence[Source],
    side: int,
    filter: Filter = "bicubic",
    impl: Impl = "triton",
) -> Tensor:
    pixels, placed = packed(images, sources)
    steps, tables, scratch = tensors(plan(placed, side, filter))
    return ops.resize(*map(guards.copy, (pixels, steps, tables)), scratch, side, impl=impl)


def assert_as_pillow(
    guards: Guards,
    images: Sequence[Image.Image],
    sources: Sequence[Source],
    side: int,
    filter: Filter = "bicubic",
    impls: Sequence[Impl] = ("triton", "reference"),
) -> None:
    wanted = torch.stack([by_pillow(*each, side, filter) for each in zip(images, sources, strict=True)])
    for impl in impls:
        got = resized(guards, images, sources, side, filter, impl)
        assert got.is_contiguous()
        assert_same_bits(got, wanted)


def photograph(path: Path) -> Image.Image:
    with Image.open(path) as file:
        return file.convert("RGB")


# --- against Pillow --------------------------------------------------------------------------------------------------

# (width, height): one pixel, one row, one column; around and at the side of 20; strongly anisotropic; ragged tiles
SIZES = [
    *((1, 1), (1, 9), (9, 1), (19, 21), (20, 20), (20, 40), (33, 17), (3, 90), (90, 3), (1, 100), (100, 1), (65, 34)),
]


@pytest.mark.parametrize("vertical_first", [False, True], ids=["x first", "y first"])
@pytest.mark.parametrize("geometry", [shortest_side, squashed])
@pytest.mark.parametrize("filter", FILTERS)
def test_oracle(filter: Filter, geometry: Any, vertical_first: bool, guards: Guards) -> None:
    models = [noise(320, 240), *map(photograph, PHOTOGRAPHS if (filter, vertical_first) == ("bicubic", False) else ())]
    for side, images in ((20, [noise(*size) for size in SIZES]), (224, models)):
        sources = [geometry(image, side, vertical_first) for image in images]
        assert_as_pillow(guards, images, sources, side, filter, ["reference"])


@pytest.mark.parametrize(
    ("filter", "geometry", "vertical_first"),
    [("bicubic", shortest_side, False), ("bicubic", squashed, True), ("bilinear", squashed, False)],
)
def test_noise_of_all_kinds_of_sizes(filter: Filter, geometry: Any, vertical_first: bool, guards: Guards) -> None:
    images = [noise(*size) for size in SIZES[:: 1 if geometry is shortest_side else 3]]
    assert_as_pillow(guards, images, [geometry(image, 20, vertical_first) for image in images], 20, filter)


def test_small_photographs(guards: Guards) -> None:
    images = [photograph(path).reduce(16) for path in PHOTOGRAPHS]
    assert_as_pillow(guards, images, [shortest_side(image, 24) for image in images], 24)


@pytest.mark.slow
@pytest.mark.parametrize("geometry", [shortest_side, squashed])
def test_a_photograph_at_the_size_of_models(geometry: Any, guards: Guards) -> None:
    image = photograph(PHOTOGRAPHS[0])
    assert_as_pillow(guards, [image], [geometry(image, 224)], 224)


@pytest.mark.parametrize("order", [False, True], ids=["x first", "y first"])
def test_random_squares_of_random_sizes(order: bool, guards: Guards) -> None:
    """Any resized size, and a square anywhere in it: the oracle with many, the kernel with the first."""
    images, sources = [], []
    for width, height, wide, high, left, top in np.random.default_rng(torch.seed()).integers(0, 50, (200, 6)):
        images.append(noise(1 + int(width), 1 + int(height)))
        size = 9 + int(wide), 9 + int(high)
        sources.append(Source(0, *images[-1].size, size, int(left) % (size[0] - 8), int(top) % (size[1] - 8), order))
    assert_as_pillow(guards, images, sources, 9, impls=["reference"])
    assert_as_pillow(guards, images[:4], sources[:4], 9)


# --- what is computed, and from what ---------------------------------------------------------------------------------


def test_an_image_does_not_depend_on_its_batch(guards: Guards) -> None:
    images = [noise(*size) for size in ((12, 20), (40, 2), (5, 5))]
    sources = [shortest_side(image, 8, number == 1) for number, image in enumerate(images)]
    whole = resized(guards, images, sources, 8)
    assert_same_bits(resized(guards, images[::-1], sources[::-1], 8), whole.flip(0))
    for number, (image, source) in enumerate(zip(images, sources, strict=True)):
        assert_same_bits(resized(guards, [image], [source], 8)[0], whole[number])


def test_only_what_the_square_needs_is_computed() -> None:
    """Of an image 1000 times as high as wide, a few rows: the others are neither read nor kept between the passes."""
    made = plan([Source(0, 10, 10_000, (20, 20_000), 0, 9_990)], 20)
    first, second = made.steps[:, 0]
    assert first[2] == second[4] < 20
    assert made.scratch == 3 * 20 * first[2]
    assert first[0] == 3 * 10 * (10_000 - first[2]) // 2


def test_equal_sizes_share_their_tables() -> None:
    one, many = plan([Source(0, 64, 48, (20, 20), 0, 0)], 20), plan([Source(9, 64, 48, (20, 20), 0, 0)] * 7, 20)
    np.testing.assert_array_equal(one.tables, many.tables)
    assert many.steps.shape == (2, 7, 9)


def test_a_joined_plan_is_that_of_its_batches(guards: Guards) -> None:
    images = [noise(*size) for size in ((12, 20), (40, 2), (5, 5), (9, 30), (33, 17))]
    sources = [shortest_side(image, 8, number == 1) for number, image in enumerate(images)]
    wanted = resized(guards, images, sources, 8)
    batches = [slice(0, 2), slice(2, 2), slice(2, 3), slice(3, 5)]
    parts = [packed(images[batch], sources[batch]) if images[batch] else (torch.empty(0), []) for batch in batches]
    whole = torch.cat([pixels.to(DEVICE, torch.uint8) for pixels, _ in parts])
    made = joined([plan(placed, 8) for _, placed in parts], [len(pixels) for pixels, _ in parts], 8)
    steps, tables, scratch = tensors(made)
    for impl in ("triton", "reference"):
        assert_same_bits(ops.resize(*map(guards.copy, (whole, steps, tables)), scratch, 8, impl=impl), wanted)  # type: ignore[arg-type]


def test_launches(guards: Guards, launches: list[str]) -> None:
    resized(guards, [noise(9, 7)], [squashed(noise(9, 7), 4)], 4)
    assert launches == ["_resize_kernel", "_resize_kernel"]


def test_no_images(guards: Guards, launches: list[str]) -> None:
    steps, tables, scratch = tensors(plan([], 8))
    for impl in ("triton", "reference"):
        got = ops.resize(torch.empty(0, dtype=torch.uint8, device=DEVICE), steps, tables, scratch, 8, impl=impl)  # type: ignore[arg-type]
        assert got.shape == (0, 3, 8, 8)
    assert not launches


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (Source(0, 0, 5, (8, 8), 0, 0), "must have pixels, got 0x5 to 8x8 and a side of 8"),
        (Source(0, 5, 5, (8, 0), 0, 0), "must have pixels, got 5x5 to 8x0"),
        (Source(0, 5, 5, (9, 8), 2, 0), r"a square of 8 at \(2, 0\) is not within 9x8 pixels"),
        (Source(0, 5, 5, (9, 8), -1, 0), r"a square of 8 at \(-1, 0\) is not within"),
        (Source(0, 40_000, 40_000, (8, 8), 0, 0), "an image of 40000x40000 pixels is too large to resize"),
        (Source(0, 1, 100_000_000, (8, 8), 0, 0), "an image of 1x100000000 pixels is too large to resize"),
    ],
)
def test_impossible_plans_are_refused(source: Source, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan([source], 8)
