"""open_clip's variants of the ViT, as it writes them itself: loaded as its own, and the others refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from saved_clips import VISION, close, open_clip_folder

import clip_fast
from clip_fast.checkpoint.reading import read_checkpoint
from clip_fast.errors import CheckpointError, NotServed

VARIANTS: dict[str, dict[str, Any]] = {
    "no ln_pre": {"no_ln_pre": True},
    "average": {"pool_type": "avg"},
    "class token, by its name": {"pool_type": "tok"},
    "average before ln_post": {"pool_type": "avg", "final_ln_after_pool": True},
    "class token before ln_post": {"final_ln_after_pool": True},
    "CLIPA": {"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True},
    "LayerScale": {"ls_init_value": 1e-4},
    "not square": {"image_size": [64, 96]},
    "fixed positions": {"pos_embed_type": "sin_cos_2d"},
    "another epsilon and GELU": {"norm_kwargs": {"eps": 0.01}, "act_kwargs": {"approximate": "tanh"}},
    "all": {
        "image_size": [48, 80], "no_ln_pre": True, "pool_type": "avg", "ls_init_value": 1e-4, "patch_dropout": 0.5,
        "output_tokens": False,
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def _no_gradients() -> object:
    with torch.no_grad():
        yield


def images_of(model: Any, batch: int = 3) -> torch.Tensor:
    return torch.randn(batch, 3, *model.visual.image_size)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_is_loaded(name: str, tmp_path: Path) -> None:
    theirs = open_clip_folder(tmp_path, vision_cfg=VISION | VARIANTS[name])
    ours, preprocess = clip_fast.load(tmp_path, "cpu")
    images = images_of(theirs)
    assert close(ours.encode_image(images), theirs.encode_image(images))
    theirs.visual.output_tokens = True
    for got, wanted in zip(ours.encode_image(images, return_patch_tokens=True), theirs.visual(images), strict=True):
        assert close(got, wanted)
    theirs.visual.output_tokens = False
    states = theirs.visual.forward_intermediates(images, output_fmt="NLC", output_extra_tokens=True)
    last = torch.cat([states["image_intermediates_prefix"][-1], states["image_intermediates"][-1]], dim=1)
    assert close(ours.hidden_state(images, -1), last)
    raw = torch.randint(0, 256, images.shape, dtype=torch.uint8)
    normalised = (raw / 255 - 0.5) / 0.25
    assert close(ours.encode_image(raw), theirs.encode_image(normalised))
    assert close(ours.encode_image(raw.permute(0, 2, 3, 1).contiguous()), theirs.encode_image(normalised))
    texts = ours.tokenize(["a photo of a dog", ""])
    assert close(ours.encode_text(texts), theirs.encode_text(texts))
    picture = Image.effect_noise((130, 70), 60).convert("RGB")
    assert preprocess(picture).shape == images.shape[1:]


def test_verified(tmp_path: Path) -> None:
    open_clip_folder(tmp_path, vision_cfg=VISION | VARIANTS["all"])
    verdict = clip_fast.verify(clip_fast.load(tmp_path, "cpu")[0])
    assert verdict.lowest_cosine > 0.99999
    assert verdict.error < 1e-5


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("mode", ["shortest", "squash"])
@pytest.mark.parametrize("size", [(48, 32), (32, 80), 32])
def test_pictures_are_preprocessed_as_by_open_clip(size: Any, mode: str, interpolation: str, tmp_path: Path) -> None:
    """As the config beside the weights says."""
    transforms = pytest.importorskip("open_clip.transform", reason="open_clip is not installed")
    mean, std = (0.4, 0.5, 0.3), (0.2, 0.3, 0.25)
    theirs = transforms.image_transform(size, False, mean=mean, std=std, resize_mode=mode, interpolation=interpolation)
    open_clip_folder(tmp_path, vision_cfg=VISION | {"image_size": size, "layers": 1})
    file = tmp_path / "open_clip_config.json"
    processing = {"mean": mean, "std": std, "resize_mode": mode, "interpolation": interpolation, "size": size}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"preprocess_cfg": processing}))
    ours = clip_fast.load(tmp_path, "cpu")[1]
    with_torchvision = transforms.Compose(ours.transforms)
    pixels = torch.randint(0, 256, (90, 90, 3), dtype=torch.uint8).numpy()
    for width, height in ((60, 40), (41, 90), (24, 40), (90, 7), (40, 24), (13, 13), (90, 89)):
        picture = Image.fromarray(pixels[:height, :width])
        wanted = theirs(picture)
        assert wanted.shape == (3, *((size, size) if isinstance(size, int) else size))
        assert torch.equal(ours(picture), wanted)
        assert torch.equal(with_torchvision(picture), wanted)


def test_another_size_resamples_positions_as_open_clip_does(tmp_path: Path) -> None:
    """Its own resampling takes the stored grid for a square."""
    open_clip = pytest.importorskip("open_clip.model", reason="open_clip is not installed")
    theirs = open_clip_folder(tmp_path, vision_cfg=VISION | VARIANTS["CLIPA"])
    wide = {"embed_dim": 32, "vision_cfg": VISION | VARIANTS["CLIPA"] | {"image_size": (48, 112)}}
    other = open_clip.CLIP(**wide, text_cfg={"width": 64, "heads": 2, "layers": 2}).eval()
    state = theirs.state_dict()
    open_clip.resize_pos_embed(state, other)
    other.load_state_dict(state)
    ours, preprocess = clip_fast.load(tmp_path, "cpu", image_size=(48, 112))
    images = torch.randn(2, 3, 48, 112)
    assert close(ours.encode_image(images), other.encode_image(images))
    assert preprocess.image_size == ours.config.image_size == (48, 112)
    with pytest.raises(ValueError, match=r"images must be \[batch, 3, 48, 112\], got \[2, 3, 112, 48\]"):
        ours.encode_image(images.transpose(2, 3))
    with pytest.raises(ValueError, match=r"image_size must be at least patch_size, got \(48, 15\)"):
        clip_fast.load(tmp_path, "cpu", image_size=(48, 15))
    assert clip_fast.load(tmp_path, "cpu", image_size=(64, 64))[1].image_size == 64


@pytest.mark.parametrize("name", ["CLIPA", "not square"])
def test_what_the_weights_alone_do_not_tell(name: str, tmp_path: Path) -> None:
    open_clip_folder(tmp_path, vision_cfg=VISION | VARIANTS[name])
    (tmp_path / "open_clip_config.json").unlink()
    problem = {"CLIPA": "place its open_clip_config.json beside it", "not square": "got 25 rows"}[name]
    with pytest.raises(CheckpointError, match=problem):
        read_checkpoint(tmp_path / "open_clip_model.safetensors", "gelu")


@pytest.mark.parametrize("custom", [False, True])
def test_a_text_tower_with_layer_scale_is_not_served(custom: bool, tmp_path: Path) -> None:
    """By the config, and by the weights alone."""
    theirs = open_clip_folder(tmp_path, custom, text_cfg={"ls_init_value": 1e-4}, vision_cfg=VISION)
    images = images_of(theirs)
    for why in ("text_cfg sets ls_init_value to 0.0001", "it has a LayerScale"):
        ours = clip_fast.load(tmp_path / "open_clip_model.safetensors", "cpu", activation="gelu")[0]
        assert close(ours.encode_image(images), theirs.encode_image(images))
        with pytest.raises(NotServed, match=why):
            ours.tokenize("a dog")
        (tmp_path / "open_clip_config.json").unlink(missing_ok=True)


def test_digests_of_output_folders_tell_variants_apart(tmp_path: Path) -> None:
    from clip_fast.bulk.manifest import weights_digest

    digests = set()
    for number, name in enumerate(("no ln_pre", "CLIPA", "average")):
        folder = tmp_path / str(number)
        open_clip_folder(folder, vision_cfg=VISION | VARIANTS["no ln_pre"])
        config = json.loads((folder / "open_clip_config.json").read_text())
        config["model_cfg"]["vision_cfg"] |= VARIANTS[name] | {"no_ln_pre": True}
        (folder / "open_clip_config.json").write_text(json.dumps(config))
        save_file(load_file(tmp_path / "0" / "open_clip_model.safetensors"), folder / "open_clip_model.safetensors")
        digests.add(weights_digest(clip_fast.load(folder, "cpu")[0]))
    assert len(digests) == 3


# The image part of open_clip's configs of models that are refused, and a key of their weights.
REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "EVA02-B-16": (
        {"timm_model_name": "eva02_base_patch16_clip_224", "timm_pool": "token", "timm_proj": None},
        "visual.trunk.blocks.0.attn.q_proj.weight",
        "no SigLIP's, eva02_base_patch16_clip_224, which is not served",
    ),
    "MobileCLIP-S1": (
        {"timm_model_name": "fastvit_mci1", "timm_pool": "avg", "timm_proj": None, "image_size": 256},
        "visual.trunk.stem.0.conv_kxk.0.conv.weight",
        "no SigLIP's, fastvit_mci1, which is not served",
    ),
    "MobileCLIP-B": (
        {"timm_model_name": "vit_base_mci_224", "timm_pool": "token", "timm_proj": None},
        "visual.trunk.patch_embed.backbone.stem.0.conv.weight",
        "no SigLIP's, vit_base_mci_224, which is not served",
    ),
    "convnext_base": (
        {"timm_model_name": "convnext_base", "timm_pool": "", "timm_proj": "linear", "image_size": 224},
        "visual.trunk.stem.0.weight",
        "no SigLIP's, convnext_base, which is not served",
    ),
    "coca_ViT-B-32": (
        VISION | {"attentional_pool": True, "attn_pooler_heads": 8, "output_tokens": True},
        "visual.attn_pool.query",
        "an attentional pooler, as CoCa has, which is not served",
    ),
    "a custom block": (VISION | {"block_type": "custom"}, "", "sets block_type to 'custom', which is not served"),
    "a norm of queries": (VISION | {"qk_norm": True}, "", "sets qk_norm to True, which is not served"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name: str, tmp_path: Path) -> None:
    vision, key, problem = REFUSED[name]
    open_clip_folder(tmp_path, vision_cfg=VISION)
    weights = tmp_path / "open_clip_model.safetensors"
    state = {own: tensor for own, tensor in load_file(weights).items() if not (key and own.startswith("visual."))}
    save_file(state | ({key: torch.randn(4, 4)} if key else {}), weights)
    config = {"embed_dim": 32, "vision_cfg": vision, "text_cfg": {"width": 64, "heads": 2, "layers": 2}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    with pytest.raises(CheckpointError, match=problem):
        clip_fast.load(tmp_path, "cpu")


def test_naflex_is_refused_by_name(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    small = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = transformers.Siglip2Config(
        text_config={**small, "vocab_size": 64}, vision_config={**small, "num_patches": 16}
    )
    transformers.Siglip2Model(config).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"NaFlex|siglip2"):
        clip_fast.load(tmp_path, "cpu")
