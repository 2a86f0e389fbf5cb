"""The Vision Transformer on a CPU, fused as far as PyTorch's own CPU kernels go.

The steps are those of `vit.py`, in the form that suits a CPU. LayerNorm is a pass of its own, since its input is still
in the caches. `cpu.Product` adds bias and residual, too, and applies the activation. Attention is PyTorch's flash
attention for CPUs. The last block is computed for the class token alone, as in `vit.py`. Its attention and the
projection are products of one row for each image. They are computed in float32 for every dtype, since oneDNN is slow to
begin a product in half precision.

oneDNN and PyTorch have a fast swish, x · σ(x), and neither has QuickGELU, x · σ(1.702 x). But QuickGELU(x) =
swish(1.702 x) / 1.702, so the factors go into the weights around the activation:

* If the weights are rounded to the dtype anyway, the factors go into the weights, before the rounding.
* If the weights come in bfloat16 and stay in it, the factors alone would round them. So the factors go into the
  LayerNorm before the weights, whose gain and shift may be float32, and into the sum after them.
* In float16, 1.702 x might overflow. There the activation is a pass of its own.

In float32 the tanh approximation of GELU is made of passes (`cpu._tanh_gelu_`) that need such factors, too.

Shapes: B images, N = 1 + G tokens, W width, H heads, D = W / H, E embed_dim.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import Rgb, SiglipConfig, VitConfig
from .cpu import GELU_TANH_SLOPE, Product, linear_of_few_rows, one_query_attention
from .fast import normalised
from .precision import Precision
from .reference import QUICK_GELU_SLOPE
from .vit import Vit


@dataclass(frozen=True)
class Mlp:
    """A LayerNorm, a pair of gain and shift, and the MLP behind it."""

    ln_2: tuple[Tensor, Tensor]
    fc1: Product
    fc2: Product


@dataclass(frozen=True)
class Block(Mlp):
    """One transformer block."""

    ln_1: tuple[Tensor, Tensor]
    qkv: Product
    out: Product


class Casting:
    """The weights of a plain tower in the precision to compute in.

    A product lays its weight out when it is first needed.
    """

    def __init__(
        self, state_dict: Mapping[str, Tensor], config: VitConfig | SiglipConfig, precision: Precision
    ) -> None:
        self.source = {name: tensor.detach() for name, tensor in state_dict.items()}
        self._width = config.width
        self._few_in_half = precision.stands_in
        self.dtype, self.wide = precision.weights, precision.wide
        # activation(x) = self._activation(slope · x) / slope
        self._slope, self._activation = 1.0, str(config.activation)
        on_cpu = self.source["conv1.weight"].device.type == "cpu"  # elsewhere no LayerNorm takes factors in float32
        if config.activation == "quick_gelu" and self.dtype != torch.float16 and on_cpu:
            self._slope, self._activation = QUICK_GELU_SLOPE, "swish"
        elif config.activation == "gelu_tanh" and self.dtype.itemsize >= 4:  # oneDNN has it in half precision
            self._slope, self._activation = GELU_TANH_SLOPE, "scaled_gelu_tanh"
        given = self.source["transformer.resblocks.0.mlp.c_fc.weight"].dtype
        # whether the factors go into the weights: these are rounded anyway
        self._in_weights = self.dtype.itemsize >= 4 or torch.finfo(given).eps < torch.finfo(self.dtype).eps

    def pair(self, name: str, dtype: torch.dtype | None = None, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        """Gain and shift of a LayerNorm."""
        gain, shift = (self.source[f"{name}.{part}"].to(self.wide) * scale for part in ("weight", "bias"))
        return gain.to(dtype or self.dtype), shift.to(dtype or self.dtype)

    def product(self, name: str, bias_scale: float = 1.0, layer_scale: str = "", **options: Any) -> Product:
        """A linear layer, and the LayerScale behind it if the tower has one of that name."""
        weight, bias = self.source[f"{name}weight"], self.source[f"{name}bias"].to(self.wide) * bias_scale
        if (gamma := self.source.get(f"{layer_scale}.gamma")) is not None:
            gamma = gamma.to(self.wide)
            weight, bias = weight.to(self.wide) * gamma[:, None], bias * gamma
        return Product(weight, bias.to(self.dtype), few_in_half=self._few_in_half, **options)

    def patch(self) -> Product:
        """The patch convolution, without a bias."""
        weight = self.source["conv1.weight"].flatten(1)
        bias = weight.new_zeros(self._width, dtype=self.dtype)
        return Product(weight, bias, few_in_half=self._few_in_half)

    def mlp(self, prefix: str, norm: str, layer_scale: str = "") -> Mlp:
        slope, fall, beside = (self._slope, 1 / self._slope, 1.0) if self._in_weights else (1.0, 1.0, self._slope)
        return Mlp(
            ln_2=self.pair(norm, self.dtype if beside == 1 else self.wide, beside),
            fc1=self.product(f"{prefix}.c_fc.", self._slope, scale=slope, activation=self._activation),
            fc2=self.product(f"{prefix}.c_proj.", beside, layer_scale, scale=fall, alpha=1 / beside),
        )

    def block(self, i: int) -> Block:
        prefix = f"transformer.resblocks.{i}"
        mlp = self.mlp(f"{prefix}.mlp", f"{prefix}.ln_2", f"{prefix}.ls_2")
        return Block(
            *(mlp.ln_2, mlp.fc1, mlp.fc2),
            ln_1=self.pair(f"{prefix}.ln_1"),
            qkv=self.product(f"{prefix}.attn.in_proj_"),
            out=self.product(f"{prefix}.attn.out_proj.", layer_scale=f"{prefix}.ls_1"),
        )


@dataclass(frozen=True)
class CpuBlocks(Vit):
    """A ViT as a CPU computes it, with or without a class token: its patches and its blocks."""

    config: VitConfig | SiglipConfig
    precision: Precision
    normalisation: tuple[Rgb, Rgb]  # mean and deviation
    patch: Product  # W of (W, 3 · P · P)
    position: Tensor  # (N, W)
    blocks: tuple[Block, ...]

    def hidden_state(self, images: Tensor, layer: int) -> Tensor:
        return deque(self._residual_stream(images, layer), maxlen=1).pop()

    def hidden_states(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.clone() for x in self._residual_stream(images, self.config.layers))

    def _residual_stream(self, images: Tensor, layers: int) -> Iterator[Tensor]:
        """The residual stream (B, N, W), once before the first block and once after each of `layers`.

        A block may write over the tensor that was yielded before it.
        """
        config = self.config
        x = self._embed(normalised(images, self.precision.weights, *self.normalisation))
        yield x
        rows = x.view(-1, config.width)  # of all images; the products read them and write over them
        for block in self.blocks[:layers]:
            qkv = block.qkv(self._norm(rows, block.ln_1)).view(*x.shape[:2], 3, config.heads, config.head_dim)
            rows = self._mlp(block, block.out(_attention(qkv), residual=rows))
            yield rows.view(x.shape)

    @abstractmethod
    def _embed(self, images: Tensor) -> Tensor:
        """The input of the first block: (B, N, W)."""

    def _patches(self, images: Tensor) -> Tensor:
        """The patches' products, behind a zero for a class token: (B, N, W)."""
        config = self.config
        b, p = len(images), config.patch_size
        first = config.tokens - config.patches  # 1 with a class token, else 0
        rows = images.new_empty(b, config.tokens, 3 * p * p)
        rows[:, :first] = 0
        patches = images.unfold(2, p, p).unfold(3, p, p).permute(0, 2, 3, 1, 4, 5)  # (B, rows, columns, 3, P, P)
        rows[:, first:].view(patches.shape).copy_(patches)
        return self.patch(rows.flatten(0, 1)).view(b, config.tokens, config.width)

    def _mlp(self, mlp: Mlp, rows: Tensor) -> Tensor:
        """x + mlp(LN(x)); it may write over x."""
        return mlp.fc2(mlp.fc1(self._norm(rows, mlp.ln_2)), residual=rows)

    def _norm(self, x: Tensor, norm: tuple[Tensor, Tensor]) -> Tensor:
        return torch.layer_norm(x, x.shape[-1:], *norm, self.config.eps)


