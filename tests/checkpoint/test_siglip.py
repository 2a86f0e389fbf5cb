"""SigLIP's checkpoints, as transformers and open_clip write them, and what is refused of them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import clip_fast
from clip_fast.checkpoint.reading import read_checkpoint, read_state_dict
from clip_fast.checkpoint.settings import _TIMM_SIGLIP, _timm_activation
from clip_fast.errors import CheckpointError
from clip_fast.towers import reference
from clip_fast.towers.config import SiglipConfig

transformers = pytest.importorskip("transformers")
timm = pytest.importorskip("timm")
open_clip = pytest.importorskip("open_clip")

SHAPE = SiglipConfig(64, 16, width=128, layers=2, heads=2, mlp_width=208)


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def randomised(module: nn.Module) -> nn.Module:
    for tensor in module.parameters():
        tensor.copy_(torch.randn_like(tensor) * (0.2 if tensor.ndim == 1 else tensor[0].numel() ** -0.5))
    return module.eval()


def hugging_face(kind: str = "SiglipModel", **vision: Any) -> Any:
    shape = {
        "hidden_size": SHAPE.width, "intermediate_size": SHAPE.mlp_width, "num_hidden_layers": SHAPE.layers,
        "num_attention_heads": SHAPE.heads, "image_size": SHAPE.image_size, "patch_size": SHAPE.patch_size, **vision,
    }  # fmt: skip
    config: Any = transformers.SiglipVisionConfig(**shape)
    if kind == "SiglipModel":
        text = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
        text |= {"vocab_size": 100, "bos_token_id": 1, "eos_token_id": 2}
        config = transformers.SiglipConfig(text_config=text, vision_config=shape)
    return randomised(getattr(transformers, kind)(config))


def timm_tower(activation: str = "gelu") -> nn.Module:
    return randomised(
        timm.models.vision_transformer.VisionTransformer(
            img_size=SHAPE.image_size, patch_size=SHAPE.patch_size, embed_dim=SHAPE.width, depth=SHAPE.layers,
            num_heads=SHAPE.heads, mlp_ratio=SHAPE.mlp_width / SHAPE.width, class_token=False, global_pool="map",
            num_classes=0, act_layer=activation,
        )
    )  # fmt: skip


def write_open_clip(folder: Path, tower: nn.Module, name: str, **vision: Any) -> Path:
    """A folder as open_clip saves it: the tower in its trunk, and a text tower, which is not read."""
    state = {f"visual.trunk.{key}": tensor for key, tensor in tower.state_dict().items()}
    save_file(
        state | {"logit_scale": torch.ones(()), "logit_bias": torch.ones(()), "text.ln_final.weight": torch.ones(3)},
        folder / "open_clip_model.safetensors",
    )
    vision = {"image_size": SHAPE.image_size, "timm_model_name": name, "timm_model_pretrained": False,
              "timm_pool": "map", "timm_proj": "none"} | vision  # fmt: skip
    processing = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
    config = {"model_cfg": {"embed_dim": SHAPE.width, "vision_cfg": vision}, "preprocess_cfg": processing}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return folder


def features(path: Path, images: Tensor, **options: Any) -> Tensor:
    checkpoint = read_checkpoint(path, **options)
    tower = reference.build(checkpoint.config)
    tower.load_state_dict(checkpoint.state_dict)
    return tower(images)


def close(ours: Tensor, theirs: Tensor) -> bool:
    return ours.shape == theirs.shape and float((ours - theirs).norm() / theirs.norm()) < 1e-5


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, SHAPE.image_size, SHAPE.image_size)


@pytest.mark.parametrize(("activation", "eps"), [("gelu_pytorch_tanh", 1e-6), ("gelu", 1e-6), ("gelu", 0.5)])
@pytest.mark.parametrize("kind", ["SiglipModel", "SiglipVisionModel"])
def test_hugging_face(kind: str, activation: str, eps: float, images: Tensor, tmp_path: Path) -> None:
    model = hugging_face(kind, hidden_act=activation, layer_norm_eps=eps)
    model.save_pretrained(tmp_path)
    tower = getattr(model, "vision_model", model)
    assert close(features(tmp_path, images), tower(pixel_values=images).pooler_output)
    checkpoint = read_checkpoint(tmp_path)
    assert isinstance(checkpoint.config, SiglipConfig)
    assert (checkpoint.mean, checkpoint.std, checkpoint.squash) == ((0.5,) * 3, (0.5,) * 3, True)


@pytest.mark.parametrize(
    ("name", "activation"), [("vit_base_patch16_siglip_224", "gelu"), ("vit_so400m_patch16_siglip_512", "gelu_tanh")]
)
def test_open_clip(name: str, activation: str, images: Tensor, tmp_path: Path) -> None:
    tower = timm_tower(activation)
    write_open_clip(tmp_path, tower, name)
    assert close(features(tmp_path, images), tower(images))
    assert read_checkpoint(tmp_path).config.activation == activation  # type: ignore[union-attr]
    weights = tmp_path / "finetuned.safetensors"
    (tmp_path / "open_clip_model.safetensors").rename(weights)
    assert close(features(weights, images), tower(images))  # a config counts beside weights of any name
    (tmp_path / "open_clip_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"does not say which activation .*pass activation='gelu_tanh' or"):
        read_checkpoint(weights)
    assert close(features(weights, images, activation=activation), tower(images))
    assert read_checkpoint(weights, activation).squash  # type: ignore[arg-type]


def test_timms_towers_have_the_activation_that_is_told() -> None:
    """Every name that open_clip has: on the meta device, where no weights are drawn."""
    names = {
        config["vision_cfg"].get("timm_model_name")
        for name in open_clip.list_models()
        if "SigLIP" in name and (config := open_clip.get_model_config(name))
    }
    assert len(names) > 15
    for name in names:
        assert _TIMM_SIGLIP.fullmatch(name)
        with torch.device("meta"):
            tower = timm.create_model(name, pretrained=False, num_classes=0, global_pool="map", depth=1)
        x = torch.linspace(-3, 3, 7)
        theirs = tower.attn_pool.mlp.act(x)
        assert torch.allclose(theirs, tower.blocks[0].mlp.act(x))
        assert torch.equal(theirs, reference.ACTIVATIONS[_timm_activation(name)](x)), name
        assert {module.eps for module in tower.modules() if isinstance(module, nn.LayerNorm)} == {1e-6}


def test_load_and_encode(images: Tensor, tmp_path: Path) -> None:
    model = hugging_face()
    model.save_pretrained(tmp_path)
    encoder, preprocess = clip_fast.load(tmp_path, device="cpu")
    wanted = model.vision_model(pixel_values=images, output_hidden_states=True)
    assert close(encoder.encode_image(images), wanted.pooler_output)
    embeddings, tokens = encoder.encode_image(images, return_patch_tokens=True)
    assert close(embeddings, wanted.pooler_output)
    assert close(tokens, wanted.last_hidden_state)
    for layer in (0, 1, -1):
        assert close(encoder.hidden_state(images, layer), wanted.hidden_states[layer])
    raw = torch.randint(0, 256, images.shape, dtype=torch.uint8)
    assert close(encoder.encode_image(raw), model.vision_model(pixel_values=raw / 127.5 - 1).pooler_output)
    assert preprocess.image_size == SHAPE.image_size


def test_another_image_size(tmp_path: Path) -> None:
    """The positions are resampled as timm does."""
    tower: Any = timm_tower()
    write_open_clip(tmp_path, tower, "vit_base_patch16_siglip_224")
    encoder, preprocess = clip_fast.load(tmp_path, device="cpu", image_size=96)
    assert preprocess.image_size == 96
    images = torch.randn(2, 3, 96, 96)
    tower.set_input_size((96, 96))
    assert close(encoder.encode_image(images), tower(images))


@pytest.mark.parametrize("resample", [3, 2], ids=["SigLIP", "SigLIP 2"])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
@pytest.mark.filterwarnings("error:.*not preprocessed")
def test_images_are_preprocessed_as_the_processor_does(mode: str, resample: int, tmp_path: Path) -> None:
    """By the settings that transformers' converter writes: SigLIP 2's images are resized bilinearly."""
    pil = pytest.importorskip("transformers.models.siglip.image_processing_pil_siglip")
    processor = pil.SiglipImageProcessorPil(size={"height": 64, "width": 64}, resample=resample)
    hugging_face("SiglipVisionModel").save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    _, preprocess = clip_fast.load(tmp_path, device="cpu")
    pixels = np.random.default_rng().integers(0, 256, (61, 83, 4), dtype=np.uint8)
    image = Image.fromarray(pixels, "RGBA").convert(mode)
    wanted = torch.as_tensor(np.array(processor(images=image)["pixel_values"][0]))
    assert torch.equal(preprocess(image), wanted)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vision", "message"),
    [
        ({"timm_pool": "avg"}, "sets timm_pool to 'avg', which is not served"),
        ({"timm_proj": "linear"}, "sets timm_proj to 'linear', which is not served"),
        ({"timm_model_name": "vit_base_patch16_224"}, "sets timm_model_name to 'vit_base_patch16_224'"),
        ({"timm_model_name": "vit_base_patch32_siglip_256"}, "describes another model .*patch size 32, not 16"),
        ({"image_size": 80}, "images of 64 pixels, the config beside it says 80"),
    ],
)
def test_open_clip_configs_that_are_not_served(vision: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_open_clip(tmp_path, timm_tower(), **{"name": "vit_base_patch16_siglip_224", **vision})
    if "timm_model_name" in vision:
        write_open_clip(tmp_path, timm_tower(), vision["timm_model_name"])
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "clip"}, "model_type must be 'siglip' or 'siglip_vision_model', got 'clip'"),
        ({"layer_norm_eps": "1e-6"}, "layer_norm_eps must be a number between 0 and 1, got '1e-6'"),
        ({"hidden_act": "relu"}, "hidden_act must be one of .*, got 'relu'"),
        ({"hidden_size": 64}, "describes another model .*width 64, not 128"),
    ],
)
def test_configs_of_transformers_that_are_not_served(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    hugging_face("SiglipVisionModel").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(tmp_path)


def test_naflex_is_refused_by_name(tmp_path: Path) -> None:
    config = transformers.Siglip2VisionConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1, num_patches=16
    )
    transformers.Siglip2VisionModel(config).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="belongs to a NaFlex tower"):
        read_checkpoint(tmp_path)


def test_a_tower_without_its_head(tmp_path: Path) -> None:
    hugging_face("SiglipVisionModel", vision_use_head=False).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"misses (vision_model\.)?head\.probe"):
        read_checkpoint(tmp_path)


def test_every_missing_tensor_is_named(tmp_path: Path) -> None:
    write_open_clip(tmp_path, timm_tower(), "vit_base_patch16_siglip_224")
    path = tmp_path / "open_clip_model.safetensors"
    state = load_file(path)
    for key in ("visual.trunk.attn_pool.kv.weight", "visual.trunk.pos_embed", "visual.trunk.patch_embed.proj.bias"):
        save_file({name: tensor for name, tensor in state.items() if name != key}, path)
        with pytest.raises(CheckpointError, match=rf"misses {re.escape(key)}"):
            read_checkpoint(tmp_path)
    bad = state["visual.trunk.attn_pool.kv.weight"][:-1].clone()
    save_file(state | {"visual.trunk.attn_pool.kv.weight": bad}, path)
    with pytest.raises(CheckpointError, match=r"attn_pool\.kv\.weight must have shape \[256, 128\], got \[255, 128\]"):
        read_checkpoint(tmp_path)


def test_its_state_dict_is_no_clips() -> None:
    with pytest.raises(CheckpointError, match="is a SigLIP's, and not a CLIP's"):
        read_state_dict({f"visual.{name}": t for name, t in reference.build(SHAPE).state_dict().items()})


class _Trunk(nn.Module):
    """A tower under the names that open_clip gives it."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.visual = nn.Module()
        self.visual.trunk = tower

    def forward(self, images: Tensor) -> Tensor:
        trunk: Any = self.visual.trunk
        return trunk(images)


@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu", "silu"])
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_an_archive_of_open_clips_model(activation: str, images: Tensor, tmp_path: Path) -> None:
    """It has the classes of its modules; of an activation that is none of ours the user is asked."""
    tower = timm_tower(activation)
    torch.jit.save(torch.jit.trace(_Trunk(tower), images), tmp_path / "model.pt")
    if activation == "silu":
        with pytest.raises(CheckpointError, match="does not say which activation"):
            read_checkpoint(tmp_path / "model.pt")
        return
    assert close(features(tmp_path / "model.pt", images), tower(images))
