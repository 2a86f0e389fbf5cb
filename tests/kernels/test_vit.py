"""The ViT through its kernels: its launches, its accuracy, and one embedding for each image."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from statistics import geometric_mean

import pytest
import torch
from kernel_checks import DEVICE, DTYPES, ONE_INTERPRETED, Guards, assert_same_bits
from random_towers import random_tower, relative_error, worst_cosine
from torch import Tensor

from clip_fast.towers.config import IMAGE_MEAN, IMAGE_STD, SIGLIP_MEAN, SIGLIP_STD, SiglipConfig, VitConfig, sides
from clip_fast.towers.precision import BY_DTYPE
from clip_fast.towers.siglip import FastSiglip
from clip_fast.towers.vit import FastVit

# Small enough to interpret. Head sizes 64 and 80, patches of 16 and 14, both activations, tokens 17 and 10.
CONFIGS = {
    "as B/16": VitConfig(image_size=64, patch_size=16, width=128, layers=3, heads=2, embed_dim=64),
    "as H/14": VitConfig(42, 14, width=160, layers=2, heads=2, embed_dim=96, mlp_ratio=4.3637, activation="gelu"),
    "all variants": VitConfig(
        (28, 42), 14, width=144, layers=2, heads=2, embed_dim=40, mlp_ratio=2, activation="gelu",
        ln_pre=False, pool="avg", ln_after_pool=True, layer_scale=True,
    ),
}  # fmt: skip


def prepared(config: VitConfig, dtype: torch.dtype, outliers: bool = False) -> tuple[torch.nn.Module, FastVit]:
    """A plain tower whose weights are rounded to `dtype`, and its fast tower."""
    tower = random_tower(config, outliers)
    tower.load_state_dict({name: tensor.to(dtype) for name, tensor in tower.state_dict().items()})
    tower = tower.to(DEVICE)
    return tower, FastVit.prepare(tower.state_dict(), config, BY_DTYPE[dtype], IMAGE_MEAN, IMAGE_STD)


def images(config: VitConfig, batch: int) -> Tensor:
    return torch.randn(batch, 3, *sides(config.image_size), device=DEVICE)


@pytest.fixture(autouse=True)
def _no_gradients() -> object:
    with torch.inference_mode():
        yield


def test_a_block_is_five_launches(launches: list[str]) -> None:
    config = CONFIGS["as B/16"]
    _, weights = prepared(config, torch.float32)
    weights.encode(images(config, 1))
    block = ["_linear_kernel", "_flash_attention_kernel", "_linear_kernel", "_linear_kernel", "_linear_kernel"]
    pool = ["_head_linear_kernel", "_scores_kernel", "_weighted_sum_kernel", "_head_linear_kernel"]
    last = ["_linear_kernel", *pool, "_linear_kernel", "_linear_kernel", "_linear_kernel"]
    assert launches == ["_patch_embed_kernel", "_layer_norm_kernel", *block, *block, *last, "_linear_kernel"]


def test_the_launches_of_an_average(launches: list[str]) -> None:
    """No LayerNorm is a launch before the pooling, and every block is a whole one."""
    _, weights = prepared(CONFIGS["all variants"], torch.float16)
    weights.encode(images(CONFIGS["all variants"], 1))
    block = ["_linear_kernel", "_flash_attention_kernel", "_linear_kernel", "_linear_kernel", "_linear_kernel"]
    end = ["_mean_token_kernel", "_layer_norm_kernel", "_linear_kernel"]
    assert launches == ["_patch_embed_kernel", *block, *block, *end]


def test_weights_in_any_layout() -> None:
    """As a state has them whose tensors are views, assigned and not copied: every other number is another model's."""
    config = VitConfig(image_size=16, patch_size=16, width=64, layers=1, heads=1, embed_dim=32)
    tower, batch = random_tower(config).to(DEVICE), images(config, 1)
    state = {name: torch.stack([x, torch.randn_like(x)], dim=-1)[..., 0] for name, x in tower.state_dict().items()}
    fast = FastVit.prepare(state, config, BY_DTYPE[torch.float32], IMAGE_MEAN, IMAGE_STD)
    assert relative_error(fast.encode(batch), tower(batch)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype"), [*(("as B/16", dtype) for dtype in DTYPES), *(("as H/14", dtype) for dtype in ONE_INTERPRETED)]
)
def test_accuracy(name: str, dtype: torch.dtype, guards: Guards) -> None:
    got, plain, wanted = map(torch.cat, zip(*draws(CONFIGS[name], dtype, 8), strict=True))
    assert relative_error(got, wanted) <= (2.5 if dtype == torch.float32 else 1.1) * relative_error(plain, wanted)
    assert worst_cosine(got, wanted) >= 0.9999


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [dtype for dtype in ONE_INTERPRETED if dtype != torch.float32])
def test_outlier_channels(dtype: torch.dtype, guards: Guards) -> None:
    """A few roundings decide the errors, so that a tower's ratio of errors scatters by a factor of 1.7 up or down.

    The typical ratio of eight towers is within 2.5, which is four deviations of its logarithm. `tests/towers` shows
    that it is no more than 1.1 over many towers.
    """
    ratios, apart, plain_apart = [], [], []
    for got, plain, wanted in draws(CONFIGS["as B/16"], dtype, 8, outliers=True):
        ratios.append(relative_error(got, wanted) / relative_error(plain, wanted))
        apart.append(max(1 - worst_cosine(got, wanted), 1e-16))
        plain_apart.append(max(1 - worst_cosine(plain, wanted), 1e-16))
    assert geometric_mean(ratios) <= 2.5
    # One minus the cosine is proportional to the square of the error.
    assert geometric_mean(apart) <= max(1e-4, 2.5**2 * geometric_mean(plain_apart))


