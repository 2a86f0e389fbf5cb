"""A drop-in fast image encoder for CLIP.

import clip_fast

model, preprocess = clip_fast.load("ViT-B/32")
embeddings = model.encode_image(preprocess(image).unsqueeze(0))  # (1, 512), not normalised
"""

from __future__ import annotations

import os
from typing import Any

import torch

from . import vit
from .accelerate import accelerate, restore
from .checkpoint import available_models, read_checkpoint, resolve
from .config import Activation, VitConfig
from .encoder import ImageEncoder, Precision, default_device, default_dtype
from .model import Clip
from .preprocess import Preprocess
from .text import tokenize
from .verify import Verdict, verify

__all__ = [
    "Clip", "ImageEncoder", "Preprocess", "Verdict", "accelerate", "available_models", "load", "restore", "tokenize",
    "verify",
]  # fmt: skip
__version__ = "0.1.0"


def load(
    name_or_path: str | os.PathLike[str],
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    *,
    precision: Precision | None = None,
    image_size: int | None = None,
    activation: Activation | None = None,
    download_root: str | os.PathLike[str] | None = None,
    cuda_graphs: bool = True,
    jit: bool = False,
) -> tuple[ImageEncoder, Preprocess]:
    """Loads a CLIP image encoder and its preprocessing, as `clip.load` does.

    Args:
        name_or_path: a name from `available_models()`, or a checkpoint: OpenAI's `.pt`, open_clip's `.pt`, `.bin` or
            `.safetensors`, or a Hugging Face folder.
        device: where to compute; by default a GPU where there is one.
        dtype: of the weights and embeddings; by default, as in `clip`, float16 on a GPU and float32 on a CPU.
        precision: to compute in, "fp32", "tf32", "fp16" or "bf16"; by default that of `dtype`.
        image_size: of the images to encode, where it is not the model's own; a ViT's positional embedding is resampled
            for it as open_clip does.
        activation: of the MLPs, for a checkpoint that does not say (plain state dicts do not).
        download_root: folder for downloaded checkpoints; by default `~/.cache/clip`, which `clip` uses too.
        cuda_graphs: replay small batches on an NVIDIA GPU as CUDA graphs: less time for each, some memory kept.
        jit: False, as callers of `clip.load` say who want no TorchScript.

    Returns:
        The encoder, a `Clip` that embeds texts too where the checkpoint has OpenAI's text tower; and a callable from a
        PIL image to the float32 tensor (3, H, W) that the encoder takes in batches.

    Raises:
        CheckpointError: where the checkpoint cannot be had or is not sound; it names the file and what is wrong.
        ValueError: for an `image_size` smaller than a patch, or other than a ResNet's own; where `jit` is true.
    """
    if jit:
        raise ValueError("clip_fast has no TorchScript model: pass jit=False")
    device = torch.device(device) if device is not None else default_device()
    dtype = dtype or default_dtype(device)
    checkpoint = read_checkpoint(resolve(name_or_path, download_root), activation)
    config, state_dict = checkpoint.config, checkpoint.state_dict
    if image_size is not None and image_size != config.image_size:
        if not isinstance(config, VitConfig):
            raise ValueError(f"a ResNet takes images of its own size, {config.image_size}, got {image_size}")
        state_dict, config = vit.resample(state_dict, config, image_size)
    options: dict[str, Any] = {
        "precision": precision,
        "mean": checkpoint.mean,
        "std": checkpoint.std,
        "cuda_graphs": cuda_graphs,
    }
    if checkpoint.text is None:
        model = ImageEncoder(config, state_dict, device, dtype, **options)
    else:
        model = Clip(config, state_dict, *checkpoint.text, device, dtype, **options)
    return model, Preprocess(config.image_size, checkpoint.mean, checkpoint.std, checkpoint.squash)
