"""The plain encoders against openai-clip, open_clip and transformers, with shared random weights.

The bounds are relative errors of 1e-5 in float32 and 1e-10 in float64. Towers that are too big for a test keep their
width, heads, resolution and tokens, and lose layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from saved_clips import WithoutInitialisation
from torch import Tensor, nn

from bench.models import OPEN_CLIP_MODELS
from clip_fast.checkpoint.published import OPENAI_MODELS
from clip_fast.towers import reference
from clip_fast.towers.config import ENCODE_TOKENS, HIDDEN_STATES, Config, ResNetConfig, SiglipConfig, VitConfig

BOUND = {torch.float32: 1e-5, torch.float64: 1e-10}


def cut(config: Config) -> Config:
    """`config` with few layers, everything else as it is."""
    return dataclasses.replace(config, layers=2 if isinstance(config, VitConfig) else (2, 1, 2, 1))


def images(config: Config, dtype: torch.dtype) -> Tensor:
    return torch.randn(2, 3, config.image_size, config.image_size, dtype=dtype)


def randomise(tower: nn.Module) -> None:
    """Sets random weights and statistics everywhere, so that no gain of one or bias of zero hides a mistake."""
    with torch.no_grad():
        for name, tensor in tower.state_dict().items():
            if name.endswith("num_batches_tracked"):
                continue
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2)
            elif tensor.ndim == 1:
                tensor.copy_(torch.randn_like(tensor) * 0.2 + (1 if name.endswith("weight") else 0))
            else:
                tensor.normal_(std=tensor[0].numel() ** -0.5)


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    return float((ours - theirs).norm() / theirs.norm())


def made_random(make: Callable[[], nn.Module]) -> nn.Module:
    """A tower in evaluation, made without its own initialisation, which takes longer than its products."""
    with WithoutInitialisation():
        tower = make().eval()
    randomise(tower)
    return tower


def ours_like(theirs: nn.Module, config: Config) -> nn.Module:
    """The plain tower with the weights of a package's."""
    with torch.device("meta"):
        ours = reference.build(config)
    ours.load_state_dict(theirs.state_dict(), assign=True)
    return ours.eval()


def openai_tower(config: Config) -> nn.Module:
    model = pytest.importorskip("clip.model", reason="openai-clip is not installed")
    if isinstance(config, ResNetConfig):
        shape = config.layers, config.embed_dim, config.heads, config.image_size, config.width
        return made_random(lambda: model.ModifiedResNet(*shape))
    shape = config.image_size, config.patch_size, config.width, config.layers, config.heads, config.embed_dim
    return made_random(lambda: model.VisionTransformer(*shape))


