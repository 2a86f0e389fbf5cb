"""The image encoders of CLIP and SigLIP in plain PyTorch: the oracle for every fast path.

The code is to be read beside the papers. It follows the order in which data meets the parts, and does nothing clever.
The modules work in any floating dtype, float64 included. They have OpenAI's parameter names, so that a canonical state
dict (see `clip_fast.checkpoint`) loads without renaming. The ViT's modules take the inputs of `clip`'s modules, in the
same layout: code that walks through its blocks, or hooks them, sees the same. SigLIP's parts have the names of the
ViT's, as far as it has them. No encoder normalises its output.

Sources: Radford et al. 2021 (CLIP), section 2.4; Dosovitskiy et al. 2020 (ViT), section 3.1; He et al. 2018 ("Bag of
tricks", ResNet-D stem) and Zhang 2019 (anti-aliased strides) for the modified ResNet; Hendrycks & Gimpel 2016, section
2, for the approximations of the GELU; Zhai et al. 2023 (SigLIP), and Zhai et al. 2022 ("Scaling Vision Transformers"),
section 3.2, for its head.

Shapes: B images, N tokens, W width, H heads, D = W / H, P patch size, G patches, E embed_dim.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import Activation, Config, ResNetConfig, SiglipConfig, Task, TextConfig, VitConfig

QUICK_GELU_SLOPE = 1.702


def quick_gelu(x: Tensor) -> Tensor:
    """x sigmoid(1.702 x), the approximation of the GELU that OpenAI's models were trained with."""
    return x * torch.sigmoid(QUICK_GELU_SLOPE * x)


def gelu_tanh(x: Tensor) -> Tensor:
    """x (1 + tanh(√(2 / π) (x + 0.044715 x³))) / 2, the approximation of the GELU that SigLIP was trained with."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "quick_gelu": quick_gelu,
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
}


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Multi-head softmax(q kᵀ / √D) v. q: (B, Nq, W); k, v: (B, N, W). Returns (B, Nq, W)."""
    head_dim = q.shape[-1] // heads
    q, k, v = (x.reshape(*x.shape[:2], heads, head_dim).transpose(1, 2) for x in (q, k, v))  # (B, H, N, D)
    scores = q @ k.transpose(-2, -1) * head_dim**-0.5  # (B, H, Nq, N)
    return (scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2)  # (B, Nq, W)


def random_parameter(*shape: int, std: float) -> nn.Parameter:
    """A normally distributed parameter. No numbers are drawn on the meta device: that would import torch.compile."""
    parameter = nn.Parameter(torch.empty(shape))
    if not parameter.is_meta:
        nn.init.normal_(parameter, std=std)
    return parameter


# --- Vision Transformer ----------------------------------------------------------------------------------------------


class QuickGELU(nn.Module):
    """`quick_gelu` as a module."""

    def forward(self, x: Tensor) -> Tensor:
        return quick_gelu(x)


_ACTIVATION_MODULES: dict[Activation, Callable[[], nn.Module]] = {
    "quick_gelu": QuickGELU,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
}


class Mlp(nn.Sequential):
    """Two linear layers with the activation between. (…, W) -> (…, W)."""

    c_fc: nn.Linear
    c_proj: nn.Linear

    def __init__(self, config: VitConfig | SiglipConfig | TextConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.width, config.mlp_width)
        self.gelu = _ACTIVATION_MODULES[config.activation]()
        self.c_proj = nn.Linear(config.mlp_width, config.width)


