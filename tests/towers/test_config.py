"""The configurations against the numbers that the papers and the packages publish."""

from __future__ import annotations

import dataclasses

import pytest

from bench.models import OPEN_CLIP_MODELS
from clip_fast.checkpoint.published import OPENAI_CHECKPOINTS, OPENAI_MODELS
from clip_fast.towers import config
from clip_fast.towers.config import ResNetConfig, VitConfig


def test_the_openai_models_have_the_papers_token_counts() -> None:
    tokens = {name: c.tokens for name, c in OPENAI_MODELS.items()}
    assert tokens == {
        "RN50": 50, "RN101": 50, "RN50x4": 82, "RN50x16": 145, "RN50x64": 197,
        "ViT-B/32": 50, "ViT-B/16": 197, "ViT-L/14": 257, "ViT-L/14@336px": 577,
    }  # fmt: skip


def test_addresses_and_hashes_are_those_of_openai_clip() -> None:
    clip = pytest.importorskip("clip", reason="openai-clip is not installed")
    assert {name: checkpoint.url for name, checkpoint in OPENAI_CHECKPOINTS.items()} == clip.clip._MODELS
    for checkpoint in OPENAI_CHECKPOINTS.values():
        assert checkpoint.sha256 == checkpoint.url.split("/")[-2]
        assert checkpoint.filename == checkpoint.url.split("/")[-1]
    assert OPENAI_CHECKPOINTS.keys() == OPENAI_MODELS.keys()


@pytest.mark.parametrize("name", OPEN_CLIP_MODELS)
def test_the_open_clip_family_has_open_clips_shapes(name: str) -> None:
    open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed")
    published = open_clip.get_model_config(name)
    tower = published["vision_cfg"]
    ours = OPEN_CLIP_MODELS[name]
    head_width = tower.get("head_width", 64)
    assert (ours.image_size, ours.patch_size) == (tower["image_size"], tower["patch_size"])
    assert (ours.width, ours.layers, ours.head_dim) == (tower["width"], tower["layers"], head_width)
    assert ours.mlp_width == int(tower["width"] * tower.get("mlp_ratio", 4.0))
    assert ours.embed_dim == published["embed_dim"]


def test_head_sizes_of_the_large_models() -> None:
    assert [OPEN_CLIP_MODELS[n].head_dim for n in ("ViT-H-14", "ViT-g-14", "ViT-bigG-14")] == [80, 88, 104]
    assert [OPEN_CLIP_MODELS[n].mlp_width for n in ("ViT-g-14", "ViT-bigG-14")] == [6144, 8192]


def test_the_normalisation_is_clips() -> None:
    clip = pytest.importorskip("clip", reason="openai-clip is not installed")
    normalise = clip.clip._transform(224).transforms[-1]
    assert (tuple(normalise.mean), tuple(normalise.std)) == (config.IMAGE_MEAN, config.IMAGE_STD)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 0}, "width must be positive, got 0"),
        ({"heads": 7}, "width must be a multiple of heads"),
        ({"image_size": 16}, "image_size must be at least patch_size"),
        ({"activation": "relu"}, "activation must be 'quick_gelu', 'gelu' or 'gelu_tanh', got 'relu'"),
    ],
)
def test_a_senseless_vit_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(OPENAI_MODELS["ViT-B/32"], **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": (3, 4, 6)}, "layers must be four positive numbers"),
        ({"layers": (3, 4, 0, 3)}, "layers must be four positive numbers"),
        ({"heads": 30}, "must be a multiple of heads"),
        ({"image_size": 31}, "image_size must be at least 32"),
    ],
)
def test_a_senseless_resnet_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(OPENAI_MODELS["RN50"], **changes)


def test_configurations_are_values() -> None:
    assert VitConfig(224, 32, width=768, layers=12, heads=12, embed_dim=512) == OPENAI_MODELS["ViT-B/32"]
    assert len({OPENAI_MODELS["RN50"], ResNetConfig((3, 4, 6, 3), 64, 32, 224, 1024)}) == 1
