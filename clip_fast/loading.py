"""`load`: a name or a checkpoint becomes an encoder and its preprocessing."""

from __future__ import annotations

import glob
import os
import warnings
from dataclasses import replace
from operator import index
from typing import Any, cast, overload

import torch

from .checkpoint.published import OpenAiName, resolve
from .checkpoint.reading import read_checkpoint
from .encoder import ImageEncoder
from .engine.ahead import probe
from .errors import reason_of
from .model import Clip, from_checkpoint
from .preprocess import Preprocess
from .towers.config import Activation, ImageSize, image_size_of, sides
from .towers.families import for_image_size
from .towers.precision import PrecisionName


def default_device() -> torch.device:
    """A GPU where PyTorch can use one. Warns where there is one that it cannot use."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    variables = ("CUDA", "HIP", "ROCR") if torch.version.hip else ("CUDA",)
    hidden = any(os.environ.get(f"{name}_VISIBLE_DEVICES", "0") in ("", "-1") for name in variables)
    if _gpu_is_there() and not hidden:
        try:
            torch.cuda.init()
            reason = "PyTorch sees none"
        except Exception as error:  # a RuntimeError of the driver's, an AssertionError of a build for CPUs
            reason = reason_of(error).partition("\n")[0]
        warnings.warn(
            f"clip_fast computes on the CPU, though this machine has a GPU: {reason.rstrip('.')}. Install the build of "
            'PyTorch that is for its driver, or update the driver; device="cpu" asks for the CPU',
            stacklevel=3,
        )
    return torch.device("cpu")


def _gpu_is_there() -> bool:
    """Whether the system has loaded the driver of a GPU that this kind of PyTorch is for."""
    if torch.version.hip:
        return os.path.exists("/dev/kfd")
    return bool(glob.glob("/dev/nvidia[0-9]*")) or os.path.exists("/usr/lib/wsl/lib/libcuda.so.1")  # Windows' own


def default_dtype(device: torch.device) -> torch.dtype:
    """The dtype of weights and embeddings: as in `clip`, float16 on a GPU and float32 on a CPU."""
    return torch.float16 if device.type == "cuda" else torch.float32


@overload
def load(
    name: OpenAiName,
    device: str | torch.device | None = ...,
    jit: bool | torch.dtype | None = ...,
    download_root: str | os.PathLike[str] | None = ...,
    *,
    dtype: torch.dtype | None = ...,
    precision: PrecisionName | None = ...,
    image_size: int | tuple[int, int] | None = ...,
    activation: Activation | None = ...,
    cuda_graphs: bool = ...,
) -> tuple[Clip, Preprocess]: ...
@overload
def load(
    name: str | os.PathLike[str],
    device: str | torch.device | None = ...,
    jit: bool | torch.dtype | None = ...,
    download_root: str | os.PathLike[str] | None = ...,
    *,
    dtype: torch.dtype | None = ...,
    precision: PrecisionName | None = ...,
    image_size: int | tuple[int, int] | None = ...,
    activation: Activation | None = ...,
    cuda_graphs: bool = ...,
) -> tuple[ImageEncoder, Preprocess]: ...
def load(
    name: str | os.PathLike[str],
    device: str | torch.device | None = None,
    jit: bool | torch.dtype | None = False,
    download_root: str | os.PathLike[str] | None = None,
    *,
    dtype: torch.dtype | None = None,
    precision: PrecisionName | None = None,
    image_size: int | tuple[int, int] | None = None,
    activation: Activation | None = None,
    cuda_graphs: bool = True,
) -> tuple[ImageEncoder, Preprocess]:
    """Loads an image encoder of CLIP or SigLIP and its preprocessing, as `clip.load` does.

    The model is in evaluation mode and its weights require gradients, as those of `clip.load` do. The fast path runs
    under `torch.no_grad()` or `torch.inference_mode()`; otherwise the plain tower does, which can be trained.

    Args:
        name: a name from `available_models()`; a model on the Hugging Face hub, as "openai/clip-vit-base-patch32" or
            "hf-hub:laion/CLIP-ViT-B-32-laion2B-s34B-b79K"; or a checkpoint: OpenAI's `.pt`, open_clip's `.pt`, `.bin`
            or `.safetensors`, a Hugging Face folder, or a file that a training loop saved such a model's state dict in.
            "@revision" behind a hub's name asks for a branch, a tag or a commit. A file or folder of that name wins,
            unless "hf-hub:" stands before it. Of a repository that has both, "hf-hub:" and open_clip's names take
            open_clip's files, and a plain name takes transformers'.
        device: where to compute; by default a GPU where PyTorch can use one. One warning says so where a GPU is there
            and PyTorch cannot use it, and where Triton cannot: plain PyTorch then computes on it.
        jit: must be False, the value with which callers of `clip.load` ask for no TorchScript. A dtype in this place
            is taken for `dtype`.
        download_root: folder for downloaded checkpoints; by default `~/.cache/clip`, which `clip` uses too, and
            huggingface_hub's own cache for models on the hub.
        dtype: of the weights and embeddings; by default, as in `clip`, float16 on a GPU and float32 on a CPU.
        precision: to compute in, "fp32", "tf32", "fp16" or "bf16"; by default that of `dtype`.
        image_size: the size of the images to encode, where it is not the model's own: the side of a square, or height
            and width. A ViT's positional embedding is resampled for it as open_clip does.
        activation: of the MLPs, for a checkpoint that does not say; plain state dicts do not. Nor do they say how a
            ViT pools or what its epsilon is: they are taken for OpenAI's there, so place the config beside them.
        cuda_graphs: replay batches on an NVIDIA GPU as CUDA graphs where launching takes longer; they keep some memory.

    Returns:
        The encoder, which is a `Clip` where the checkpoint has a text tower that is served, and embeds texts too
            (otherwise `encode_text` raises `NotServed`, and says why); and a callable
        from a PIL image to the float32 tensor (3, H, W) that the encoder takes in batches.

    Raises:
        CheckpointError: the checkpoint is missing or not sound; the message names the file and what is wrong. Or it
            cannot be had from the hub; the message says why, and what to do.
        ModuleNotFoundError: the extra `hub` is not installed: `pip install "clip_fast[hub]"`.
        ValueError: `image_size` is no size, smaller than a patch, or not a ResNet's own; `precision`, `activation` or
            `dtype` is not one that there is; `jit` is true; or two different dtypes are given.
        TypeError: `dtype` is no dtype.
    """
    if isinstance(jit, torch.dtype):
        if dtype not in (None, jit):
            raise ValueError(f"two dtypes are asked for, {jit} and {dtype}")
        jit, dtype = False, jit
    if jit:
        raise ValueError("clip_fast has no TorchScript model: pass jit=False")
    size = None if image_size is None else _checked_size(image_size)
    device = torch.device(device) if device is not None else default_device()
    checkpoint = read_checkpoint(resolve(name, download_root), activation)
    config = checkpoint.config
    if size is not None and sides(size) != sides(config.image_size):
        state_dict, config = for_image_size(checkpoint.state_dict, config, size)
        checkpoint = replace(checkpoint, state_dict=state_dict, config=config)
    model = from_checkpoint(
        checkpoint, device, dtype or default_dtype(device), precision=precision, cuda_graphs=cuda_graphs
    )
    probe(device)
    how = checkpoint.squash, checkpoint.on_white, checkpoint.bilinear
    return model, Preprocess(config.image_size, checkpoint.mean, checkpoint.std, *how)


def _checked_size(size: Any) -> ImageSize:
    """A size as users give it: any whole number, or height and width."""
    try:
        height, width = cast(tuple[Any, Any], size if isinstance(size, tuple | list) else (size, size))
        return image_size_of(index(height), index(width))
    except (TypeError, ValueError):
        raise ValueError(f"image_size must be a whole number of pixels, or height and width, got {size!r}") from None
