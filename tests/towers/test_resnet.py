"""The fast ResNets, by the kernels' oracles and by the CPU's libraries, against the plain encoder in float64."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from random_towers import random_tower, relative_error, worst_cosine
from torch import Tensor, nn

import clip_fast
from clip_fast.checkpoint.published import OPENAI_MODELS
from clip_fast.towers import convolution, cpu, reference, resnet
from clip_fast.towers.config import IMAGE_MEAN, IMAGE_STD, ResNetConfig
from clip_fast.towers.precision import BY_DTYPE
from clip_fast.towers.resnet import FastResNet

SMALL = ResNetConfig(layers=(1, 2, 1, 1), width=16, heads=4, image_size=64, embed_dim=32)
# Every published width, head count and embedding, with one block in each stage.
CONFIGS = {
    name: dataclasses.replace(config, layers=(1, 1, 1, 1), image_size=96)
    for name, config in OPENAI_MODELS.items()
    if isinstance(config, ResNetConfig)
}


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(params=["libraries", "kernels' oracles", "plain"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The implementation that runs on this CPU."""
    if request.param == "kernels' oracles":
        for module in (convolution, resnet):
            monkeypatch.setattr(module, "by_kernels", lambda weight: True)
    if request.param == "plain":
        for module in (convolution, cpu):
            monkeypatch.setattr(module, "can_fuse", lambda dtype: False)
    return request.param


def skip_what_is_plain(way: str, dtype: torch.dtype) -> None:
    """Skips libraries that have nothing for `dtype`. They would compute the plain way, which is tested as such."""
    if way == "libraries" and not cpu.can_fuse(dtype):
        pytest.skip(f"no library fuses {dtype} here: this is the plain way")


def embed(tower: nn.Module, config: ResNetConfig, images: Tensor, dtype: torch.dtype) -> Tensor:
    fast = FastResNet.prepare(tower.state_dict(), config, BY_DTYPE[dtype], IMAGE_MEAN, IMAGE_STD)
    return fast.encode(images)


def check(tower: nn.Module, config: ResNetConfig, dtype: torch.dtype) -> float:
    """The ratio of the error against float64 to the plain tower's error in the same dtype.

    In float32 the error must be at most 5e-6.
    """
    images = torch.randn(2 if dtype == torch.float32 else 4, 3, config.image_size, config.image_size).to(dtype)
    tower.to(dtype)  # both read the rounded weights
    got = embed(tower, config, images, dtype)
    plain = tower(images)
    exact = tower.double()(images.double())
    assert got.dtype == dtype
    assert worst_cosine(got, exact) >= 0.9999
    assert dtype != torch.float32 or relative_error(got, exact) <= 5e-6
    return relative_error(got, exact) / relative_error(plain, exact)


@pytest.mark.parametrize("name", CONFIGS)
def test_float32(name: str, way: str) -> None:
    check(random_tower(CONFIGS[name]), CONFIGS[name], torch.float32)


@pytest.mark.parametrize("way", ["libraries", "plain"], indirect=True)  # oracles round a product before its epilogue
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype, way: str) -> None:
    """The typical ratio of errors over a few towers is bounded, since single ratios scatter by a tenth."""
    skip_what_is_plain(way, dtype)
    config = CONFIGS["RN50"]
    assert statistics.geometric_mean(check(random_tower(config), config, dtype) for _ in range(5)) <= 1.1


@pytest.mark.parametrize("image_size", [64, 65, 94, 96])
def test_float64_is_exact(image_size: int, way: str) -> None:
    """In float64 no rounding hides a mistake in the folding. Some sizes are not multiples of the stride."""
    skip_what_is_plain(way, torch.float64)
    config = dataclasses.replace(SMALL, image_size=image_size)
    tower = random_tower(config).double()
    images = torch.randn(3, 3, image_size, image_size, dtype=torch.float64)
    assert relative_error(embed(tower, config, images, torch.float64), tower(images)) < 1e-12


@pytest.mark.parametrize("in_tiles", [True, False])
@pytest.mark.parametrize("batch", [8, 16, 17, 35])
def test_more_images_than_are_computed_together(batch: int, in_tiles: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resnet, "multiplies_in_tiles", lambda dtype: in_tiles)
    tower, together = random_tower(SMALL), []
    bottleneck = resnet._bottleneck
    monkeypatch.setattr(resnet, "_bottleneck", lambda block, x: together.append(len(x)) or bottleneck(block, x))
    images = torch.randn(batch, 3, 64, 64)
    got, wanted = embed(tower, SMALL, images, torch.float32), tower.double()(images.double())
    assert max(map(relative_error, got, wanted)) < 5e-6  # of each row
    assert max(together) == min(batch, 16)
    few = 8 if in_tiles else 2
    assert sum(number <= few for number in together) >= (SMALL.layers[0] + 1) * batch // few


def with_hostile_statistics(tower: nn.Module) -> nn.Module:
    """Makes some channels vary hardly, some never, and moves some far from zero."""
    for module in tower.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_var[::5] = 1e-9
            module.running_var[1::7] = 0
            module.running_mean[::3] = 30
            module.weight[::5] *= 0.01
            module.weight[1::7] *= 0.01
    return tower


def test_statistics_far_from_those_of_a_fresh_network(way: str) -> None:
    check(with_hostile_statistics(random_tower(SMALL)), SMALL, torch.float32)


