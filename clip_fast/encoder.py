"""The image encoder that users hold: a tower on a device, in a precision.

`ImageEncoder` keeps the weights under their canonical names, as any PyTorch module; its engine runs them fast.
"""

from __future__ import annotations

import warnings
from typing import Any, Literal, TypeVar, get_args, overload

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook  # pyright: ignore[reportPrivateUsage]

from . import reference
from .config import IMAGE_MEAN, IMAGE_STD, Config, Rgb, VitConfig
from .engine import (
    Engine,
    NotServed,
    Precision,
    Source,
    Task,
    Watch,
    as_tuple,
    compiled,
    normalised,
    register,
    transformed,
    without_values,
)
from .graphs import Results

_Module = TypeVar("_Module", bound=nn.Module)

_DOUBLE = "it computes in float64"


def default_device() -> torch.device:
    """A GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def default_dtype(device: torch.device) -> torch.dtype:
    """Of weights and embeddings: as in `clip`, float16 on a GPU and float32 on a CPU."""
    return torch.float16 if device.type == "cuda" else torch.float32


class ImageEncoder(nn.Module):
    """CLIP's image encoder: `encode_image(images)` gives one embedding per image.

    Args:
        config: the tower's shape.
        state_dict: its weights under canonical names (see `clip_fast.checkpoint`), on any device, of any float dtype.
        device: where to compute.
        dtype: of the weights and of the embeddings.
        precision: to compute in, by default that of `dtype`: "fp32" is exact float32 (on a CPU
            unless `torch.set_float32_matmul_precision` says otherwise), "tf32" has the operands
            of float32 products cut to 11 bits on a GPU (and is "fp32" elsewhere), "fp16" and "bf16" accumulate in
            float32; a CPU that has no instructions for one of these two computes in float32 instead.
        mean, std: of the RGB channels of pixels scaled to [0, 1], with which uint8 images are normalised.
        cuda_graphs: replay small batches on an NVIDIA GPU as CUDA graphs, which keep some of its memory for themselves.

    On a GPU a ViT's embedding of an image has the same bits alone, in any batch and at any position. On a CPU the
    libraries that PyTorch multiplies with do not keep that, and cuDNN's convolutions in a ResNet do not promise it.

    `visual` is the tower in plain PyTorch. It runs instead of the fast path where gradients are wanted (they are
    enabled, and the images or a weight require them), and, with a warning, where its modules are hooked, replaced by
    others, or batch norms in training mode.
    """

    def __init__(
        self,
        config: Config,
        state_dict: dict[str, Tensor],
        device: torch.device,
        dtype: torch.dtype,
        *,
        precision: Precision | None = None,
        mean: Rgb = IMAGE_MEAN,
        std: Rgb = IMAGE_STD,
        cuda_graphs: bool = True,
    ) -> None:
        super().__init__()
        if not dtype.is_floating_point:
            raise ValueError(f"dtype must be a floating-point type, got {dtype}")
        if precision is not None and precision not in get_args(Precision):
            raise ValueError(f"precision must be one of {get_args(Precision)} or None, got {precision!r}")
        self.config = config
        self.mean, self.std = mean, std
        self._precision: Precision | None = precision
        self._cuda_graphs = cuda_graphs
        with torch.device("meta"):  # without drawing random weights first
            visual = reference.build(config)
        self.visual = with_weights(visual, state_dict, device, dtype)
        self.eval()
        self._name = register(self, ImageEncoder._run, ImageEncoder._empty)
        self.refresh()

    def refresh(self) -> None:
        """Looks through the tower as it is now, and reads its weights anew at the next call.

        Needed only after writes that leave no trace: to `weight.data`, or through NumPy.
        """
        visual, config = self.visual, self.config  # below without `self`, which would then hold on to itself
        self._problem = _difference(visual, config)
        self._watch = Watch(visual, called=False)
        self._norms = [module for module in visual.modules() if isinstance(module, nn.BatchNorm2d)]

        def state_dict() -> dict[str, Tensor]:
            if problem := _difference(visual, config):
                raise NotServed(problem)
            return visual.state_dict()

        source = Source(config, self._watch.modules, state_dict, lambda: visual.conv1.weight)
        self._engine = Engine(
            source, precision=self._precision, mean=self.mean, std=self.std, cuda_graphs=self._cuda_graphs
        )
        self._warned: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: all but what `refresh` makes, and the name."""
        made = ("_problem", "_watch", "_norms", "_engine", "_name", "_warned")
        state: dict[str, Any] = super().__getstate__()
        return {name: value for name, value in state.items() if name not in made}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # pyright: ignore[reportUnknownMemberType]
        with torch.inference_mode(False):  # a copy made in inference mode has weights that cannot be told from others
            weights: dict[str, Tensor] = self.state_dict()
            if any(tensor.is_inference() for tensor in weights.values()):
                self.load_state_dict({name: tensor.clone() for name, tensor in weights.items()}, assign=True)
        self._name = register(self, ImageEncoder._run, ImageEncoder._empty)
        self.refresh()

    @property
    def precision(self) -> Precision | None:
        """What is computed in; None is the weights' dtype."""
        return self._precision

    @property
    def device(self) -> torch.device:
        return self.visual.conv1.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.visual.conv1.weight.dtype

    @overload
    def encode_image(self, image: Tensor, *, return_patch_tokens: Literal[False] = False) -> Tensor: ...

    @overload
    def encode_image(self, image: Tensor, *, return_patch_tokens: Literal[True]) -> tuple[Tensor, Tensor]: ...

    def encode_image(self, image: Tensor, *, return_patch_tokens: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Embeds images.

        Args:
            image: images (B, 3, image_size, image_size) as `preprocess` gives them, of any float dtype; or raw pixels
                in uint8, (B, 3, image_size, image_size) or (B, image_size, image_size, 3), which are normalised on
                the way. B may be 0.
            return_patch_tokens: also return a ViT's patch tokens after its last LayerNorm, as open_clip gives them.

        Returns:
            (B, embed_dim) of the encoder's dtype, on its device; not normalised. With patch tokens a pair, the second
            (B, patches, width).

        Raises:
            ValueError: for another shape, or patch tokens of a ResNet.
            TypeError: for images of another integer dtype.
        """
        images = self._engine.checked(image)
        if not return_patch_tokens:
            return self._run(images, "encode")[0]
        self._vit_config("patch tokens")
        embeddings, tokens = self._run(images, "encode_tokens")
        return embeddings, tokens

    def hidden_state(self, images: Tensor, layer: int) -> Tensor:
        """The residual stream of a ViT after `layer` of its blocks: (B, 1 + patches, width) of the encoder's dtype.

        0 is what enters the first block; −1 the last block's output and −2 the one before, as the `hidden_states` of
        transformers are counted.

        Raises:
            ValueError: for images of another shape, a ResNet, or a layer that is not there.
        """
        images = self._engine.checked(images)
        config = self._vit_config("hidden states")
        index = layer if layer >= 0 else config.layers + 1 + layer
        if not 0 <= index <= config.layers:
            raise ValueError(f"layer must be between {-config.layers - 1} and {config.layers}, got {layer}")
        return self._run(images, "hidden_state", index)[0]

    def forward(self, images: Tensor) -> Tensor:
        return self.encode_image(images)

    def _vit_config(self, what: str) -> VitConfig:
        if not isinstance(self.config, VitConfig):
            raise ValueError(f"a ResNet has no {what}")
        return self.config

    def _run(self, images: Tensor, task: Task, *arguments: int) -> Results:
        """A task's results: by the engine wherever it serves, else by the plain tower."""
        if torch.compiler.is_exporting() or transformed():  # a program must stand on its own
            return self._plain(images, task, *arguments)
        if getattr(self, "_is_replica", False):  # of DataParallel: its weights last for this call
            return self._plain(images.to(self.device), task, *arguments)
        if torch.compiler.is_compiling():
            if self._engine.gradients_wanted(images):
                return self._plain(images, task, *arguments)
            return compiled(self._name, images, task, *arguments)
        if without_values(images):
            return self._plain(images, task, *arguments)
        problem = self.why_plain()
        engine = self._engine
        if len(images) == 0:
            return engine.empty(images, task)
        if engine.gradients_wanted(images):
            return self._plain(images, task, *arguments)
        if problem == _DOUBLE:
            with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
                return engine.in_parts(images, lambda part: self._plain(part, task, *arguments), task)
        if problem:
            self._warn(problem)
            return self._plain(images, task, *arguments)
        try:
            return engine.run(images, task, *arguments)
        except NotServed as error:
            self._warn(str(error))
            return self._plain(images, task, *arguments)

    def _empty(self, images: Tensor, task: Task) -> Results:
        return self._engine.empty(images, task)

    def why_plain(self) -> str | None:
        """Why the plain tower must run, apart from gradients; None where the fast path serves."""
        if self.visual is not self._watch.modules[0] or self._watch.replaced():
            self.refresh()
        if self._problem:
            return self._problem
        if self._watch.hooked() or _has_any_global_hook():
            return "hooks are registered inside the tower"
        if any(norm.training for norm in self._norms):
            return "its batch norms are in training mode"
        return _DOUBLE if self._engine.compute_dtype == torch.float64 else None

    def _warn(self, problem: str) -> None:
        if problem not in self._warned:
            self._warned.add(problem)
            warnings.warn(f"the plain tower runs, not the fast one: {problem}", stacklevel=5)

    def _plain(self, images: Tensor, task: Task, *arguments: int) -> Results:
        """A task's results by the plain tower, through which gradients flow."""
        method = self.visual if task == "encode" else getattr(self.visual, task)
        return as_tuple(method(normalised(images, self.dtype, self.mean, self.std), *arguments))


def with_weights(module: _Module, state_dict: dict[str, Tensor], device: torch.device, dtype: torch.dtype) -> _Module:
    """`module`, which is on the meta device, with copies of these weights, for inference."""
    with torch.inference_mode(False):  # tensors made in inference mode have no version to tell changes by
        weights = {
            name: tensor.to(device, dtype if tensor.is_floating_point() else None, copy=True).contiguous()
            for name, tensor in state_dict.items()
        }
        module.load_state_dict(weights, assign=True)
        return module.eval().requires_grad_(False)


def _difference(tower: Any, config: Config) -> str | None:
    """What in a tower is not as `reference.build` makes it."""
    with torch.device("meta"):
        wanted: Any = reference.build(config)
    classes: dict[str, type] = {name: type(module) for name, module in wanted.named_modules()}
    for name, module in tower.named_modules():
        if classes.pop(name, None) is not type(module):
            return f"visual.{name} is a {type(module).__qualname__}"
    if classes:
        return f"visual.{next(iter(classes))} is gone"
    shapes: dict[str, torch.Size] = {name: tensor.shape for name, tensor in wanted.state_dict().items()}
    for name, tensor in tower.state_dict().items():
        if shapes.pop(name, None) != tensor.shape:
            return f"visual.{name} is {list(tensor.shape)}"
    return f"visual.{next(iter(shapes))} is gone" if shapes else None
