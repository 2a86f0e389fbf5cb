"""The modified ResNet as a straight line: convolutions with their batch norms folded in, and a pool with one query.

`FastResNet.prepare` folds every batch norm into the convolution before it, and the normalisation of raw pixels into the
stem, once, in float64. `encode` is the encoder of Radford et al. 2021, section 2.3 (He et al. 2019's ResNet-D, with
Zhang's antialiasing average pools):

    stem: 3 × (3×3 convolution + ReLU) → average pool
    → bottlenecks: 1×1 + ReLU → 3×3 + ReLU → (average pool) → 1×1 + shortcut + ReLU
    → attention pool: mean token → query → attention with that one query → projection

The average pools stay passes of their own. A pool and the 1×1 convolution after it would make one 2×2 convolution of
stride 2. It would save writing one map, of a quarter of the size of the map that is read. It would take four times the
arithmetic, which gains on no device with the 128 channels and more that there are.

Shapes: B images, C features of the last map, G = h · w its positions, H heads, D = C / H, E embed_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import ops
from .config import ResNetConfig, Rgb, TaskName
from .convolution import Convolution, by_kernels
from .cpu import linear_of_few_rows, multiplies_in_tiles, one_query_attention
from .fast import FastTower, Results
from .precision import Precision

# Images that a CPU computes together. The allocator returns maps of more images to the system after each layer, and
# their pages are cleared anew for the next: by AMX RN50 takes 7 per cent longer for 64 at once, and RN50x4 for 32. Of
# large maps there are fewer. Convolutions by AMX are so short that more images pay: eight take a tenth less time than
# two and two.
_IMAGES = 16
_IMAGES_OF_LARGE_MAPS, _BY_AMX = 2, 8
_PIXEL_OFFSET = 128  # a pixel u enters as u − 128, which is exact in every dtype; as in `ops.patch_embed`


@dataclass(frozen=True)
class Bottleneck:
    """Three convolutions and a shortcut; `stride` is that of the average pools before the last and the shortcut."""

    conv1: Convolution
    conv2: Convolution
    conv3: Convolution
    shortcut: Convolution | None
    stride: int


@dataclass(frozen=True)
class Pool:
    """The attention pool.

    For the kernels its weights are of the compute dtype, and the position and biases are float32. On a CPU values and
    results are computed in float32: there is one position, so that roundings would not average out as the map's do. Of
    a half weight for query or key no copy is made, since roundings of scores are lost in the softmax's sum.
    """

    position: Tensor  # (1 + G, C)
    query: Callable[[Tensor], Tensor]
    key_weight: Tensor  # (H, D, C)
    value_weight: Tensor  # (H, D, C)
    value_bias: Tensor  # (C,)
    out: Callable[[Tensor], Tensor]
    precision: Precision
    kernels: bool  # the weights are for the ops, which the oracles compute where a launch has failed since


@dataclass(frozen=True)
class FastResNet(FastTower):
    """A ResNet in the form that `encode` computes with, on a CPU or a GPU.

    `stem` is for normalised images. For raw pixels `stem_uint8` replaces its first convolution.
    """

    config: ResNetConfig
    precision: Precision
    stem: tuple[Convolution, ...]
    stem_uint8: Convolution
    black: Tensor  # (3, 1, 1): the padding of raw images, a raw value that normalises to zero, less the offset
    bottlenecks: tuple[Bottleneck, ...]
    pool: Pool

    @classmethod
    def prepare(
        cls, state_dict: Mapping[str, Tensor], config: ResNetConfig, precision: Precision, mean: Rgb, std: Rgb
    ) -> FastResNet:
        """Folds the weights of `reference.ModifiedResNet` in float64 and casts them at the end.

        On a CPU a convolution folds its weight when it is first needed, and the pool's float32 weights are shared.
        """
        dtype = precision.weights
        source = {name: t.detach() for name, t in state_dict.items() if t.is_floating_point()}

        def folded(conv: str, norm: str) -> tuple[Tensor, Tensor, Tensor]:
            """Weight as it is, and in float64 scale and bias, of a convolution and the batch norm after it."""
            gain, shift, average, variance = (
                source[f"{norm}.{name}"].double() for name in ("weight", "bias", "running_mean", "running_var")
            )
            scale = gain * torch.rsqrt(variance + config.eps)
            return source[f"{conv}.weight"], scale, shift - average * scale

        convolution = partial(Convolution, precision=precision)

        def bottleneck(prefix: str, stride: int) -> Bottleneck:
            shortcut = None
            if f"{prefix}.downsample.0.weight" in source:
                shortcut = convolution(*folded(f"{prefix}.downsample.0", f"{prefix}.downsample.1"), relu=False)
            conv1, conv2, conv3 = (convolution(*folded(f"{prefix}.conv{i}", f"{prefix}.bn{i}")) for i in (1, 2, 3))
            return Bottleneck(conv1, conv2, conv3, shortcut, stride)

        weight, scale, bias = folded("conv1", "bn1")
        mu, sigma = (torch.tensor(x, dtype=torch.float64, device=weight.device)[:, None, None] for x in (mean, std))
        raw = (
            (weight.double() * scale[:, None, None, None] / (255 * sigma)).to(dtype).double()
        )  # normalise(u) = (u − 255 μ) / 255 σ
        raw_bias = bias + (raw * (_PIXEL_OFFSET - 255 * mu)).sum(dim=(1, 2, 3))
        return cls(
            config=config,
            precision=precision,
            stem=(
                convolution(weight, scale, bias, stride=2),
                convolution(*folded("conv2", "bn2")),
                convolution(*folded("conv3", "bn3")),
            ),
            stem_uint8=convolution(raw, torch.ones_like(scale), raw_bias, stride=2, padding=0),
            black=(255 * mu - _PIXEL_OFFSET).to(dtype),
            bottlenecks=tuple(
                bottleneck(f"layer{stage + 1}.{i}", stride=2 if stage > 0 and i == 0 else 1)
                for stage, blocks in enumerate(config.layers)
                for i in range(blocks)
            ),
            pool=_prepare_pool(source, config, precision),
        )

    @staticmethod
    def activations(config: ResNetConfig) -> int:
        """Two maps of the first bottleneck, doubled for the memory that cuDNN works with.

        They have 4 · width channels at a quarter of the image's side. No earlier map is larger.
        """
        return 4 * config.width * (config.image_size // 2) ** 2

    @classmethod
    def largest_batch(cls, config: ResNetConfig, device: torch.device, precision: Precision) -> int | None:
        """On a GPU, cuDNN and PyTorch's pools count a map's elements in 32 bits; the stem's last map is the largest."""
        if device.type == "cpu":
            return super().largest_batch(config, device, precision)
        return (2**31 - 1) // (config.width * (config.image_size // 2) ** 2)

    # --- the encoder -------------------------------------------------------------------------------------------------

    @property
    def tasks(self) -> Mapping[TaskName, Callable[..., Tensor | Results]]:
        return {"encode": self.encode}

    def encode(self, images: Tensor) -> Tensor:
        """Embeds images (B, 3, h, w), normalised floats or raw uint8 pixels: (B, E), not normalised."""
        return attention_pool(self.pool, _in_groups(self._last_map, images, _IMAGES))

    @property
    def _large(self) -> int:
        """The number of bottlenecks that read maps of more than an eighth of the image's side."""
        return self.config.layers[0] + 1

    def _last_map(self, images: Tensor) -> Tensor:
        large = _BY_AMX if multiplies_in_tiles(self.precision.weights) else _IMAGES_OF_LARGE_MAPS
        x = _in_groups(self._large_maps, images, large)
        for block in self.bottlenecks[self._large :]:
            x = _bottleneck(block, x)
        return x

    def _large_maps(self, images: Tensor) -> Tensor:
        x = self._stem(images)
        for block in self.bottlenecks[: self._large]:
            x = _bottleneck(block, x)
        return x

    def _stem(self, images: Tensor) -> Tensor:
        first, *rest = self.stem
        if images.dtype == torch.uint8:
            x = self.stem_uint8(self._padded(images))
        else:
            x = first(images.to(self.precision.weights, memory_format=torch.channels_last))
        for convolution in rest:
            x = convolution(x)
        return F.avg_pool2d(x, 2)

    def _padded(self, images: Tensor) -> Tensor:
        """Raw pixels less the offset, with one pixel all around that normalises to zero: (B, 3, h + 2, w + 2)."""
        b, c, h, w = images.shape
        dtype, layout = self.precision.weights, torch.channels_last
        x = torch.empty(b, c, h + 2, w + 2, dtype=dtype, device=images.device, memory_format=layout)
        x.copy_(self.black)
        x[:, :, 1:-1, 1:-1].copy_(images).sub_(_PIXEL_OFFSET)
        return x


