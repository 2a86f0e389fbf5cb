"""open_clip's variants of the ViT, accelerated, and its models however `create_model` was asked to make them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peers import close, error, open_clip, open_clip_vit, tower, why_original
from torch import Tensor, nn

import clip_fast
from clip_fast.errors import NotServed

VARIANTS: dict[str, dict[str, Any]] = {
    "no ln_pre": {"no_ln_pre": True},
    "average": {"pool_type": "avg"},
    "average before ln_post": {"pool_type": "avg", "final_ln_after_pool": True},
    "class token before ln_post": {"final_ln_after_pool": True},
    "LayerScale": {"ls_init_value": 0.1},
    "not square": {"image_size": (48, 80)},
    "another epsilon and GELU": {"norm_kwargs": {"eps": 0.01}, "act_kwargs": {"approximate": "tanh"}},
    "all": {
        "image_size": (80, 48), "no_ln_pre": True, "pool_type": "avg", "ls_init_value": 0.1, "patch_dropout": 0.5,
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def _only_fast() -> Iterator[None]:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("error", message="the original forward")
        yield


def images_of(model: Any, batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, *tower(model).image_size)


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_is_accelerated(name: str, tokens: bool) -> None:
    model: Any = open_clip_vit(**VARIANTS[name], output_tokens=tokens)
    original: Any = copy.deepcopy(model)
    images = images_of(model)
    clip_fast.accelerate(model)
    assert why_original(tower(model), images) is None
    for x in (images, torch.randint(0, 256, images.shape, dtype=torch.uint8)):
        plain = x if x.is_floating_point() else normalised(x)
        got, wanted = model.visual(x), original.visual(plain)
        pairs = zip(got, wanted, strict=True) if tokens else [(got, wanted)]
        for ours, theirs in pairs:
            assert close(ours, theirs)
            assert not torch.equal(ours, theirs)  # by another path
    with pytest.raises(ValueError, match=r"images must be \[batch, 3, "):
        model.visual(images[..., 1:])


def normalised(raw: Tensor) -> Tensor:
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (clip_fast.encoder.IMAGE_MEAN, clip_fast.encoder.IMAGE_STD))
    return (raw / 255 - mean) / std


def test_verified() -> None:
    verdict = clip_fast.verify(open_clip_vit(**VARIANTS["all"]))
    assert verdict.error < 1e-5


def test_pooling_that_is_set_later_is_followed() -> None:
    model: Any = clip_fast.accelerate(open_clip_vit())
    original: Any = copy.deepcopy(clip_fast.restore(copy.deepcopy(model)))
    images = images_of(model)
    for name, value in (("pool_type", "avg"), ("final_ln_after_pool", True), ("pool_type", "tok")):
        assert close(model.visual(images), original.visual(images))
        for each in (model, original):
            setattr(tower(each), name, value)
    assert close(model.visual(images), original.visual(images))


def test_a_gamma_that_is_changed_is_seen() -> None:
    model: Any = clip_fast.accelerate(open_clip_vit(ls_init_value=0.1))
    images = images_of(model)
    before = model.visual(images)
    model.visual.transformer.resblocks[0].ls_2.gamma.mul_(-3)
    after = model.visual(images)
    assert not close(before, after)
    assert close(after, clip_fast.restore(model).visual(images))


def _one_block_without(model: Any) -> None:
    model.visual.transformer.resblocks[1].ls_1 = nn.Identity()


@pytest.mark.parametrize(
    ("vision", "change", "why"),
    [
        ({"qk_norm": True, "block_type": "custom"}, None, "is a open_clip.transformer"),
        ({"attentional_pool": True}, None, "attn_pool is an attentional pooler"),
        ({"pool_type": "none"}, None, r"pool_type is 'none', expected one of \('tok', 'avg'\)"),
        ({"ls_init_value": 0.1}, _one_block_without, "blocks differ in their LayerScale"),
    ],
)
def test_others_are_refused(vision: dict[str, Any], change: Any, why: str) -> None:
    model = open_clip_vit(**vision)
    if change:
        change(model)
    with pytest.raises(NotServed, match=why):
        clip_fast.accelerate(model)


# --- as create_model makes them --------------------------------------------------------------------------------------


def created(name: str = "ViT-B-32", **options: Any) -> Any:
    """A published model by open_clip's factory, its towers cut to a layer."""
    config = open_clip.get_model_config(name)
    cut = {"vision_cfg": config["vision_cfg"] | {"layers": 1}, "text_cfg": config["text_cfg"] | {"layers": 1}}
    return open_clip.create_model(name, pretrained=None, **cut, **options).eval()


@pytest.mark.parametrize(
    "options",
    [
        {"force_image_size": (64, 128)},
        {"force_image_size": 96, "force_custom_text": True},
        {"output_dict": True},
        {"force_patch_dropout": 0.5},
        {"precision": "pure_bf16"},
        {"precision": "bf16"},
        {"precision": "amp_bf16"},
        {"precision": "fp32", "force_quick_gelu": True},
    ],
    ids=str,
)
def test_options_of_create_model(options: dict[str, Any], tmp_path: Path) -> None:
    model = created(**options, cache_dir=str(tmp_path))
    original = copy.deepcopy(model)
    dtype = model.visual.conv1.weight.dtype
    images = images_of(model).to(dtype)
    clip_fast.accelerate(model)
    assert why_original(tower(model), images) is None
    got, wanted = model.encode_image(images), original.encode_image(images)
    assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape)
    if dtype == torch.float32:
        assert close(got, wanted)
    else:
        exact = original.float().encode_image(images.float())
        assert error(got, exact) <= 1.1 * error(wanted, exact)
    if "output_dict" in options:
        tokens = torch.randint(1, 100, (3, 77))
        assert close(model(images, tokens)["image_features"], original(images, tokens)["image_features"])


def test_a_torchscript_model_is_refused() -> None:
    model = created(jit=True)
    with pytest.raises(NotServed, match=r"TorchScript program.*load it with jit=False"):
        clip_fast.accelerate(model)
