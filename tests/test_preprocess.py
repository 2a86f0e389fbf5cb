"""Preprocessing against openai-clip's and open_clip's own transforms, bit for bit, and what needs no such package."""

from __future__ import annotations

import io
import pickle
import random
import re
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from clip_fast.preprocess import Preprocess
from clip_fast.towers.config import IMAGE_MEAN, IMAGE_STD

ClipTransform = Callable[[int], Any]  # image_size -> torchvision's Compose of the five steps

DATA = Path(__file__).parent / "data"
PHOTOGRAPHS = sorted(path.name for path in DATA.iterdir() if path.suffix in (".jpg", ".png"))
IMAGE_SIZES = (28, 224, 288, 336, 448)  # 28 of nothing published; the rest of the published models
MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "I", "F")
MODES_16_BIT = ("I;16", "I;16L", "I;16B", "I;16N")

# (width, height): one pixel, one row, one column; around and at 224; an even and an odd surplus to crop on either side
SIZES = [
    *((1, 1), (1, 7), (7, 1), (2, 3), (223, 225), (225, 223), (224, 224), (225, 224), (224, 225), (226, 224)),
    *((448, 224), (224, 448), (448, 448), (227, 224), (3, 1000), (1000, 3), (29, 28), (28, 31), (500, 333), (333, 500)),
]
RANDOM_SIZES = [tuple(np.random.default_rng(seed).integers(1, 700, 2).tolist()) for seed in range(12)]


@pytest.fixture(scope="module")
def clip_transform() -> ClipTransform:
    return cache(pytest.importorskip("clip", reason="openai-clip, to compare with").clip._transform)


