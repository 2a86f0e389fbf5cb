"""What the encoders' lines for CPUs are made of: products and one-query attention, fused as far as PyTorch goes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor

from .reference import QUICK_GELU_SLOPE

_FEW_ROWS = 128  # up to which oneDNN's packed products are faster in float32 than a BLAS that knows the CPU
# activation -> oneDNN's name of it, and of the algorithm where there are several
_FUSED = {"none": ("none", ""), "swish": ("swish", ""), "gelu": ("gelu", "none")}


def _quick_gelu_(x: Tensor) -> Tensor:
    return x.mul_((QUICK_GELU_SLOPE * x).sigmoid_())


_IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "swish": torch.ops.aten.silu_.default,
    "quick_gelu": _quick_gelu_,
    "gelu": torch.ops.aten.gelu_.default,
}


def images_at_a_time(rows: int, tokens: int) -> int:
    """How many images of so many tokens are encoded together, where that many rows are."""
    return max(1, rows // tokens)


def can_fuse(dtype: torch.dtype) -> bool:
    """Whether this build of PyTorch has oneDNN's fused products, and this CPU the instructions for `dtype`."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    return dtype in (torch.float32, torch.bfloat16) and can_multiply(dtype)


@cache
def can_multiply(dtype: torch.dtype) -> bool:
    """Whether a library multiplies in `dtype` on this CPU, be it (bfloat16) by AVX-512's other instructions.

    If not, PyTorch does so number by number, a hundred times as slowly.
    """
    known = {torch.float16: "_is_mkldnn_fp16_supported", torch.bfloat16: "_is_mkldnn_bf16_supported"}
    return dtype not in known or (torch.backends.mkldnn.is_available() and getattr(torch.ops.mkldnn, known[dtype])())


@cache
def _capabilities() -> Mapping[str, Any]:
    """What PyTorch knows of this CPU."""
    return torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}


def _is_intel() -> bool:
    return str(_capabilities().get("cpu_name")).startswith("Intel")


def can_pack_for_mkl() -> bool:
    """Whether this build of PyTorch has MKL's packed products, and this is a CPU of MKL's maker."""
    return torch.backends.mkl.is_available() and hasattr(torch.ops.mkl, "_mkl_linear") and _is_intel()


def blas_leaves_avx512() -> bool:
    """Whether BLAS is MKL on another maker's CPU that has AVX-512: there it multiplies by AVX2, half as fast."""
    return torch.backends.mkl.is_available() and bool(_capabilities().get("avx512_f")) and not _is_intel()


class Product:
    """activation(x Wᵀ + b), or residual + α (x Wᵀ + b), by the library that is faster for the rows at hand.

    oneDNN, its weights packed and everything fused, serves bfloat16, and in float32 the few rows of a single image: but
    for the activation, which costs it a quarter of a float32 product and PyTorch a twentieth, in place. For many rows
    in float32 BLAS is faster, with the residual as the product's initial value, unless it leaves AVX-512 unused. On
    Intel's CPUs MKL is the fastest in float32 with weights that were packed for just as many rows, as they are for
    `usual_rows`, and as many threads: by weights that one thread has packed, one thread multiplies. Each has a layout
    of W of its own, made when it is first needed.

    Args:
        weight: (N, K), of any float dtype; multiplied by `scale`, then cast to the bias's dtype.
        bias: (N,), of the dtype to compute in.
        alpha: what a sum with a residual has of the product.
        usual_rows: counts of rows that many calls have.
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
        self._source, self._scale = weight, scale
        on_cpu = bias.device.type == "cpu"
        self._fuses = on_cpu and can_fuse(bias.dtype)
        all_rows = bias.dtype != torch.float32 or blas_leaves_avx512()
        self._onednn_rows = math.inf if all_rows else _FEW_ROWS  # up to which a product is oneDNN's
        by_mkl = on_cpu and bias.dtype == torch.float32 and can_pack_for_mkl()
        self._usual_rows = frozenset(usual_rows if by_mkl else ())
        self._packed_for: dict[tuple[int, int], Tensor] = {}  # (rows, threads) -> W as MKL multiplies by it
        # What MKL would multiply other counts of rows by: here it reads the shape alone.
        self._unpacked = bias.new_full((), torch.nan).expand(weight.shape)

    @property
    def weight(self) -> Tensor:
        """W, (N, K), as it is multiplied by."""
        wide = torch.promote_types(self._source.dtype, torch.float32)
        weight = self._source if self._scale == 1 else self._source.to(wide) * self._scale
        return weight.to(self.bias.dtype).contiguous()

    @cached_property
    def _packed(self) -> Tensor:
        return torch.ops.mkldnn._reorder_linear_weight(self.weight, _FEW_ROWS)

    @cached_property
    def _transposed(self) -> Tensor:
        return self.weight.T.contiguous()

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """(M, K) -> (M, N). The residual (M, N) is the caller's to lose: the result may be written over it."""
        rows = x.shape[0]  # len(x) is a function of Python's, four times as slow: this runs fifty times an image
        if rows in self._usual_rows:
            return self._by_mkl(x, residual, rows)
        if self._fuses and rows <= self._onednn_rows:
            return self._by_onednn(x, residual)
        if residual is not None and x.dtype.itemsize >= 4:  # in half precision the sums between would be rounded
            return residual.add_(self.bias, alpha=self.alpha).addmm_(x, self._transposed, alpha=self.alpha)
        return self._finish(torch.addmm(self.bias, x, self._transposed), residual)

    def _by_mkl(self, x: Tensor, residual: Tensor | None, rows: int) -> Tensor:
        key = rows, torch.get_num_threads()
        if (packed := self._packed_for.get(key)) is None:
            packed = self._packed_for[key] = torch.ops.mkl._mkl_reorder_linear_weight(self.weight, rows)
        y = torch.ops.mkl._mkl_linear(x, packed, self._unpacked, self.bias, rows)
        return self._finish(y, residual)

    def _by_onednn(self, x: Tensor, residual: Tensor | None) -> Tensor:
        if residual is not None and self.alpha == 1:
            return torch.ops.mkldnn._linear_pointwise.binary(x, residual, self._packed, self.bias, "add")
        fused = residual is None and self.activation in _FUSED and x.dtype != torch.float32
        name, algorithm = _FUSED[self.activation if fused else "none"]
        y = torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, name, [], algorithm)
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
    u = torch.bmm(query.transpose(0, 1), key_weight).transpose(0, 1)  # W_kᵀ q, (B, H, W)
    p = (torch.bmm(u, tokens.transpose(1, 2)) * query.shape[-1] ** -0.5).softmax(dim=-1)  # (B, H, N)
    z = torch.bmm(p, tokens)  # (B, H, W)
    return torch.bmm(z.transpose(0, 1), value_weight.transpose(1, 2)).transpose(0, 1).flatten(1) + value_bias
