"""Checkpoints: files that the real packages wrote, and every way for a tower or a config to be bad."""

from __future__ import annotations

import functools
import json
import random
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from clip_fast.checkpoint import stored_text, stored_tower
from clip_fast.checkpoint.published import resolve
from clip_fast.checkpoint.reading import read_checkpoint
from clip_fast.errors import CheckpointError
from clip_fast.towers import reference
from clip_fast.towers.config import IMAGE_MEAN, Activation, ResNetConfig, VitConfig
from clip_fast.towers.text import TextEncoder

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*TorchScript.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]

VIT = VitConfig(image_size=64, patch_size=16, width=128, layers=2, heads=2, embed_dim=32)
RESNET = ResNetConfig(layers=(1, 2, 1, 1), width=4, heads=2, image_size=64, embed_dim=32)


def randomise(module: nn.Module) -> nn.Module:
    """Fresh weights and statistics everywhere, so that a tensor in the wrong place shows."""
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2)
            elif tensor.is_floating_point():
                tensor.copy_(torch.randn_like(tensor) * (0.2 if tensor.ndim < 2 else tensor[0].numel() ** -0.5))
                tensor += 1 if tensor.ndim == 1 and name.endswith("weight") else 0
    return module.eval()


def features(path: Path, images: Tensor, activation: Activation | None = None) -> Tensor:
    """What the plain encoder makes of the checkpoint at `path`, in float32."""
    read = read_checkpoint(path, activation)
    tower = reference.build(read.config)
    tower.load_state_dict({name: tensor.to(tensor.dtype if tensor.dtype == torch.long else torch.float32)
                           for name, tensor in read.state_dict.items()})  # fmt: skip
    with torch.no_grad():
        return tower.eval()(images)


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-5


# --- OpenAI ----------------------------------------------------------------------------------------------------------


def openai_clip(kind: str) -> nn.Module:
    model = pytest.importorskip("clip.model", reason="openai-clip is not installed")
    layers, width, patch = (2, 128, 16) if kind == "vit" else ((1, 2, 1, 1), 4, None)
    return randomise(model.CLIP(32, 64, layers, width, patch, 8, 64, 64, 1, 1))


def traced(model: nn.Module) -> torch.jit.ScriptModule:
    return torch.jit.trace(model, (torch.zeros(1, 3, 64, 64), torch.zeros(1, 8, dtype=torch.long)))


@pytest.mark.parametrize("archive", ["traced", "traced tower", "state dict", "legacy state dict"])
@pytest.mark.parametrize("kind", ["vit", "resnet"])
@pytest.mark.filterwarnings("ignore:.*taken for one of OpenAI's")
def test_openai(kind: str, archive: str, tmp_path: Path) -> None:
    model, path = openai_clip(kind), tmp_path / "model.pt"
    if archive == "traced":
        torch.jit.save(traced(model), path)
    elif archive == "traced tower":
        torch.jit.save(torch.jit.trace(_Holder(model.visual), torch.zeros(1, 3, 64, 64)), path)
    else:
        torch.save(model.state_dict(), path, _use_new_zipfile_serialization=archive == "state dict")
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert_close(features(path, images), model.visual(images))


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_an_archive_tells_its_activation(kind: str, tmp_path: Path) -> None:
    """A ResNet's words have one."""
    torch.jit.save(traced(openai_clip(kind)), tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="is a model with 'quick_gelu', and activation='gelu' was asked for"):
        read_checkpoint(tmp_path / "model.pt", "gelu")


class _Holder(nn.Module):
    """A tower under the name that CLIP gives it."""

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual = visual

    def forward(self, images: Tensor) -> Tensor:
        return self.visual(images)


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_openai_in_half_precision_as_published(kind: str, tmp_path: Path) -> None:
    """OpenAI's archives hold float16 weights beside float32 LayerNorms and embeddings; every value is kept."""
    model = openai_clip(kind)
    pytest.importorskip("clip.model").convert_weights(model)
    archive = torch.jit.trace(_Dtypes(model), torch.zeros(1))
    torch.jit.save(archive, tmp_path / "model.pt")
    read = read_checkpoint(tmp_path / "model.pt").state_dict
    wanted = model.visual.state_dict()
    assert read.keys() == wanted.keys()
    assert {tensor.dtype for tensor in read.values()} >= {torch.float16, torch.float32}
    for name, tensor in wanted.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor), name