def noise(mode: str, width: int, height: int, seed: int = 0) -> Image.Image:
    """Random pixels over the whole range of the mode: a wrong size, crop or rounding shows at almost every one."""
    rng = np.random.default_rng(seed)
    if mode in MODES_16_BIT:
        return Image.frombytes(mode, (width, height), rng.bytes(2 * width * height))
    if mode == "I":  # some below and some above what 8 bits hold
        return Image.fromarray(rng.integers(-200, 600, (height, width), dtype=np.int32))
    if mode == "F":
        return Image.fromarray(rng.uniform(-200, 600, (height, width)).astype(np.float32))
    if mode in ("P", "PA"):
        image = Image.frombytes(mode, (width, height), rng.bytes(len(mode) * width * height))
        image.putpalette(rng.bytes(768))
        return image
    bands = len(Image.new(mode, (1, 1)).getbands())
    return Image.frombytes(
        mode, (width, height), rng.bytes((width + 7) // 8 * height if mode == "1" else bands * width * height)
    )


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def reopened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def assert_as_clip(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype == torch.float32
    assert torch.equal(actual, expected), f"{int((actual != expected).sum())} of {expected.numel()} values differ"


def assert_as_clip_or_refused(
    make: Callable[[], Image.Image], clip_transform: ClipTransform, squash: bool = False
) -> None:
    """A new image for each, so that neither sees what the other loaded."""
    image, preprocess = make(), Preprocess(28, squash=squash)
    try:
        expected = clip_transform(28)(make())
    except ValueError as error:
        refusal = f"cannot make RGB pixels of an image of mode '{image.mode}', {image.width}x{image.height}: {error}"
        with pytest.raises(ValueError, match=f"^{re.escape(refusal)}$"):
            preprocess(image)
    else:
        assert_as_clip(preprocess(image), expected)


# --- Against openai-clip ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image_size", IMAGE_SIZES)
@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_photographs_are_as_in_clip(name: str, image_size: int, clip_transform: ClipTransform) -> None:
    with Image.open(DATA / name) as image:
        assert_as_clip(Preprocess(image_size)(image), clip_transform(image_size)(image))
        upright = image.transpose(Image.Transpose.ROTATE_90)
    assert_as_clip(Preprocess(image_size)(upright), clip_transform(image_size)(upright))


@pytest.mark.parametrize("image_size", [28, 224, 225])
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_sizes_are_as_in_clip(size: tuple[int, int], image_size: int, clip_transform: ClipTransform) -> None:
    image = noise("RGB", *size)
    assert_as_clip(Preprocess(image_size)(image), clip_transform(image_size)(image))


@pytest.mark.parametrize(
    ("seed", "size"),
    [pytest.param(seed, size, id=f"seed{seed}-{size[0]}x{size[1]}") for seed, size in enumerate(RANDOM_SIZES)],
)
def test_random_sizes_are_as_in_clip(seed: int, size: tuple[int, int], clip_transform: ClipTransform) -> None:
    image = noise("RGB", *size, seed)
    for image_size in IMAGE_SIZES[:2]:
        assert_as_clip(Preprocess(image_size)(image), clip_transform(image_size)(image))


def test_geometry_of_every_size_is_as_in_clip(clip_transform: ClipTransform) -> None:
    """The rounding of the long side and of the crop: a wrong one moves a pixel, and every pixel is another."""
    preprocess, transform = Preprocess(7), clip_transform(7)
    for width in range(1, 41):
        for height in range(1, 41):
            image = noise("L", width, height)
            assert torch.equal(preprocess(image), transform(image)), f"{width}x{height}"


@pytest.mark.parametrize("size", [(45, 33), (33, 45), (60, 28), (28, 28)], ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("mode", MODES + MODES_16_BIT)
def test_modes_are_as_in_clip(mode: str, size: tuple[int, int], clip_transform: ClipTransform) -> None:
    """The same tensor, or an error that names the mode where clip fails too; which modes fail is up to Pillow."""
    assert_as_clip_or_refused(lambda: noise(mode, *size), clip_transform)


@pytest.mark.filterwarnings("ignore:Palette images with Transparency:UserWarning")  # of Pillow, at either
@pytest.mark.parametrize("transparency", [3, bytes(range(256))], ids=["one index", "an alpha for each index"])
def test_transparent_palettes_are_as_in_clip(transparency: int | bytes, clip_transform: ClipTransform) -> None:
    image = reopened(encoded(noise("P", 45, 33), "PNG", transparency=transparency))
    assert image.mode == "P"
    assert "transparency" in image.info
    expected = clip_transform(28)(image.copy())
    assert_as_clip(Preprocess(28)(image), expected)


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_transparent_colour_is_as_in_clip(mode: str, clip_transform: ClipTransform) -> None:
    image = reopened(encoded(noise(mode, 45, 33), "PNG", transparency=7 if mode == "L" else (7, 8, 9)))
    assert "transparency" in image.info
    expected = clip_transform(28)(image.copy())
    assert_as_clip(Preprocess(28)(image), expected)


@pytest.mark.parametrize(
    ("format", "mode"),
    [
        *(("JPEG", "RGB"), ("JPEG", "CMYK"), ("JPEG", "L"), ("PNG", "RGBA"), ("PNG", "1"), ("PNG", "I;16")),
        *(("GIF", "P"), ("BMP", "RGB"), ("TIFF", "LAB"), ("TIFF", "F"), ("TIFF", "RGB"), ("ICO", "RGBA")),
    ],
)
def test_lazily_opened_files_are_as_in_clip(format: str, mode: str, clip_transform: ClipTransform) -> None:
    data = encoded(noise(mode, 45, 33), format)
    assert_as_clip_or_refused(lambda: reopened(data), clip_transform)


def test_an_animation_is_its_current_frame_as_in_clip(clip_transform: ClipTransform) -> None:
    frames = [noise("RGB", 45, 33, seed) for seed in range(3)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    first, second = reopened(data), reopened(data)
    second.seek(1)
    expected_second = reopened(data)
    expected_second.seek(1)
    assert_as_clip(Preprocess(28)(first), clip_transform(28)(reopened(data)))
    assert_as_clip(Preprocess(28)(second), clip_transform(28)(expected_second))
    assert not torch.equal(Preprocess(28)(first), Preprocess(28)(second))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_ignored_as_in_clip(orientation: int, clip_transform: ClipTransform) -> None:
    with Image.open(DATA / "rocket.jpg") as photograph:
        image = photograph.reduce(4)
    exif = Image.Exif()
    exif[0x0112] = orientation
    tagged = encoded(image, "JPEG", exif=exif)
    assert reopened(tagged).getexif()[0x0112] == orientation
    actual = Preprocess(28)(reopened(tagged))
    assert_as_clip(actual, clip_transform(28)(reopened(tagged)))
    assert torch.equal(actual, Preprocess(28)(reopened(encoded(image, "JPEG"))))


def test_pillow_turns_a_tiff_by_its_orientation_as_in_clip(clip_transform: ClipTransform) -> None:
    image = noise("RGB", 45, 33)
    tagged = encoded(image, "TIFF", tiffinfo={0x0112: 6})
    actual = Preprocess(28)(reopened(tagged))
    assert_as_clip(actual, clip_transform(28)(reopened(tagged)))
    assert torch.equal(actual, Preprocess(28)(image.transpose(Image.Transpose.ROTATE_270)))


def test_another_mean_and_std_are_as_in_torchvision(clip_transform: ClipTransform) -> None:
    mean, std = (0.5, 0.25, 0.1), (0.3, 0.7, 1.1)
    transform = clip_transform(28)
    normalise = type(transform.transforms[-1])(mean, std)
    image = noise("RGB", 45, 33)
    expected: Any = image
    for step in [*transform.transforms[:-1], normalise]:
        expected = step(expected)
    assert_as_clip(Preprocess(28, mean, std)(image), expected)


# --- Squashed, against open_clip and transformers --------------------------------------------------------------------


@pytest.fixture(scope="module")
def squash_transform() -> ClipTransform:
    open_clip = pytest.importorskip("open_clip", reason="open_clip, to compare with")
    return cache(lambda size: open_clip.image_transform(size, is_train=False, resize_mode="squash"))


@pytest.mark.parametrize("image_size", [28, 224, 378])
@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_squashed_photographs_are_as_in_open_clip(name: str, image_size: int, squash_transform: ClipTransform) -> None:
    preprocess = Preprocess(image_size, squash=True)
    with Image.open(DATA / name) as image:
        assert_as_clip(preprocess(image), squash_transform(image_size)(image))
        pixels = preprocess.uint8(image)
        upright = image.transpose(Image.Transpose.ROTATE_90)
        for step in squash_transform(image_size).transforms[:2]:  # to its size, to RGB
            image = step(image)
    assert_as_clip(preprocess(upright), squash_transform(image_size)(upright))
    assert torch.equal(pixels, torch.from_numpy(np.array(image)).permute(2, 0, 1))
    assert pixels.is_contiguous()


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_squashed_sizes_are_as_in_open_clip(size: tuple[int, int], squash_transform: ClipTransform) -> None:
    image = noise("RGB", *size)
    for image_size in (28, 224, 225):
        assert_as_clip(Preprocess(image_size, squash=True)(image), squash_transform(image_size)(image))


@pytest.mark.parametrize("size", [(45, 33), (28, 28)], ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("mode", MODES + MODES_16_BIT)
def test_squashed_modes_are_as_in_open_clip(mode: str, size: tuple[int, int], squash_transform: ClipTransform) -> None:
    assert_as_clip_or_refused(lambda: noise(mode, *size), squash_transform, squash=True)


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_squashed_photographs_are_as_in_transformers(name: str) -> None:
    """With its image processor that resizes by Pillow; its arithmetic after that is in another order."""
    clip = pytest.importorskip("transformers.models.clip.image_processing_pil_clip", reason="transformers 5")
    processor = clip.CLIPImageProcessorPil(size={"height": 224, "width": 224}, do_center_crop=False)
    with Image.open(DATA / name) as image:
        rgb = image.convert("RGB")
    expected = torch.as_tensor(processor(rgb, return_tensors="np")["pixel_values"][0])
    assert torch.allclose(Preprocess(224, squash=True)(rgb), expected, rtol=0, atol=1e-5)


# --- By itself -------------------------------------------------------------------------------------------------------


def test_there_are_photographs() -> None:
    assert len(PHOTOGRAPHS) >= 4
    listed = (DATA / "README.md").read_text(encoding="utf-8")
    for name in PHOTOGRAPHS:
        assert f"| `{name}` |" in listed, f"{name} has no author and licence in README.md"


def test_known_pixels() -> None:
    """An image of the wanted height is only cropped: the middle columns, 7 - 4 = 3 over, round(1.5) = 2 to the left."""
    pixels = np.arange(4 * 7 * 3, dtype=np.uint8).reshape(4, 7, 3)
    result = Preprocess(4).uint8(Image.fromarray(pixels))
    assert torch.equal(result, torch.from_numpy(pixels[:, 2:6].transpose(2, 0, 1).copy()))


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_uint8_is_the_float_tensor_before_normalising(name: str) -> None:
    preprocess = Preprocess(224)
    with Image.open(DATA / name) as image:
        pixels, normalised = preprocess.uint8(image), preprocess(image)
    for tensor, dtype in ((pixels, torch.uint8), (normalised, torch.float32)):
        assert tensor.dtype == dtype
        assert tensor.shape == (3, 224, 224)
        assert tensor.is_contiguous()
    assert pixels.float().std() > 10  # a photograph, not a blank
    mean, std = torch.tensor(IMAGE_MEAN)[:, None, None], torch.tensor(IMAGE_STD)[:, None, None]
    assert torch.equal(normalised, (pixels / 255 - mean) / std)


@pytest.mark.parametrize("image_size", [1, 28])
def test_the_result_has_memory_of_its_own(image_size: int) -> None:
    image = noise("RGB", image_size, image_size)
    before = image.tobytes()
    preprocess = Preprocess(image_size)
    expected = preprocess.uint8(image).clone()
    preprocess.uint8(image).zero_()
    preprocess(image).zero_()
    assert image.tobytes() == before
    result = preprocess.uint8(image)
    image.paste((0, 0, 0), (0, 0, image_size, image_size))
    assert torch.equal(result, expected)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA"])
def test_pixels_are_written_where_they_are_wanted(mode: str) -> None:
    image, rows = noise("RGB", 45, 33).convert(mode), torch.zeros(3, 3, 28, 28, dtype=torch.uint8)
    preprocess = Preprocess(28)
    assert preprocess.uint8(image, rows[1]).data_ptr() == rows[1].data_ptr()
    assert torch.equal(rows[1], preprocess.uint8(image))
    assert not rows[::2].any()


def test_the_default_dtype_and_device_do_not_matter() -> None:
    image = noise("RGB", 45, 33)
    expected = Preprocess(28)(image)
    dtype = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            result = Preprocess(28)(image)
    finally:
        torch.set_default_dtype(dtype)
    assert result.device.type == "cpu"
    assert_as_clip(result, expected)


def test_pickle_repr_and_equality() -> None:
    preprocess = Preprocess(28, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    squashing = Preprocess(28, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), squash=True)
    image = noise("RGB", 45, 33)
    for original in (preprocess, squashing):
        copy = pickle.loads(pickle.dumps(original))
        assert torch.equal(copy(image), original(image))
        assert copy == original != Preprocess(28)
    assert squashing != preprocess == Preprocess(28, preprocess.mean, preprocess.std, False)
    assert repr(preprocess) == "Preprocess(image_size=28, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), squash=False)"


def test_what_was_pickled_before_there_was_squashing() -> None:
    old = Preprocess(28)
    del old.__dict__["squash"]
    assert torch.equal(pickle.loads(pickle.dumps(old))(noise("RGB", 45, 33)), Preprocess(28)(noise("RGB", 45, 33)))


@pytest.mark.parametrize(
    ("image", "named"),
    [
        (np.zeros((8, 8, 3), np.uint8), "numpy.ndarray"),
        (torch.zeros(3, 8, 8), "torch.Tensor"),
        ("photograph.jpg", "builtins.str"),
        (None, "builtins.NoneType"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_pil_image_is_named(image: object, named: str) -> None:
    with pytest.raises(TypeError, match=f"image must be a PIL image, got {named}"):
        Preprocess(28)(image)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [(0, 0), (0, 5), (5, 0)])
def test_an_image_without_pixels_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"image must have pixels, got one of {size[0]}x{size[1]}"):
        Preprocess(28)(Image.new("RGB", size))


@pytest.mark.parametrize("name", ["rocket.jpg", "chelsea.png"])
def test_a_truncated_file_is_an_os_error(name: str) -> None:
    data = (DATA / name).read_bytes()
    with pytest.raises(OSError, match="truncated"):
        Preprocess(28)(reopened(data[: len(data) // 2]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "image_size must be positive, got 0"),
        ((-224,), "image_size must be positive, got -224"),
        ((28, (0.5, 0.5)), "mean must be three finite numbers, got (0.5, 0.5)"),
        ((28, (0.5, float("nan"), 0.5)), "mean must be three finite numbers, got (0.5, nan, 0.5)"),
        ((28, IMAGE_MEAN, (1.0, 0.0, 1.0)), "std must be three positive numbers, got (1.0, 0.0, 1.0)"),
        ((28, IMAGE_MEAN, (1.0, float("inf"), 1.0)), "std must be three positive numbers, got (1.0, inf, 1.0)"),
        ((28, IMAGE_MEAN, (1.0,)), "std must be three positive numbers, got (1.0,)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_arguments_that_make_no_sense(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Preprocess(*arguments)  # type: ignore[arg-type]


# --- as transformers does, and as torchvision does --------------------------------------------------------------------


TRANSPARENT = ("RGBA", "LA", "PA", "P with an index", "P with alphas", "RGB with a colour", "L with a level")
OPAQUE = ("RGB", "L", "P", "1", "CMYK", "YCbCr")


def picture(kind: str, width: int, height: int) -> Image.Image:
    image = noise(kind.partition(" ")[0], width, height, random.randrange(2**32))
    transparency = {
        "P with an index": 3,
        "P with alphas": bytes(range(256)),
        "RGB with a colour": (0, 0, 0),
        "L with a level": 9,
    }
    if kind in transparency:
        if kind.startswith(("RGB", "L")):
            image.paste(0 if kind.startswith("RGB") else 9, (0, 0, width // 2, height // 2))
        image.info["transparency"] = transparency[kind]
    return image


@pytest.mark.filterwarnings("ignore:Palette images with Transparency:UserWarning")  # of Pillow, at either
# Resized, the long side is 38, 28, and 31, which is 3 more than the result: openai-clip's crop begins a pixel later.
@pytest.mark.parametrize("size", [(45, 33), (33, 45), (28, 28), (31, 28)], ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("kind", TRANSPARENT + OPAQUE)
def test_on_white_is_as_in_transformers(kind: str, size: tuple[int, int]) -> None:
    pil = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    processor = pil.CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    image = picture(kind, *size)
    wanted = processor(images=image, return_tensors="pt")["pixel_values"][0]
    got = Preprocess(28, on_white=True)(image)
    assert float((got - wanted).abs().max()) < 1e-5
    if kind in TRANSPARENT:  # it makes a difference
        assert float((Preprocess(28)(image) - wanted).abs().max()) > 0.1


@pytest.mark.parametrize("on_white", [False, True])
@pytest.mark.parametrize("squash", [False, True])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L"])
@pytest.mark.parametrize("width", [45, 47])
def test_the_transforms_are_the_steps(width: int, mode: str, squash: bool, on_white: bool) -> None:
    transforms = pytest.importorskip("torchvision.transforms")
    preprocess = Preprocess(28, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4), squash, on_white)
    image = noise(mode, width, 33)
    assert torch.equal(transforms.Compose(preprocess.transforms)(image), preprocess(image))
    copy = pickle.loads(pickle.dumps(preprocess.transforms))
    assert torch.equal(transforms.Compose(copy)(image), preprocess(image))


def test_the_transforms_stand_where_clips_do(clip_transform: ClipTransform) -> None:
    wanted, got = clip_transform(28).transforms, Preprocess(28).transforms
    assert len(got) == len(wanted) == 5
    for place in (0, 1, 3, 4):  # the third is a function
        assert repr(got[place]) == repr(wanted[place])
    pixels = torch.rand(3, 45, 33)  # as code that optimises images takes the steps apart
    for step_got, step_wanted in zip(got[:2] + got[4:], wanted[:2] + wanted[4:], strict=True):
        assert torch.equal(step_got(pixels), step_wanted(pixels))
        pixels = step_wanted(pixels)


def test_without_torchvision_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision.transforms", None)
    with pytest.raises(ModuleNotFoundError, match=r'the extra "transforms": pip install "clip_fast\[transforms\]"'):
        Preprocess(28).transforms  # noqa: B018