@dataclass(frozen=True)
class CpuVit(CpuBlocks):
    """CLIP's ViT as a CPU computes it. It also serves GPUs on which Triton cannot launch."""

    config: VitConfig
    ln_pre: tuple[Tensor, Tensor] | None
    last_qkv: tuple[Tensor, Tensor]  # the last block's, unpacked: (3 · W, W) and (3 · W,), float32 at least
    ln_post: tuple[Tensor, Tensor]  # float32 at least
    proj: Tensor  # (W, E), float32 at least

    @classmethod
    def prepare(
        cls, state_dict: Mapping[str, Tensor], config: VitConfig, precision: Precision, mean: Rgb, std: Rgb
    ) -> CpuVit:
        """Casts the weights of `reference.VisionTransformer`."""
        casting = Casting(state_dict, config, precision)
        source, wide = casting.source, precision.wide
        position = source["positional_embedding"].to(wide, copy=True)
        position[0] += source["class_embedding"]
        in_proj = f"transformer.resblocks.{config.layers - 1}.attn.in_proj"
        return cls(
            config=config,
            precision=precision,
            normalisation=(mean, std),
            patch=casting.patch(),
            position=position.to(precision.weights),
            ln_pre=casting.pair("ln_pre") if config.ln_pre else None,
            blocks=tuple(map(casting.block, range(config.layers))),
            last_qkv=(source[f"{in_proj}_weight"].to(wide), source[f"{in_proj}_bias"].to(wide)),
            ln_post=casting.pair("ln_post", wide),
            proj=source["proj"].to(wide),
        )

    # --- the encoder -------------------------------------------------------------------------------------------------

    def encode(self, images: Tensor) -> Tensor:
        if self.config.pool == "avg":
            return self.encode_tokens(images)[0]
        x = self.hidden_state(images, self.config.layers - 1)
        return self._project(self._last_block(x))

    def encode_tokens(self, images: Tensor) -> tuple[Tensor, Tensor]:
        config = self.config
        x = self.hidden_state(images, config.layers)
        tokens = x[:, 1:] if config.ln_after_pool else self._norm(x[:, 1:], self.ln_post)
        if config.pool == "tok":
            return self._project(x[:, 0]), tokens
        mean = tokens.mean(dim=1, dtype=self.proj.dtype)
        return self._project(mean, normed=not config.ln_after_pool).to(x.dtype), tokens

    def _embed(self, images: Tensor) -> Tensor:
        """Class token and patches with their positions, after ln_pre if there is one."""
        x = self._patches(images).add_(self.position)
        return x if self.ln_pre is None else self._norm(x, self.ln_pre)

    def _last_block(self, x: Tensor) -> Tensor:
        """The last block for the class token alone, with its sums re-associated as in `kernels/attention_pool.py`.

        (B, N, W) -> (B, W)
        """
        config, block = self.config, self.blocks[-1]
        batch, (h, d, w) = len(x), (config.heads, config.head_dim, config.width)
        q_weight, k_weight, v_weight = self.last_qkv[0].view(3, h, d, w)
        q_bias, _, v_bias = self.last_qkv[1].view(3, w)  # a bias of the keys drops out of the softmax
        y = self._norm(x, block.ln_1).to(q_weight.dtype)
        q = linear_of_few_rows(y[:, 0], q_weight.flatten(0, 1), q_bias).view(batch, h, d)
        attended = one_query_attention(q, y, k_weight, v_weight, v_bias).to(x.dtype)
        return self._mlp(block, block.out(attended, residual=x[:, 0].clone()))

    def _project(self, pooled: Tensor, normed: bool = False) -> Tensor:
        """ln_post, unless it was before the pooling, and projection: (B, W) -> (B, E)."""
        wide = pooled.to(self.proj.dtype)
        projected = (wide if normed else self._norm(wide, self.ln_post)) @ self.proj
        return projected.to(pooled.dtype)


def _attention(qkv: Tensor) -> Tensor:
    """softmax(q kᵀ / √D) v of every head: (B, N, 3, H, D) -> (B · N, W)."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).flatten(0, 1)