class _Dtypes(nn.Module):
    """openai-clip cannot run in float16 on a CPU, so that only its weights are traced."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.visual = model.visual

    def forward(self, x: Tensor) -> Tensor:
        return x + sum(p.sum().float() for p in self.parameters())


# --- open_clip -------------------------------------------------------------------------------------------------------

OPEN_CLIP_VISION: dict[str, dict[str, Any]] = {
    "vit": {"image_size": 64, "layers": 2, "width": 128, "patch_size": 16},
    "vit of 80": {"image_size": 64, "layers": 2, "width": 160, "patch_size": 16, "head_width": 80, "mlp_ratio": 4.9231},
    "resnet": {"image_size": 64, "layers": [1, 2, 1, 1], "width": 16},
}


def open_clip_model(kind: str, quick_gelu: bool = False) -> tuple[nn.Module, dict[str, Any]]:
    open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed")
    vision = OPEN_CLIP_VISION[kind]
    text = {"context_length": 8, "vocab_size": 64, "width": 64, "heads": 1, "layers": 1}
    model = open_clip.CLIP(32, vision, text, quick_gelu=quick_gelu)
    return randomise(model), {"embed_dim": 32, "quick_gelu": quick_gelu, "vision_cfg": vision, "text_cfg": text}


@pytest.mark.parametrize("form", ["pt", "training", "safetensors"])
@pytest.mark.parametrize(("kind", "quick_gelu"), [("vit", False), ("vit", True), ("resnet", False)])
def test_open_clip_files(kind: str, quick_gelu: bool, form: str, tmp_path: Path) -> None:
    model, _ = open_clip_model(kind, quick_gelu)
    state = model.state_dict()
    path = tmp_path / ("model.safetensors" if form == "safetensors" else "open_clip_pytorch_model.pt")
    if form == "pt":
        torch.save(state, path)
    elif form == "training":
        parallel = {f"module.{name}": tensor for name, tensor in state.items()}
        torch.save({"epoch": 3, "name": "run", "state_dict": parallel, "optimizer": {"state": {}}}, path)
    else:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        wanted = model.encode_image(images)
    assert_close(features(path, images, "quick_gelu" if quick_gelu else "gelu"), wanted)


@pytest.mark.parametrize(("kind", "quick_gelu"), [("vit", False), ("vit", True), ("resnet", False)])
def test_scripted_archives(kind: str, quick_gelu: bool, tmp_path: Path) -> None:
    """By open_clip, since TorchScript cannot compile openai-clip's code; the archive names the activation's class."""
    model, _ = open_clip_model(kind, quick_gelu)
    torch.jit.save(torch.jit.script(model), tmp_path / "model.pt")
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        wanted = model.encode_image(images)
    assert_close(features(tmp_path / "model.pt", images), wanted)


@pytest.mark.parametrize("weights", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"])
@pytest.mark.parametrize(("kind", "quick_gelu"), [("vit of 80", False), ("vit", True), ("resnet", False)])
def test_open_clip_folders(kind: str, quick_gelu: bool, weights: str, tmp_path: Path) -> None:
    """The config beside the weights gives activation, heads and normalisation."""
    model, config = open_clip_model(kind, quick_gelu)
    preprocess = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "interpolation": "bicubic"}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, tmp_path / weights) if weights.endswith("safetensors") else torch.save(state, tmp_path / weights)
    read = read_checkpoint(tmp_path)
    assert read.mean == (0.5, 0.5, 0.5)
    assert read.std == (0.25, 0.25, 0.25)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        wanted = model.encode_image(images)
    assert_close(features(tmp_path, images), wanted)


# --- A config beside weights of any name -----------------------------------------------------------------------------


OPEN_CLIP_PREPROCESS = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
HEADS_OF_32 = OPEN_CLIP_VISION["vit"] | {"head_width": 32}


def write_open_clip_config(folder: Path, vision: dict[str, Any], **model: Any) -> None:
    config = {"embed_dim": 32, "vision_cfg": vision, **model}
    content = {"model_cfg": config, "preprocess_cfg": OPEN_CLIP_PREPROCESS}
    (folder / "open_clip_config.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("weights", "given"),
    [
        *(("finetuned.safetensors", "file"), ("finetuned.pt", "file"), ("model.safetensors", "file")),
        *(("model.safetensors", "folder"), ("pytorch_model.bin", "folder")),
    ],
)
@pytest.mark.filterwarnings("error")
def test_open_clips_config_beside_any_file(weights: str, given: str, tmp_path: Path) -> None:
    open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed")
    text = {"context_length": 8, "vocab_size": 64, "width": 64, "heads": 1, "layers": 1}
    model, path = randomise(open_clip.CLIP(32, HEADS_OF_32, text)), tmp_path / weights
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    write_open_clip_config(tmp_path, HEADS_OF_32, text_cfg=text)
    path = tmp_path if given == "folder" else path
    read = read_checkpoint(path)
    assert (read.mean, read.std) == ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert_close(features(path, images), model.encode_image(images))


@pytest.mark.filterwarnings("error")
def test_open_clips_config_beside_a_resnet(tmp_path: Path) -> None:
    save_file(state("resnet"), tmp_path / "finetuned.safetensors")
    write_open_clip_config(tmp_path, {"image_size": [64, 64], "layers": [1, 2, 1, 1], "width": 4, "head_width": 32})
    read = read_checkpoint(tmp_path / "finetuned.safetensors")
    assert isinstance(read.config, ResNetConfig)
    assert (read.config.heads, read.mean) == (4, (0.5, 0.5, 0.5))


@pytest.mark.filterwarnings("error")
def test_hugging_faces_config_beside_any_file(saved: Path, tmp_path: Path) -> None:
    """Beside its own names, and beside OpenAI's, where transformers' config is all there is."""
    config = json.loads((saved / "config.json").read_bytes())
    config["vision_config"] |= {"num_attention_heads": 4, "hidden_act": "gelu"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(load_file(saved / "model.safetensors"), tmp_path / "finetuned.safetensors")
    save_file(state(), tmp_path / "other.safetensors")
    for weights in ("finetuned.safetensors", "other.safetensors"):
        read = read_checkpoint(tmp_path / weights).config
        assert isinstance(read, VitConfig)
        assert (read.heads, read.activation) == (4, "gelu")


@pytest.mark.filterwarnings("error")
def test_open_clips_config_beside_hugging_faces_names(saved: Path, tmp_path: Path) -> None:
    save_file(load_file(saved / "model.safetensors"), tmp_path / "model.safetensors")
    write_open_clip_config(tmp_path, HEADS_OF_32)
    read = read_checkpoint(tmp_path).config
    assert isinstance(read, VitConfig)
    assert (read.heads, read.activation) == (4, "gelu")


@pytest.mark.filterwarnings("error")
def test_of_two_configs_that_of_the_layout_counts(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((saved / "config.json").read_bytes())
    write_open_clip_config(tmp_path, HEADS_OF_32)
    for weights in ("model.safetensors", "finetuned.safetensors"):
        save_file(load_file(saved / "model.safetensors"), tmp_path / weights)
        assert read_checkpoint(tmp_path / weights).config == read_checkpoint(saved).config
        save_file(state(), tmp_path / weights)
        read = read_checkpoint(tmp_path / weights)
        assert isinstance(read.config, VitConfig)
        assert (read.config.heads, read.config.activation, read.mean) == (4, "gelu", (0.5, 0.5, 0.5))


FOREIGN_CONFIGS: dict[str, tuple[str, str, str | None]] = {
    "BERT": ("config.json", json.dumps({"model_type": "bert", "num_attention_heads": 3}), None),
    "no model": ("config.json", json.dumps({"compilerOptions": {}}), None),
    "no JSON": ("config.json", "{ // comment", "cannot be read as JSON"),
    "no object": ("config.json", "[]", "must hold a JSON object"),
    "no vision": ("config.json", json.dumps({"model_type": "clip", "vision_config": [1]}), "cannot be understood"),
    "other shape": (
        "config.json",
        json.dumps({"model_type": "clip", "vision_config": {"image_size": 64, "patch_size": 16, "hidden_size": 256}}),
        "another model's than clip.pt: width 256, not 128, layers 12, not 2",
    ),
    "timm": (
        "open_clip_config.json",
        json.dumps({"model_cfg": {"vision_cfg": OPEN_CLIP_VISION["vit"] | {"timm_model_name": "vit"}}}),
        None,
    ),
    "structure": ("open_clip_config.json", "{}", "cannot be understood"),
    **{
        f"other {key}": (
            "open_clip_config.json",
            json.dumps({"model_cfg": {"quick_gelu": True, "vision_cfg": HEADS_OF_32 | {key: value}}}),
            f"another model's than clip.pt: {key.replace('image_size', 'tokens')}",
        )
        for key, value in {"width": 256, "layers": 3, "image_size": 96}.items()
    },
    "other activation": (
        "open_clip_config.json",
        json.dumps({"model_cfg": {"vision_cfg": HEADS_OF_32}}),
        "another model's than clip.pt: activation gelu, not quick_gelu",
    ),
}


@pytest.mark.parametrize("case", FOREIGN_CONFIGS)
def test_another_models_config_does_not_change_what_is_read(case: str, tmp_path: Path) -> None:
    """Such as lies in a folder of downloads; a CLIP's, which might have been meant, is named."""
    name, content, message = FOREIGN_CONFIGS[case]
    path = tmp_path / "clip.pt"
    torch.jit.save(traced(openai_clip("vit")), path)
    wanted = read_checkpoint(path).config
    (tmp_path / name).write_text(content)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        assert read_checkpoint(path).config == wanted
    told = [str(warning.message) for warning in caught if "not used" in str(warning.message)]
    assert len(told) == (message is not None)
    assert all(re.search(f"{re.escape(name)}: not used, since .*{message}", text) for text in told), told