def in_float64(tower: nn.Module, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """Replaces openai-clip's LayerNorm, which always computes in float32, by one that computes in float64."""
    model = pytest.importorskip("clip.model", reason="openai-clip is not installed")
    monkeypatch.setattr(model.LayerNorm, "forward", nn.LayerNorm.forward)
    return tower.double()


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if name in ("RN50x16", "RN50x64") else name for name in OPENAI_MODELS],
)
def test_openai_clip(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    config = cut(OPENAI_MODELS[name])
    theirs = openai_tower(config)
    ours = ours_like(theirs, config)
    if dtype == torch.float64:
        theirs, ours = in_float64(theirs, monkeypatch), ours.double()
    x = images(config, dtype)
    if len(x[0, 0]) > 300:  # of large images one: two are told apart by smaller towers of the same kinds
        x = x[:1]
    with torch.no_grad():
        assert relative_error(ours(x), theirs(x)) < BOUND[dtype]


@pytest.mark.parametrize("name", ["ViT-B/32", "RN50"])
def test_openai_clip_uncut(name: str) -> None:
    config = OPENAI_MODELS[name]
    theirs = openai_tower(config)
    ours = ours_like(theirs, config)
    x = images(config, torch.float32)
    with torch.no_grad():
        assert relative_error(ours(x), theirs(x)) < BOUND[torch.float32]


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-H-14", "ViT-bigG-14"])
def test_open_clip_vit(name: str, activation: Any, dtype: torch.dtype) -> None:
    open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed")
    config = dataclasses.replace(OPEN_CLIP_MODELS[name], layers=2, activation=activation)
    theirs = made_random(
        lambda: open_clip.transformer.VisionTransformer(
            image_size=config.image_size, patch_size=config.patch_size, width=config.width, layers=config.layers,
            heads=config.heads, mlp_ratio=config.mlp_ratio, output_dim=config.embed_dim,
            act_layer=open_clip.transformer.QuickGELU if activation == "quick_gelu" else nn.GELU,
        )
    )  # fmt: skip
    ours = ours_like(theirs, config)
    x = images(config, dtype)[:1]
    with torch.no_grad():
        assert relative_error(ours.to(dtype)(x), theirs.to(dtype)(x)) < BOUND[dtype]


@pytest.mark.parametrize("dtype", BOUND, ids=str)
def test_open_clip_resnet(dtype: torch.dtype) -> None:
    open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed")
    config = OPENAI_MODELS["RN50"]
    assert isinstance(config, ResNetConfig)
    theirs = open_clip.modified_resnet.ModifiedResNet(
        layers=config.layers, output_dim=config.embed_dim, heads=config.heads, image_size=224, width=config.width
    ).eval()
    randomise(theirs)
    ours = reference.build(config)
    ours.load_state_dict(theirs.state_dict())
    x = images(config, dtype)
    with torch.no_grad():
        assert relative_error(ours.to(dtype)(x), theirs.to(dtype)(x)) < BOUND[dtype]


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_transformers(activation: Any, dtype: torch.dtype, tmp_path: Any) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from clip_fast.checkpoint.reading import read_checkpoint

    theirs = transformers.CLIPVisionModelWithProjection(
        transformers.CLIPVisionConfig(
            hidden_size=768, intermediate_size=3072, num_hidden_layers=2, num_attention_heads=12, image_size=224,
            patch_size=32, projection_dim=512, hidden_act=activation,
        )
    ).eval()  # fmt: skip
    randomise(theirs)
    theirs.save_pretrained(tmp_path)
    checkpoint = read_checkpoint(tmp_path)
    expected = dataclasses.replace(OPENAI_MODELS["ViT-B/32"], layers=2, activation=activation)
    assert checkpoint.config == expected
    ours = reference.build(checkpoint.config)
    ours.load_state_dict(checkpoint.state_dict)
    x = images(expected, dtype)
    with torch.no_grad():
        assert relative_error(ours.to(dtype)(x), theirs.to(dtype)(pixel_values=x).image_embeds) < BOUND[dtype]


def test_embeddings_are_not_normalised() -> None:
    tower = reference.build(VitConfig(32, 16, width=64, layers=1, heads=1, embed_dim=8))
    with torch.no_grad():
        short = tower(torch.randn(4, 3, 32, 32))
        tower.proj *= 3
        assert not torch.allclose(short.norm(dim=-1), torch.ones(4))


# --- SigLIP ----------------------------------------------------------------------------------------------------------

# Every published shape of a block: widths, head sizes, MLPs, and numbers of tokens.
SIGLIP = {
    "B/16 at 224": SiglipConfig(224, 16, width=768, layers=2, heads=12, mlp_width=3072),
    "L/16 at 256": SiglipConfig(256, 16, width=1024, layers=1, heads=16, mlp_width=4096),
    "SO400M/14 at 384": SiglipConfig(384, 14, width=1152, layers=1, heads=16, mlp_width=4304),
}
TINY_SIGLIP = SiglipConfig(70, 16, width=72, layers=3, heads=3, mlp_width=136)  # pixels past the last whole patch


def siglip_of(config: SiglipConfig) -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    return transformers.SiglipVisionModel(
        transformers.SiglipVisionConfig(
            hidden_size=config.width, intermediate_size=config.mlp_width, num_hidden_layers=config.layers,
            num_attention_heads=config.heads, image_size=config.image_size, patch_size=config.patch_size,
        )
    ).eval()  # fmt: skip


def renamed_siglip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of transformers' SigLIP under the names of the plain tower."""
    renamed: dict[str, Tensor] = {}
    for key, tensor in state.items():
        key = key.removeprefix("vision_model.")
        for theirs, ours in {
            "embeddings.patch_embedding": "conv1", "embeddings.position_embedding.weight": "positional_embedding",
            "encoder.layers": "transformer.resblocks", "layer_norm": "ln_", "self_attn": "attn",
            "post_layernorm": "ln_post", "head.probe": "map_head.query", "head.attention": "map_head.attn",
            "head.layernorm": "map_head.ln", "head.mlp": "map_head.mlp", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
        }.items():  # fmt: skip
            key = key.replace(theirs, ours)
        renamed[key] = tensor
    for prefix in {key.rpartition(".q_proj.")[0] for key in renamed if ".q_proj." in key}:
        for part in ("weight", "bias"):
            parts = [renamed.pop(f"{prefix}.{name}_proj.{part}") for name in "qkv"]
            renamed[f"{prefix}.in_proj_{part}"] = torch.cat(parts)
    return renamed


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("config", [TINY_SIGLIP, *SIGLIP.values()], ids=["tiny", *SIGLIP])
def test_siglip_of_transformers(config: SiglipConfig, dtype: torch.dtype) -> None:
    theirs = siglip_of(config)
    randomise(theirs)
    ours = reference.build(config)
    ours.load_state_dict(renamed_siglip(theirs.state_dict()))
    theirs, ours, x = theirs.to(dtype), ours.to(dtype), images(config, dtype)[:1]
    with torch.no_grad():
        wanted = theirs(pixel_values=x, output_hidden_states=True)
        embeddings, tokens = ours.results(x, ENCODE_TOKENS)
        assert relative_error(embeddings, wanted.pooler_output) < BOUND[dtype]
        assert relative_error(tokens, wanted.last_hidden_state) < BOUND[dtype]
        assert relative_error(ours(x), wanted.pooler_output) < BOUND[dtype]
        states = ours.results(x, HIDDEN_STATES)
    assert len(states) == len(wanted.hidden_states) == config.layers + 1
    for got, expected in zip(states, wanted.hidden_states, strict=True):
        assert relative_error(got, expected) < BOUND[dtype]
