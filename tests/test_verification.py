"""`verify`: its figures on models of the packages, on an encoder, and what it refuses."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from clip.model import convert_weights
from peers import hugging_face, open_clip_vit, openai_resnet, openai_vit
from random_towers import random_tower
from torch import nn

import clip_fast
from clip_fast import ImageEncoder, verify
from clip_fast.dropin.accelerate import is_accelerated
from clip_fast.errors import NotServed
from clip_fast.towers.config import ResNetConfig, VitConfig

CONFIGS = [
    VitConfig(image_size=64, patch_size=16, width=128, layers=3, heads=2, embed_dim=64),
    ResNetConfig(layers=(1, 1, 1, 1), width=16, heads=4, image_size=64, embed_dim=32),
]


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("make", [openai_vit, openai_resnet, open_clip_vit, hugging_face])
def test_a_model_of_a_package(make: Any, accelerated: bool, capsys: pytest.CaptureFixture[str]) -> None:
    model = make()
    if accelerated:
        clip_fast.accelerate(model)
    verdict = verify(model)
    print(verdict)
    assert 0 < verdict.error < 1e-5
    assert 0 < verdict.original_error < 1e-5
    assert verdict.error != verdict.original_error  # by different paths
    assert verdict.lowest_cosine > 1 - 1e-9
    assert verdict.seconds > 0
    assert (verdict.dtype, verdict.images) == (torch.float32, 8)
    assert is_accelerated(model) == accelerated
    assert capsys.readouterr().out == f"{verdict}\n"


@pytest.mark.parametrize("config", CONFIGS)
def test_an_encoder(config: Any) -> None:
    state = {name: tensor.detach() for name, tensor in random_tower(config).state_dict().items()}
    encoder = ImageEncoder(config, state, torch.device("cpu"), torch.float32)
    verdict = verify(encoder, torch.randn(3, 3, 64, 64))
    assert verdict.images == 3
    assert verdict.error < 1e-5
    assert verdict.original_error < 1e-5


def test_raw_pixels_are_normalised_as_the_encoder_does() -> None:
    encoder = clip_fast.load("tiny-digits", "cpu")[0].requires_grad_(False)
    seen: list[torch.Tensor] = []
    encode = encoder.encode_image
    encoder.encode_image = lambda x: seen.append(x) or encode(x)  # type: ignore[assignment, method-assign]
    pixels = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8)
    assert verify(encoder, pixels).error < 1e-5
    assert torch.allclose(encode(seen[0]), encode(pixels), atol=1e-5)


def test_what_cannot_be_verified_is_named() -> None:
    encoder, preprocess = clip_fast.load("tiny-digits", "cpu")
    with pytest.raises(TypeError, match="model must be a module, got tuple: `load` gives one, and a `preprocess`"):
        verify((encoder, preprocess))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="images must be a tensor, got list"):
        verify(encoder, [torch.zeros(3, 32, 32)])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"images must be \[batch, 3, 32, 32\], got \[1, 3, 32, 31\]"):
        verify(encoder, torch.zeros(1, 3, 32, 31))
    with pytest.raises(TypeError, match=r"must be preprocessed floats, got torch\.uint8"):
        verify(openai_vit(), torch.zeros(1, 3, 64, 64, dtype=torch.uint8))


def test_an_error_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    config = CONFIGS[0]
    state = {name: tensor.detach() for name, tensor in random_tower(config).state_dict().items()}
    encoder = ImageEncoder(config, state, torch.device("cpu"), torch.float32)
    right = encoder.encode_image
    calls = iter(range(1, 1000))
    monkeypatch.setattr(encoder, "encode_image", lambda x: right(x) * 1.01 + 0.02 * next(calls))
    verdict = verify(encoder)
    assert verdict.error > 5e-3
    assert verdict.lowest_cosine < 1 - 1e-9
    assert not verdict.batch_invariant
    assert "batch-invariant   no" in str(verdict)
    assert "lowest cosine     1 - nan" in str(dataclasses.replace(verdict, lowest_cosine=float("nan")))


def test_half_precision_is_judged_in_its_dtype() -> None:
    verdict = verify(hugging_face().bfloat16())
    assert verdict.dtype == torch.bfloat16
    assert 1e-3 < verdict.error < 2 * verdict.original_error
    model = openai_vit()
    convert_weights(model)  # as clip.load does on a GPU: LayerNorms and embeddings stay in float32
    verdict = verify(model)
    assert verdict.dtype == torch.float16
    assert 1e-4 < verdict.error < 2 * verdict.original_error


def test_what_keeps_an_encoders_fast_path_from_running_is_named() -> None:
    model = clip_fast.load("tiny-digits", "cpu")[0]
    hook = model.visual.ln_post.register_forward_hook(lambda *_: None)
    with pytest.raises(NotServed, match="hooks are registered"):
        verify(model)
    hook.remove()
    assert verify(model).error < 1e-5
    with pytest.raises(NotServed, match="float64"):
        verify(model.double())


def test_what_keeps_the_fast_path_from_running_is_named() -> None:
    model: Any = openai_vit()
    model.visual.transformer.resblocks[0].register_forward_hook(lambda *_: None)
    with pytest.raises(NotServed, match="hooks are registered"):
        verify(model)
    assert not is_accelerated(model)
    with pytest.raises(NotServed, match="no image tower"):
        verify(nn.Linear(2, 2))
    with pytest.raises(NotServed, match="float64"):
        verify(openai_vit().double())
    with pytest.raises(ValueError, match="2 image towers"):
        verify(nn.ModuleList([openai_vit(), openai_vit()]))
    with pytest.raises(ValueError, match="no image to compare with"):
        verify(openai_vit(), torch.empty(0, 3, 64, 64))
