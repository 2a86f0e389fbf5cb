"""SigLIP towers of transformers and of timm, as open_clip has them, accelerated."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from kernel_checks import assert_same_bits
from torch import Tensor, nn

import clip_fast
from clip_fast.dropin.accelerate import is_accelerated
from clip_fast.errors import NotServed

transformers = pytest.importorskip("transformers")
timm = pytest.importorskip("timm")
timm_model = pytest.importorskip("open_clip.timm_model")

# Late releases of transformers 4 take hidden states from the layers, which the original must run for that.
COLLECTED = transformers.__version__.startswith("4.")
VISION = {
    "hidden_size": 144, "intermediate_size": 208, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 64,
    "patch_size": 16,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def images() -> Tensor:
    return torch.randn(3, 3, 64, 64)


def hugging_face(kind: str = "SiglipVisionModel", **vision: Any) -> Any:
    config: Any = transformers.SiglipVisionConfig(**VISION | vision)
    if kind == "SiglipModel":
        text = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
        text |= {"vocab_size": 100, "bos_token_id": 1, "eos_token_id": 2}
        config = transformers.SiglipConfig(text_config=text, vision_config=VISION | vision)
    return getattr(transformers, kind)(config).eval()


def timm_tower(**options: Any) -> Any:
    shape = {
        "img_size": 64, "patch_size": 16, "embed_dim": 144, "depth": 3, "num_heads": 2, "mlp_ratio": 1.5,
        "class_token": False, "global_pool": "map", "num_classes": 0,
    }  # fmt: skip
    return timm.models.vision_transformer.VisionTransformer(**shape | options).eval()


def close(got: Tensor, wanted: Tensor, bound: float = 1e-5) -> bool:
    assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype)
    return float((got.double() - wanted.double()).norm() / wanted.double().norm()) < bound


@pytest.mark.parametrize(("activation", "eps"), [("gelu_pytorch_tanh", 1e-6), ("gelu", 1e-6), ("gelu", 0.5)])
def test_all_outputs_of_transformers(activation: str, eps: float, images: Tensor) -> None:
    model = hugging_face(hidden_act=activation, layer_norm_eps=eps)
    original = copy.deepcopy(model)
    clip_fast.accelerate(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got, wanted = model(pixel_values=images), original(pixel_values=images)
        assert type(got) is type(wanted)
        assert got.hidden_states is None
        assert close(got.pooler_output, wanted.pooler_output)
        assert close(got.last_hidden_state, wanted.last_hidden_state)
        assert not torch.equal(got.pooler_output, wanted.pooler_output)  # another path
    with pytest.warns(match="hidden states or attention weights are asked") if COLLECTED else nullcontext():
        got, wanted = (each(pixel_values=images, output_hidden_states=True) for each in (model, original))
    assert close(got.pooler_output, wanted.pooler_output)
    assert close(got.last_hidden_state, wanted.last_hidden_state)
    assert len(got.hidden_states) == len(wanted.hidden_states) == 4
    assert all(map(close, got.hidden_states, wanted.hidden_states))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pooled = model(pixel_values=images).pooler_output
        assert not torch.equal(pooled, wanted.pooler_output)  # the fast path again
        got, wanted = (each(pixel_values=images, return_dict=False) for each in (model, original))
    assert_same_bits(got[1], pooled)
    assert (type(got), len(got)) == (tuple, len(wanted))


def features(model: Any, images: Tensor) -> Tensor:
    found = model.get_image_features(pixel_values=images)
    return found if isinstance(found, Tensor) else found.pooler_output


def test_image_features(images: Tensor) -> None:
    model = hugging_face("SiglipModel")
    wanted = features(model, images)
    clip_fast.accelerate(model)
    got = features(model, images)
    assert close(got, wanted)
    assert not torch.equal(got, wanted)
    raw = torch.randint(0, 256, images.shape, dtype=torch.uint8)
    fast = features(model, raw)
    clip_fast.restore(model)
    assert close(fast, features(model, raw / 127.5 - 1))
    assert_same_bits(features(model, images), wanted)


@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu"])
def test_timms_tower_in_open_clips_model(activation: str, images: Tensor) -> None:
    visual = timm_model.TimmModel("vit_base_patch16_siglip_224", 144, 64, pool="map", proj="none")
    visual.trunk = timm_tower(act_layer=activation)
    wanted = visual(images)
    clip_fast.accelerate(visual)
    assert is_accelerated(visual)
    got = visual(images)
    assert close(got, wanted)
    assert not torch.equal(got, wanted)
    raw = torch.randint(0, 256, images.shape, dtype=torch.uint8)
    fast = visual(raw)
    masked = visual.trunk(images, torch.ones(16, 16, dtype=torch.bool))
    clip_fast.restore(visual)
    assert close(fast, visual(raw / 127.5 - 1))
    assert_same_bits(masked, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("make", [hugging_face, timm_tower])
def test_verify(make: Any, dtype: torch.dtype) -> None:
    """No less accurate than the original, on enough images for a steady statistic."""
    model = make().to(dtype)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.add_(0.2 * torch.randn_like(parameter))
    verdict = clip_fast.verify(model, torch.randn(24, 3, 64, 64).to(dtype))
    assert verdict.error <= 1.1 * verdict.original_error
    assert verdict.lowest_cosine > 0.9999
    assert not is_accelerated(model)


def test_changed_weights_are_seen(images: Tensor) -> None:
    model = clip_fast.accelerate(hugging_face())
    before = model(pixel_values=images).pooler_output
    getattr(model, "vision_model", model).head.probe.add_(1)
    after = model(pixel_values=images).pooler_output
    assert not close(before, after)
    assert close(after, clip_fast.restore(model)(pixel_values=images).pooler_output)


def test_what_only_the_original_gives(images: Tensor) -> None:
    model = hugging_face(attn_implementation="eager")
    original = copy.deepcopy(model)
    clip_fast.accelerate(model)
    larger = torch.randn(1, 3, 96, 96)
    with pytest.warns(UserWarning, match="positional encodings are to be interpolated"):
        got = model(pixel_values=larger, interpolate_pos_encoding=True).pooler_output
    assert_same_bits(got, original(pixel_values=larger, interpolate_pos_encoding=True).pooler_output)
    with pytest.warns(UserWarning, match="attention weights are asked for"):
        assert len(model(pixel_values=images, output_attentions=True).attentions) == 3
    assert not torch.equal(model(pixel_values=images).pooler_output, original(pixel_values=images).pooler_output)


@pytest.mark.parametrize("all_states", [False, True])
def test_autocast_has_a_dtype_for_each_output(all_states: bool, images: Tensor) -> None:
    model = hugging_face()
    with torch.autocast("cpu", torch.bfloat16):
        wanted = model(images, output_hidden_states=all_states)
        clip_fast.accelerate(model)
        got = model(images, output_hidden_states=all_states)
    assert [got[name].dtype for name in ("last_hidden_state", "pooler_output")] == [
        wanted[name].dtype for name in ("last_hidden_state", "pooler_output")
    ]
    assert close(got.pooler_output, wanted.pooler_output, 0.05)


def test_dropout_in_training(images: Tensor) -> None:
    tower = clip_fast.accelerate(timm_tower(proj_drop_rate=0.5)).train()
    with pytest.warns(UserWarning, match="training mode, with dropout"):
        assert not torch.equal(tower(images), tower(images))


def replaced(change: Any) -> Any:
    tower = timm_tower()
    change(tower)
    return tower


def other_head(model: Any) -> Any:
    getattr(model, "vision_model", model).head.layernorm.eps = 1e-5
    return model


def unused_head(model: Any) -> Any:
    getattr(model, "vision_model", model).use_head = False  # which is the tower itself in transformers 5
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: timm_tower(class_token=True), "class tokens, images of any size, or another pool"),
        (lambda: timm_tower(dynamic_img_size=True), "class tokens, images of any size, or another pool"),
        (lambda: timm_tower(init_values=0.1), r"ls1 is a .*LayerScale"),
        (lambda: timm_tower(qk_norm=True), r"q_norm is a .*LayerNorm"),
        (lambda: timm_tower(num_classes=10), "head is a .*Linear"),
        (lambda: timm_tower(act_layer="relu"), "the activation .*ReLU is neither"),
        (lambda: replaced(lambda t: setattr(t.blocks[1].attn, "scale", 1.0)), "an attention has its own scale"),
        (lambda: replaced(lambda t: setattr(t.norm, "eps", 1e-5)), "norm1 has eps 1e-06, expected 1e-05"),
        (lambda: replaced(lambda t: setattr(t.attn_pool.mlp, "act", nn.GELU("tanh"))), "blocks differ in their activ"),
        (lambda: hugging_face(vision_use_head=False), "its parts are not those that its class makes: .*head"),
        (lambda: unused_head(hugging_face()), "its head is not used"),
        (lambda: other_head(hugging_face()), "head.layernorm has eps 1e-05, expected 1e-06"),
    ],
)
def test_what_is_not_served_is_named(make: Any, message: str) -> None:
    model = make()
    with pytest.raises(NotServed, match=message):
        clip_fast.accelerate(model)
    assert not is_accelerated(model)