class LayerScale(nn.Module):
    """A factor for each channel (Touvron et al., "Going deeper with Image Transformers", 2021, section 2)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class ResidualBlock(nn.Module):
    """A pre-LayerNorm transformer block. (N, B, W) -> (N, B, W), tokens first as in `clip`.

    `attn_mask` is added to the scores of the queries and keys: (at least N, at least N), or None.
    """

    def __init__(self, config: VitConfig | SiglipConfig | TextConfig, attn_mask: Tensor | None) -> None:
        super().__init__()
        self.attn_mask = attn_mask
        self.ln_1 = nn.LayerNorm(config.width, eps=config.eps)
        self.attn = nn.MultiheadAttention(config.width, config.heads)
        self.ln_2 = nn.LayerNorm(config.width, eps=config.eps)
        self.mlp = Mlp(config)
        scaled = isinstance(config, VitConfig) and config.layer_scale
        self.ls_1, self.ls_2 = (LayerScale(config.width) if scaled else nn.Identity() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls_1(self.attention(self.ln_1(x)))
        return x + self.ls_2(self.mlp(self.ln_2(x)))

    def attention(self, x: Tensor) -> Tensor:
        mask = None if self.attn_mask is None else self.attn_mask[: len(x), : len(x)].to(x)
        # With its weights PyTorch writes attention out as above; the fused one has no forward-mode derivative on a CPU.
        return self.attn(x, x, x, attn_mask=mask, need_weights=True, average_attn_weights=False)[0]


class Transformer(nn.Module):
    """The stack of blocks, under the names that `clip` gives it. (N, B, W) -> (N, B, W)."""

    def __init__(self, config: VitConfig | SiglipConfig | TextConfig, attn_mask: Tensor | None = None) -> None:
        super().__init__()
        self.width, self.layers = config.width, config.layers
        self.resblocks = nn.Sequential(*(ResidualBlock(config, attn_mask) for _ in range(config.layers)))

    def blocks(self) -> list[ResidualBlock]:
        return cast(list[ResidualBlock], list(self.resblocks))

    def forward(self, x: Tensor) -> Tensor:
        return self.resblocks(x)


class TokenTower(nn.Module, ABC):
    """A tower of tokens, and its results for every task."""

    transformer: Transformer

    @abstractmethod
    def encode_tokens(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings, and the patch tokens (B, G, W), after ln_post as a rule."""

    @abstractmethod
    def hidden_state(self, images: Tensor, layer: int) -> Tensor:
        """The residual stream (B, N, W) after `layer` blocks."""

    def results(self, images: Tensor, task: Task) -> tuple[Tensor, ...]:
        """The results of any task. Embeddings come from a call of the module, whose hooks run."""
        match task.name:
            case "encode":
                return (self(images),)
            case "encode_tokens":
                return self.encode_tokens(images)
            case "hidden_state":
                return (self.hidden_state(images, *task.arguments),)
            case "hidden_states":
                return tuple(self.hidden_state(images, n) for n in range(len(self.transformer.resblocks) + 1))


class VisionTransformer(TokenTower):
    """CLIP's Vision Transformer, and open_clip's variants of it: images (B, 3, height, width) -> embeddings (B, E)."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.input_resolution, self.output_dim = config.image_size, config.embed_dim
        self.pool, self.ln_after_pool = config.pool, config.ln_after_pool
        scale = config.width**-0.5
        self.conv1 = nn.Conv2d(3, config.width, config.patch_size, stride=config.patch_size, bias=False)
        self.class_embedding = random_parameter(config.width, std=scale)
        self.positional_embedding = random_parameter(config.tokens, config.width, std=scale)
        self.ln_pre = nn.LayerNorm(config.width, eps=config.eps) if config.ln_pre else nn.Identity()
        self.transformer = Transformer(config)
        self.ln_post = nn.LayerNorm(config.width, eps=config.eps)
        # `clip`'s users set it to None for the features before it.
        self.proj: nn.Parameter | None = random_parameter(config.width, config.embed_dim, std=scale)

    def forward(self, images: Tensor) -> Tensor:
        return self._embed(self.hidden_state(images, len(self.transformer.resblocks)))

    def encode_tokens(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings (B, E), and the patch tokens (B, G, W), after ln_post unless it comes after the pooling."""
        x = self.hidden_state(images, len(self.transformer.resblocks))
        return self._embed(x), x[:, 1:] if self.ln_after_pool else self.ln_post(x[:, 1:])

    def _embed(self, x: Tensor) -> Tensor:
        """Pooling, ln_post and projection: (B, N, W) -> (B, E)."""
        if self.pool == "tok":
            pooled = self.ln_post(x[:, 0])
        elif self.ln_after_pool:
            pooled = self.ln_post(x[:, 1:].mean(dim=1))
        else:
            pooled = self.ln_post(x[:, 1:]).mean(dim=1)
        return pooled if self.proj is None else pooled @ self.proj

    def hidden_state(self, images: Tensor, layer: int) -> Tensor:
        """The residual stream (B, N, W) after `layer` blocks."""
        patches = self.conv1(images).flatten(2).transpose(1, 2)  # (B, G, W)
        class_token = self.class_embedding.expand(len(images), 1, -1)  # (B, 1, W)
        x = torch.cat([class_token, patches], dim=1) + self.positional_embedding  # (B, N, W)
        x = self.ln_pre(x).transpose(0, 1)  # (N, B, W)
        for block in self.transformer.blocks()[:layer]:
            x = block(x)
        return x.transpose(0, 1)


