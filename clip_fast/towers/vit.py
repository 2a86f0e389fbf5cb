"""The Vision Transformer as a straight line of kernel calls.

`FastVit.prepare` folds a state dict once into the operands of the kernels. `encode` is the encoder of Radford et al.
2021, section 2.4 (Dosovitskiy et al. 2021, section 3.1), in launches:

    patch_embed → ln_pre → (ln+qkv → attention → out+residual → ln+fc1+activation → fc2+residual) × (layers − 1)
                → the last block, for the class token alone → ln_post+projection

Every LayerNorm except the first is folded into the product that follows it:

    LN(x) Wᵀ + b = rstd · (x W′ᵀ − mean · colsum) + b′,  W′ = W diag(gain), colsum = Σ_k W′, b′ = b + W · shift

Mean and rstd come from statistics that the kernel which writes x leaves beside it. Only the class token leaves the
encoder, so the last block has one query for each image. Its keys and values are never formed, and its MLP runs on that
token alone.

open_clip's variants: without ln_pre, patch_embed leaves the statistics for the first block. Where the embedding is the
average of the patch tokens, the last block is as the others, and mean_token follows, before ln_post or after it. A
LayerScale is folded into the product before it: diag(γ) (x Wᵀ + b) has the rows of W and b times γ.

Shapes: B images, N = 1 + G tokens, W width, H heads, D = W / H, P patch size, E embed_dim.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import ops
from .config import ImageSize, Rgb, SiglipConfig, TaskName, VitConfig
from .fast import FastTower, Results
from .precision import Precision

_Config = TypeVar("_Config", VitConfig, SiglipConfig)


@dataclass(frozen=True)
class Folded:
    """An operand of `ops.linear`: weight (N, K), bias (N,), and colsum (N,) where a LayerNorm is folded into it."""

    weight: Tensor
    bias: Tensor
    colsum: Tensor | None = None


@dataclass(frozen=True)
class Block:
    """One transformer block; `qkv` stacks the projections of queries, keys and values, (3 · W, W)."""

    qkv: Folded
    out: Folded
    fc1: Folded
    fc2: Folded


class Vit(FastTower):
    """A ViT on any device: its tasks, and the memory that they take."""

    @property
    def tasks(self) -> Mapping[TaskName, Callable[..., Tensor | Results]]:
        return {
            "encode": self.encode,
            "encode_tokens": self.encode_tokens,
            "hidden_state": self.hidden_state,
            "hidden_states": self.hidden_states,
        }

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """Embeds images (B, 3, h, w), normalised floats or raw uint8 pixels, any strides: (B, E), not normalised."""

    @abstractmethod
    def encode_tokens(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Embeds images: (B, E), and their patch tokens (B, G, W), after ln_post as a rule, as open_clip gives them."""

    @abstractmethod
    def hidden_state(self, images: Tensor, layer: int) -> Tensor:
        """The residual stream (B, N, W) after `layer` blocks: 0 is the first's input, `layers` the last's output."""

    @abstractmethod
    def hidden_states(self, images: Tensor) -> tuple[Tensor, ...]:
        """The residual stream (B, N, W) before the first block and after each: layers + 1 tensors."""

    @staticmethod
    def activations(config: VitConfig | SiglipConfig) -> int:
        """The peak in an MLP: x before and within the block, the attended tokens, the hidden layer and the result."""
        return config.tokens * (4 * config.width + config.mlp_width)


