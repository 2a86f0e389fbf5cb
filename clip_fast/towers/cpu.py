"""The parts of the encoders for CPUs: products and one-query attention, fused as far as PyTorch's operators go."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor

from .. import pytorch
from .reference import QUICK_GELU_SLOPE

_FEW_ROWS = 128  # up to this many, oneDNN's packed products are faster in float32 than a BLAS that knows the CPU
# activation -> oneDNN's name for it, and for the algorithm where oneDNN has several
_FUSED = {"none": ("none", ""), "swish": ("swish", ""), "gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh")}


def _quick_gelu_(x: Tensor) -> Tensor:
    return x.mul_((QUICK_GELU_SLOPE * x).sigmoid_())


_IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "swish": torch.ops.aten.silu_.default,
    "quick_gelu": _quick_gelu_,
    "gelu": torch.ops.aten.gelu_.default,
    "gelu_tanh": lambda x: torch.ops.aten.gelu_.default(x, approximate="tanh"),
}


def images_at_a_time(rows: int, tokens: int) -> int:
    """The number of images, of `tokens` tokens each, that have about `rows` rows together; at least one."""
    return max(1, rows // tokens)


def can_fuse(dtype: torch.dtype) -> bool:
    """Whether this build of PyTorch has oneDNN's fused products, and this CPU the instructions for `dtype`."""
    return dtype in (torch.float32, torch.bfloat16) and pytorch.has_onednn() and can_multiply(dtype)


@cache
def can_multiply(dtype: torch.dtype) -> bool:
    """Whether a library multiplies in `dtype` on this CPU, with the CPU's instructions or (bfloat16) by emulation.

    Without such a library PyTorch multiplies number by number, a hundred times as slowly.
    """
    return dtype not in (torch.float16, torch.bfloat16) or pytorch.onednn_multiplies(dtype)


@cache
def _capabilities() -> Mapping[str, Any]:
    """The instruction sets and the name of this CPU, as PyTorch reads them."""
    return torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}


def _is_intel() -> bool:
    return str(_capabilities().get("cpu_name")).startswith("Intel")


def can_pack_for_mkl() -> bool:
    """Whether this build of PyTorch has MKL's packed products, and this is a CPU of MKL's maker."""
    return pytorch.has_mkl() and _is_intel()


def blas_leaves_avx512() -> bool:
    """Whether BLAS is MKL on a non-Intel CPU with AVX-512: MKL uses AVX2 there, at half the speed."""
    return torch.backends.mkl.is_available() and bool(_capabilities().get("avx512_f")) and not _is_intel()