# --- Text towers of open_clip ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "heads", "configured"), [(128, 4, True), (1280, 20, False), (1280, 20, True)])
def test_text_towers_of_open_clip(
    width: int, heads: int, configured: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Text of ViT-bigG is as wide as images of ViT-H, but its heads are 64 wide as all texts' are by default."""
    monkeypatch.setattr(stored_text, "VOCABULARY", 64)
    open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed")
    text = {"context_length": 8, "vocab_size": 64, "width": width, "heads": heads, "layers": 1}
    config = {"embed_dim": 32, "vision_cfg": OPEN_CLIP_VISION["vit"], "text_cfg": text}
    model = randomise(open_clip.CLIP(32, OPEN_CLIP_VISION["vit"], text))
    if configured:
        (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    read = read_checkpoint(tmp_path, "gelu")
    assert read.text is not None
    ours = TextEncoder(read.text[0])
    ours.load_state_dict(read.text[1])
    tokens = torch.randint(64, (5, 8))
    with torch.no_grad():
        assert_close(ours(tokens), model.encode_text(tokens))


@pytest.mark.parametrize(
    "changes",
    [{"pool_type": "eos"}, {"embed_cls": True}, {"hf_tokenizer_name": "xlm"}, {"vocab_size": 100}],
    ids=str,
)
def test_other_text_towers_are_not_read(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as MetaCLIP's worldwide ones, with tensors of the same names: the image tower is read without them."""
    monkeypatch.setattr(stored_text, "VOCABULARY", 64)
    open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed")
    text = {"context_length": 8, "vocab_size": 64, "width": 64, "heads": 1, "layers": 1} | changes
    config = {"embed_dim": 32, "vision_cfg": OPEN_CLIP_VISION["vit"], "text_cfg": text}
    write(tmp_path / "open_clip_model.safetensors", open_clip.CLIP(32, OPEN_CLIP_VISION["vit"], text).state_dict())
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    assert read_checkpoint(tmp_path).text is None


@pytest.mark.parametrize(
    ("prefix", "part"),
    [("_orig_mod.", ""), ("module._orig_mod.", ""), ("_orig_mod.module.", ""), ("", "visual."), ("module.", "visual.")],
)
def test_of_compiled_models(prefix: str, part: str, tmp_path: Path) -> None:
    """Saved from `torch.compile(model)`, from a model with a compiled tower, and either in DistributedDataParallel."""
    compiled = {
        f"{prefix}{key.replace(part, f'{part}_orig_mod.', 1) if part else key}": t for key, t in state().items()
    }
    assert all("_orig_mod." in key for key in compiled)
    torch.save(compiled, tmp_path / "m.pt")
    read = read_checkpoint(tmp_path / "m.pt", "quick_gelu")
    assert read.config == VIT
    assert all(torch.equal(read.state_dict[name], tensor) for name, tensor in _tower_state("vit").items())


def test_keys_are_as_torch_compile_makes_them(tmp_path: Path) -> None:
    torch.save(torch.compile(_Holder(reference.build(VIT))).state_dict(), tmp_path / "m.pt")
    assert read_checkpoint(tmp_path / "m.pt", "quick_gelu").config == VIT


def test_a_file_of_open_clip_does_not_say_its_activation(tmp_path: Path) -> None:
    model, _ = open_clip_model("vit")
    torch.save({"epoch": 1, "state_dict": model.state_dict()}, tmp_path / "epoch_1.pt")
    with pytest.raises(CheckpointError, match=r"epoch_1\.pt: .*pass activation='gelu'"):
        read_checkpoint(tmp_path / "epoch_1.pt")


# --- Hugging Face ----------------------------------------------------------------------------------------------------


def hugging_face(kind: str, activation: str = "quick_gelu", **others: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    shape = {"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {**shape, "image_size": 64, "patch_size": 16, "projection_dim": 32, "hidden_act": activation, **others}
    if kind == "CLIPVisionModelWithProjection":
        return randomise(transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**vision)))
    text = {**shape, "vocab_size": 64, "max_position_embeddings": 8, "eos_token_id": 2}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=32)
    return randomise(transformers.CLIPModel(config))


def hugging_face_features(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        visual = model.visual_projection(model.vision_model(images).pooler_output)
    assert isinstance(visual, Tensor)
    return visual


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("kind", ["CLIPModel", "CLIPVisionModelWithProjection"])
@pytest.mark.parametrize("sharded", [False, True])
def test_hugging_face(kind: str, activation: str, sharded: bool, tmp_path: Path) -> None:
    model = hugging_face(kind, activation)
    model.save_pretrained(tmp_path, max_shard_size="300KB" if sharded else "5GB")  # type: ignore[operator]
    assert (tmp_path / "model.safetensors.index.json").exists() == sharded
    images = torch.randn(2, 3, 64, 64)
    assert_close(features(tmp_path, images), hugging_face_features(model, images))
    with pytest.raises(CheckpointError, match=f"is a model with '{activation}', and activation='gelu_tanh' was asked"):
        read_checkpoint(tmp_path, "gelu_tanh")
    assert read_checkpoint(tmp_path, activation).config.activation == activation


@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_an_epsilon_of_hugging_face(eps: float, tmp_path: Path) -> None:
    model = hugging_face("CLIPModel", layer_norm_eps=eps)
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    images = torch.randn(2, 3, 64, 64)
    assert_close(features(tmp_path, images), hugging_face_features(model, images))
    config = read_checkpoint(tmp_path).config
    assert config.eps == eps
    assert f"eps={eps}" in repr(config)  # which the digest of an output folder takes


# --- Preprocessing ---------------------------------------------------------------------------------------------------


SQUASHED = {"size": {"height": 64, "width": 64}, "do_center_crop": False}


@pytest.mark.parametrize(
    ("processing", "squash"),
    [
        ({}, False),
        ({"size": 64, "crop_size": 64, "resample": 3, "do_center_crop": True}, False),
        ({"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}, "rescale_factor": 1 / 255}, False),
        ({"size": {"shortest_edge": 64}, "crop_size": [64, 64], "rescale_factor": 0.00392156862745098}, False),
        ({"size": None, "crop_size": None, "do_resize": None, "do_rescale": None, "do_pad": False}, False),
        (SQUASHED, True),
        (SQUASHED | {"crop_size": {"height": 224, "width": 224}, "do_convert_rgb": True}, True),
        (SQUASHED | {"do_center_crop": True, "crop_size": 64}, True),
        ({"size": [64, 64], "do_center_crop": False}, True),
        ({"resample": 2}, False),
        (SQUASHED | {"resample": 2}, True),
    ],
    ids=str,
)
@pytest.mark.parametrize("file", ["preprocessor_config.json", "processor_config.json"])
@pytest.mark.filterwarnings("error")
def test_preprocessing_of_hugging_face(
    processing: dict[str, Any], squash: bool, file: str, saved: Path, tmp_path: Path
) -> None:
    write_hugging_face(saved, tmp_path, file, processing)
    checkpoint = read_checkpoint(tmp_path)
    assert (checkpoint.squash, checkpoint.bilinear) == (squash, processing.get("resample") == 2)


@pytest.mark.parametrize(
    ("processing", "named"),
    [
        ({"do_resize": False}, "do_resize False"),
        ({"resample": 0}, "resample 0"),
        ({"size": {"shortest_edge": 72}}, "size {'shortest_edge': 72}"),
        ({"size": 72, "crop_size": 64}, "size 72"),
        ({"size": {"shortest_edge": 64, "longest_edge": 96}}, "size {'shortest_edge': 64, 'longest_edge': 96}"),
        ({"size": {"height": 72, "width": 72}}, "size {'height': 72, 'width': 72}"),
        ({"size": {"height": 64, "width": 72}}, "size {'height': 64, 'width': 72}"),
        ({"size": [72, 72]}, "size [72, 72]"),
        ({"size": 64, "crop_size": 56}, "crop_size 56"),
        ({"crop_size": {"height": 64, "width": 72}}, "crop_size {'height': 64, 'width': 72}"),
        (SQUASHED | {"do_center_crop": True, "crop_size": 56}, "crop_size 56"),
        ({"size": 64, "do_center_crop": False}, "do_center_crop False"),
        ({"size": {"shortest_edge": 64}, "do_center_crop": False}, "do_center_crop False"),
        ({"do_rescale": False}, "do_rescale False"),
        ({"rescale_factor": 1 / 127.5}, f"rescale_factor {1 / 127.5}"),
        ({"do_normalize": False}, "do_normalize False"),
        ({"do_pad": True}, "do_pad True"),
        ({"do_rescale": False, "do_normalize": False}, "do_rescale False, do_normalize False"),
    ],
    ids=str,
)
def test_preprocessing_that_is_not_done_is_named(
    processing: dict[str, Any], named: str, saved: Path, tmp_path: Path
) -> None:
    write_hugging_face(saved, tmp_path, "preprocessor_config.json", processing)
    with pytest.warns(UserWarning, match=rf"\({re.escape(named)}\).*preprocess images yourself") as caught:
        read_checkpoint(tmp_path)
    assert [warning.filename for warning in caught] == [__file__]


def write_hugging_face(saved: Path, folder: Path, file: str, processing: dict[str, Any]) -> None:
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((saved / name).read_bytes())
    content = processing if file == "preprocessor_config.json" else {"image_processor": processing}
    (folder / file).write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("processing", "squash", "named"),
    [
        ({}, False, None),
        ({"resize_mode": "shortest", "interpolation": "bicubic", "size": [64, 64], "fill_color": 0}, False, None),
        ({"resize_mode": None, "interpolation": "random"}, False, None),
        ({"resize_mode": "squash", "interpolation": "bicubic"}, True, None),
        ({"resize_mode": "squash", "interpolation": "bilinear"}, True, None),
        ({"resize_mode": "squash", "interpolation": "nearest"}, True, "interpolation 'nearest'"),
        ({"resize_mode": "longest"}, False, "resize_mode 'longest'"),
    ],
    ids=str,
)
def test_preprocessing_of_open_clip(
    processing: dict[str, Any], squash: bool, named: str | None, tmp_path: Path
) -> None:
    config = {"model_cfg": {"vision_cfg": OPEN_CLIP_VISION["vit"]}, "preprocess_cfg": processing}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    write(tmp_path / "open_clip_model.safetensors", state())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert read_checkpoint(tmp_path).squash == squash
    assert [warning.filename for warning in caught] == [__file__] * (named is not None)
    assert all(f"({named})" in str(warning.message) for warning in caught)


def test_hugging_face_normalisation(tmp_path: Path) -> None:
    hugging_face("CLIPModel").save_pretrained(tmp_path)  # type: ignore[operator]
    assert read_checkpoint(tmp_path).mean == IMAGE_MEAN
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.1, 0.2, 0.3], "resample": 0}))
    with pytest.warns(UserWarning, match="preprocess images yourself"):
        assert read_checkpoint(tmp_path).mean == (0.1, 0.2, 0.3)


