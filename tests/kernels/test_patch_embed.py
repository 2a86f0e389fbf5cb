"""`patch_embed` against its oracle in float64."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from kernel_checks import DEVICE, DTYPES, Guards, assert_as_accurate, assert_same_bits, assert_statistics_of, poison
from torch import Tensor

from clip_fast.kernels import ops, oracles

NAN = float("nan")
IMAGE_DTYPES = (torch.uint8, *DTYPES)
CASES = [  # patch size, width, height and width of the images in pixels, batch
    pytest.param(14, 100, (28, 42), 3, id="P14-W100"),
    pytest.param(16, 128, (53, 41), 3, id="P16-W128-rest"),
    pytest.param(32, 64, (64, 96), 2, id="P32-W64"),
    pytest.param(7, 100, (15, 29), 3, id="P7-W100-rest"),
    pytest.param(10, 192, (30, 25), 1, id="P10-W192-rest"),
    pytest.param(1, 128, (3, 5), 2, id="P1-W128"),
    pytest.param(16, 100, (16, 16), 3, id="P16-W100-one-patch"),
]
MEAN, DEVIATION = (torch.tensor(x, dtype=torch.float64, device=DEVICE).view(3, 1, 1) for x in (
    (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711),
))  # those of CLIP's preprocessing  # fmt: skip


@pytest.fixture(autouse=True)
def _exact_oracle() -> Iterator[None]:
    """Turns TF32 off: cuDNN would compute the float32 oracle in it, and any kernel would be as accurate as that."""
    with torch.backends.cudnn.flags(allow_tf32=False):
        yield


def images_of(dtype: torch.dtype, batch: int, size: tuple[int, int]) -> Tensor:
    if dtype == torch.uint8:
        return torch.randint(0, 256, (batch, 3, *size), dtype=dtype, device=DEVICE)
    return torch.randn(batch, 3, *size, device=DEVICE).to(dtype)


def parameters(patch: int, width: int, tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """weight (W, K′), padded, and position (1 + G, W) in float32."""
    weight = torch.randn(width, 3 * patch**2, device=DEVICE) / (3 * patch**2) ** 0.5
    return padded(weight).to(dtype), torch.randn(tokens, width, device=DEVICE)


def padded(weight: Tensor) -> Tensor:
    return torch.nn.functional.pad(weight, (0, -weight.shape[1] % ops.PATCH_K_STEP))


def tokens_of(patch: int, size: tuple[int, int]) -> int:
    return 1 + (size[0] // patch) * (size[1] // patch)


def matmul_in_order(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a @ b with the same order of sums in every row, as on tensor cores. A BLAS's order depends on the row's place."""
    product = np.zeros((len(a), b.shape[1]), dtype=np.float32)
    for k in range(len(b)):
        product += a[:, k, None] * b[k]
    return product


