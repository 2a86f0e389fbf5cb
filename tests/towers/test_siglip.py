"""The fast SigLIP towers, by the kernels' oracles and on a CPU, against the plain tower in float64."""

from __future__ import annotations

import dataclasses
import statistics
from typing import Any

import pytest
import torch
from random_towers import assert_as_exact, random_tower, relative_error, worst_cosine
from torch import Tensor

from clip_fast.kernels import oracles as kernel_oracles
from clip_fast.towers import reference
from clip_fast.towers.config import SIGLIP_MEAN, SIGLIP_STD, SiglipConfig
from clip_fast.towers.families import for_image_size
from clip_fast.towers.precision import BY_DTYPE
from clip_fast.towers.siglip import FastSiglip
from clip_fast.towers.siglip_cpu import CpuSiglip

# Pixels past the last whole patch, a head size of 72, and an MLP whose width is 16 times an odd number.
SMALL = SiglipConfig(70, 16, width=144, layers=3, heads=2, mlp_width=272)
# Published widths, heads and MLPs; few layers, and few patches where the tower is wide.
CONFIGS = {
    "B/16": SiglipConfig(112, 16, width=768, layers=2, heads=12, mlp_width=3072),
    "SO400M/14": SiglipConfig(70, 14, width=1152, layers=2, heads=16, mlp_width=4304),
}
TOWERS = [FastSiglip, CpuSiglip]


@pytest.fixture(autouse=True)
def _no_gradients() -> object:
    with torch.inference_mode():
        yield


def prepared(kind: Any, state: Any, config: SiglipConfig, dtype: torch.dtype) -> Any:
    return kind.prepare(state, config, BY_DTYPE[dtype], SIGLIP_MEAN, SIGLIP_STD)


@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu"])
@pytest.mark.parametrize("kind", TOWERS)
def test_float64_is_exact(kind: Any, activation: Any) -> None:
    """In float64 no rounding hides a mistake in the folding."""
    config = dataclasses.replace(SMALL, activation=activation)
    tower = random_tower(config).double()
    assert isinstance(tower, reference.SiglipTransformer)
    images = torch.randn(3, 3, 70, 70, dtype=torch.float64)
    fast = prepared(kind, tower.state_dict(), config, torch.float64)
    assert_as_exact(fast, tower, images)
    raw = torch.randint(0, 256, images.shape, dtype=torch.uint8)
    assert relative_error(fast.encode(raw), tower(raw.double() / 127.5 - 1)) < 1e-13


def ratio_of_errors(kind: Any, config: SiglipConfig, dtype: torch.dtype, batch: int) -> float:
    tower = random_tower(config)
    state = {key: tensor.to(dtype) for key, tensor in tower.state_dict().items()}  # both read the rounded weights
    tower.load_state_dict(state)
    images = torch.randn(batch, 3, config.image_size, config.image_size).to(dtype)
    exact, plain = tower.double()(images.double()), tower.to(dtype)(images)
    got = prepared(kind, state, config, dtype).encode(images)
    assert got.dtype == dtype
    assert worst_cosine(got, exact) >= 0.9999
    return relative_error(got, exact) / relative_error(plain, exact)


@pytest.mark.parametrize("kind", TOWERS)
@pytest.mark.parametrize("name", CONFIGS)
def test_float32(name: str, kind: Any) -> None:
    assert ratio_of_errors(kind, CONFIGS[name], torch.float32, 2) <= 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", TOWERS)
def test_half_precision(kind: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The typical error of some towers is at most 1.1 times the plain tower's.

    The kernels keep a product in float32 until its epilogue is done. Their oracles leave products to PyTorch, which
    rounds them earlier. So the oracles get float32 operands here.
    """
    plain_linear = kernel_oracles.linear

    def linear(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
        added = None if residual is None else residual.float()
        y = plain_linear(x.float(), weight.float(), bias, added, *rest)[0].to(x.dtype)
        return y, kernel_oracles.row_statistics(y)

    monkeypatch.setattr(kernel_oracles, "linear", linear)
    ratios = [ratio_of_errors(kind, SMALL, dtype, 6) for _ in range(12)]
    assert statistics.geometric_mean(ratios) <= 1.1


def test_positions_are_resampled_without_a_class_token() -> None:
    state = random_tower(SMALL).state_dict()
    resized, config = for_image_size(state, SMALL, 100)
    assert isinstance(config, SiglipConfig)
    assert (config.image_size, config.tokens) == (100, 36)
    grid = state["positional_embedding"].view(1, 4, 4, -1).permute(0, 3, 1, 2)
    wanted = torch.nn.functional.interpolate(grid, (6, 6), mode="bicubic", antialias=True, align_corners=False)
    assert torch.allclose(resized["positional_embedding"], wanted.permute(0, 2, 3, 1).reshape(36, -1))
