"""One line makes a user's own model fast: its image tower's `forward` is replaced, on that instance alone.

    model = clip_fast.accelerate(model)

The model keeps its class, its weights and their names. What the fast path does not give (gradients, attention weights,
hooks inside the tower, training with dropout) the original forward gives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, get_args

import torch
from torch import Tensor, nn

from . import instance, towers
from .encoder import ImageEncoder
from .engine import NotServed, Precision
from .forward import Forward

_Model = TypeVar("_Model", bound=nn.Module)


def accelerate(model: _Model, *, precision: Precision | None = None, cuda_graphs: bool = True) -> _Model:
    """Puts the fast encoder behind the image path of a model, in place.

    Args:
        model: of openai-clip, open_clip, transformers (`CLIPModel`, `CLIPVisionModel`, `CLIPVisionModelWithProjection`)
            or sentence-transformers; any module that has such an image tower inside.
        precision: to compute in, by default that of the weights, or autocast's; see `ImageEncoder`.
        cuda_graphs: replay small batches on an NVIDIA GPU as CUDA graphs.

    Returns:
        The same model. It returns what it returned; raw uint8 images, which no original takes, are normalised.

    Raises:
        NotServed: (a ValueError) names the part that is not served. The model is as it was.
        ValueError: for a precision that is none.

    The original forward runs, and a warning says why once, where a weight or the images require gradients, hooks are
    registered inside the tower, or it is in training mode and has dropout or batch norms.

    An accelerated model refers to itself: once deleted, its memory is free at Python's next garbage collection.
    TorchScript wants the original: `torch.jit.script(clip_fast.restore(model).visual)`.
    """
    if precision is not None and precision not in get_args(Precision):
        raise ValueError(f"precision must be one of {get_args(Precision)} or None, got {precision!r}")
    if isinstance(model, ImageEncoder):  # which is fast as it is
        model.refresh()
        return model
    found = [_forward(tower, precision, cuda_graphs) for tower in towers.find(model)]
    for forward in found:
        if problem := forward.read():
            raise NotServed(problem)
    restore(model)
    for forward in found:
        forward.attach()
    for module in model.modules():
        if _is_openai_clip(module):
            _take_raw_pixels(module)
    return model


def restore(model: _Model) -> _Model:
    """Undoes `accelerate`: the original forward runs again. A model that was never accelerated stays as it is."""
    for module in model.modules():
        instance.detach(module)
    return model


def is_accelerated(model: nn.Module) -> bool:
    """Whether an image tower in it is."""
    return any(map(instance.is_attached, model.modules()))


def why_original(tower: nn.Module, images: Tensor) -> str | None:
    """Why the original forward of an accelerated tower would run for `images`; None: the fast path has just run."""
    forward = Forward.of(tower)
    assert forward is not None
    return forward.why_original(images)


def _forward(tower: nn.Module, precision: Precision | None, cuda_graphs: bool) -> Forward:
    """A tower's own, if it is accelerated with the same settings: by its name, compiled graphs know it."""
    attached = Forward.of(tower)
    return attached if attached and attached.has(precision, cuda_graphs) else Forward(tower, precision, cuda_graphs)


def _is_openai_clip(module: nn.Module) -> bool:
    return type(module).__module__ == "clip.model" and type(module).__qualname__ == "CLIP"


def _encode_image(model: Any) -> Callable[[Tensor], Tensor]:
    """openai-clip's `encode_image`, but for raw pixels, which must reach the tower as such and not cast to floats."""

    def encode_image(image: Tensor) -> Tensor:
        return model.visual(image if image.dtype == torch.uint8 else image.type(model.dtype))

    return encode_image


def _take_raw_pixels(model: nn.Module) -> None:
    instance.attach(model, {"encode_image": _encode_image(model)}, _take_raw_pixels)
