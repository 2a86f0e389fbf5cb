"""The image encoder that users hold: a tower on a device, in a precision.

`ImageEncoder` keeps the weights under their canonical names, as any PyTorch module, and beside them the form that the
fast path reads, made from them when first needed and again whenever they have changed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Literal, cast, get_args, overload

import torch
from torch import Tensor, nn

from . import reference, vit, vit_cpu
from .config import IMAGE_MEAN, IMAGE_STD, Config, ResNetConfig, VitConfig
from .kernels import ops

Precision = Literal["fp32", "tf32", "fp16", "bf16"]

_COMPUTE_DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_CPU_BATCH = 64  # images at a time on a CPU: more are no faster and take more memory

_Triple = tuple[float, float, float]
_Result = Tensor | tuple[Tensor, ...]


class ImageEncoder(nn.Module):
    """CLIP's image encoder: `encode_image(images)` gives one embedding per image.

    Args:
        config: the tower's shape.
        state_dict: its weights under canonical names (see `clip_fast.checkpoint`), on any device, of any float dtype.
        device: where to compute.
        dtype: of the weights and of the embeddings.
        precision: to compute in, by default that of `dtype`: "fp32" is exact float32, "tf32" rounds the operands of
            float32 products on a GPU (and is "fp32" elsewhere), "fp16" and "bf16" accumulate in float32.
        mean, std: of the RGB channels of pixels scaled to [0, 1], with which uint8 images are normalised.

    On a GPU an image's embedding has the same bits alone, in any batch and at any position. On a CPU the libraries that
    PyTorch multiplies with do not keep that.
    """

    def __init__(
        self,
        config: Config,
        state_dict: dict[str, Tensor],
        device: torch.device,
        dtype: torch.dtype,
        *,
        precision: Precision | None = None,
        mean: _Triple = IMAGE_MEAN,
        std: _Triple = IMAGE_STD,
    ) -> None:
        super().__init__()
        if not dtype.is_floating_point:
            raise ValueError(f"dtype must be a floating-point type, got {dtype}")
        if precision is not None and precision not in get_args(Precision):
            raise ValueError(f"precision must be one of {get_args(Precision)} or None, got {precision!r}")
        if precision is not None and isinstance(config, ResNetConfig) and _COMPUTE_DTYPES[precision] != dtype:
            raise ValueError(f"a ResNet computes in the dtype of its weights, {dtype}, got precision {precision!r}")
        self.config = config
        self.precision = precision
        self.mean, self.std = mean, std
        with torch.inference_mode(False):  # tensors made in inference mode have no version to tell changes by
            self.visual = reference.build(config)
            self.visual.load_state_dict(state_dict)
            self.to(device=device, dtype=dtype).eval().requires_grad_(False)
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._prepared: tuple[object, Any] | None = None  # what it was made from, and the fast path's weights
        self._largest_batch: int | None = None  # that fitted into a GPU's memory, once one did not
        modules = list(self.visual.modules())
        self._slots = [slot for m in modules for slot in (m._parameters, m._buffers) if slot]

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: all but what is derived."""
        derived = ("_lock", "_prepared", "_largest_batch", "_slots")
        return {name: value for name, value in self.__dict__.items() if name not in derived}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # pyright: ignore[reportUnknownMemberType]
        self._reset()

    @property
    def device(self) -> torch.device:
        return self.visual.conv1.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.visual.conv1.weight.dtype

    @overload
    def encode_image(self, images: Tensor, *, return_patch_tokens: Literal[False] = False) -> Tensor: ...

    @overload
    def encode_image(self, images: Tensor, *, return_patch_tokens: Literal[True]) -> tuple[Tensor, Tensor]: ...

    def encode_image(self, images: Tensor, *, return_patch_tokens: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Embeds images.

        Args:
            images: (B, 3, image_size, image_size) as `preprocess` gives them, of any float dtype; or raw pixels in
                uint8, (B, 3, image_size, image_size) or (B, image_size, image_size, 3), which are normalised on the
                way. B may be 0.
            return_patch_tokens: also return a ViT's patch tokens after its last LayerNorm, as open_clip gives them.

        Returns:
            (B, embed_dim) of the encoder's dtype, on its device; not normalised. With patch tokens a pair, the second
            (B, patches, width).

        Raises:
            ValueError: for another shape, or patch tokens of a ResNet.
            TypeError: for images of another integer dtype.

        Where gradients are wanted (they are enabled, and the images or a weight require them), the plain tower runs.
        """
        images = self._checked(images)
        if not return_patch_tokens:
            return self._run(images, "encode", [(self.config.embed_dim,)])[0]
        config = self._vit_config("patch tokens")
        embeddings, tokens = self._run(
            images, "encode_tokens", [(config.embed_dim,), (config.tokens - 1, config.width)]
        )
        return embeddings, tokens

    def hidden_state(self, images: Tensor, layer: int) -> Tensor:
        """The residual stream of a ViT after `layer` of its blocks: (B, 1 + patches, width) of the encoder's dtype.

        0 is what enters the first block; −1 the last block's output and −2 the one before, as the `hidden_states` of
        transformers are counted.

        Raises:
            ValueError: for images of another shape, a ResNet, or a layer that is not there.
        """
        images = self._checked(images)
        config = self._vit_config("hidden states")
        index = layer if layer >= 0 else config.layers + 1 + layer
        if not 0 <= index <= config.layers:
            raise ValueError(f"layer must be between {-config.layers - 1} and {config.layers}, got {layer}")
        return self._run(images, "hidden_state", [(config.tokens, config.width)], index)[0]

    def forward(self, images: Tensor) -> Tensor:
        return self.encode_image(images)

    # --- which way, and with which weights ---------------------------------------------------------------------------

    def _checked(self, images: Tensor) -> Tensor:
        """`images` on the encoder's device as (B, 3, H, W), or an error that says what is wrong with them."""
        size = self.config.image_size
        if images.dtype == torch.uint8 and images.ndim == 4 and images.shape[1:] == (size, size, 3):
            images = images.permute(0, 3, 1, 2)
        if images.ndim != 4 or images.shape[1:] != (3, size, size):
            raise ValueError(f"images must be [batch, 3, {size}, {size}], got {list(images.shape)}")
        if not images.is_floating_point() and images.dtype != torch.uint8:
            raise TypeError(f"images must be of a floating-point dtype, or raw pixels in uint8, got {images.dtype}")
        return images.to(self.device)

    def _vit_config(self, what: str) -> VitConfig:
        if not isinstance(self.config, VitConfig):
            raise ValueError(f"a ResNet has no {what}")
        return self.config

    @property
    def _compute_dtype(self) -> torch.dtype:
        return self.dtype if self.precision is None else _COMPUTE_DTYPES[self.precision]

    def _wants_gradients(self, images: Tensor) -> bool:
        return torch.is_grad_enabled() and (
            images.requires_grad or any(p.requires_grad for p in self._parameters_now())
        )

    def _normalised(self, images: Tensor, dtype: torch.dtype) -> Tensor:
        """Images as the plain tower takes them, in `dtype`."""
        if images.dtype == torch.uint8:
            wide = torch.promote_types(dtype, torch.float32)
            mean, std = (
                torch.tensor(x, dtype=wide, device=images.device)[:, None, None] for x in (self.mean, self.std)
            )
            images = (images.to(wide) / 255 - mean) / std
        return images.to(dtype)

    def _run(self, images: Tensor, what: str, shapes: list[tuple[int, ...]], *arguments: int) -> tuple[Tensor, ...]:
        """`what` of a tower for a batch, by the way that serves it best; results of `shapes` behind the batch."""
        if len(images) == 0:
            return tuple(torch.empty(0, *shape, dtype=self.dtype, device=self.device) for shape in shapes)
        if self._wants_gradients(images):
            return self._plain(images, what, *arguments)
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            if not isinstance(self.config, VitConfig) or self._compute_dtype == torch.float64:
                return self._in_parts(images, lambda part: self._plain(part, what, *arguments))
            if ops.triton_can_run(self.device):
                weights = self._weights(self._prepare_vit)
                precision: ops.Precision = "tf32" if self.precision == "tf32" else "ieee"
                encode = getattr(vit, what)
                return self._in_parts(images, lambda part: encode(weights, part, *arguments, precision=precision))
            weights = self._weights(self._prepare_vit_cpu)
            encode, dtype = getattr(vit_cpu, what), self._compute_dtype
            return self._in_parts(images, lambda part: encode(weights, self._normalised(part, dtype), *arguments))

    def _plain(self, images: Tensor, what: str, *arguments: int) -> tuple[Tensor, ...]:
        """`what` of the plain tower, through which gradients flow."""
        method = self.visual if what == "encode" else getattr(self.visual, what)
        result: _Result = method(self._normalised(images, self.dtype), *arguments)
        return result if isinstance(result, tuple) else (result,)

    def _in_parts(self, images: Tensor, run: Callable[[Tensor], _Result]) -> tuple[Tensor, ...]:
        """`run` over the batch in parts that fit into memory; a GPU that runs out of it is asked for half as much."""
        limit = self._largest_batch if self.device.type == "cuda" else _CPU_BATCH
        size = min(len(images), limit or len(images))
        while True:
            try:
                parts = [run(part) for part in torch.split(images, size)]
                break
            except torch.OutOfMemoryError:
                if size == 1:
                    raise
                size = self._largest_batch = -(-size // 2)
        columns = zip(*(part if isinstance(part, tuple) else (part,) for part in parts), strict=True)
        return tuple((column[0] if len(column) == 1 else torch.cat(column)).to(self.dtype) for column in columns)

    def _prepare_vit(self) -> vit.Weights:
        config = cast(VitConfig, self.config)
        return vit.prepare(self.visual.state_dict(), config, self._compute_dtype, self.mean, self.std)

    def _prepare_vit_cpu(self) -> vit_cpu.Weights:
        return vit_cpu.prepare(self.visual.state_dict(), cast(VitConfig, self.config), self._compute_dtype)

    def _weights(self, prepare: Callable[[], Any]) -> Any:
        """The fast path's weights, made again where those that they were made from have changed."""
        source = (prepare.__name__, self.precision, self._fingerprint())
        prepared = self._prepared
        if prepared is None or prepared[0] != source:
            with self._lock, torch.inference_mode(False), torch.no_grad():
                prepared = self._prepared
                if prepared is None or prepared[0] != source:
                    prepared = self._prepared = (source, prepare())
        return prepared[1]

    def _fingerprint(self) -> tuple[int, ...]:
        """Changes whenever a weight is written to, or another tensor takes its place.

        Every tensor counts the writes to it, in its version; one that stands for another has another address. (Tensors
        made in inference mode count nothing, and can only be written to in inference mode.)
        """
        return tuple(
            number for p in self._parameters_now() for number in (p.data_ptr(), 0 if p.is_inference() else p._version)
        )

    def _parameters_now(self) -> list[Tensor]:
        """The tower's tensors; as `parameters()` and `buffers()`, without their walk through all modules."""
        return [p for tensors in self._slots for p in tensors.values() if p is not None]