# --- SigLIP ----------------------------------------------------------------------------------------------------------


class MapHead(nn.Module):
    """Multihead attention pooling: a learned query attends to all tokens, and an MLP follows. (B, N, W) -> (B, W)."""

    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        self.query = random_parameter(1, 1, config.width, std=config.width**-0.5)
        self.attn = nn.MultiheadAttention(config.width, config.heads, batch_first=True)
        self.ln = nn.LayerNorm(config.width, eps=config.eps)
        self.mlp = Mlp(config)

    def forward(self, x: Tensor) -> Tensor:
        query = self.query.expand(len(x), -1, -1)  # (B, 1, W)
        # With its weights, for the reason that `ResidualBlock.attention` gives.
        x = self.attn(query, x, x, need_weights=True, average_attn_weights=False)[0][:, 0]
        return x + self.mlp(self.ln(x))


class SiglipTransformer(TokenTower):
    """SigLIP's Vision Transformer: images (B, 3, height, width) -> embeddings (B, W)."""

    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        self.input_resolution, self.output_dim = config.image_size, config.embed_dim
        self.conv1 = nn.Conv2d(3, config.width, config.patch_size, stride=config.patch_size)
        self.positional_embedding = random_parameter(config.tokens, config.width, std=config.width**-0.5)
        self.transformer = Transformer(config)
        self.ln_post = nn.LayerNorm(config.width, eps=config.eps)
        self.map_head = MapHead(config)

    def forward(self, images: Tensor) -> Tensor:
        return self.map_head(self._tokens(images))

    def encode_tokens(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings (B, W), and the tokens (B, N, W) after ln_post, which the head reads."""
        x = self._tokens(images)
        return self.map_head(x), x

    def hidden_state(self, images: Tensor, layer: int) -> Tensor:
        """The residual stream (B, N, W) after `layer` blocks."""
        x = self.conv1(images).flatten(2).transpose(1, 2) + self.positional_embedding  # (B, N, W)
        x = x.transpose(0, 1)  # (N, B, W)
        for block in self.transformer.blocks()[:layer]:
            x = block(x)
        return x.transpose(0, 1)

    def _tokens(self, images: Tensor) -> Tensor:
        return self.ln_post(self.hidden_state(images, len(self.transformer.resblocks)))


# --- Modified ResNet -------------------------------------------------------------------------------------------------


def _conv(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False)


def _norm(channels: int, eps: float) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=eps)


class Bottleneck(nn.Module):
    """1×1, 3×3 and 1×1 convolutions beside a shortcut. A stride is an average pool before a convolution of stride 1."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int, eps: float) -> None:
        super().__init__()
        out_channels = self.expansion * channels
        self.stride = stride
        self.conv1, self.bn1, self.relu1 = _conv(in_channels, channels, 1), _norm(channels, eps), nn.ReLU()
        self.conv2, self.bn2, self.relu2 = _conv(channels, channels, 3), _norm(channels, eps), nn.ReLU()
        self.avgpool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3, self.bn3, self.relu3 = _conv(channels, out_channels, 1), _norm(out_channels, eps), nn.ReLU()
        self.downsample: nn.Module = nn.Identity()
        if stride > 1 or in_channels != out_channels:
            self.downsample = nn.Sequential()
            self.downsample.add_module("-1", nn.AvgPool2d(stride))
            self.downsample.add_module("0", _conv(in_channels, out_channels, 1))
            self.downsample.add_module("1", _norm(out_channels, eps))

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.relu2(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(self.avgpool(out)))
        return self.relu3(out + self.downsample(x))


class AttentionPool(nn.Module):
    """Attention over the feature map with the mean token as the only query. (B, C, h, w) -> (B, E)."""

    def __init__(self, config: ResNetConfig) -> None:
        super().__init__()
        features = config.features
        self.num_heads = config.heads
        self.positional_embedding = random_parameter(config.tokens, features, std=features**-0.5)
        self.q_proj = nn.Linear(features, features)
        self.k_proj = nn.Linear(features, features)
        self.v_proj = nn.Linear(features, features)
        self.c_proj = nn.Linear(features, config.embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).transpose(1, 2)  # (B, h·w, C)
        x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1) + self.positional_embedding  # (B, 1 + h·w, C)
        pooled = attention(self.q_proj(x[:, :1]), self.k_proj(x), self.v_proj(x), self.num_heads)  # (B, 1, C)
        return self.c_proj(pooled[:, 0])  # (B, E)


