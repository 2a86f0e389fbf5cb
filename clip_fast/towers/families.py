"""The families of image towers: one entry each, by the class of their configuration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..kernels.dispatch import triton_can_run
from .config import Config, ImageSize, ResNetConfig, SiglipConfig, VitConfig
from .fast import FastTower
from .resnet import FastResNet
from .siglip import FastSiglip
from .siglip_cpu import CpuSiglip
from .vit import FastVit, resampled
from .vit_cpu import CpuVit


@dataclass(frozen=True)
class Family:
    """The fast towers of a family, and a function that fits its weights to images of another size, if there is one."""

    with_triton: type[FastTower]
    without_triton: type[FastTower]
    resampled: Callable[[dict[str, Tensor], Any, ImageSize], tuple[dict[str, Tensor], Any]] | None = None


_FAMILIES: dict[type, Family] = {
    VitConfig: Family(FastVit, CpuVit, resampled),
    SiglipConfig: Family(FastSiglip, CpuSiglip, resampled),
    ResNetConfig: Family(FastResNet, FastResNet),
}


def fast_tower(config: Config, device: torch.device) -> type[FastTower]:
    """The fast tower for `config` on a device."""
    family = _FAMILIES[type(config)]
    return family.with_triton if triton_can_run(device) else family.without_triton


def for_image_size(
    state_dict: dict[str, Tensor], config: Config, image_size: ImageSize
) -> tuple[dict[str, Tensor], Config]:
    """The same tower for images of another size.

    Raises:
        ValueError: the tower's weights are for one size of images, or `image_size` is smaller than a patch.
    """
    family = _FAMILIES[type(config)]
    if family.resampled is None:
        raise ValueError(f"{config.family} takes images of its own size, {config.image_size}, got {image_size}")
    return family.resampled(state_dict, config, image_size)
