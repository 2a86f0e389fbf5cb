"""The models that benchmarks know by name: those that are published, and toys to try a benchmark itself."""

from __future__ import annotations

from clip_fast.config import OPEN_CLIP_MODELS, OPENAI_MODELS, Config, ResNetConfig, VitConfig

PUBLISHED: dict[str, Config] = {**OPENAI_MODELS, **OPEN_CLIP_MODELS}
MODELS: dict[str, Config] = {
    **PUBLISHED,
    "toy": VitConfig(image_size=32, patch_size=16, width=64, layers=2, heads=1, embed_dim=32),
    "toy-resnet": ResNetConfig(layers=(1, 1, 1, 1), width=8, heads=4, image_size=64, embed_dim=32),
}
