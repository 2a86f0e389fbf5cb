"""The ResNet through the kernels: its launches, its accuracy, and one pooled embedding for each image."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

import pytest
import torch
from kernel_checks import DEVICE, DTYPES, SLOW_IN_FLOAT32, Guards, assert_same_bits
from random_towers import random_tower, relative_error, worst_cosine
from torch import Tensor, nn

from clip_fast.towers import resnet
from clip_fast.towers.config import IMAGE_MEAN, IMAGE_STD, ResNetConfig
from clip_fast.towers.precision import BY_DTYPE

CONFIG = ResNetConfig(layers=(1, 1, 2, 1), width=8, heads=4, image_size=96, embed_dim=48)


def prepared(dtype: torch.dtype) -> tuple[nn.Module, resnet.FastResNet]:
    """A plain tower whose weights are rounded to `dtype`, and its fast tower."""
    tower = random_tower(CONFIG)
    tower.load_state_dict({name: tensor.to(dtype) for name, tensor in tower.state_dict().items()})
    tower = tower.to(DEVICE)
    return tower, resnet.FastResNet.prepare(tower.state_dict(), CONFIG, BY_DTYPE[dtype], IMAGE_MEAN, IMAGE_STD)


def images(batch: int) -> Tensor:
    return torch.randn(batch, 3, CONFIG.image_size, CONFIG.image_size, device=DEVICE)


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


def test_what_is_launched(launches: list[str]) -> None:
    """Two products in every bottleneck, one for each shortcut that changes the map, and the pool."""
    _, weights = prepared(torch.float32)
    weights.encode(images(1))
    pool = ["_head_linear_kernel", "_scores_kernel", "_weighted_sum_kernel", "_head_linear_kernel"]
    convolutions = ["_linear_kernel"] * (5 * 2 + 4)
    assert launches == [*convolutions, "_mean_token_kernel", "_linear_kernel", *pool, "_linear_kernel"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_accuracy(dtype: torch.dtype, guards: Guards) -> None:
    """In half precision the typical ratio of errors is bounded, since so small a tower has few numbers."""
    ratios = []
    for _ in range(1 if dtype == torch.float32 else 6):
        tower, weights = prepared(dtype)
        batch = images(3).to(dtype)
        got = weights.encode(batch)
        plain = tower.to(dtype)(batch)
        exact = tower.double()(batch.double())
        assert got.dtype == dtype
        assert worst_cosine(got, exact) >= 0.9999
        if dtype == torch.float32:
            assert relative_error(got, exact) <= 5e-6
        else:
            ratios.append(relative_error(got, exact) / relative_error(plain, exact))
    assert not ratios or statistics.geometric_mean(ratios) <= 1.1


@pytest.mark.parametrize("dtype", SLOW_IN_FLOAT32)
def test_an_image_has_one_pooled_embedding(dtype: torch.dtype) -> None:
    """The pool gives the same bits alone, in a batch and at any position.

    A library computes the convolutions with larger windows, and promises nothing of the kind.
    """
    _, weights = prepared(dtype)
    features = torch.randn(7, CONFIG.features, CONFIG.grid, CONFIG.grid, device=DEVICE).to(dtype)
    features = features.contiguous(memory_format=torch.channels_last)
    pooled = resnet.attention_pool(weights.pool, features)
    for i in (0, 3, 6):
        assert_same_bits(resnet.attention_pool(weights.pool, features[i : i + 1]), pooled[i : i + 1])
    order = torch.tensor([4, 2, 6, 0], device=DEVICE)
    assert_same_bits(resnet.attention_pool(weights.pool, features[order]), pooled[order])