# --- what a file or folder can have wrong ----------------------------------------------------------------------------


@functools.cache
def _tower_state(kind: str) -> dict[str, Tensor]:
    return dict(randomise(reference.build(VIT if kind == "vit" else RESNET)).state_dict())


def state(kind: str = "vit") -> dict[str, Tensor]:
    """A state dict with OpenAI's names, to be spoilt."""
    return {f"visual.{name}": tensor.clone() for name, tensor in _tower_state(kind).items()}


def write(path: Path, entries: dict[str, Any]) -> Path:
    save_file(entries, path, {"activation": "quick_gelu"})
    return path


def test_a_sound_state_dict_of_ours_is_read(tmp_path: Path) -> None:
    """The files that the cases below spoil would be read otherwise."""
    for kind, config in (("vit", VIT), ("resnet", RESNET)):
        read = read_checkpoint(write(tmp_path / "m.safetensors", state(kind)))
        assert read.config == config
        assert all(torch.equal(read.state_dict[name], tensor) for name, tensor in _tower_state(kind).items())
        assert all(tensor.is_contiguous() for tensor in read.state_dict.values())


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_every_missing_tensor_is_named(kind: str, tmp_path: Path) -> None:
    whole = state(kind)
    for key in whole:
        if key.endswith("num_batches_tracked"):
            continue
        path = write(tmp_path / "m.safetensors", {k: v for k, v in whole.items() if k != key})
        with pytest.raises(CheckpointError, match=r"m\.safetensors: ") as error:
            read_checkpoint(path)
        if key != "visual.layer1.0.conv1.weight":  # without which a ResNet looks like a ViT without all it needs
            assert key in str(error.value), key


