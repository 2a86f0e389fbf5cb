"""One line makes a user's own model fast: its image tower's `forward` is replaced, on that instance alone.

    model = clip_fast.accelerate(model)

The model keeps its class, its weights and their names. The original forward runs where the fast path cannot: for
gradients, attention weights, hooks inside the tower, training with dropout.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..encoder import ImageEncoder
from ..engine.ahead import probe
from ..errors import NotServed
from ..towers.precision import PrecisionName, check_name
from . import instance, served
from .forward import Forward

_Model = TypeVar("_Model", bound=nn.Module)


def accelerate(model: _Model, *, precision: PrecisionName | None = None, cuda_graphs: bool = True) -> _Model:
    """Puts the fast encoder behind the image path of a model, in place.

    Args:
        model: of openai-clip, open_clip, transformers (`CLIPModel`, `CLIPVisionModel`, `CLIPVisionModelWithProjection`,
            `SiglipModel`, `SiglipVisionModel`), sentence-transformers; any module that has such an image tower inside.
        precision: to compute in, see `ImageEncoder`; by default that of the weights or, under autocast, autocast's.
        cuda_graphs: replay batches on an NVIDIA GPU as CUDA graphs where launching would take longer.

    Returns:
        The same model. It returns what it returned, but for raw uint8 images: these are normalised.

    Raises:
        NotServed: (a ValueError) the model has a part that is not served; the message names it. The model is unchanged.
        ValueError: `precision` is none of the four, or the model is a loaded one, and has other settings.
        TypeError: `model` is no module.

    The original forward runs, and one warning says why, where a weight or the images require gradients, where hooks are
    registered inside the tower, or where it is in training mode and has dropout or batch norms.

    A pickle is the original, and a warning says so: accelerate it in the process where it arrives.

    An accelerated model refers to itself: after its deletion, Python's next garbage collection frees its memory.
    TorchScript needs the original: `torch.jit.script(clip_fast.restore(model).visual)`.
    """
    check_name(precision)
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"accelerate takes a torch.nn.Module, got a {type(model).__qualname__}")
    loaded = [module for module in model.modules() if isinstance(module, ImageEncoder)]  # already fast
    for encoder in loaded:
        if precision not in (None, encoder.precision) or (encoder.cuda_graphs and not cuda_graphs):
            raise ValueError("the model was loaded with another precision, or with CUDA graphs: give these to `load`")
    towers = list(filter(served.is_tower, model.modules())) if loaded else served.find(model)
    found = [_forward(tower, precision, cuda_graphs) for tower in towers]
    for forward in found:
        if problem := forward.read():
            raise NotServed(problem)
        probe(forward.device)
    for encoder in loaded:
        encoder.refresh()
    restore(model)
    for forward in found:
        forward.attach()
    for module in model.modules():
        if _is_openai_clip(module):
            _take_raw_pixels(module)
    return model


def restore(model: _Model) -> _Model:
    """Undoes `accelerate`: the original forward runs again. A model that was never accelerated is left alone."""
    for module in model.modules():
        instance.detach(module)
    return model


def is_accelerated(model: nn.Module) -> bool:
    """Whether an image tower in `model` is accelerated."""
    return any(map(instance.is_attached, model.modules()))


def _forward(tower: nn.Module, precision: PrecisionName | None, cuda_graphs: bool) -> Forward:
    """A new `Forward`, or the tower's own where that has the same settings: compiled graphs know it by its name."""
    attached = Forward.of(tower)
    return attached if attached and attached.has(precision, cuda_graphs) else Forward(tower, precision, cuda_graphs)


def _is_openai_clip(module: nn.Module) -> bool:
    """Whether it is openai-clip's model, whose class has its own `encode_image` still."""
    kind: Any = type(module)
    if (kind.__module__, kind.__qualname__) != ("clip.model", "CLIP"):
        return False
    return served.is_own(kind, "encode_image", kind.encode_image)


def _encode_image(model: Any) -> Callable[[Tensor], Tensor]:
    """openai-clip's `encode_image`, except that raw pixels reach the tower as they are, not cast to floats."""

    def encode_image(image: Tensor) -> Tensor:
        return model.visual(image if image.dtype == torch.uint8 else image.type(model.dtype))

    return encode_image


def _take_raw_pixels(model: nn.Module) -> None:
    instance.attach(model, {"encode_image": _encode_image(model)}, _take_raw_pixels)
