"""Configs of open_clip as they are published: each is understood as it is, with what it says of the image tower."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from clip_fast.checkpoint.settings import CONVENTIONS, BesideWeights, description, read_settings

IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
CLIPA_TEXT = {
    "context_length": 80, "vocab_size": 32000, "hf_tokenizer_name": "bert-base-uncased",
    "tokenizer_kwargs": {"strip_sep_token": True}, "width": 1152, "heads": 16, "layers": 27, "pool_type": "last",
    "no_causal_mask": True,
}  # fmt: skip
CLIPA_POOLING = {"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True}

# The structure of configs in repositories whose architectures open_clip itself has no names of.
BY_OTHERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "OpenVision, SO400M/14 at 84 pixels": (
        {
            "model_cfg": {
                "embed_dim": 1152,
                "vision_cfg": {
                    "image_size": 84, "layers": 27, "width": 1152, "patch_size": 14, **CLIPA_POOLING,
                    "norm_kwargs": {"eps": 1e-06}, "head_width": 72, "mlp_ratio": 3.7362,
                },
                "text_cfg": CLIPA_TEXT | {"act_kwargs": {"approximate": "tanh"}, "norm_kwargs": {"eps": 1e-06}},
            },
            "preprocess_cfg": IMAGENET | {"interpolation": "bilinear", "resize_mode": "squash"},
        },
        {"eps": 1e-6, "heads": 16, "ln_pre": False, "pool": "avg", "ln_after_pool": True, "activation": "gelu",
         "bilinear": True, "squash": True, "image_size": 84},
    ),
    "NV-CLIP, ViT-H/14 at 224 pixels": (
        {
            "model_cfg": {
                "embed_dim": 1024,
                "init_logit_bias": -10,
                "vision_cfg": {
                    "image_size": 224, "layers": 32, "width": 1280, "head_width": 80, "patch_size": 14, **CLIPA_POOLING,
                    "pos_embed_type": "sin_cos_2d", "patch_dropout": 0.0,
                },
                "text_cfg": CLIPA_TEXT | {"context_length": 77, "width": 1024, "layers": 24},
            },
        },
        {"eps": 1e-5, "heads": 16, "ln_pre": False, "pool": "avg", "ln_after_pool": True, "image_size": 224},
    ),
}  # fmt: skip


def settings_of(folder: Path, content: dict[str, Any]) -> BesideWeights:
    """What is read from a config beside weights of its own shape, without a warning."""
    path = folder / "open_clip_config.json"
    path.write_text(json.dumps(content))
    held = description(path, content)
    assert held is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return read_settings(path, held, CONVENTIONS[False])


@pytest.mark.parametrize("name", BY_OTHERS)
def test_a_config_of_others(name: str, tmp_path: Path) -> None:
    content, wanted = BY_OTHERS[name]
    settings = settings_of(tmp_path, content)
    assert {key: getattr(settings, key) for key in wanted} == wanted
    assert settings.text.unserved


def test_every_config_that_open_clip_publishes(tmp_path: Path) -> None:
    """As `push_to_hf_hub` writes it: the model's config, and how its images are preprocessed."""
    open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed")
    read = set()
    for architecture, tag in open_clip.list_pretrained():
        model, pretrained = open_clip.get_model_config(architecture), open_clip.get_pretrained_cfg(architecture, tag)
        if model is None or "timm_model_name" in model["vision_cfg"] or "multimodal_cfg" in model:
            continue
        processing = {key: pretrained[key] for key in ("mean", "std", "interpolation", "resize_mode")}
        settings = settings_of(tmp_path, {"model_cfg": model, "preprocess_cfg": processing})
        vision = model["vision_cfg"]
        assert settings.image_size == vision["image_size"]
        assert (settings.mean, settings.std) == (tuple(pretrained["mean"]), tuple(pretrained["std"]))
        assert settings.squash == (pretrained["resize_mode"] == "squash")
        assert settings.bilinear == (pretrained["interpolation"] == "bilinear")
        assert settings.activation == ("quick_gelu" if model.get("quick_gelu") else "gelu")
        assert settings.ln_pre != vision.get("no_ln_pre", False)
        assert settings.pool == vision.get("pool_type", "tok")
        read.add(architecture)
    assert {"ViT-H-14-378-quickgelu", "ViT-H-14-worldwide", "ViT-bigG-14-CLIPA-336", "RN50x64"} <= read
