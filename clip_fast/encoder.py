"""The image encoder that users hold: a tower on a device, in a precision.

`ImageEncoder` keeps the weights under their canonical names, as any PyTorch module; its engine runs them fast.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, TypeVar, overload

import torch
from torch import Tensor, nn

from . import pytorch
from .engine import route
from .engine.compiled import register
from .engine.engine import Engine, checked
from .engine.tower import Tower, Watch, plain_tensors, replaced_method, setting
from .errors import NotServed
from .towers import reference
from .towers.config import (
    ENCODE,
    ENCODE_TOKENS,
    HIDDEN_STATES,
    IMAGE_MEAN,
    IMAGE_STD,
    Config,
    Rgb,
    Task,
    TaskName,
    check_normalisation,
    hidden_state,
    sides,
)
from .towers.fast import Results, normalised
from .towers.precision import PrecisionName, check_name

_Module = TypeVar("_Module", bound=nn.Module)

_REPLICA = "it is a replica of DataParallel, whose weights last for one call"
_SILENT = route.SILENT | {route.TRANSFORMED, _REPLICA}


@dataclass(frozen=True)
class _Reading:
    """A tower as it was looked through: how it differs from what `reference.build` makes, or else its engine.

    `state` is that of the watch then.
    """

    difference: str | None
    engine: Engine | None
    watch: Watch
    norms: tuple[nn.BatchNorm2d, ...]
    state: object


class ImageEncoder(nn.Module):
    """CLIP's or SigLIP's image encoder: `encode_image(images)` gives one embedding for each image.

    Args:
        config: the tower's shape.
        state_dict: its weights under canonical names (those of `clip_fast.towers.reference`), on any device, of any
            float dtype.
        device: where to compute.
        dtype: of the weights and of the embeddings.
        precision: to compute in, by default that of `dtype`. "fp32" is exact float32 (on a CPU unless
            `torch.set_float32_matmul_precision` says otherwise). "tf32" cuts the operands of float32 products to 11
            bits on a GPU, and is "fp32" elsewhere. "fp16" and "bf16" accumulate in float32; a CPU that multiplies
            faster in float32 computes in it instead.
        mean, std: of the RGB channels of pixels scaled to [0, 1], with which uint8 images are normalised.
        cuda_graphs: replay batches on an NVIDIA GPU as CUDA graphs where launching takes longer; they keep some memory.
        copy: the encoder has copies of the weights. Otherwise those that are on `device` and in `dtype` become its own.

    On a GPU a ViT's embedding of an image has the same bits alone, in any batch and at any position. On a CPU the
    libraries that PyTorch multiplies with do not keep that, and cuDNN's convolutions in a ResNet do not promise it.

    `visual` is the tower in plain PyTorch. It runs instead of the fast path where gradients are wanted (they are
    enabled, and the images or a weight require them), with a warning if the encoder is in evaluation mode and its
    weights require them. It also runs, with a warning, where its modules are hooked or replaced, or where batch norms
    are in training mode. An encoder that is made by this class has weights that require no gradients.
    """

    def __init__(
        self,
        config: Config,
        state_dict: Mapping[str, Tensor],
        device: torch.device,
        dtype: torch.dtype,
        *,
        precision: PrecisionName | None = None,
        mean: Rgb = IMAGE_MEAN,
        std: Rgb = IMAGE_STD,
        cuda_graphs: bool = True,
        copy: bool = True,
        without_text: str = "it has no text tower",
    ) -> None:
        super().__init__()
        if not isinstance(dtype, torch.dtype):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"dtype must be a torch.dtype, got {dtype!r}")
        if not dtype.is_floating_point or dtype.itemsize < 2:
            raise ValueError(f"dtype must be float16, bfloat16, float32 or float64, got {dtype}")
        check_name(precision)
        check_normalisation(mean, std)
        self.config = config
        self._mean, self._std = mean, std
        self._without_text = without_text
        self._precision: PrecisionName | None = precision
        self._cuda_graphs = cuda_graphs
        with torch.device("meta"):  # so that no random weights are drawn
            visual = reference.build(config)
        self.visual = with_weights(visual, state_dict, device, dtype, copy=copy)
        self.eval()
        self._name = register(self)
        self.refresh()

    def refresh(self) -> None:
        """Looks through the tower as it is now, and reads its weights anew at the next call.

        Needed only after writes that leave no trace: to `weight.data`, or through NumPy.
        """
        visual, config = self.visual, self.config  # used below in place of `self`, which would hold on to itself

        def state_dict() -> dict[str, Tensor]:
            if difference := _difference(visual, config):
                raise NotServed(difference)
            plain_tensors(visual.state_dict(keep_vars=True))
            return visual.state_dict()

        watch, difference, engine = Watch(visual, _SETTINGS, called=False), _difference(visual, config), None
        if difference is None:
            tower = Tower(config, watch.modules, state_dict, lambda: visual.conv1.weight)
            precision, cuda_graphs = self._precision, self._cuda_graphs
            engine = Engine(tower, precision=precision, mean=self._mean, std=self._std, cuda_graphs=cuda_graphs)
        norms = tuple(module for module in watch.modules if isinstance(module, nn.BatchNorm2d))
        self._warned: set[str] = set()
        # At once, and last: other threads may be encoding.
        self._reading = _Reading(difference, engine, watch, norms, watch.state())

    @property
    def _engine(self) -> Engine | None:
        return self._reading.engine

    def __getstate__(self) -> dict[str, Any]:
        """The state for copies and pickles: all but what `refresh` makes, and the name."""
        made = ("_reading", "_warned", "_name")
        state: dict[str, Any] = super().__getstate__()
        return {name: value for name, value in state.items() if name not in made}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # pyright: ignore[reportUnknownMemberType]
        with torch.inference_mode(False):  # tensors made in inference mode have no version to tell changes by
            weights: dict[str, Tensor] = self.state_dict()
            if any(tensor.is_inference() for tensor in weights.values()):
                self.load_state_dict({name: tensor.clone() for name, tensor in weights.items()}, assign=True)
        self._name = register(self)
        self.refresh()

    @property
    def precision(self) -> PrecisionName | None:
        """The precision that is computed in; None is that of the weights' dtype."""
        return self._precision

    @property
    def cuda_graphs(self) -> bool:
        """Whether batches may be replayed as CUDA graphs on a GPU."""
        return self._cuda_graphs

    @property
    def mean(self) -> Rgb:
        """That uint8 images are normalised with, as `std`."""
        return self._mean

    @property
    def std(self) -> Rgb:
        return self._std

    @property
    def device(self) -> torch.device:
        return self._weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self._weight.dtype

    @property
    def _weight(self) -> Tensor:
        """The first weight of the tower, whatever the tower is. The weights of a replica are no parameters."""
        weights = (getattr(module, "weight", None) for module in self.visual.modules())
        found = next((weight for weight in weights if isinstance(weight, Tensor)), None)
        if found is None:
            raise ValueError(f"visual is a {type(self.visual).__qualname__} without a weight: it is no image tower")
        return found

    @overload
    def encode_image(self, image: Tensor, *, return_patch_tokens: Literal[False] = False) -> Tensor: ...

    @overload
    def encode_image(self, image: Tensor, *, return_patch_tokens: Literal[True]) -> tuple[Tensor, Tensor]: ...

    def encode_image(self, image: Tensor, *, return_patch_tokens: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Embeds images.

        Args:
            image: images (B, 3, height, width) as `preprocess` gives them, of any float dtype; or raw pixels in uint8,
                (B, 3, height, width) or (B, height, width, 3), which are normalised on the way. B may be 0.
            return_patch_tokens: also return a ViT's patch tokens, as open_clip gives them: after its last LayerNorm,
                or before it in a model that has it behind the pooling.

        Returns:
            (B, embed_dim) of the encoder's dtype, under autocast too, on its device; not normalised. With patch tokens
            a pair, the second (B, patches, width).

        Raises:
            ValueError: the images have another shape, or patch tokens are wanted of a ResNet.
            TypeError: the images are no tensor, or of another integer dtype.
        """
        if not return_patch_tokens:
            return self._results(image, ENCODE)[0]
        self._require("encode_tokens", "patch tokens")
        embeddings, tokens = self._results(image, ENCODE_TOKENS)
        return embeddings, tokens

    def hidden_state(self, images: Tensor, layer: int) -> Tensor:
        """The residual stream of a ViT after `layer` of its blocks: (B, tokens, width) of the encoder's dtype.

        The tokens are the patches, and with CLIP's ViT a class token before them.

        0 is the input of the first block; −1 the last block's output and −2 the one before, as transformers counts its
        `hidden_states`.

        Raises:
            ValueError: the images have another shape, the encoder is a ResNet, or there is no such layer.
            TypeError: `layer` is no whole number.
        """
        self._require("hidden_state", "hidden states")
        blocks = getattr(getattr(self.visual, "transformer", None), "resblocks", None)  # some may have been removed
        layers = len(self.config.row_shapes(HIDDEN_STATES)) - 1 if blocks is None else len(blocks)
        try:
            layer = operator.index(layer)
        except TypeError as error:
            raise TypeError(f"layer must be a whole number, got {layer!r}") from error
        index = layer if layer >= 0 else layers + 1 + layer
        if not 0 <= index <= layers:
            raise ValueError(f"layer must be between {-layers - 1} and {layers}, got {layer}")
        return self._results(images, hidden_state(index))[0]

    def tokenize(self, texts: str | list[str], truncate: bool = False) -> Tensor:
        """Texts to tokens, in a `Clip`. Raises NotServed, with the reason, in an encoder that embeds images alone."""
        raise NotServed(f"this model embeds no texts: {self._without_text}")

    def encode_text(self, text: Tensor) -> Tensor:
        """Embeds texts, in a `Clip`. Raises NotServed, with the reason, in an encoder that embeds images alone."""
        raise NotServed(f"this model embeds no texts: {self._without_text}")

    def forward(self, images: Tensor) -> Tensor:
        return self.encode_image(images)

    def _require(self, task: TaskName, what: str) -> None:
        if task not in self.config.tasks:
            raise ValueError(f"{self.config.family} has no {what}")

    # --- which way a call goes, see `engine.route` -------------------------------------------------------------------

    def _results(self, images: Tensor, task: Task) -> Results:
        """A task's results: by the engine wherever it serves, else by the plain tower."""
        if not isinstance(images, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
            height, width = sides(self.config.image_size)
            raise TypeError(
                f"images must be a tensor [batch, 3, {height}, {width}], got {_kind(images)}: "
                "preprocess(picture).unsqueeze(0) makes one of a PIL image, torch.stack(tensors) of a list, "
                "torch.from_numpy(array) of an array"
            )
        results = route.route(self, images, task)
        return self._plain(images, task, because=results) if isinstance(results, str) else results

    def _look(self) -> tuple[Engine | None, str | None]:
        if self._replica():
            return None, _REPLICA
        reading = self._reading
        watch = reading.watch
        if self.visual is not watch.modules[0] or watch.replaced() or watch.state() != reading.state:
            self.refresh()
            reading = self._reading
        return reading.engine, _problem(reading)

    def _traced_engine(self) -> Engine | None:
        return None if self._replica() else self._engine

    def _autocast(self) -> str:
        return ""  # a loaded encoder has its own precision

    def _run_in_graph(self, images: Tensor, task: Task, autocast: str) -> Results:
        return self._results(images, task)

    def _without_values(self, images: Tensor, task: Task) -> Results:
        assert self._engine is not None
        return self._engine.without_values(images, task)

    def _warn(self, reason: str) -> None:
        if reason not in self._warned and reason not in _SILENT:
            self._warned.add(reason)
            warnings.warn(f"the plain tower runs, not the fast one: {reason}", stacklevel=route.users_level())

    def _replica(self) -> bool:
        return self.__dict__.get("_is_replica", False)  # DataParallel's mark

    def _plain(self, images: Tensor, task: Task, because: str) -> Results:
        """A task's results by the plain tower, through which gradients flow."""
        expected = because in _SILENT
        if because == route.GRADIENTS:  # asked for in training, or by images: it is no oversight
            expected = self.training or not any(p.requires_grad for p in self.visual.parameters())
        if not expected:
            self._warn(because)
        images = checked(images, self.config.image_size).to(self.device)
        if task != ENCODE and not hasattr(self.visual, "results"):
            raise ValueError(f"visual is a {type(self.visual).__qualname__}, which gives embeddings alone")

        def run(images: Tensor) -> Results:
            images = normalised(images, self.dtype, self.mean, self.std)
            results = (self.visual(images),) if task == ENCODE else self.visual.results(images, task)
            return tuple(result.to(self.dtype) for result in results)

        if because == route.DOUBLE and self._engine is not None and not self._engine.gradients_wanted(images):
            with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
                return self._engine.in_parts(images, run, task)
        return run(images)


def with_weights(
    module: _Module, state_dict: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype, *, copy: bool
) -> _Module:
    """`module`, which is on the meta device, with these weights, for inference; see `ImageEncoder` for `copy`."""

    def own(tensor: Tensor) -> Tensor:
        to = dtype if tensor.is_floating_point() else None
        return tensor.to(device, to, copy=copy or tensor.is_inference()).contiguous()

    with torch.inference_mode(False):  # tensors made in inference mode have no version to tell changes by
        weights = {name: own(tensor) for name, tensor in state_dict.items()}
        module.load_state_dict(weights, assign=True)
        return module.eval().requires_grad_(False)


def _kind(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")


def _problem(reading: _Reading) -> str | None:
    """The reason why a tower's engine cannot serve at the moment; None where nothing is in the way."""
    if reading.difference:
        return reading.difference
    if reading.watch.hooked() or pytorch.has_global_hook():
        return "hooks are registered inside the tower"
    if any(norm.training for norm in reading.norms):
        return "its batch norms are in training mode"
    return None


# --- what is in the tower --------------------------------------------------------------------------------------------

_SETTINGS = (  # the attributes of modules that the plain tower computes with
    "eps", "attn_mask", "num_heads", "head_dim", "dropout", "add_zero_attn", "batch_first", "approximate", "pool",
    "ln_after_pool", "kernel_size", "stride", "padding", "dilation", "padding_mode",
)  # fmt: skip


@cache
def _wanted(config: Config) -> tuple[dict[str, type], dict[str, dict[str, object]], dict[str, torch.Size]]:
    """The classes and settings of all modules and the shapes of all tensors, as `reference.build` makes them."""
    with torch.device("meta"):
        plain: Any = reference.build(config)
    modules: dict[str, nn.Module] = dict(plain.named_modules())
    classes = {name: type(module) for name, module in modules.items()}
    settings = {name: {each: setting(vars(module), each) for each in _SETTINGS} for name, module in modules.items()}
    return classes, settings, {name: tensor.shape for name, tensor in plain.state_dict().items()}


def _difference(tower: Any, config: Config) -> str | None:
    """The first part of a tower that is not as `reference.build` makes it; None where there is none."""
    classes, settings, shapes = _wanted(config)
    classes, shapes = dict(classes), dict(shapes)  # what the tower has is taken out
    modules: dict[str, nn.Module] = dict(tower.named_modules())
    for name, module in modules.items():
        place = f"visual.{name}" if name else "visual"
        if classes.pop(name, None) is not type(module):
            return f"{place} is a {type(module).__qualname__}"
        for each, value in settings[name].items():
            if setting(vars(module), each) != value:
                return f"{place} has another {each}"
        if method := replaced_method(module, vars(module)):
            return f"{place} has its own {method}"
    if classes:
        return f"visual.{next(iter(classes))} is gone"
    if list(modules) != list(settings):
        return "visual's modules are in another order"
    for name, tensor in tower.state_dict().items():
        if shapes.pop(name, None) != tensor.shape:
            return f"visual.{name} is {list(tensor.shape)}"
    return f"visual.{next(iter(shapes))} is gone" if shapes else None