@pytest.mark.parametrize("way", ["libraries", "plain"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_statistics_far_from_those_of_a_fresh_network_in_half_precision(dtype: torch.dtype, way: str) -> None:
    """The typical ratio of many small towers is bounded, since few numbers decide each one's error."""
    skip_what_is_plain(way, dtype)
    config = dataclasses.replace(SMALL, layers=(1, 1, 1, 1), width=8)
    ratios = [check(with_hostile_statistics(random_tower(config)), config, dtype) for _ in range(80)]
    assert statistics.geometric_mean(ratios) <= 1.1


def raw_pixels(layout: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings of raw images by a new tower: ours in `dtype`, the plain tower's in `dtype`, and its in float64."""
    mean, std = (0.4, 0.5, 0.3), (0.2, 0.3, 0.25)
    raw = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    if layout == "nhwc":
        raw = raw.contiguous(memory_format=torch.channels_last)
    tower = random_tower(SMALL)
    got = FastResNet.prepare(tower.state_dict(), SMALL, BY_DTYPE[dtype], mean, std).encode(raw)
    mu, sigma = (torch.tensor(x, dtype=torch.float64).view(3, 1, 1) for x in (mean, std))
    normalised = (raw.double() / 255 - mu) / sigma
    exact = tower.double()(normalised)
    return got, tower.to(dtype)(normalised.to(dtype)), exact


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_raw_pixels_are_normalised_by_the_stem(layout: str, way: str) -> None:
    """The border is right too, where zeros are padded after normalisation, not before."""
    for dtype, limit in ((torch.float64, 1e-12), (torch.float32, 5e-6)):
        got, _, exact = raw_pixels(layout, dtype)
        assert relative_error(got, exact) <= limit


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("way", ["libraries", "plain"], indirect=True)
def test_raw_pixels_in_half_precision(layout: str, way: str) -> None:
    """The typical ratio of errors over a few towers is bounded."""
    skip_what_is_plain(way, torch.float16)
    ratios = []
    for _ in range(4):
        got, plain, exact = raw_pixels(layout, torch.float16)
        ratios.append(relative_error(got, exact) / relative_error(plain, exact))
    assert statistics.geometric_mean(ratios) <= 1.1


def test_an_image_is_left_as_it_was(way: str) -> None:
    tower = random_tower(SMALL)
    for images in (torch.randn(2, 3, 64, 64), torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)):
        kept = images.clone()
        embed(tower, SMALL, images, torch.float32)
        assert torch.equal(images, kept)


@pytest.mark.parametrize("package", ["clip.model", "open_clip.modified_resnet"])
def test_the_original_packages(package: str, way: str) -> None:
    """The packages' own towers are compared with ours."""
    model = pytest.importorskip(package)
    config = CONFIGS["RN50"]
    theirs = model.ModifiedResNet(config.layers, config.embed_dim, config.heads, config.image_size, config.width).eval()
    theirs.load_state_dict(random_tower(config).state_dict())
    images = torch.randn(2, 3, config.image_size, config.image_size)
    got = embed(theirs, config, images, torch.float32)
    own = theirs(images)
    exact = reference.build(config).double()
    exact.load_state_dict(theirs.state_dict())
    wanted = exact(images.double())
    assert relative_error(got, wanted) <= 5e-6
    assert relative_error(own, wanted) <= 5e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_no_less_accurate_than_open_clip_itself_in_half_precision(dtype: torch.dtype) -> None:
    """Compares with open_clip alone, since openai-clip computes in no half precision on a CPU."""
    model = pytest.importorskip("open_clip.modified_resnet", reason="open_clip is not installed")
    config = dataclasses.replace(SMALL, layers=(1, 1, 1, 1), width=8)
    ratios = []
    for _ in range(40):
        theirs = model.ModifiedResNet(config.layers, config.embed_dim, config.heads, config.image_size, config.width)
        theirs.load_state_dict(random_tower(config).state_dict())
        theirs.eval().to(dtype)
        images = torch.randn(4, 3, config.image_size, config.image_size).to(dtype)
        got, own = embed(theirs, config, images, dtype), theirs(images)
        exact = reference.build(config).double()
        exact.load_state_dict(theirs.state_dict())
        wanted = exact(images.double())
        ratios.append(relative_error(got, wanted) / relative_error(own, wanted))
    assert statistics.geometric_mean(ratios) <= 1.1


def test_weights_for_kernels_serve_after_a_launch_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the moment a launch fails, the oracles compute, with the weights that are there."""
    tower, images = random_tower(SMALL).half(), torch.randn(4, 3, 64, 64).half()
    with monkeypatch.context() as patched:
        patched.setattr(resnet, "by_kernels", lambda weight: True)
        fast = FastResNet.prepare(tower.state_dict(), SMALL, BY_DTYPE[torch.float16], IMAGE_MEAN, IMAGE_STD)
    got, exact = fast.encode(images), random_tower(SMALL).double()
    exact.load_state_dict(tower.state_dict())
    assert worst_cosine(got, exact(images.double())) >= 0.9999


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_an_openai_file_of_every_resnet(name: str, tmp_path: Path) -> None:
    """A file is written in OpenAI's form and read by `load`. The model encodes images of full size."""
    config = OPENAI_MODELS[name]
    tower = reference.build(config)
    torch.save({f"visual.{key}": tensor.half() for key, tensor in tower.state_dict().items()}, tmp_path / "model.pt")
    model, preprocess = clip_fast.load(tmp_path / "model.pt", "cpu")
    assert model.config == config
    image = preprocess(Image.effect_noise((700, 500), 80).convert("RGB"))[None]
    got = model.encode_image(image)
    assert got.shape == (1, config.embed_dim)
    tower.load_state_dict(model.visual.state_dict())
    assert relative_error(got, tower(image)) <= 5e-6