class Folding:
    """The weights of a plain tower, folded into operands in float32 or wider, and cast at the end."""

    def __init__(self, state_dict: Mapping[str, Tensor], precision: Precision) -> None:
        self.precision = precision
        self.source = {name: tensor.detach().to(precision.wide) for name, tensor in state_dict.items()}

    def operand(self, weight: Tensor) -> Tensor:
        return ops.operand(weight, self.precision.weights, self.precision.products)

    def pair(self, norm: str) -> tuple[Tensor, Tensor]:
        """Gain and shift of a LayerNorm."""
        return self.source[f"{norm}.weight"], self.source[f"{norm}.bias"]

    def folded(self, weight: Tensor, bias: Tensor, norm: str | None = None) -> Folded:
        if norm is None:
            return Folded(self.operand(weight), bias)
        gain, shift = self.pair(norm)
        product = self.operand(weight * gain)
        # Sum the rounded weight, in float64: the means in the product cancel against exactly these sums.
        return Folded(product, bias + weight @ shift, product.double().sum(dim=1).to(self.precision.wide))

    def block(self, prefix: str) -> Block:
        return Block(
            qkv=self.folded(*self._linear(f"{prefix}.attn.in_proj_"), norm=f"{prefix}.ln_1"),
            out=self._scaled(f"{prefix}.attn.out_proj", f"{prefix}.ls_1"),
            fc1=self.linear(f"{prefix}.mlp.c_fc", norm=f"{prefix}.ln_2"),
            fc2=self._scaled(f"{prefix}.mlp.c_proj", f"{prefix}.ls_2"),
        )

    def _scaled(self, name: str, layer_scale: str) -> Folded:
        """A linear layer, and the LayerScale behind it if the tower has one."""
        weight, bias = self._linear(f"{name}.")
        gamma = self.source.get(f"{layer_scale}.gamma")
        return self.folded(weight, bias) if gamma is None else self.folded(weight * gamma[:, None], bias * gamma)

    def linear(self, name: str, norm: str | None = None) -> Folded:
        return self.folded(*self._linear(f"{name}."), norm=norm)

    def _linear(self, prefix: str) -> tuple[Tensor, Tensor]:
        return self.source[f"{prefix}weight"], self.source[f"{prefix}bias"]

    def patches(self, position: Tensor, class_tokens: int, mean: Rgb, std: Rgb) -> dict[str, Tensor]:
        """The operands of `patch_embed`, by their names in `KernelVit`. `position` has a row for each token."""
        patch = self.source["conv1.weight"]  # (W, 3, P, P)
        mu, sigma = (torch.tensor(x, dtype=torch.float64, device=patch.device)[:, None, None] for x in (mean, std))
        # A pixel u enters as u − 128, see `ops.patch_embed`.
        patch_uint8 = self.operand(patch.double() / (255 * sigma))
        shift = (patch_uint8.double() * (128 - 255 * mu)).sum(dim=(1, 2, 3))
        position_uint8 = position.clone()
        position_uint8[class_tokens:] += shift.to(self.precision.wide)
        return {
            "patch": _pad_features(self.operand(patch)),
            "position": position,
            "patch_uint8": _pad_features(patch_uint8),
            "position_uint8": position_uint8,
        }