def draws(
    config: VitConfig, dtype: torch.dtype, towers: int, outliers: bool = False
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Embeddings of new images by new towers: by the kernels, by the plain tower in `dtype`, and by it in float64.

    A ratio of errors is random. Six images take hardly longer to interpret than two, and their ratio scatters less.
    """
    for _ in range(towers):
        tower, weights = prepared(config, dtype, outliers)
        x = images(config, 6).to(dtype)
        got, wanted = weights.encode(x), tower.double()(x.double())
        yield got, tower.to(dtype)(x), wanted


SIGLIP = SiglipConfig(56, 14, width=144, layers=2, heads=2, mlp_width=272)  # a head size of 72, as SO400M/14 has


def siglip(dtype: torch.dtype) -> tuple[torch.nn.Module, FastSiglip]:
    tower = random_tower(SIGLIP)
    tower.load_state_dict({name: tensor.to(dtype) for name, tensor in tower.state_dict().items()})
    tower = tower.to(DEVICE)
    return tower, FastSiglip.prepare(tower.state_dict(), SIGLIP, BY_DTYPE[dtype], SIGLIP_MEAN, SIGLIP_STD)


def test_the_launches_of_siglip(launches: list[str]) -> None:
    """The head's W_kᵀ q is no launch, and no LayerNorm is one."""
    _, weights = siglip(torch.float16)
    weights.encode(torch.randn(1, 3, 56, 56, device=DEVICE))
    block = ["_linear_kernel", "_flash_attention_kernel", "_linear_kernel", "_linear_kernel", "_linear_kernel"]
    head = ["_scores_kernel", "_weighted_sum_kernel", "_head_linear_kernel", *["_linear_kernel"] * 3]
    assert launches == ["_patch_embed_kernel", *block, *block, *head]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ONE_INTERPRETED)