class Product:
    """activation(x Wᵀ + b), or residual + α (x Wᵀ + b), by the library that is faster for the rows at hand.

    | dtype | rows | library | why |
    |---|---|---|---|
    | bfloat16 | any | oneDNN, packed weights | bias, residual and activation are fused |
    | float32 | `usual_rows`, on Intel | MKL, weights packed for that many rows | the fastest there |
    | float32 | up to 128 | oneDNN, packed weights | bias and residual are fused, the activation is a pass in place |
    | float32 | more | BLAS | faster than oneDNN, with the residual as initial value |
    | float32 | any, on a CPU whose AVX-512 MKL leaves unused | oneDNN | twice as fast |
    | others | any | BLAS | |

    oneDNN's fused activation costs a quarter of a float32 product, PyTorch's pass in place a twentieth. MKL multiplies
    with as many threads as packed the weight, so there is a packing for each number of threads. Each library has its
    own layout of W, which is made when it is first needed.

    Args:
        weight: (N, K), of any float dtype; multiplied by `scale`, then cast to the bias's dtype.
        bias: (N,), of the dtype to compute in.
        alpha: the factor of the product in a sum with a residual.
        usual_rows: the numbers of rows that most calls have.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor,
        activation: str = "none",
        scale: float = 1.0,
        alpha: float = 1.0,
        usual_rows: tuple[int, ...] = (),
    ) -> None:
        self.bias = bias
        self.activation = activation
        self.alpha = alpha
        self._given, self._scale = weight, scale
        on_cpu = bias.device.type == "cpu"
        self._fuses = on_cpu and can_fuse(bias.dtype)
        all_rows = bias.dtype != torch.float32 or blas_leaves_avx512()
        self._onednn_rows = math.inf if all_rows else _FEW_ROWS  # the most rows that oneDNN multiplies
        by_mkl = on_cpu and bias.dtype == torch.float32 and can_pack_for_mkl()
        self._usual_rows = frozenset(usual_rows if by_mkl else ())
        self._packed_for: dict[tuple[int, int], Tensor] = {}  # (rows, threads) -> W as MKL multiplies by it
        # MKL would multiply other numbers of rows by this operand. Here it reads the operand's shape alone.
        self._unpacked = bias.new_full((), torch.nan).expand(weight.shape)

    @property
    def weight(self) -> Tensor:
        """W, (N, K), scaled and cast."""
        wide = torch.promote_types(self._given.dtype, torch.float32)
        weight = self._given if self._scale == 1 else self._given.to(wide) * self._scale
        return weight.to(self.bias.dtype).contiguous()

    @cached_property
    def _packed(self) -> Tensor:
        return pytorch.reorder_linear_weight(self.weight, _FEW_ROWS)

    @cached_property
    def _transposed(self) -> Tensor:
        return self.weight.T.contiguous()

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """(M, K) -> (M, N). The result may be written over the residual (M, N)."""
        rows = x.shape[0]  # len(x) is four times as slow, and this runs fifty times an image
        if rows in self._usual_rows:
            return self._by_mkl(x, residual, rows)
        if self._fuses and rows <= self._onednn_rows:
            return self._by_onednn(x, residual)
        if residual is not None and x.dtype.itemsize >= 4:  # in half precision the sum would be rounded twice
            return residual.add_(self.bias, alpha=self.alpha).addmm_(x, self._transposed, alpha=self.alpha)
        return self._finish(torch.addmm(self.bias, x, self._transposed), residual)

    def _by_mkl(self, x: Tensor, residual: Tensor | None, rows: int) -> Tensor:
        key = rows, torch.get_num_threads()
        if (packed := self._packed_for.get(key)) is None:
            packed = self._packed_for[key] = pytorch.mkl_reorder_linear_weight(self.weight, rows)
        y = pytorch.mkl_linear(x, packed, self._unpacked, self.bias, rows)
        return self._finish(y, residual)

    def _by_onednn(self, x: Tensor, residual: Tensor | None) -> Tensor:
        if residual is not None and self.alpha == 1:
            return pytorch.linear_pointwise.binary(x, residual, self._packed, self.bias, "add")
        fused = residual is None and self.activation in _FUSED and x.dtype != torch.float32
        name, algorithm = _FUSED[self.activation if fused else "none"]
        y = pytorch.linear_pointwise(x, self._packed, self.bias, name, [], algorithm)
        return y if fused else self._finish(y, residual)

    def _finish(self, y: Tensor, residual: Tensor | None) -> Tensor:
        return _IN_PLACE[self.activation](y) if residual is None else residual.add_(y, alpha=self.alpha)


def one_query_attention(
    query: Tensor, tokens: Tensor, key_weight: Tensor, value_weight: Tensor, value_bias: Tensor
) -> Tensor:
    """`ops.attention_pool` with the softmax scale 1 / √D: its sums are re-associated, keys and values never formed.

    Args:
        query: (B, H, D), bias included.
        tokens: (B, N, W).
        key_weight, value_weight: (H, D, W).
        value_bias: (H · D,).

    Returns:
        (B, H · D).
    """
    towards = torch.bmm(query.transpose(0, 1), key_weight).transpose(0, 1)  # W_kᵀ q, (B, H, W)
    return attention_towards(towards, tokens, value_weight, value_bias)


def attention_towards(towards: Tensor, tokens: Tensor, value_weight: Tensor, value_bias: Tensor) -> Tensor:
    """`one_query_attention` where W_kᵀ q is known: `towards` (B, H, W)."""
    scale = value_weight.shape[1] ** -0.5
    p = (torch.bmm(towards, tokens.transpose(1, 2)) * scale).softmax(dim=-1)  # (B, H, N)
    z = torch.bmm(p, tokens)  # (B, H, W)
    return torch.bmm(z.transpose(0, 1), value_weight.transpose(1, 2)).transpose(0, 1).flatten(1) + value_bias
