"""`clip-fast models`: the models that are known by name, by their image towers."""

from __future__ import annotations

import argparse

import torch

from ..checkpoint.published import Published, published_models
from ..towers import reference
from ..towers.config import Config
from .messages import EXIT_OK, show


def models(_: argparse.Namespace) -> int:
    """Runs `clip-fast models` and returns its exit status."""
    families: dict[Config, list[Published]] = {}
    for model in published_models():
        families.setdefault(model.config, []).append(model)
    longest = max(len(model.name) for model in published_models())
    for config, members in families.items():
        size = f"{_parameters(config) / 1e6:,.1f} million parameters"
        show(f"{members[0].name}: {size}, images of {config.image_size} pixels, embeddings of {config.embed_dim}")
        for model in members:
            words = " (images only)" if model.images_only else ""
            show(f"  {model.name:<{longest}}  {model.source}{words}")
    show("any other CLIP or SigLIP on the Hugging Face hub: owner/name, or hf-hub:owner/name")
    return EXIT_OK


def _parameters(config: Config) -> int:
    """How many parameters an image tower has."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in reference.build(config).parameters())
