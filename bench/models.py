"""The models that benchmarks know by name: the published ones, and toys to try a benchmark itself."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip_fast.checkpoint.published import OPENAI_MODELS
from clip_fast.towers import reference
from clip_fast.towers.config import Config, ImageSize, ResNetConfig, SiglipConfig, VitConfig, sides

_BRANCH = 0.25  # gain of a bottleneck's last batch norm; a gain of one would double the variance at every bottleneck

# The ViT family of open_clip from B to bigG, with the shapes of its model cards. They were trained with the exact GELU.
OPEN_CLIP_MODELS: dict[str, VitConfig] = {
    "ViT-B-32": VitConfig(224, 32, width=768, layers=12, heads=12, embed_dim=512, activation="gelu"),
    "ViT-B-16": VitConfig(224, 16, width=768, layers=12, heads=12, embed_dim=512, activation="gelu"),
    "ViT-B-16-plus-240": VitConfig(240, 16, width=896, layers=12, heads=14, embed_dim=640, activation="gelu"),
    "ViT-L-14": VitConfig(224, 14, width=1024, layers=24, heads=16, embed_dim=768, activation="gelu"),
    "ViT-L-14-336": VitConfig(336, 14, width=1024, layers=24, heads=16, embed_dim=768, activation="gelu"),
    "ViT-H-14": VitConfig(224, 14, width=1280, layers=32, heads=16, embed_dim=1024, activation="gelu"),
    "ViT-g-14": VitConfig(
        224, 14, width=1408, layers=40, heads=16, embed_dim=1024, mlp_ratio=4.3637, activation="gelu"
    ),
    "ViT-bigG-14": VitConfig(
        224, 14, width=1664, layers=48, heads=16, embed_dim=1280, mlp_ratio=4.9231, activation="gelu"
    ),
}

# SigLIP's, by the names that open_clip gives them. No contest of kernels has their shapes yet.
SIGLIP_MODELS: dict[str, SiglipConfig] = {
    "ViT-B-16-SigLIP": SiglipConfig(224, 16, width=768, layers=12, heads=12, mlp_width=3072),
    "ViT-L-16-SigLIP-256": SiglipConfig(256, 16, width=1024, layers=24, heads=16, mlp_width=4096),
    "ViT-SO400M-14-SigLIP-384": SiglipConfig(384, 14, width=1152, layers=27, heads=16, mlp_width=4304),
    "ViT-SO400M-16-SigLIP2-256": SiglipConfig(256, 16, width=1152, layers=27, heads=16, mlp_width=4304),
}

PUBLISHED: dict[str, Config] = {**OPENAI_MODELS, **OPEN_CLIP_MODELS}
MODELS: dict[str, Config] = {
    **PUBLISHED,
    "toy": VitConfig(image_size=32, patch_size=16, width=64, layers=2, heads=1, embed_dim=32),
    "toy-resnet": ResNetConfig(layers=(1, 1, 1, 1), width=8, heads=4, image_size=64, embed_dim=32),
}
ENCODERS: dict[str, Config] = {  # what is measured as a whole
    **MODELS,
    **SIGLIP_MODELS,
    "toy-siglip": SiglipConfig(image_size=32, patch_size=16, width=64, layers=2, heads=1, mlp_width=112),
}


def random_tower(config: Config) -> nn.Module:
    """A plain tower whose embeddings depend on the images. PyTorch's own initialisation lets a ResNet's maps fade."""
    tower = reference.build(config)
    for name, module in tower.named_modules():
        if isinstance(config, ResNetConfig) and isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d) and name.startswith("layer") and name.endswith("bn3"):
            nn.init.constant_(module.weight, _BRANCH)
    return tower


def random_images(count: int, size: ImageSize) -> Tensor:
    """(count, 3, height, width): noise over large squares of colour. A ResNet cannot tell images of noise apart."""
    both = sides(size)
    return F.interpolate(torch.randn(count, 3, 4, 4), both).add_(torch.randn(count, 3, *both), alpha=0.25)