def test_accuracy_of_siglip(dtype: torch.dtype, guards: Guards) -> None:
    results = []
    for _ in range(6):
        tower, weights = siglip(dtype)
        x = torch.randn(6, 3, 56, 56, device=DEVICE).to(dtype)
        got, wanted = weights.encode(x), tower.double()(x.double())
        results.append((got, tower.to(dtype)(x), wanted))
    got, plain, wanted = map(torch.cat, zip(*results, strict=True))
    assert relative_error(got, wanted) <= (2.5 if dtype == torch.float32 else 1.1) * relative_error(plain, wanted)
    assert worst_cosine(got, wanted) >= 0.9999


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_image_has_one_embedding_by_siglip(dtype: torch.dtype) -> None:
    _, weights = siglip(dtype)
    x = torch.randn(5, 3, 56, 56, device=DEVICE).to(dtype)
    whole = weights.encode(x)
    assert_same_bits(weights.encode(x[3:4]), whole[3:4])
    assert_same_bits(weights.encode(x[[3, 1]]), whole[[3, 1]])


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [88, 104])
@pytest.mark.parametrize("dtype", ONE_INTERPRETED)
def test_head_sizes_that_are_no_power_of_two(head_dim: int, dtype: torch.dtype, guards: Guards) -> None:
    """The head sizes are those of ViT-g/14 and ViT-bigG/14."""
    config = VitConfig(28, 14, width=head_dim, layers=2, heads=1, embed_dim=64, mlp_ratio=4.9231, activation="gelu")
    got, plain, wanted = map(torch.cat, zip(*draws(config, dtype, 8), strict=True))
    assert relative_error(got, wanted) <= (2.5 if dtype == torch.float32 else 1.1) * relative_error(plain, wanted)


def test_raw_pixels(guards: Guards) -> None:
    config = CONFIGS["as B/16"]
    tower, weights = prepared(config, torch.float32)
    raw = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, device=DEVICE)
    mean, std = (torch.tensor(x, dtype=torch.float64, device=DEVICE).view(3, 1, 1) for x in (IMAGE_MEAN, IMAGE_STD))
    assert relative_error(weights.encode(raw), tower.double()((raw.double() / 255 - mean) / std)) < 1e-5


@pytest.mark.parametrize("name", ["as B/16", "all variants"])
def test_patch_tokens_and_hidden_states(name: str, guards: Guards) -> None:
    config = CONFIGS[name]
    tower, weights = prepared(config, torch.float32)
    x = images(config, 2)
    results = [*weights.encode_tokens(x), weights.hidden_state(x, config.layers - 1)]
    tower = tower.double()
    exact = [*tower.encode_tokens(x.double()), tower.hidden_state(x.double(), config.layers - 1)]
    for got, wanted in zip(results, exact, strict=True):
        assert relative_error(got, wanted) < 1e-5


def test_an_image_has_one_embedding_by_the_variants() -> None:
    _, weights = prepared(CONFIGS["all variants"], torch.float16)
    x = images(CONFIGS["all variants"], 4).half()
    whole = weights.encode(x)
    assert_same_bits(weights.encode(x[2:3]), whole[2:3])
    assert_same_bits(weights.encode(x[[2, 1]]), whole[[2, 1]])


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("dtype", ONE_INTERPRETED)
def test_an_image_has_one_embedding(dtype: torch.dtype, raw: bool) -> None:
    """The bits are the same alone, in a batch of seven, at another position, and among copies that fill a batch up."""
    config = dataclasses.replace(CONFIGS["as B/16"], layers=2)
    _, weights = prepared(config, dtype)
    x = torch.randint(0, 256, (7, 3, 64, 64), dtype=torch.uint8, device=DEVICE) if raw else images(config, 7).to(dtype)
    whole = weights.encode(x)
    assert_same_bits(weights.encode(x[4:5]), whole[4:5])
    assert_same_bits(weights.encode(x[[4, 1]]), whole[[4, 1]])
    padded = torch.cat([x[:3], x[:1].expand(5, -1, -1, -1)])
    assert_same_bits(weights.encode(padded)[:3], whole[:3])
