"""`Clip`: what `clip.load`'s model gives, from the checkpoint that `clip.load` reads."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from random_towers import relative_error
from safetensors.torch import save_file
from torch import nn

import clip_fast

clip_model = pytest.importorskip("clip.model")


def make(vision_layers: int | tuple[int, ...]) -> nn.Module:
    patch = 16 if isinstance(vision_layers, int) else None
    width = 128 if patch else 32
    return clip_model.CLIP(48, 64, vision_layers, width, patch, 77, 49408, 64, 1, 2).eval()


@pytest.mark.parametrize("vision_layers", [2, (1, 1, 1, 1)], ids=["vit", "resnet"])
def test_a_drop_in_for_clips_model(vision_layers: int | tuple[int, ...], tmp_path: Path) -> None:
    theirs = make(vision_layers)
    torch.save(theirs.state_dict(), tmp_path / "clip.pt")
    ours, _ = clip_fast.load(tmp_path / "clip.pt", "cpu", activation="quick_gelu")
    assert isinstance(ours, clip_fast.Clip)
    images = torch.randn(3, 3, 64, 64)
    tokens = clip_fast.tokenize(["a dog", "two cats", "a beach at night", "nothing"])
    with torch.inference_mode():
        assert relative_error(ours.encode_text(tokens), theirs.encode_text(tokens)) < 1e-5
        assert relative_error(ours.encode_image(images), theirs.encode_image(images)) < 1e-5
        for copied in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            for got, wanted in zip(copied(images, tokens), theirs(images, tokens), strict=True):
                assert relative_error(got, wanted) < 1e-5
    assert torch.equal(ours.logit_scale, theirs.logit_scale)


def test_in_half_precision(tmp_path: Path) -> None:
    theirs = make(2)
    torch.save(theirs.state_dict(), tmp_path / "clip.pt")
    ours, _ = clip_fast.load(tmp_path / "clip.pt", "cpu", torch.bfloat16, activation="quick_gelu")
    assert isinstance(ours, clip_fast.Clip)
    tokens = clip_fast.tokenize(["a dog", "two cats"])
    embeddings = ours.encode_text(tokens)
    assert embeddings.dtype == torch.bfloat16
    assert relative_error(embeddings, theirs.encode_text(tokens)) < 0.05


@pytest.mark.parametrize("vision_layers", [2, (1, 1, 1, 1)], ids=["vit", "resnet"])
def test_loading_does_not_wait_for_torch_compile(vision_layers: int | tuple[int, ...], tmp_path: Path) -> None:
    torch.save(make(vision_layers).state_dict(), tmp_path / "clip.pt")
    code = """if True:
        import sys, torch, clip_fast
        heavy = {"torch._dynamo", "sympy"} - set(sys.modules)
        assert heavy, "torch imports them by itself now: this test tells nothing"
        model, _ = clip_fast.load(sys.argv[1], "cpu", activation="quick_gelu")
        model.encode_image(torch.zeros(1, 3, 64, 64))
        assert not heavy & set(sys.modules), heavy & set(sys.modules)
    """
    subprocess.run([sys.executable, "-c", code, tmp_path / "clip.pt"], check=True, timeout=300)


def test_without_its_text_tower_a_checkpoint_gives_the_image_encoder(tmp_path: Path) -> None:
    visual = {name: tensor for name, tensor in make(2).state_dict().items() if name.startswith("visual.")}
    torch.save(visual, tmp_path / "clip.pt")
    model, _ = clip_fast.load(tmp_path / "clip.pt", "cpu", activation="quick_gelu")
    assert type(model) is clip_fast.ImageEncoder


@pytest.mark.parametrize("squash", [False, True])
@pytest.mark.parametrize("text", [False, True])
def test_what_is_asked_for_and_what_the_config_says_reach_the_model(text: bool, squash: bool, tmp_path: Path) -> None:
    """A model with a text tower and one without are made in two places."""
    state = {name: tensor.contiguous() for name, tensor in make(2).state_dict().items()}
    save_file(
        {name: tensor for name, tensor in state.items() if text or name.startswith("visual.")},
        tmp_path / "open_clip_model.safetensors",
    )
    mean, std = (0.5, 0.4, 0.3), (0.25, 0.3, 0.35)
    config = {
        "model_cfg": {
            "quick_gelu": True,
            "vision_cfg": {"image_size": 64, "patch_size": 16, "width": 128, "layers": 2},
            "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2},
        },
        "preprocess_cfg": {"mean": mean, "std": std, "resize_mode": "squash" if squash else "shortest"},
    }
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    model, preprocess = clip_fast.load(tmp_path, "cpu", precision="bf16", cuda_graphs=False)
    assert isinstance(model, clip_fast.Clip) == text
    assert preprocess == clip_fast.Preprocess(64, mean, std, squash)
    assert (model.mean, model.std, model.precision, model.dtype) == (mean, std, "bf16", torch.float32)
    assert model._engine.cuda_graphs is False
    pictures = [Image.effect_noise((96, 64), 90).convert("RGB") for _ in range(3)]
    floats = torch.stack([preprocess(picture) for picture in pictures])
    pixels = torch.stack([preprocess.uint8(picture) for picture in pictures])
    plain, _ = clip_fast.load(tmp_path, "cpu")
    with torch.inference_mode():
        wanted = plain.encode_image(floats)
        assert relative_error(plain.encode_image(pixels), wanted) < 1e-4
        for images in (floats, pixels):
            assert 1e-4 < relative_error(model.encode_image(images), wanted) < 0.05  # in bfloat16, indeed
        assert relative_error(plain.encode_image(clip_fast.Preprocess(64)(pictures[0])[None]), wanted[:1]) > 0.05
    assert plain._engine.cuda_graphs is True


def test_jit_is_refused(tmp_path: Path) -> None:
    torch.save(make(2).state_dict(), tmp_path / "clip.pt")
    with pytest.raises(ValueError, match="clip_fast has no TorchScript model: pass jit=False"):
        clip_fast.load(tmp_path / "clip.pt", "cpu", activation="quick_gelu", jit=True)
    model, _ = clip_fast.load(tmp_path / "clip.pt", "cpu", activation="quick_gelu", jit=False)
    assert isinstance(model, clip_fast.Clip)


def test_a_damaged_text_tower_is_named(tmp_path: Path) -> None:
    state = make(2).state_dict()
    state["ln_final.weight"] = state["ln_final.weight"][:-1]
    torch.save(state, tmp_path / "clip.pt")
    with pytest.raises(ValueError, match=r"ln_final.weight must have shape \[64\], got \[63\]"):
        clip_fast.load(tmp_path / "clip.pt", "cpu", activation="quick_gelu")