def _in_groups(encode: Callable[[Tensor], Tensor], images: Tensor, together: int) -> Tensor:
    """`encode` of all images; on a CPU of so many at a time."""
    if images.device.type != "cpu" or len(images) <= together:
        return encode(images)
    return torch.cat([encode(group) for group in torch.split(images, together)])


def _prepare_pool(source: dict[str, Tensor], config: ResNetConfig, precision: Precision) -> Pool:
    wide = precision.wide
    heads, features = config.heads, config.features
    kernels = by_kernels(source["attnpool.q_proj.weight"].to(precision.weights))

    def weight(name: str) -> Tensor:
        matrix = source[f"attnpool.{name}.weight"]
        if kernels:
            return ops.operand(matrix, precision.weights, precision.products)
        shared = name in ("q_proj", "k_proj") and matrix.dtype == precision.weights
        return matrix if shared else matrix.to(wide)

    def product(name: str) -> Callable[[Tensor], Tensor]:
        matrix, bias = weight(name), source[f"attnpool.{name}.bias"].to(wide)
        if kernels:
            return lambda x: ops.linear(x, matrix, bias, precision=precision.products)[0]
        narrow = bias.to(matrix.dtype)
        return lambda x: linear_of_few_rows(x.to(matrix.dtype), matrix, narrow)

    def per_head(name: str) -> Tensor:
        return weight(name).view(heads, features // heads, features)

    return Pool(
        position=source["attnpool.positional_embedding"].to(wide),
        query=product("q_proj"),
        key_weight=per_head("k_proj"),  # a bias of the keys drops out of the softmax
        value_weight=per_head("v_proj"),
        value_bias=source["attnpool.v_proj.bias"].to(wide),
        out=product("c_proj"),
        precision=precision,
        kernels=kernels,
    )


def _bottleneck(block: Bottleneck, x: Tensor) -> Tensor:
    y = block.conv2(block.conv1(x))
    if block.stride > 1:
        x, y = F.avg_pool2d(x, block.stride), F.avg_pool2d(y, block.stride)
    return block.conv3(y, residual=x if block.shortcut is None else block.shortcut(x))


def attention_pool(pool: Pool, x: Tensor) -> Tensor:
    """Attention over the last map with the mean token as its only query: (B, C, h, w) -> (B, E)."""
    features = x.flatten(2).transpose(1, 2)  # (B, G, C), a view of a channels-last map
    heads = pool.key_weight.shape[:2]
    weights = (pool.key_weight, pool.value_weight, pool.value_bias)
    if pool.kernels:
        mean = ops.mean_token(features, pool.position[0])
        query = pool.query(mean).view(-1, *heads)
        position, products = pool.position[1:], pool.precision.products
        pooled = ops.attention_pool(
            query, mean, features, *weights, heads[1] ** -0.5, position=position, precision=products
        )
    else:
        features = features.to(pool.position.dtype)
        tokens = torch.cat([features.mean(dim=1, keepdim=True), features], dim=1).add_(pool.position)
        pooled = one_query_attention(pool.query(tokens[:, 0]).view(-1, *heads), tokens, *weights)
    return pool.out(pooled).to(x.dtype)