def spoil(key: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda entries: entries | {key: change(entries[key])}


def nan_at_the_end(tensor: Tensor) -> Tensor:
    tensor.view(-1)[-1] = float("nan")
    return tensor


BLOCK = "visual.transformer.resblocks"
BAD_ENTRIES: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "surplus": (lambda e: e | {"visual.extra.weight": torch.zeros(2)}, r"has not: visual\.extra\.weight"),
    "wrong shape": (
        spoil(f"{BLOCK}.1.mlp.c_proj.bias", lambda t: t[:-1].clone()),
        r"1\.mlp\.c_proj\.bias must have shape \[128\], got \[127\]",
    ),
    "wrong rank": (
        spoil("visual.conv1.weight", lambda t: t.flatten(1)),
        r"visual\.conv1\.weight must have 4 dimensions",
    ),
    "integers": (
        spoil("visual.ln_post.weight", lambda t: t.to(torch.int32)),
        r"ln_post\.weight must be of a floating-point dtype, got torch\.int32",
    ),
    "NaN": (spoil("visual.proj", nan_at_the_end), r"visual\.proj holds NaN or infinite"),
    "infinity": (spoil("visual.ln_pre.bias", lambda t: t / 0), r"visual\.ln_pre\.bias holds NaN or infinite"),
    "tokens no square": (
        spoil("visual.positional_embedding", lambda t: t[:-1].clone()),
        r"positional_embedding must have one row and a square number more, got 16",
    ),
    "a block missing": (
        lambda e: {k: v for k, v in e.items() if not k.startswith(f"{BLOCK}.0.")},
        r"misses all of visual\.transformer\.resblocks\.0|misses visual\.transformer\.resblocks\.0",
    ),
    "width in no heads": (
        spoil("visual.conv1.weight", lambda t: t[:96].clone()),
        r"heads cannot be told from its width of 96",
    ),
    "no ln_pre": (
        lambda e: {k: v for k, v in e.items() if "ln_pre" not in k},
        r"misses visual\.ln_pre\.weight: if its model has none, .* place its open_clip_config\.json beside it",
    ),
    "half of an ln_pre": (
        lambda e: {k: v for k, v in e.items() if "ln_pre.bias" not in k},
        r"misses visual\.ln_pre\.bias",
    ),
    "one LayerScale": (
        lambda e: e | {f"{BLOCK}.0.ls_1.gamma": torch.ones(128)},
        r"misses visual\.transformer\.resblocks\.0\.ls_2\.gamma",
    ),
    "attentional pooler": (
        lambda e: e | {"visual.attn_pool.query": torch.ones(2)},
        "an attentional pooler, as CoCa has, which is not served",
    ),
    "timm": (lambda e: {"visual.trunk.cls_token": torch.ones(2)}, "an image tower from timm"),
    "no tower": (lambda e: {"bert.embeddings": torch.ones(2)}, r"holds no CLIP image tower, only bert\.embeddings"),
    "text only": (lambda e: {"text_model.weight": torch.ones(2)}, "holds no CLIP image tower"),
}


@pytest.mark.parametrize("case", BAD_ENTRIES)
def test_bad_entries_are_named(case: str, tmp_path: Path) -> None:
    change, message = BAD_ENTRIES[case]
    path = write(tmp_path / "m.safetensors", change(state()))
    with pytest.raises(CheckpointError, match=r"m\.safetensors: .*(" + message + ")"):
        read_checkpoint(path)


def test_an_entry_that_is_no_tensor(tmp_path: Path) -> None:
    torch.save(state() | {"visual.proj": [1, 2]}, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match=r"visual\.proj is not a plain dense tensor but list"):
        read_checkpoint(tmp_path / "m.pt", "gelu")


def _truncate(path: Path, fraction: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * fraction)])


@pytest.mark.parametrize("fraction", [0.02, 0.5, 0.999])
@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors", "torchscript"])
def test_truncated(form: str, fraction: float, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    if form == "torchscript":
        torch.jit.save(traced(openai_clip("vit")), path)
    elif form == "safetensors":
        write(path, state())
    else:
        torch.save(state(), path, _use_new_zipfile_serialization=form == "zip")
    read_checkpoint(path, "quick_gelu")
    _truncate(path, fraction)
    with pytest.raises(CheckpointError, match=r"model\.pt: .*(truncated or damaged)"):
        read_checkpoint(path, "quick_gelu")


def test_paths_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nothing\.pt: no such file"):
        read_checkpoint(tmp_path / "nothing.pt")
    with pytest.raises(CheckpointError, match=r"folder holds none of model\.safetensors"):
        read_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"did you mean 'ViT-B/32'\?"):
        resolve("vit-b-32")
    with pytest.raises(CheckpointError, match=r"no model of that name.*RN50.*tiny-digits"):
        resolve("something else entirely")
    with pytest.raises(CheckpointError, match=r"~nobody-of-that-name/clip\.pt"):
        resolve("~nobody-of-that-name/clip.pt")
    with pytest.raises(ValueError, match=r"activation must be one of .*got 'relu'"):
        read_checkpoint(tmp_path, "relu")  # type: ignore[arg-type]


