"""Small models of the packages that `accelerate` serves, with random weights, and the calls that tests make of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clip_fast.dropin.forward import Forward
from clip_fast.engine import route

clip_model = pytest.importorskip("clip.model")
open_clip = pytest.importorskip("open_clip")
transformers = pytest.importorskip("transformers")


def openai_vit() -> nn.Module:
    return clip_model.CLIP(64, 64, 3, 128, 16, 77, 100, 64, 1, 2).eval()


def openai_resnet() -> nn.Module:
    return clip_model.CLIP(64, 64, (1, 1, 1, 1), 64, None, 77, 100, 64, 1, 2).eval()


def open_clip_vit(**vision: Any) -> nn.Module:
    shape = {"image_size": 64, "layers": 3, "width": 128, "patch_size": 16, **vision}
    text = {"context_length": 77, "vocab_size": 100, "width": 64, "heads": 2, "layers": 1}
    return open_clip.model.CLIP(64, shape, text).eval()


def open_clip_resnet() -> nn.Module:
    return open_clip_vit(layers=[1, 1, 1, 1], width=64)


def hugging_face(activation: str = "quick_gelu", kind: str = "CLIPVisionModelWithProjection", **options: Any) -> Any:
    config = transformers.CLIPVisionConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=2, image_size=64,
        patch_size=16, projection_dim=64, hidden_act=activation, **options,
    )  # fmt: skip
    return getattr(transformers, kind)(config).eval()


MODELS: list[Callable[[], nn.Module]] = [openai_vit, openai_resnet, open_clip_vit, open_clip_resnet, hugging_face]


def embeddings(model: nn.Module, images: Tensor) -> Tensor:
    part: Any = model
    return part.encode_image(images) if hasattr(model, "encode_image") else part(pixel_values=images).image_embeds


def tower(model: nn.Module) -> Any:
    """The image tower of a model."""
    part: Any = model
    inner = part.visual if hasattr(model, "visual") else getattr(model, "vision_model", model)
    return getattr(inner, "vision_model", inner)  # transformers 4 has the tower one module deeper


def error(got: Tensor, exact: Tensor) -> float:
    """‖got − exact‖ / ‖exact‖, in float64."""
    return float((got.double() - exact.double()).norm() / exact.double().norm())


def close(got: Tensor, wanted: Tensor, bound: float = 1e-5) -> bool:
    return got.dtype == wanted.dtype and got.shape == wanted.shape and error(got, wanted) < bound


def random_images(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 64, 64)


def why_original(tower: nn.Module, images: Tensor) -> str | None:
    """The reason why the original forward of an accelerated tower would run; None if the fast path has just run."""
    forward: Any = Forward.of(tower)
    results = route.judge(forward, images, forward.task)
    return results if isinstance(results, str) else None