@dataclass(frozen=True)
class KernelVit(Vit):
    """A ViT as the kernels read it, with or without a class token: its patches and its blocks.

    `patch` (W, K′) and `position` (N, W) are for normalised images. `patch_uint8` and `position_uint8` are for raw
    pixels, with the normalisation folded in. Weights are of the compute dtype. The terms that an epilogue adds are
    float32.
    """

    config: VitConfig | SiglipConfig
    precision: Precision
    patch: Tensor
    position: Tensor
    patch_uint8: Tensor
    position_uint8: Tensor
    blocks: tuple[Block, ...]

    def hidden_state(self, images: Tensor, layer: int) -> Tensor:
        return self._after(images, layer)[0]

    def hidden_states(self, images: Tensor) -> tuple[Tensor, ...]:
        x, statistics = self._embed(images)
        states = [x]
        for block in self.blocks:
            x, statistics = self._block(block, x, statistics)
            states.append(x)
        return tuple(states)

    def _after(self, images: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """The residual stream after `layer` blocks, and its row statistics."""
        x, statistics = self._embed(images)
        for block in self.blocks[:layer]:
            x, statistics = self._block(block, x, statistics)
        return x, statistics

    @abstractmethod
    def _embed(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images -> the input of the first block (B, N, W) and its row statistics."""

    def _patches(self, images: Tensor, *, class_token: bool, statistics: bool) -> tuple[Tensor, Tensor]:
        """Positioned tokens, and their row statistics where these enter the first block as they are."""
        raw = images.dtype == torch.uint8
        patch = self.patch_uint8 if raw else self.patch
        position = self.position_uint8 if raw else self.position
        return ops.patch_embed(
            images,
            patch,
            position,
            self.config.patch_size,
            class_token=class_token,
            statistics=statistics,
            precision=self.precision.products,
        )

    def _block(self, block: Block, x: Tensor, statistics: Tensor) -> tuple[Tensor, Tensor]:
        """x + attention(ln_1(x)), then x + mlp(ln_2(x)), in five launches: x (B, N, W) and its row statistics."""
        config = self.config
        packed = (*x.shape[:-1], 3, config.heads, config.head_dim)
        # qkv is unnamed on purpose: its memory is free for the next launch.
        attended = ops.flash_attention(  # (B, N, W)
            self._normed(block.qkv, x, statistics).view(packed),
            config.head_dim**-0.5,
            precision=self.precision.products,
        )
        x, statistics = self._added(block.out, attended, x)
        return self._mlp(block.fc1, block.fc2, x, statistics)

    def _mlp(self, fc1: Folded, fc2: Folded, x: Tensor, statistics: Tensor) -> tuple[Tensor, Tensor]:
        return self._added(fc2, self._normed(fc1, x, statistics, self.config.activation), x)

    def _normed(self, folded: Folded, x: Tensor, statistics: Tensor, activation: ops.Activation = "none") -> Tensor:
        """activation(LN(x) Wᵀ + b), with the LayerNorm's gain and shift folded into the product."""
        assert folded.colsum is not None
        y, _ = ops.linear(
            x,
            folded.weight,
            folded.bias,
            norm=(statistics, folded.colsum),
            activation=activation,
            eps=self.config.eps,
            precision=self.precision.products,
        )
        return y

    def _added(self, folded: Folded, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """x Wᵀ + b + residual, and its row statistics."""
        products = self.precision.products
        return ops.linear(x, folded.weight, folded.bias, residual=residual, statistics=True, precision=products)


@dataclass(frozen=True)
class FastVit(KernelVit):
    """CLIP's ViT as the kernels read it.

    `projection` has ln_post folded in where the class token is the embedding. `no_position` (W,) is zero.
    """

    config: VitConfig
    ln_pre: tuple[Tensor, Tensor] | None
    ln_post: tuple[Tensor, Tensor]
    projection: Folded
    no_position: Tensor

    @classmethod
    def prepare(
        cls, state_dict: Mapping[str, Tensor], config: VitConfig, precision: Precision, mean: Rgb, std: Rgb
    ) -> FastVit:
        """Folds the weights of `reference.VisionTransformer`, in float32 or wider, and casts them at the end."""
        folding = Folding(state_dict, precision)
        position = folding.source["positional_embedding"].clone()
        position[0] += folding.source["class_embedding"]
        proj = folding.source["proj"]
        norm = "ln_post" if config.pool == "tok" else None
        return cls(
            config=config,
            precision=precision,
            **folding.patches(position, 1, mean, std),
            ln_pre=folding.pair("ln_pre") if config.ln_pre else None,
            blocks=tuple(folding.block(f"transformer.resblocks.{i}") for i in range(config.layers)),
            ln_post=folding.pair("ln_post"),
            projection=folding.folded(proj.T, proj.new_zeros(config.embed_dim), norm=norm),
            no_position=proj.new_zeros(config.width),
        )

    # --- the encoder -------------------------------------------------------------------------------------------------

    def encode(self, images: Tensor) -> Tensor:
        if self.config.pool == "avg":
            return self.encode_tokens(images)[0]
        x, statistics = self._after(images, self.config.layers - 1)
        x, statistics = self._last_block(self.blocks[-1], x, statistics)
        return self._project(x, statistics)

    def encode_tokens(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x, statistics = self._after(images, self.config.layers)
        tokens = (x if self.config.ln_after_pool else self._ln_post(x))[:, 1:]
        if self.config.pool == "tok":
            return self._project(x[:, 0], statistics[:, 0]), tokens
        mean = ops.mean_token(tokens, self.no_position)
        return self._linear(self._ln_post(mean) if self.config.ln_after_pool else mean), tokens

    def _embed(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images -> tokens after ln_pre, if there is one, (B, N, W) and their row statistics."""
        x, statistics = self._patches(images, class_token=True, statistics=self.ln_pre is None)
        if self.ln_pre is None:
            return x, statistics
        return ops.layer_norm(x, *self.ln_pre, self.config.eps, statistics=True)

    def _last_block(self, block: Block, x: Tensor, statistics: Tensor) -> tuple[Tensor, Tensor]:
        """`_block` for the class token alone: (B, N, W) -> (B, W), with its row statistics."""
        class_token, patches = x[:, 0], x[:, 1:]
        w, (h, d) = self.config.width, (self.config.heads, self.config.head_dim)
        qkv = block.qkv
        assert qkv.colsum is not None
        query = Folded(qkv.weight[:w], qkv.bias[:w], qkv.colsum[:w])
        attended = ops.attention_pool(
            self._normed(query, class_token, statistics[:, 0]).view(-1, h, d),
            class_token,
            patches,
            key_weight=qkv.weight[w : 2 * w].view(h, d, w),
            value_weight=qkv.weight[2 * w :].view(h, d, w),
            value_bias=qkv.bias[2 * w :],
            scale=d**-0.5,
            statistics=statistics,
            eps=self.config.eps,
            precision=self.precision.products,
        )  # (B, W)
        x, statistics = self._added(block.out, attended, class_token)
        return self._mlp(block.fc1, block.fc2, x, statistics)

    def _project(self, class_token: Tensor, statistics: Tensor) -> Tensor:
        """ln_post and projection of the class token: (B, W) -> (B, E)."""
        return self._normed(self.projection, class_token, statistics)

    def _linear(self, pooled: Tensor) -> Tensor:
        """The projection of what ln_post has been applied to: (B, W) -> (B, E)."""
        weight, bias = self.projection.weight, self.projection.bias
        return ops.linear(pooled, weight, bias, precision=self.precision.products)[0]

    def _ln_post(self, x: Tensor) -> Tensor:
        return ops.layer_norm(x, *self.ln_post, self.config.eps)[0]


def resampled(
    state_dict: dict[str, Tensor], config: _Config, image_size: ImageSize
) -> tuple[dict[str, Tensor], _Config]:
    """The same tower for images of another size, with its positional embedding resampled bicubically, antialiased.

    As in open_clip (`resize_pos_embed`), a class token's row is kept, and the patches' rows are a grid of W channels.
    """
    resized = replace(config, image_size=image_size)
    if resized.grid == config.grid:
        return state_dict, resized
    position = state_dict["positional_embedding"]
    class_rows = len(position) - config.patches
    grid = position[class_rows:].float().view(*config.grid, -1).permute(2, 0, 1)[None]  # (1, W, rows, columns)
    grid = F.interpolate(grid, resized.grid, mode="bicubic", antialias=True, align_corners=False)[0]
    patches = grid.permute(1, 2, 0).flatten(0, 1).to(position.dtype)
    return state_dict | {"positional_embedding": torch.cat([position[:class_rows], patches])}, resized


def _pad_features(patch: Tensor) -> Tensor:
    """(W, 3, P, P) -> (W, K′), the features zero-padded to a multiple of the kernel's step."""
    flat = patch.flatten(1)
    return F.pad(flat, (0, -flat.shape[1] % ops.PATCH_K_STEP)).contiguous()