# --- what a config beside the weights can have wrong -----------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    hugging_face("CLIPModel").save_pretrained(folder)  # type: ignore[operator]
    return folder


def vision(**changes: object) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda config: config | {"vision_config": config["vision_config"] | changes}


BAD_CONFIGS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "another model": (lambda c: c | {"model_type": "siglip"}, "model_type must be 'clip'.*got 'siglip'"),
    "activation": (vision(hidden_act="relu"), "hidden_act must be one of .*got 'relu'"),
    "eps": (vision(layer_norm_eps=-1e-5), "layer_norm_eps must be a number between 0 and 1, got -1e-05"),
    "image size": (vision(image_size=96), "images of 64 pixels, the config beside it says 96"),
    "heads": (vision(num_attention_heads=3), "heads, got width 128 and heads 3"),
    "no heads": (vision(num_attention_heads=0), "heads must be positive, got 0"),
    "heads as text": (vision(num_attention_heads="2"), "num_attention_heads must be an integer, got '2'"),
    "two sizes": (vision(image_size=[64, 64]), r"image_size must be an integer, got \[64, 64\]"),
    "structure": (lambda c: c | {"vision_config": [1]}, "unexpected structure"),
    "no object": (lambda c: [c], "must hold a JSON object, got list"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_bad_hugging_face_configs(case: str, saved: Path, tmp_path: Path) -> None:
    """Of weights of any name: Hugging Face's cannot do without."""
    change, message = BAD_CONFIGS[case]
    (tmp_path / "config.json").write_text(json.dumps(change(json.loads((saved / "config.json").read_bytes()))))
    for name in ("model.safetensors", "finetuned.safetensors"):
        (tmp_path / name).write_bytes((saved / "model.safetensors").read_bytes())
        with pytest.raises(CheckpointError, match=message):
            read_checkpoint(tmp_path / name)


def test_hugging_face_files_that_are_not_enough(saved: Path, tmp_path: Path) -> None:
    weights = load_file(saved / "model.safetensors")
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"needs the config\.json"):
        read_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{ truncated")
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read as JSON"):
        read_checkpoint(tmp_path)
    (tmp_path / "config.json").write_bytes((saved / "config.json").read_bytes())
    save_file({k: v for k, v in weights.items() if k != "visual_projection.weight"}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"misses visual_projection\.weight: a CLIPVisionModel has no"):
        read_checkpoint(tmp_path)


def test_a_vision_model_of_transformers(tmp_path: Path) -> None:
    """Its keys have no prefix as of release 5, and it has no projection."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = transformers.CLIPVisionConfig(**shape, image_size=32, patch_size=16)
    transformers.CLIPVisionModel(config).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"misses visual_projection\.weight: a CLIPVisionModel has no"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"a": "missing.safetensors"}}, r"shard 'missing\.safetensors' is not a file"),
        ({"weight_map": {"a": "../outside.safetensors"}}, "shard .*outside.* is not a file in the same folder"),
        ({}, "has no weight_map"),
    ],
)
def test_bad_shards(index: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write(tmp_path / "outside.safetensors", state())
    (tmp_path / "sub" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(tmp_path / "sub")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"no_ln_pre": True}, "has an ln_pre, the config beside it says no_ln_pre"),
        ({"pool_type": "none"}, "sets pool_type to 'none', which is not served"),
        ({"qk_norm": True}, "sets qk_norm to True, which is not served"),
        ({"act_kwargs": {"approximate": "erf"}}, r"sets act_kwargs to \{'approximate': 'erf'\}, which is not served"),
        ({"act_kwargs": {"inplace": True}}, "sets act_kwargs to"),
        ({"norm_kwargs": {"bias": False}}, r"sets norm_kwargs to \{'bias': False\}, which is not served"),
        ({"norm_kwargs": {"eps": "1e-6"}}, "sets norm_kwargs to"),
        ({"norm_kwargs": {"eps": -1e-6}}, "sets norm_kwargs to"),
        ({"timm_model_name": "vit"}, "sets timm_model_name to 'vit'"),
        ({"image_size": [64, 32]}, r"is for images of 64 pixels, the config beside it says \(64, 32\)"),
        ({"image_size": [64, 64, 3]}, r"image_size must be a number or two, got \[64, 64, 3\]"),
        ({"image_size": "64"}, "image_size must be an integer, got '64'"),
    ],
)
def test_bad_open_clip_configs(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    config = {"embed_dim": 32, "vision_cfg": OPEN_CLIP_VISION["vit"] | changes}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    write(tmp_path / "open_clip_model.safetensors", state())
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(tmp_path)


def test_bundled_metadata_must_make_sense(tmp_path: Path) -> None:
    save_file(state(), tmp_path / "m.safetensors", {"activation": "relu"})
    with pytest.raises(CheckpointError, match="metadata must name an activation"):
        read_checkpoint(tmp_path / "m.safetensors")


# --- a config that belongs to the weights, and an index --------------------------------------------------------------


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 4}, "layers 4, not 2"),
        ({"num_hidden_layers": 1}, "layers 1, not 2"),
        ({"num_hidden_layers": None}, "layers 12, not 2"),  # transformers' default
        ({"hidden_size": 256, "num_attention_heads": 4}, "width 256, not 128"),
        ({"patch_size": 32, "image_size": 128}, "patch size 32, not 16"),
        ({"patch_size": 0}, "unexpected structure"),
        ({"num_hidden_layers": "2"}, "layers 2, not 2"),
    ],
    ids=str,
)
def test_transformers_config_must_describe_its_weights(
    changes: dict[str, Any], message: str, sharded: bool, saved: Path, tmp_path: Path
) -> None:
    config = json.loads((saved / "config.json").read_bytes())
    config["vision_config"] |= changes
    config["vision_config"] = {key: value for key, value in config["vision_config"].items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_shards(tmp_path, load_file(saved / "model.safetensors"), 2 if sharded else 1)
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{message}"):
        read_checkpoint(tmp_path)


def write_shards(folder: Path, entries: dict[str, Tensor], count: int) -> dict[str, str]:
    """A file, or shards with an index, whose weight map is returned."""
    if count == 1:
        save_file(entries, folder / "model.safetensors")
        return {}
    places = {key: f"part{number % count}.safetensors" for number, key in enumerate(sorted(entries))}
    for name in set(places.values()):
        save_file({key: entries[key] for key in entries if places[key] == name}, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return places


def test_the_embedding_of_transformers_config_must_be_that_of_the_weights(saved: Path, tmp_path: Path) -> None:
    config = json.loads((saved / "config.json").read_bytes()) | {"projection_dim": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((saved / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="embedding 64, not 32"):
        read_checkpoint(tmp_path)


def without_layers(entries: dict[str, Tensor], last: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in entries.items() if last not in key}


@pytest.mark.parametrize("kind", ["vit", "resnet", "text"])
def test_open_clips_config_must_describe_its_weights(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored_text, "VOCABULARY", 64)
    open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed")
    vision = OPEN_CLIP_VISION["vit" if kind == "text" else kind]
    text = {"context_length": 8, "vocab_size": 64, "width": 64, "heads": 1, "layers": 2}
    config = {"embed_dim": 32, "vision_cfg": vision, "text_cfg": text}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    model = randomise(open_clip.CLIP(32, vision, text))
    whole = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    write(tmp_path / "open_clip_model.safetensors", whole)
    read_checkpoint(tmp_path, "gelu")
    last, message = {
        "vit": ("visual.transformer.resblocks.1.", "layers 2, not 1"),
        "resnet": ("visual.layer2.1.", r"layers \[1, 2, 1, 1\], not \[1, 1, 1, 1\]"),
        "text": ("transformer.resblocks.1.", "its text tower has 1 layers, the config beside it says 2"),
    }[kind]
    visual = kind != "text"
    cut = {key: t for key, t in whole.items() if not key.startswith(last) or (key.startswith("visual.") and not visual)}
    assert len(cut) < len(whole)
    write(tmp_path / "open_clip_model.safetensors", cut)
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(tmp_path, "gelu")


def test_what_an_index_lists_must_be_there(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((saved / "config.json").read_bytes())
    entries = load_file(saved / "model.safetensors")
    places = write_shards(tmp_path, entries, 3)
    assert read_checkpoint(tmp_path).config == read_checkpoint(saved).config
    for key, name in random.sample(sorted(places.items()), 5):
        held = load_file(tmp_path / name)
        save_file({other: tensor for other, tensor in held.items() if other != key}, tmp_path / name)
        with pytest.raises(CheckpointError, match=rf"lists {re.escape(key)} in {name}, which has no such tensor"):
            read_checkpoint(tmp_path)
        save_file(held, tmp_path / name)
    moved = {**places, key: next(other for other in places.values() if other != places[key])}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": moved}))
    with pytest.raises(CheckpointError, match="which has no such tensor"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "other.index.json", "x" * 5000, "\0", "", ".", ".."])
def test_an_index_lists_files_of_weights(name: str, tmp_path: Path) -> None:
    for index in ("model.safetensors.index.json", "other.index.json"):
        (tmp_path / index).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match=r"shard .* is not a file in the same folder"):
        read_checkpoint(tmp_path)


# --- where in a file or folder the weights are -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["vit", "resnet"])
@pytest.mark.parametrize(
    "prefix", ["module.", "model.", "clip_model.", "module.model.", "net.encoder.clip.", "_orig_mod.model.", "visual_."]
)
@pytest.mark.parametrize("form", ["pt", "safetensors", "head", "alone"])
def test_prefixes_are_found(form: str, prefix: str, kind: str, tmp_path: Path) -> None:
    """Such as wrappers leave, which may have weights of their own beside the model."""
    names = state(kind)
    if form == "alone":
        names = {key.removeprefix("visual."): tensor for key, tensor in names.items()}
    wrapped = {f"{prefix}{key}": tensor for key, tensor in names.items()}
    if form == "head":
        wrapped |= {"head.weight": torch.ones(2, 32), "visual_head.0.weight": torch.ones(1), "scale": torch.ones(())}
    path = tmp_path / ("m.safetensors" if form == "safetensors" else "m.pt")
    save_file(wrapped, path) if form == "safetensors" else torch.save(wrapped, path)
    read = read_checkpoint(path, "quick_gelu")
    assert read.config == (VIT if kind == "vit" else RESNET)
    assert all(torch.equal(read.state_dict[name], tensor) for name, tensor in _tower_state(kind).items())


def test_prefixes_of_hugging_faces_names_are_found(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((saved / "config.json").read_bytes())
    entries = {f"model.clip.{key}": tensor for key, tensor in load_file(saved / "model.safetensors").items()}
    for count in (1, 3):  # of shards, none of which tells the prefix alone
        write_shards(tmp_path, entries, count)
        read = read_checkpoint(tmp_path / ("model.safetensors" if count == 1 else "model.safetensors.index.json"))
        wanted = read_checkpoint(saved)
        assert read.config == wanted.config
        assert all(torch.equal(read.state_dict[name], tensor) for name, tensor in wanted.state_dict.items())


def test_a_missing_tensor_behind_a_prefix_is_named(tmp_path: Path) -> None:
    wrapped = {f"model.{key}": tensor for key, tensor in state().items() if key != "visual.proj"}
    torch.save(wrapped, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match=r"misses visual\.proj"):
        read_checkpoint(tmp_path / "m.pt", "quick_gelu")


@pytest.mark.parametrize(
    "container",
    [
        lambda weights: {"epoch": 3, "model_state_dict": weights, "optimizer_state_dict": {}, "loss": torch.ones(1)},
        lambda weights: {"model": weights},
        lambda weights: {"net": weights, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": []}},
        lambda weights: {"checkpoint": {"student": {f"clip.{key}": tensor for key, tensor in weights.items()}}},
        lambda weights: {"state_dict": weights, "state_dict_ema": {key: 2 * tensor for key, tensor in weights.items()}},
        lambda weights: {"state_dict": {"model": weights}},
    ],
    ids=["model_state_dict", "model", "with an optimiser", "nested", "with an average", "twice"],
)
def test_state_dicts_in_containers_are_found(
    container: Callable[[dict[str, Tensor]], dict[Any, Any]], tmp_path: Path
) -> None:
    torch.save(container(state()), tmp_path / "m.pt")
    read = read_checkpoint(tmp_path / "m.pt", "quick_gelu")
    assert all(torch.equal(read.state_dict[name], tensor) for name, tensor in _tower_state("vit").items())


def test_of_several_models_none_is_guessed(tmp_path: Path) -> None:
    torch.save({"model": state(), "ema": state()}, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match="holds several models, model, ema: save one of them alone"):
        read_checkpoint(tmp_path / "m.pt", "quick_gelu")
    torch.save({f"{name}.{k}": t for name in ("student", "teacher") for k, t in state().items()}, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match=r"holds several models, named student\., teacher\.: save one"):
        read_checkpoint(tmp_path / "m.pt", "quick_gelu")


def test_weights_one_folder_down(saved: Path, tmp_path: Path) -> None:
    """As in sentence-transformers' folders; of two such folders none is guessed."""
    for name in ("0_CLIPModel", "1_Other"):
        (tmp_path / name).mkdir()
        for file in ("config.json", "model.safetensors"):
            (tmp_path / name / file).write_bytes((saved / file).read_bytes())
        if name == "0_CLIPModel":
            (tmp_path / "1_Pooling").mkdir()
            assert read_checkpoint(tmp_path).config == read_checkpoint(saved).config
    with pytest.raises(CheckpointError, match="several models: choose one of its folders 0_CLIPModel, 1_Other"):
        read_checkpoint(tmp_path)


# --- dtypes, and what would fill the memory --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", stored_tower._FLOAT8, ids=str)
@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_weights_in_8_bits_are_read(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    entries = {key: t.to(dtype) if t.ndim > 1 else t for key, t in state(kind).items()}
    torch.save(entries, tmp_path / "m.pt")
    read = read_checkpoint(tmp_path / "m.pt", "quick_gelu").state_dict
    for name, tensor in read.items():
        assert torch.equal(tensor.double(), entries[f"visual.{name}"].to(torch.float32).double()), name
    entries["visual.conv1.weight"] = torch.full_like(state(kind)["visual.conv1.weight"], float("nan")).to(dtype)
    torch.save(entries, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match=r"visual\.conv1\.weight holds NaN"):
        read_checkpoint(tmp_path / "m.pt", "quick_gelu")


def expanded(entries: dict[str, Tensor]) -> dict[str, Tensor]:
    width = entries["visual.positional_embedding"].shape[1]
    return entries | {"visual.positional_embedding": torch.zeros(1, 1).expand((1 << 16) ** 2 + 1, width)}


def repeated(entries: dict[str, Tensor]) -> dict[str, Tensor]:
    blocks = {key: tensor for key, tensor in entries.items() if f"{BLOCK}.0." in key}
    return entries | {key.replace(".0.", f".{number}.", 1): t for key, t in blocks.items() for number in range(500)}


@pytest.mark.parametrize("grow", [expanded, repeated])
def test_tensors_that_are_larger_than_what_is_stored(
    grow: Callable[[dict[str, Tensor]], dict[str, Tensor]], tmp_path: Path
) -> None:
    torch.save(grow(state()), tmp_path / "m.pt")
    assert (tmp_path / "m.pt").stat().st_size < 10_000_000
    with pytest.raises(CheckpointError, match="share memory, and are larger than what is stored"):
        read_checkpoint(tmp_path / "m.pt", "quick_gelu")


@pytest.mark.parametrize("key", ["visual.conv1.weight", "token_embedding.weight"])
def test_a_width_that_no_tensor_can_have(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_text, "VOCABULARY", 64)
    entries = openai_clip("vit").state_dict()
    shape = list(entries[key].shape)
    shape[0 if key == "visual.conv1.weight" else 1] = 1 << 31
    torch.save(entries | {key: torch.zeros(1).expand(shape)}, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match=r"m\.pt: its tensors' shapes make no tower: Storage size"):
        read_checkpoint(tmp_path / "m.pt", "quick_gelu")


@pytest.mark.parametrize(
    ("processing", "message"),
    [
        ({"mean": [float("nan")] * 3}, "mean must be three finite numbers"),
        ({"mean": [10**400, 1, 1]}, "mean must be three finite numbers"),
        ({"mean": [float("-inf"), 1, 1]}, "mean must be three finite numbers"),
        ({"mean": [1e300, 1, 1]}, "mean must be three finite numbers"),
        ({"mean": ["0.5"] * 3}, "mean must be three numbers"),
        ({"mean": [0.5]}, "mean must be three numbers"),
        ({"mean": 0.5}, "unexpected structure"),
        ({"std": [0, 0, 0]}, "std must be three numbers above 0, got"),
        ({"std": [1, -1, 1]}, "std must be three numbers above 0, got"),
        ({"std": [1, 1, float("nan")]}, "std must be three numbers above 0, got"),
    ],
    ids=str,
)
def test_means_and_deviations_that_make_no_sense(processing: dict[str, Any], message: str, tmp_path: Path) -> None:
    config = {"model_cfg": {"vision_cfg": OPEN_CLIP_VISION["vit"]}, "preprocess_cfg": processing}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    write(tmp_path / "open_clip_model.safetensors", state())
    with pytest.raises(CheckpointError, match=rf"open_clip_config\.json: .*{message}"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("deep", ["[" * 100_000 + "]" * 100_000, '{"a":' * 100_000 + "1" + "}" * 100_000])
@pytest.mark.parametrize("name", ["open_clip_config.json", "model.safetensors.index.json"])
def test_json_nested_deep(name: str, deep: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(f'{{"a": {deep}}}')
    if name == "open_clip_config.json":
        write(tmp_path / "open_clip_model.safetensors", state())
    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("processing", "on_white"),
    [
        ({"size": 64}, True),  # transformers' default
        ({"size": 64, "do_convert_rgb": True}, True),
        ({"size": 64, "do_convert_rgb": False}, True),  # it refuses what is transparent
        (None, False),
    ],
    ids=str,
)
def test_transparency_is_that_of_the_folders_processor(
    processing: dict[str, Any] | None, on_white: bool, saved: Path, tmp_path: Path
) -> None:
    write_hugging_face(saved, tmp_path, "preprocessor_config.json", processing or {})
    if processing is None:
        (tmp_path / "preprocessor_config.json").unlink()
    assert read_checkpoint(tmp_path).on_white == on_white
