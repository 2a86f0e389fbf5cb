"""The image tower in a weights file: its shape, and its weights under canonical names."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..towers import reference
from ..towers.config import (
    HEAD_DIM,
    RESNET_STRIDE,
    Activation,
    Config,
    ImageSize,
    ResNetConfig,
    SiglipConfig,
    VitConfig,
    sides,
)
from .layouts import TIMM, Layout, listing
from .settings import BesideWeights, Described
from .weights_file import WeightsFile

_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, *_FLOAT8)
_HEAD_DIMS = {1280: 80, 1408: 88, 1664: 104, 1792: 112}  # by width: images in open_clip's ViT-H, ViT-g, ViT-bigG, ViT-e
_SIGLIP_HEAD_DIMS = {1152: 72, 1536: 96}  # SO400M and giant-opt


@dataclass(frozen=True)
class StoredTower:
    """The image tower in a file, by canonical names. Every method raises CheckpointError."""

    file: WeightsFile
    layout: Layout

    def config(self, settings: BesideWeights, activation: Callable[[], Activation]) -> Config:
        """Infers the tower's config from shapes, and from `settings` what shapes cannot tell."""
        if self.layout.hugging_face and not self.is_siglip and not self._has("proj"):
            raise CheckpointError(
                self.file.path,
                "misses visual_projection.weight: a CLIPVisionModel has no embeddings shared with text, "
                "save a CLIPModel or a CLIPVisionModelWithProjection",
            )
        try:
            if self._is_resnet():
                return self._resnet_config(settings)
            if self.is_siglip:
                return self._siglip_config(settings, activation)
            return self._vit_config(settings, activation)
        except CheckpointError:
            raise
        except ValueError as error:
            raise CheckpointError(self.file.path, f"its tensors' shapes make no tower: {error}") from error

    def described(self) -> Described:
        """The tower's shape by the weights alone, as a config tells it."""
        if self._is_resnet():
            width = self._shape("layer1.0.conv1.weight", 4)[0]
            layers = [self._count(f"layer{stage}.") for stage in (1, 2, 3, 4)]
            tokens = self._shape("attnpool.positional_embedding", 2)[0]
            embedding = self._shape("attnpool.c_proj.weight", 2)[0]
            return Described(self.file.activation, width, layers, RESNET_STRIDE, tokens, embedding)
        width, patch_size = self._patches()
        layers, tokens = self._count(self.layout.blocks), self._shape("positional_embedding", 2)[0]
        embedding = self._shape("proj", 2)[1] if self._has("proj") else None
        return Described(self.file.activation, width, layers, patch_size, tokens, embedding)

    def _vit_config(self, settings: BesideWeights, activation: Callable[[], Activation]) -> VitConfig:
        width, patch_size = self._patches()
        ln_pre = self._has("ln_pre.weight") or self._has("ln_pre.bias")
        if ln_pre and not settings.ln_pre:
            raise CheckpointError(self.file.path, "has an ln_pre, the config beside it says no_ln_pre")
        if settings.ln_pre and not ln_pre:
            raise CheckpointError(
                self.file.path,
                f"misses {self.layout.keys('ln_pre.weight')[0]}: if its model has none, as open_clip's with no_ln_pre, "
                "place its open_clip_config.json beside it",
            )
        embed_dim = self._shape("proj", 2)[1]
        layers = self._count(self.layout.blocks)
        mlp_width = self._shape("transformer.resblocks.0.mlp.c_fc.weight", 2)[0]
        image_size = self._image_size("positional_embedding", patch_size, settings)
        heads = self._heads(settings.heads, width, _HEAD_DIMS.get(width, HEAD_DIM))
        return VitConfig(
            *(image_size, patch_size, width, layers, heads, embed_dim, mlp_width / width, activation()),
            eps=settings.eps,
            ln_pre=ln_pre,
            pool=settings.pool,
            ln_after_pool=settings.ln_after_pool,
            layer_scale=self._has("transformer.resblocks.0.ls_1.gamma"),
        )

    def _siglip_config(self, settings: BesideWeights, activation: Callable[[], Activation]) -> SiglipConfig:
        width, patch_size = self._patches()
        layers = self._count(self.layout.blocks)
        mlp_width = self._shape("transformer.resblocks.0.mlp.c_fc.weight", 2)[0]
        image_size = self._image_size("positional_embedding", patch_size, settings, class_tokens=0)
        heads = self._heads(settings.heads, width, _SIGLIP_HEAD_DIMS.get(width, HEAD_DIM))
        shape = (image_size, patch_size, width, layers, heads, mlp_width, activation())
        return SiglipConfig(*shape, eps=settings.eps)

    def _patches(self) -> tuple[int, int]:
        """The width of a ViT's tower, and the side of its patches."""
        key = self.layout.keys("conv1.weight")[0]
        if self.is_siglip and self._tensor(key).ndim == 2:
            raise CheckpointError(
                self.file.path, f"{key} belongs to a NaFlex tower, for images of any shape, which is not served"
            )
        width, _, _, patch_size = self._shape("conv1.weight", 4)
        return width, patch_size

    def _resnet_config(self, settings: BesideWeights) -> ResNetConfig:
        width = self._shape("layer1.0.conv1.weight", 4)[0]
        layers = self._count("layer1."), self._count("layer2."), self._count("layer3."), self._count("layer4.")
        embed_dim = self._shape("attnpool.c_proj.weight", 2)[0]
        image_size = self._image_size("attnpool.positional_embedding", RESNET_STRIDE, settings)
        if not isinstance(image_size, int):
            raise CheckpointError(
                self.file.path, f"a ResNet takes square images, the config beside it says {image_size}"
            )
        heads = self._heads(settings.heads, 32 * width)
        return ResNetConfig(layers, width, heads, image_size, embed_dim)

    def state_dict(self, config: Config) -> dict[str, Tensor]:
        """All tensors of the tower, checked: complete, nothing besides, right in shape and dtype, finite."""
        wanted = self._wanted(lambda: reference.build(config))
        used = {key for name in wanted for key in self.layout.keys(name)}
        state_dict = self._load_all(wanted)
        surplus = [key for key in self.file.entries if key not in used and not self.layout.other.match(key)]
        if surplus:
            raise CheckpointError(self.file.path, f"holds what a CLIP model has not: {listing(surplus)}")
        return state_dict

    def _wanted(self, build: Callable[[], nn.Module]) -> dict[str, Tensor]:
        """The tensors of the module that `build` makes: their names, shapes and dtypes, without storage."""
        try:
            with torch.device("meta"):
                return build().state_dict()
        except RuntimeError as error:  # a stored tensor may be one number, and its shape any
            raise CheckpointError(self.file.path, f"its tensors' shapes make no tower: {error}") from error

    def _load_all(self, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of `wanted` names and shapes."""
        held = [self._tensor(key) for name in wanted for key in self.layout.keys(name) if key in self.file.entries]
        storages = {storage.data_ptr(): storage.nbytes() for storage in (part.untyped_storage() for part in held)}
        if sum(part.nbytes for part in held) > sum(storages.values()):  # a copy of them might fill any memory
            raise CheckpointError(self.file.path, "its tensors share memory, and are larger than what is stored")
        return {name: self._load(name, like) for name, like in wanted.items()}

    def _load(self, name: str, like: Tensor) -> Tensor:
        if name.endswith("num_batches_tracked") and not self._has(name):  # some tools leave these counters out
            return torch.zeros((), dtype=like.dtype)
        keys = self.layout.keys(name)
        whole_shape = list(like.shape)
        if transposed := self._is_transposed(name):
            whole_shape.reverse()
        batch = [1] if self._is_batched(name) else []
        shares = [2 if ".kv." in key else 1 for key in keys]  # timm keeps a head's keys and values together
        parts = [self._tensor(key) for key in keys]
        for key, share, part in zip(keys, shares, parts, strict=True):
            shape = [*batch, *(size * share // sum(shares) for size in whole_shape[:1]), *whole_shape[1:]]
            if list(part.shape) != shape:
                raise CheckpointError(self.file.path, f"{key} must have shape {shape}, got {list(part.shape)}")
            if like.is_floating_point() and part.dtype not in _DTYPES:
                raise CheckpointError(self.file.path, f"{key} must be of a floating-point dtype, got {part.dtype}")
            part = _wide(part)
            # Of NaN and other numbers the least is NaN. Counters of batches are nobody's concern, whatever their dtype.
            if like.is_floating_point() and not all(bound.isfinite() for bound in part.aminmax()):
                raise CheckpointError(self.file.path, f"{key} holds NaN or infinite values")
        if len({part.dtype for part in parts}) != 1:
            raise CheckpointError(self.file.path, f"{', '.join(keys)} must be of one dtype")
        parts = [_wide(part.detach()) for part in parts]
        whole = torch.cat(parts) if len(parts) > 1 else parts[0]
        whole = whole[0] if batch else whole
        whole = whole.T if transposed else whole
        # Pages of a file whose writer did not align its tensors are read at half the speed.
        keep = self.file.lasting and whole.data_ptr() % whole.itemsize == 0
        return whole.contiguous() if keep else whole.clone(memory_format=torch.contiguous_format)

    def _has(self, name: str) -> bool:
        return all(key in self.file.entries for key in self.layout.keys(name))

    @property
    def is_siglip(self) -> bool:
        """Whether it is SigLIP's: CLIP's patches have no bias."""
        return self.layout is TIMM or self._has("conv1.bias")

    def _is_resnet(self) -> bool:
        return self._has("layer1.0.conv1.weight")

    def _is_transposed(self, name: str) -> bool:
        return name == "proj" and self.layout.hugging_face

    def _is_batched(self, name: str) -> bool:
        """Whether a tensor is stored with a dimension of one before its own."""
        return name == "positional_embedding" and self.layout is TIMM

    def _tensor(self, key: str) -> Tensor:
        """The tensor under a key of the file."""
        if key not in self.file.entries:
            raise CheckpointError(self.file.path, f"misses {key}")
        value = self.file.entries[key]
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.device.type != "cpu":
            raise CheckpointError(self.file.path, f"{key} is not a plain dense tensor but {type(value).__name__}")
        return value

    def _shape(self, name: str, dimensions: int) -> tuple[int, ...]:
        """The shape of one canonical tensor that is stored in one piece."""
        (key,) = self.layout.keys(name)
        shape = tuple(self._tensor(key).shape)
        leading = 1 if self._is_batched(name) else 0
        if len(shape) != leading + dimensions or 0 in shape:
            raise CheckpointError(
                self.file.path, f"{key} must have {leading + dimensions} dimensions, none of them 0, got {list(shape)}"
            )
        shape = shape[leading:]
        return shape[::-1] if self._is_transposed(name) else shape

    def _count(self, blocks: str) -> int:
        """How many numbered blocks there are, which must be 0, 1, 2 and so on."""
        pattern = re.compile(re.escape(f"{self.layout.prefix}{blocks}") + r"(\d{1,9})\.")
        numbers = {int(found[1]) for key in self.file.entries if (found := pattern.match(key))}
        missing = next(number for number in range(len(numbers) + 1) if number not in numbers)
        if missing < max(len(numbers), 1):
            raise CheckpointError(self.file.path, f"misses all of {self.layout.prefix}{blocks}{missing}")
        return len(numbers)

    def _image_size(self, name: str, stride: int, settings: BesideWeights, class_tokens: int = 1) -> ImageSize:
        """The size of the images: as the config beside the weights says, or that of a square."""
        tokens = self._shape(name, 2)[0]
        grid = math.isqrt(max(0, tokens - class_tokens))
        (key,) = self.layout.keys(name)
        told = settings.image_size
        if told is not None:
            rows, columns = (side // stride for side in sides(told))
            if rows * columns + class_tokens == tokens:
                return told
        if grid < 1 or grid**2 + class_tokens != tokens:
            wanted = "one row and a square number more" if class_tokens else "a square number of rows"
            raise CheckpointError(self.file.path, f"{key} must have {wanted}, got {tokens} rows")
        if told is not None:
            raise CheckpointError(
                self.file.path, f"{key} is for images of {grid * stride} pixels, the config beside it says {told}"
            )
        return grid * stride

    def _heads(self, told: int | None, width: int, head_dim: int = HEAD_DIM) -> int:
        if told is not None:
            return told
        if width % head_dim:
            raise CheckpointError(
                self.file.path,
                f"its number of heads cannot be told from its width of {width}: "
                "put its config.json or open_clip_config.json beside it",
            )
        return width // head_dim


def _wide(tensor: Tensor) -> Tensor:
    """`tensor`, or its values in float16 where they are in 8 bits, with which PyTorch does not compute."""
    return tensor.to(torch.float16) if tensor.dtype in _FLOAT8 else tensor