class ModifiedResNet(nn.Module):
    """CLIP's ResNet: images (B, 3, image_size, image_size) -> embeddings (B, E).

    Put it into `eval()` mode, as `build` does: for inference the batch norms must use their running statistics.
    """

    def __init__(self, config: ResNetConfig) -> None:
        super().__init__()
        self.input_resolution, self.output_dim = config.image_size, config.embed_dim
        width = config.width
        self.conv1, self.bn1, self.relu1 = _conv(3, width // 2, 3, 2), _norm(width // 2, config.eps), nn.ReLU()
        self.conv2, self.bn2, self.relu2 = _conv(width // 2, width // 2, 3), _norm(width // 2, config.eps), nn.ReLU()
        self.conv3, self.bn3, self.relu3 = _conv(width // 2, width, 3), _norm(width, config.eps), nn.ReLU()
        self.avgpool = nn.AvgPool2d(2)
        in_channels = width
        for stage, blocks in enumerate(config.layers):
            channels = width * 2**stage
            out_channels = Bottleneck.expansion * channels
            first = Bottleneck(in_channels, channels, 1 if stage == 0 else 2, config.eps)
            rest = [Bottleneck(out_channels, channels, 1, config.eps) for _ in range(blocks - 1)]
            self.add_module(f"layer{stage + 1}", nn.Sequential(first, *rest))
            in_channels = out_channels
        self.attnpool = AttentionPool(config)

    def forward(self, images: Tensor) -> Tensor:
        x = self.relu1(self.bn1(self.conv1(images)))
        x = self.relu2(self.bn2(self.conv2(x)))
        x = self.relu3(self.bn3(self.conv3(x)))
        x = self.avgpool(x)
        for stage in ("layer1", "layer2", "layer3", "layer4"):
            x = cast(nn.Module, getattr(self, stage))(x)
        return self.attnpool(x)

    def results(self, images: Tensor, task: Task) -> tuple[Tensor, ...]:
        """The results of the only task that a ResNet has."""
        return (self(images),)


PlainTower = VisionTransformer | ModifiedResNet | SiglipTransformer

_TOWERS: dict[type, Callable[..., PlainTower]] = {
    VitConfig: VisionTransformer,
    ResNetConfig: ModifiedResNet,
    SiglipConfig: SiglipTransformer,
}


def build(config: Config) -> PlainTower:
    """The plain encoder of `config` with random float32 weights, in evaluation mode."""
    return _TOWERS[type(config)](config).eval()
