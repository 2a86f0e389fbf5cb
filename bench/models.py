"""The models that benchmarks know by name: those that are published, and toys to try a benchmark itself."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip_fast import reference
from clip_fast.config import OPEN_CLIP_MODELS, OPENAI_MODELS, Config, ResNetConfig, VitConfig

_BRANCH = 0.25  # gain of a bottleneck's last batch norm: with one, variances double at every bottleneck

PUBLISHED: dict[str, Config] = {**OPENAI_MODELS, **OPEN_CLIP_MODELS}
MODELS: dict[str, Config] = {
    **PUBLISHED,
    "toy": VitConfig(image_size=32, patch_size=16, width=64, layers=2, heads=1, embed_dim=32),
    "toy-resnet": ResNetConfig(layers=(1, 1, 1, 1), width=8, heads=4, image_size=64, embed_dim=32),
}


def random_tower(config: Config) -> nn.Module:
    """A plain tower whose embeddings depend on the images: PyTorch's own initialisation lets a ResNet's maps fade."""
    tower = reference.build(config)
    for name, module in tower.named_modules():
        if isinstance(config, ResNetConfig) and isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d) and name.startswith("layer") and name.endswith("bn3"):
            nn.init.constant_(module.weight, _BRANCH)
    return tower


def random_images(count: int, size: int) -> Tensor:
    """(count, 3, size, size): noise over large squares of colour, without which a ResNet tells no two of them apart."""
    return F.interpolate(torch.randn(count, 3, 4, 4), size).add_(torch.randn(count, 3, size, size), alpha=0.25)
