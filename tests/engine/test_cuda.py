"""Whole encoders on a GPU, with compiled kernels and graphs, against the plain tower in float64 on the same GPU.

Without a GPU a small encoder goes through the same checks under Triton's interpreter, so that no check breaks for the
first time on a GPU.
"""

from __future__ import annotations

import copy
import dataclasses
import statistics
from collections.abc import Callable

import pytest
import torch
from kernel_checks import assert_same_bits
from random_towers import random_tower, relative_error, worst_cosine
from torch import Tensor

from bench.models import PUBLISHED
from bench.timing import DTYPES, products_in
from clip_fast.encoder import ImageEncoder
from clip_fast.kernels import ops
from clip_fast.kernels.dispatch import triton_can_run
from clip_fast.towers.config import Config, ResNetConfig, VitConfig

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CUDA = torch.device("cuda")
PRECISIONS = ("fp32", "tf32", "fp16", "bf16")

VITS = ("ViT-B/32", "ViT-B/16", "ViT-L/14", "ViT-L/14@336px", "ViT-H-14", "ViT-g-14", "ViT-bigG-14")
RESNETS = ("RN50", "RN101", "RN50x4", "RN50x16", "RN50x64")


@pytest.fixture(autouse=True)
def _no_gradients() -> object:
    with torch.inference_mode():
        yield


def encoder(
    tower: torch.nn.Module, config: Config, precision: str, device: torch.device, cuda_graphs: bool = True
) -> ImageEncoder:
    """Our encoder with the weights of `tower`."""
    assert triton_can_run(device)
    state, dtype = tower.state_dict(), DTYPES[precision]
    return ImageEncoder(config, state, device, dtype, precision=precision, cuda_graphs=cuda_graphs)  # type: ignore[arg-type]


def errors(
    config: Config, precision: str, device: torch.device, batch: int, outliers: bool = False
) -> tuple[float, float, float]:
    """For a random tower: the encoder's error against float64, the plain tower's, and the encoder's lowest cosine.

    The plain tower runs in PyTorch in the encoder's own dtype. For "tf32" it runs in fp16, whose operands have as many
    bits.
    """
    dtype = DTYPES[precision]
    tower = random_tower(config, outliers).to(device, dtype).eval()  # all read the rounded weights
    images = torch.randn(batch, 3, config.image_size, config.image_size, device=device).to(dtype)
    got = encoder(tower, config, precision, device).encode_image(images)
    assert got.dtype == dtype
    exact = copy.deepcopy(tower).double()(images.double())
    with products_in("fp32"):
        same = torch.float16 if precision == "tf32" else dtype
        plain = tower.to(same)(images.to(same))
    return relative_error(got, exact), relative_error(plain, exact), worst_cosine(got, exact)


def check_vit(config: VitConfig, precision: str, device: torch.device, towers: int = 3, batch: int = 16) -> None:
    """The typical error of a few towers is at most twice the plain tower's in float32, 1.1 times in half precisions."""
    found = [errors(config, precision, device, batch) for _ in range(towers)]
    limit = {"fp32": 2.0, "tf32": 1.0, "fp16": 1.1, "bf16": 1.1}[precision]
    assert statistics.geometric_mean(error / plain for error, plain, _ in found) <= limit
    assert min(cosine for *_, cosine in found) >= 0.9999


def check_resnet(config: ResNetConfig, precision: str, device: torch.device, towers: int = 3, batch: int = 8) -> None:
    found = [errors(config, precision, device, batch) for _ in range(towers)]
    if precision == "fp32":
        assert max(error for error, *_ in found) <= 5e-6
    else:
        limit = 1.0 if precision == "tf32" else 1.1
        assert statistics.geometric_mean(error / plain for error, plain, _ in found) <= limit
    assert min(cosine for *_, cosine in found) >= 0.9999


def check_one_row_one_result(
    config: VitConfig, precision: str, device: torch.device, raw: bool, others: int = 60
) -> None:
    """An image's embedding has the same bits alone, among others, at another place, replayed and launched."""
    tower = random_tower(config)
    model, launched = (encoder(tower, config, precision, device, graphs) for graphs in (True, False))
    images = _images(7, config, DTYPES[precision], device, raw)
    alone = torch.cat([model.encode_image(image[None]) for image in images])
    order = [3, 6, 0, 5, 1, 2, 4]
    many = torch.cat([_images(others, config, DTYPES[precision], device, raw), images])
    ways: dict[str, Callable[[], Tensor]] = {
        "in a batch of 7": lambda: model.encode_image(images),
        "at other places": lambda: model.encode_image(images[order])[torch.tensor(order, device=device).argsort()],
        "in a bucket that is full": lambda: model.encode_image(images[[0, 1, 2, 3, 4, 5, 6, 0]])[:7],
        "in a large batch": lambda: model.encode_image(many)[others:],
        "launched alone": lambda: torch.cat([launched.encode_image(image[None]) for image in images]),
        "launched in a batch of 7": lambda: launched.encode_image(images),
        "launched in a large batch": lambda: launched.encode_image(many)[others:],
    }
    for encode in ways.values():
        assert_same_bits(encode(), alone)


def check_every_run_is_the_same(
    config: VitConfig, precision: str, device: torch.device, runs: int = 100, large: int = 70
) -> None:
    """Other batches run between the runs. Batches of 5 are padded with rows of these."""
    model = encoder(random_tower(config), config, precision, device)
    batches = {batch: _images(batch, config, DTYPES[precision], device, raw=False) for batch in (5, large)}
    first = {batch: model.encode_image(images).clone() for batch, images in batches.items()}
    for _ in range(runs):
        model.encode_image(_images(8, config, DTYPES[precision], device, raw=False))
        for batch, images in batches.items():
            assert_same_bits(model.encode_image(images), first[batch])