def in_float64(images: Tensor, weight: Tensor, position: Tensor, patch: int) -> Tensor:
    return oracles.patch_embed(images, weight.double(), position.double(), patch)[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("image_dtype", IMAGE_DTYPES)
@pytest.mark.parametrize(("patch", "width", "size", "batch"), CASES)
def test_accuracy(
    patch: int,
    width: int,
    size: tuple[int, int],
    batch: int,
    image_dtype: torch.dtype,
    dtype: torch.dtype,
    guards: Guards,
    launches: list[str],
) -> None:
    images = guards.copy(images_of(image_dtype, batch, size))
    weight, position = (guards.copy(p) for p in parameters(patch, width, tokens_of(patch, size), dtype))
    out = ops.patch_embed(images, weight, position, patch, impl="triton")[0]
    assert launches == ["_patch_embed_kernel"]
    assert out.is_contiguous()
    plain = oracles.patch_embed(images, weight, position, patch)[0]
    assert_as_accurate(out, plain, in_float64(images, weight, position, patch))
    assert_same_bits(out[:, 0], position[0].to(dtype).expand(batch, -1))


@pytest.mark.parametrize(
    ("patch", "width", "batch", "dtype"),
    [(14, 64, 2, torch.bfloat16), (16, 64, 2, torch.float32), (32, 768, 1, torch.float16)],
)
def test_real_images(patch: int, width: int, batch: int, dtype: torch.dtype, guards: Guards) -> None:
    images = guards.copy(images_of(torch.uint8, batch, (224, 224)))
    weight, position = (guards.copy(p) for p in parameters(patch, width, tokens_of(patch, (224, 224)), dtype))
    out = ops.patch_embed(images, weight, position, patch, impl="triton")[0]
    plain = oracles.patch_embed(images, weight, position, patch)[0]
    assert_as_accurate(out, plain, in_float64(images, weight, position, patch))


@pytest.mark.parametrize("position_dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_position_of_another_dtype(position_dtype: torch.dtype, guards: Guards) -> None:
    images = images_of(torch.uint8, 2, (32, 48))
    weight, position = parameters(16, 100, 7, torch.float32)
    position = guards.copy(position.to(position_dtype))
    out = ops.patch_embed(images, weight, position, 16, impl="triton")[0]
    plain = oracles.patch_embed(images, weight, position, 16)[0]
    assert_as_accurate(out, plain, in_float64(images, weight, position, 16))


# --- layouts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("patch", "image_dtype"),
    [
        *((patch, dtype) for patch in (14, 16) for dtype in (torch.uint8, torch.float16, torch.float32)),
        (7, torch.float16),
        (32, torch.uint8),
    ],
)
def test_strides_do_not_matter(patch: int, image_dtype: torch.dtype, guards: Guards) -> None:
    size = (3 * patch, 2 * patch + 5)
    images = images_of(image_dtype, 2, size)
    weight, position = parameters(patch, 72, 7, torch.float16)
    out = ops.patch_embed(guards.copy(images), weight, position, patch, impl="triton")[0]

    nhwc = guards.copy(images.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    batch_last = guards.copy(images.permute(1, 2, 3, 0)).permute(3, 0, 1, 2)
    frame = poison(images.new_empty((4, 5, size[0] + 5, size[1] + 4)))
    frame[1::2, 1:4, 2:-3, 3:-1] = images
    crop = guards.copy(frame)[1::2, 1:4, 2:-3, 3:-1]
    for view in (nhwc, batch_last, crop):
        assert torch.equal(view, images)
        assert_same_bits(ops.patch_embed(view, weight, position, patch, impl="triton")[0], out)


def test_parameters_of_any_strides(guards: Guards) -> None:
    images = images_of(torch.uint8, 2, (28, 42))
    weight, position = parameters(14, 72, 7, torch.float16)
    out = ops.patch_embed(images, weight, position, 14, impl="triton")[0]
    gaps = [guards.copy(p, gap=24) for p in (weight, position)]
    assert_same_bits(ops.patch_embed(images, *gaps, 14, impl="triton")[0], out)
    transposed = [p.t().contiguous().t() for p in (weight, position)]
    assert_same_bits(ops.patch_embed(images, *transposed, 14, impl="triton")[0], out)


@pytest.mark.parametrize("patch", [14, 16])
def test_pixels_past_the_last_whole_patch_do_not_matter(patch: int, guards: Guards) -> None:
    images = images_of(torch.float32, 2, (2 * patch, 3 * patch))
    weight, position = parameters(patch, 72, 7, torch.float32)
    out = ops.patch_embed(images, weight, position, patch, impl="triton")[0]
    larger = torch.nn.functional.pad(images, (0, patch - 1, 0, 5), value=NAN)
    assert_same_bits(ops.patch_embed(guards.copy(larger), weight, position, patch, impl="triton")[0], out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize(("patch", "width", "image_dtype"), [(16, 192, torch.float32), (14, 100, torch.uint8)])
def test_row_statistics(
    patch: int,
    width: int,
    image_dtype: torch.dtype,
    class_token: bool,
    dtype: torch.dtype,
    guards: Guards,
    launches: list[str],
) -> None:
    """They are left beside the tokens, which may be the patches alone, and are the same without them."""
    size = (7 * patch, 5 * patch)
    images = guards.copy(images_of(image_dtype, 4, size))  # 140 rows: images cross the borders of tiles
    weight, position = (guards.copy(p) for p in parameters(patch, width, class_token + 35, dtype))
    one = {"class_token": class_token}
    out, statistics = ops.patch_embed(images, weight, position, patch, **one, statistics=True, impl="triton")
    assert launches == ["_patch_embed_kernel"]
    plain = oracles.patch_embed(images, weight, position, patch, **one)[0]
    exact = oracles.patch_embed(images, weight.double(), position.double(), patch, **one)[0]
    assert_as_accurate(out, plain, exact)
    assert_statistics_of(statistics, out)
    with_one = position if class_token else torch.cat([position[:1], position])
    alone = ops.patch_embed(images, weight, with_one, patch, impl="triton")[0]
    assert_same_bits(alone if class_token else alone[:, 1:], out)


# --- hostile pixels --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["extremes", "black", "white", "grey"])
def test_hostile_bytes(kind: str, dtype: torch.dtype, guards: Guards) -> None:
    coin = torch.randint(0, 2, (2, 3, 42, 42), dtype=torch.uint8, device=DEVICE)
    constant = {"black": 0, "grey": 127, "white": 255}
    images = guards.copy(coin * 255 if kind == "extremes" else torch.full_like(coin, constant[kind]))
    weight, position = (guards.copy(p) for p in parameters(14, 100, 10, dtype))
    out = ops.patch_embed(images, weight, position, 14, impl="triton")[0]
    plain = oracles.patch_embed(images, weight, position, 14)[0]
    assert_as_accurate(out, plain, in_float64(images, weight, position, 14))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["far from zero", "outlier channel", "constant", "tiny"])
def test_hostile_floats(kind: str, dtype: torch.dtype, guards: Guards) -> None:
    images = images_of(torch.float32, 2, (42, 42))
    if kind == "far from zero":
        images += 100
    elif kind == "outlier channel":
        images[:, 1] *= 300
    elif kind == "constant":
        images.fill_(3.3)
    else:
        images *= 1e-3
    images = guards.copy(images)
    weight, position = (guards.copy(p) for p in parameters(14, 100, 10, dtype))
    out = ops.patch_embed(images, weight, position, 14, impl="triton")[0]
    plain = oracles.patch_embed(images, weight, position, 14)[0]
    assert_as_accurate(out, plain, in_float64(images, weight, position, 14))


@pytest.mark.parametrize("patch", [14, 16])
def test_nan_stays_in_its_patch(patch: int, guards: Guards) -> None:
    """The features past 3 · P² lie in the next image, at last all NaN, and must not be multiplied by zero."""
    images = images_of(torch.float16, 3, (2 * patch, 3 * patch))
    weight, position = parameters(patch, 72, 7, torch.float16)
    clean = ops.patch_embed(images, weight, position, patch, impl="triton")[0]
    one = images.clone()
    one[1, 2, patch, 2 * patch - 1] = NAN  # patch 4
    out = ops.patch_embed(guards.copy(one), weight, position, patch, impl="triton")[0]
    assert out[1, 5].isnan().all()
    out[1, 5] = clean[1, 5]
    assert_same_bits(out, clean)

    images[1] = NAN
    out = ops.patch_embed(guards.copy(images), weight, position, patch, impl="triton")[0]
    assert out[1, 1:].isnan().all()
    assert_same_bits(out[1, 0], clean[1, 0])
    assert_same_bits(out[[0, 2]], clean[[0, 2]])


# --- promises --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("patch", "image_dtype"), [(14, torch.uint8), (16, torch.float32)])
def test_an_image_does_not_depend_on_its_batch(
    patch: int, image_dtype: torch.dtype, dtype: torch.dtype, guards: Guards, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(np, "matmul", matmul_in_order)  # the interpreter multiplies with it
    images = images_of(image_dtype, 5, (7 * patch, 7 * patch))  # 245 rows: images cross the borders of tiles
    weight, position = parameters(patch, 72, 50, dtype)
    whole = ops.patch_embed(images, weight, position, patch, impl="triton")[0]
    reversed_ = ops.patch_embed(images.flip(0), weight, position, patch, impl="triton")[0]
    assert_same_bits(reversed_.flip(0), whole)
    for i in range(5):
        alone = ops.patch_embed(images[i : i + 1].clone(), weight, position, patch, impl="triton")[0]
        assert_same_bits(alone[0], whole[i])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("patch", [14, 16, 32])
def test_normalisation_folds_into_the_weight(patch: int, dtype: torch.dtype, guards: Guards) -> None:
    images = images_of(torch.uint8, 3, (2 * patch, 3 * patch))
    images[1] //= 8  # a dark image
    features = 3 * patch**2
    weight = torch.randn(128, features, dtype=torch.float64, device=DEVICE) / features**0.5
    position = torch.randn(7, 128, dtype=torch.float64, device=DEVICE)
    normalised = (images.double() / 255 - MEAN) / DEVIATION
    exact = oracles.patch_embed(normalised, padded(weight), position, patch)[0]
    plain = oracles.patch_embed(normalised.float(), padded(weight).to(dtype), position.float(), patch)[0]

    per_channel = weight.view(128, 3, -1)
    shift = (per_channel * ((128 / 255 - MEAN) / DEVIATION).view(3, 1)).sum(dim=(1, 2))
    folded_weight = padded((per_channel / (255 * DEVIATION).view(3, 1)).flatten(1)).to(dtype)
    folded_position = torch.cat([position[:1], position[1:] + shift]).float()
    out = ops.patch_embed(images, folded_weight, folded_position, patch, impl="triton")[0]
    assert_as_accurate(out, plain, exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_images_of_no_kernels_dtype(dtype: torch.dtype, guards: Guards) -> None:
    images = images_of(torch.float32, 2, (28, 42)).double()
    weight, position = parameters(14, 72, 7, dtype)
    out = ops.patch_embed(guards.copy(images), weight, position, 14, impl="triton")[0]
    assert_same_bits(out, ops.patch_embed(images.to(dtype), weight, position, 14, impl="triton")[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_empty_batch(dtype: torch.dtype, launches: list[str]) -> None:
    weight, position = parameters(14, 72, 7, dtype)
    out = ops.patch_embed(images_of(torch.uint8, 0, (28, 42)), weight, position, 14, impl="triton")[0]
    assert out.shape == (0, 7, 72)
    assert out.dtype == dtype
    assert launches == []


def test_float64_takes_the_oracle(launches: list[str]) -> None:
    images = images_of(torch.uint8, 2, (32, 48))
    weight, position = parameters(16, 72, 7, torch.float64)
    with pytest.raises(RuntimeError, match="float64"):
        ops.patch_embed(images, weight, position, 16, impl="triton")[0]
    assert_same_bits(
        ops.patch_embed(images, weight, position, 16)[0], oracles.patch_embed(images, weight, position, 16)[0]
    )
    assert launches == []


# --- PyTorch sees through the op -------------------------------------------------------------------------------------


@pytest.mark.parametrize("image_dtype", [torch.uint8, torch.float32])
def test_opcheck(image_dtype: torch.dtype) -> None:
    images = images_of(image_dtype, 2, (28, 42))
    weight, position = parameters(14, 72, 7, torch.float32)
    for class_token, statistics in ((True, False), (True, True), (False, True)):
        arguments = images, weight, position[0 if class_token else 1 :], 14, class_token, statistics, "ieee"
        torch.library.opcheck(torch.ops.clip_fast.patch_embed.default, arguments)


class Embedding(torch.nn.Module):
    def forward(self, images: Tensor, weight: Tensor, position: Tensor) -> Tensor:
        return 2 * ops.patch_embed(images, weight, position, 14)[0]


def test_compile_and_export(launches: list[str]) -> None:
    args = (images_of(torch.uint8, 2, (28, 42)), *parameters(14, 72, 7, torch.float16))
    eager = Embedding()(*args)
    compiled = torch.compile(Embedding(), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert_same_bits(compiled(*args), eager)
        exported = torch.export.export(Embedding(), args).module()
        assert_same_bits(exported(*args), eager)
    assert launches == ["_patch_embed_kernel"] * 3
