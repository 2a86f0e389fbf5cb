"""The systems that encode images of CLIP and SigLIP: ours and those that people use, each made from the same weights.

A `System` builds an `Encode` from a plain tower. One that cannot be built (its package is missing, or has no such
model) raises `Unavailable` with the reason. The table shows the reason in its place.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch._dynamo.config
import torch._inductor
import torch._inductor.config
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from clip_fast.checkpoint.layouts import hugging_face_keys, timm_keys
from clip_fast.encoder import ImageEncoder
from clip_fast.towers.config import EPS, Config, ResNetConfig, SiglipConfig, VitConfig

from .timing import DTYPES

Encode = Callable[[Tensor], Tensor]  # (B, 3, H, W) in the task's dtype -> (B, embed_dim)


class Unavailable(Exception):
    """The reason why a system does not take part."""


@dataclass(frozen=True)
class Task:
    """A tower to encode with: its shape, float32 weights under canonical names, the device and the precision."""

    config: Config
    state_dict: dict[str, Tensor]
    device: torch.device
    precision: str  # "fp32", "tf32", "fp16" or "bf16"

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.precision]

    def vit(self, package: str) -> VitConfig:
        if not isinstance(self.config, VitConfig):
            raise Unavailable(f"{package} has no {'ResNets' if isinstance(self.config, ResNetConfig) else 'SigLIP'}")
        return self.config

    def ready(self, tower: nn.Module) -> nn.Module:
        return tower.to(device=self.device, dtype=self.dtype).eval().requires_grad_(False)


@dataclass(frozen=True)
class System:
    """A way to encode images. It needs `package` beside PyTorch, and is measured on `devices`."""

    name: str
    package: str | None
    build: Callable[[Task], Encode]
    devices: tuple[str, ...] = ("cpu", "cuda")
    precisions: tuple[str, ...] = ("fp32", "tf32", "fp16", "bf16")

    def encode(self, task: Task) -> Encode:
        """Raises Unavailable where it cannot take part. Exceptions of its package are passed on."""
        if self.package is not None:
            try:
                importlib.metadata.version(self.package)
            except importlib.metadata.PackageNotFoundError:
                raise Unavailable(f"{self.package} is not installed") from None
        if task.precision not in self.precisions:
            raise Unavailable(f"is measured in {', '.join(self.precisions)} only")
        return self.build(task)


def our_encoder(task: Task) -> ImageEncoder:
    precision: Any = task.precision
    return ImageEncoder(task.config, task.state_dict, task.device, task.dtype, precision=precision)


def _ours(task: Task) -> Encode:
    return our_encoder(task).encode_image


def _openai_clip(task: Task) -> Encode:
    if isinstance(task.config, VitConfig) and task.config.activation != "quick_gelu":
        raise Unavailable("openai-clip has QuickGELU only")
    _stand_in_for_torchvision_operators()
    towers: Any = importlib.import_module("clip.model")
    c = task.config
    if isinstance(c, ResNetConfig):
        tower = towers.ModifiedResNet(c.layers, c.embed_dim, c.heads, c.image_size, c.width)
    else:
        c = task.vit("openai-clip")
        tower = towers.VisionTransformer(c.image_size, c.patch_size, c.width, c.layers, c.heads, c.embed_dim)
    tower.load_state_dict(task.state_dict)
    if task.precision == "fp16":
        tower.to(task.device).eval().requires_grad_(False)
        towers.convert_weights(tower)  # as clip.load does
        return tower
    task.ready(tower)
    for module in tower.modules():
        if isinstance(module, nn.LayerNorm):
            module.float()  # its forward expects float32 weights; convert_weights leaves them in float32 too
    return tower


def _in_float32(task: Task) -> Encode:
    encode = _openai_clip(replace(task, precision="fp32"))
    return lambda images: encode(images.float())


def _open_clip_tower(task: Task) -> nn.Module:
    _stand_in_for_torchvision_operators()
    c = task.config
    if isinstance(c, SiglipConfig):
        return _timm_siglip(task, c)
    if isinstance(c, ResNetConfig):
        towers: Any = importlib.import_module("open_clip.modified_resnet")
        tower = towers.ModifiedResNet(c.layers, c.embed_dim, c.heads, c.image_size, c.width)
    else:
        assert isinstance(c, VitConfig)
        towers = importlib.import_module("open_clip.transformer")
        activation = towers.QuickGELU if c.activation == "quick_gelu" else nn.GELU
        tower = towers.VisionTransformer(
            c.image_size, c.patch_size, c.width, c.layers, c.heads, c.mlp_ratio,
            output_dim=c.embed_dim, act_layer=activation,
        )  # fmt: skip
    tower.load_state_dict(task.state_dict)
    return task.ready(tower)


def _timm_siglip(task: Task, c: SiglipConfig) -> nn.Module:
    """timm's tower, which is all that open_clip runs for a SigLIP's images."""
    timm: Any = importlib.import_module("timm.models.vision_transformer")
    tower = timm.VisionTransformer(
        c.image_size, c.patch_size, num_classes=0, global_pool="map", class_token=False, embed_dim=c.width,
        depth=c.layers, num_heads=c.heads, mlp_ratio=c.mlp_width / c.width, act_layer=c.activation,
    )  # fmt: skip
    state: dict[str, Tensor] = {}
    for name, tensor in task.state_dict.items():
        keys = timm_keys(name)
        shares = [2 if ".kv." in key else 1 for key in keys]  # keys and values are one tensor there
        parts = tensor.split([len(tensor) * share // sum(shares) for share in shares])
        state |= dict(zip(keys, parts, strict=True))
    state["pos_embed"] = state["pos_embed"][None]
    tower.load_state_dict(state)
    return task.ready(tower)


def _transformers_siglip(task: Task, c: SiglipConfig) -> nn.Module:
    transformers: Any = importlib.import_module("transformers")
    config = transformers.SiglipVisionConfig(
        hidden_size=c.width, intermediate_size=c.mlp_width, num_hidden_layers=c.layers, num_attention_heads=c.heads,
        image_size=c.image_size, patch_size=c.patch_size, attn_implementation="sdpa",
        hidden_act="gelu_pytorch_tanh" if c.activation == "gelu_tanh" else c.activation,
    )  # fmt: skip
    model = transformers.SiglipVisionModel(config)
    tower = getattr(model, "vision_model", model)  # inside of it before release 5
    state: dict[str, Tensor] = {}
    for name, tensor in task.state_dict.items():
        keys = [key.removeprefix("vision_model.") for key in hugging_face_keys(name)]
        state |= dict(zip(keys, tensor.chunk(len(keys)), strict=True))
    tower.load_state_dict(state)
    return task.ready(model)


def _transformers_model(task: Task) -> nn.Module:
    if isinstance(task.config, SiglipConfig):
        return _transformers_siglip(task, task.config)
    c = task.vit("transformers")
    transformers: Any = importlib.import_module("transformers")
    config = transformers.CLIPVisionConfig(
        hidden_size=c.width, intermediate_size=c.mlp_width, projection_dim=c.embed_dim, num_hidden_layers=c.layers,
        num_attention_heads=c.heads, image_size=c.image_size, patch_size=c.patch_size, hidden_act=c.activation,
        layer_norm_eps=EPS, attn_implementation="sdpa",
    )  # fmt: skip
    state: dict[str, Tensor] = {}
    for name, tensor in task.state_dict.items():
        keys = hugging_face_keys(name)
        parts = [tensor.T] if name == "proj" else tensor.chunk(len(keys))
        state |= dict(zip(keys, parts, strict=True))
    model = transformers.CLIPVisionModelWithProjection(config)
    missing = model.load_state_dict(state, strict=False).missing_keys
    if any(not key.endswith("position_ids") for key in missing):
        raise Unavailable(f"its weights have other names here: {missing[0]}")
    return task.ready(model)


def _transformers(task: Task) -> Encode:
    model = _transformers_model(task)
    output = "pooler_output" if isinstance(task.config, SiglipConfig) else "image_embeds"
    return lambda images: getattr(model(pixel_values=images), output)


def _timm_tower(task: Task) -> nn.Module:
    if isinstance(task.config, SiglipConfig):
        raise Unavailable("timm's SigLIP is what open_clip runs")
    c = task.vit("timm")
    _stand_in_for_torchvision_operators()
    timm: Any = importlib.import_module("timm.models.vision_transformer")
    layers: Any = importlib.import_module("timm.layers")
    tower = timm.VisionTransformer(
        c.image_size, c.patch_size, num_classes=c.embed_dim, global_pool="token", embed_dim=c.width, depth=c.layers,
        num_heads=c.heads, mlp_ratio=c.mlp_ratio, pre_norm=True,
        norm_layer=partial(layers.LayerNorm, eps=EPS),
        act_layer=layers.get_act_layer("quick_gelu" if c.activation == "quick_gelu" else "gelu"),
    )  # fmt: skip
    tower.load_state_dict(timm._convert_openai_clip(dict(task.state_dict), tower, prefix=""))
    return task.ready(tower)


@contextmanager
def compilations() -> Iterator[None]:
    """Within this context compiled systems start without earlier compilations.

    A system that was compiled for too many shapes fails. PyTorch would otherwise run it eagerly.
    """
    torch.compiler.reset()
    with torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True):
        yield


def _compiled(build: Callable[[Task], Encode], attention: str | None = None) -> Callable[[Task], Encode]:
    """torch.compile of a system: on a GPU at its highest setting, on a CPU in its default mode with frozen weights.

    Args:
        attention: the backend to pin scaled_dot_product_attention to; None leaves the choice to PyTorch.
    """

    def compiled(task: Task) -> Encode:
        on_gpu = task.device.type == "cuda"
        options = torch._inductor.list_mode_options("max-autotune") if on_gpu else {}
        encode = torch.compile(build(task), backend=_inductor(options), dynamic=False)
        if attention is None and on_gpu:
            return encode
        # Freezing makes the weights constants, which Inductor packs once. Dynamo reads this setting too, so it cannot
        # be an option of the graph.
        frozen = nullcontext if on_gpu else partial(torch._inductor.config.patch, freezing=True)
        pinned = partial(sdpa_kernel, [getattr(SDPBackend, attention)]) if attention else nullcontext

        def with_settings(images: Tensor) -> Tensor:
            with frozen(), pinned():
                return encode(images)

        return with_settings

    return compiled


def _inductor(options: dict[str, Any]) -> Callable[..., Any]:
    """Inductor under a name of its own.

    PyTorch looks compiled graphs up by code and backend, and takes any two uses of its own "inductor" for one backend.
    Two systems of one package would then share the first one's graph, with the attention that was chosen for that.
    """

    def inductor(graph: torch.fx.GraphModule, examples: list[Tensor]) -> Any:
        return torch._inductor.compile(graph, examples, options)  # type: ignore[arg-type]

    return inductor


def _onnx_runtime(task: Task) -> Encode:
    ort: Any = importlib.import_module("onnxruntime")
    tower = _open_clip_tower(task)

    @cache
    def session(shape: torch.Size) -> Any:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "tower.onnx"
            with contextlib.redirect_stdout(None):
                torch.onnx.export(
                    tower, (torch.zeros(shape),), str(file), input_names=["images"], output_names=["embeddings"],
                    dynamo=True, external_data=True,
                )  # fmt: skip
            options = ort.SessionOptions()
            options.intra_op_num_threads = torch.get_num_threads()
            return ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])

    return lambda images: torch.from_numpy(session(images.shape).run(None, {"images": images.numpy()})[0])


def _openvino(task: Task) -> Encode:
    ov: Any = importlib.import_module("openvino")
    tower = _open_clip_tower(replace(task, precision="fp32"))
    hints = {
        "INFERENCE_PRECISION_HINT": "bf16" if task.precision == "bf16" else "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }

    @cache
    def compiled(shape: torch.Size) -> Any:
        model = ov.convert_model(tower, example_input=torch.zeros(shape), input=[list(shape)])
        return ov.compile_model(model, "CPU", hints)

    return lambda images: torch.from_numpy(compiled(images.shape)(images.float().numpy())[0].copy())


_REGISTERED: list[torch.library.Library] = []  # kept alive until the process ends


def _stand_in_for_torchvision_operators() -> None:
    """Defines the operators that torchvision's Python part needs, where its compiled part cannot be loaded.

    The packages import torchvision for their preprocessing.
    """
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _REGISTERED.append(library)


OURS = "clip_fast"
BASELINE = "openai-clip"
FLOAT32 = "openai-clip, fp32"  # as people run it on a CPU; measured beside lower precisions
_CPU: tuple[str, ...] = ("cpu",)
_CUDA: tuple[str, ...] = ("cuda",)

SYSTEMS = (  # compiled ones come late: compiling takes minutes each
    System(OURS, None, _ours),
    System(BASELINE, "openai-clip", _openai_clip),
    System(FLOAT32, "openai-clip", _in_float32, _CPU, ("bf16",)),
    System("open_clip", "open_clip_torch", _open_clip_tower),
    System("transformers", "transformers", _transformers),
    System("open_clip, compiled", "open_clip_torch", _compiled(_open_clip_tower)),
    System(
        "open_clip, compiled, cuDNN attention", "open_clip_torch", _compiled(_open_clip_tower, "CUDNN_ATTENTION"),
        _CUDA, ("fp16", "bf16"),
    ),
    System("transformers, compiled", "transformers", _compiled(_transformers)),
    System(
        "transformers, compiled, cuDNN attention", "transformers", _compiled(_transformers, "CUDNN_ATTENTION"),
        _CUDA, ("fp16", "bf16"),
    ),
    System("timm, compiled", "timm", _compiled(_timm_tower)),
    System("ONNX Runtime", "onnxruntime", _onnx_runtime, _CPU, ("fp32",)),
    System("OpenVINO", "openvino", _openvino, _CPU, ("fp32", "bf16")),
)  # fmt: skip