def _images(batch: int, config: VitConfig, dtype: torch.dtype, device: torch.device, raw: bool) -> Tensor:
    shape = (batch, 3, config.image_size, config.image_size)
    if raw:
        return torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    return torch.randn(shape, device=device).to(dtype)


# --- on a GPU --------------------------------------------------------------------------------------------------------


def published(name: str, layers: int | None = None) -> VitConfig:
    config = PUBLISHED[name]
    assert isinstance(config, VitConfig)
    return config if layers is None else dataclasses.replace(config, layers=layers)


@needs_gpu
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", VITS)
def test_vit(name: str, precision: str) -> None:
    wide = PUBLISHED[name].width >= 1280
    check_vit(published(name, layers=4 if wide else None), precision, CUDA)


@needs_gpu
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", RESNETS)
def test_resnet(name: str, precision: str) -> None:
    config = PUBLISHED[name]
    assert isinstance(config, ResNetConfig)
    check_resnet(config, precision, CUDA)


@needs_gpu
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_outlier_channels(precision: str) -> None:
    """A few channels of the residual stream reach several hundred, as in trained networks.

    Many towers are drawn, since few numbers decide each one's error.
    """
    config = VitConfig(image_size=32, patch_size=16, width=128, layers=2, heads=2, embed_dim=64)
    found = [errors(config, precision, CUDA, 4, outliers=True) for _ in range(300)]
    assert statistics.geometric_mean(error / plain for error, plain, _ in found) <= 1.1


@needs_gpu
@pytest.mark.parametrize("raw", [False, True], ids=["floats", "raw pixels"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["ViT-B/32", "ViT-L/14@336px", "ViT-H-14"])
def test_one_row_one_result(name: str, precision: str, raw: bool) -> None:
    check_one_row_one_result(published(name, layers=4), precision, CUDA, raw)


@needs_gpu
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["ViT-B/32", "ViT-L/14"])
def test_every_run_is_the_same(name: str, precision: str) -> None:
    check_every_run_is_the_same(published(name), precision, CUDA)


@needs_gpu
def test_more_elements_than_an_int32_counts() -> None:
    """The residual and the result have 8 GiB each. The last rows have the same bits as when computed alone."""
    m, n, k = 2**20 + 1, 4096, 64
    if torch.cuda.get_device_properties(CUDA).total_memory < 24 * 2**30:
        pytest.skip("needs 24 GiB of GPU memory")
    x, weight = torch.randn(m, k, device=CUDA).half(), torch.randn(n, k, device=CUDA).half() / 8
    residual = torch.zeros(m, n, dtype=torch.float16, device=CUDA)
    residual[-300:].normal_()
    y, statistics_ = ops.linear(x, weight, residual=residual, statistics=True, impl="triton")
    assert y.numel() > 2**32
    alone, alone_statistics = ops.linear(x[-300:], weight, residual=residual[-300:], statistics=True, impl="triton")
    assert_same_bits(y[-300:], alone)
    assert_same_bits(statistics_[-300:], alone_statistics)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("name", ["ViT-B/32", "RN50"])
def test_the_current_device_does_not_matter(name: str) -> None:
    """Graphs, launches of small and large batches, and single ops run on another device than the current one."""
    config = published(name)
    tower = random_tower(config).half()
    first, second = (encoder(tower, config, "fp16", torch.device("cuda", i)) for i in range(2))
    for batch in (1, 3, 100):
        images = torch.randn(batch, 3, config.image_size, config.image_size, dtype=torch.float16)
        wanted = first.encode_image(images.to("cuda:0"))
        got = second.encode_image(images.to("cuda:1"))
        assert got.device == torch.device("cuda", 1)
        assert relative_error(got.cpu(), wanted.cpu()) < 1e-3
    x, weight = torch.randn(5, 64, device="cuda:1"), torch.randn(64, 64, device="cuda:1")
    for impl in ("auto", "triton"):
        assert relative_error(ops.linear(x, weight, None, impl=impl)[0], x.double() @ weight.double().T) < 1e-5
    assert torch.cuda.current_device() == 0


# --- interpreted -----------------------------------------------------------------------------------------------------

CPU = torch.device("cpu")
TINY_VIT = VitConfig(image_size=32, patch_size=16, width=64, layers=2, heads=1, embed_dim=32)
TINY_RESNET = ResNetConfig(layers=(1, 1, 1, 1), width=8, heads=4, image_size=64, embed_dim=32)
CHECKS: dict[str, Callable[[], None]] = {
    "vit": lambda: check_vit(TINY_VIT, "fp32", CPU, towers=2, batch=2),
    "resnet": lambda: check_resnet(TINY_RESNET, "fp32", CPU, towers=1, batch=2),
    "one row, floats": lambda: check_one_row_one_result(TINY_VIT, "fp16", CPU, raw=False, others=2),
    "one row, raw pixels": lambda: check_one_row_one_result(TINY_VIT, "bf16", CPU, raw=True, others=2),
    "every run": lambda: check_every_run_is_the_same(TINY_VIT, "fp32", CPU, runs=1, large=6),
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU goes through them")
@pytest.mark.parametrize(
    "check", [pytest.param(name, marks=pytest.mark.slow) if name.startswith("one row") else name for name in CHECKS]
)
def test_cuda_checks_interpreted(check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    CHECKS[check]()
