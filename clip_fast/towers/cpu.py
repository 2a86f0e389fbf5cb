"""The parts of the encoders for CPUs: products and one-query attention, fused as far as PyTorch's operators go."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache, cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import pytorch
from .reference import QUICK_GELU_SLOPE

# The number of rows that weights are packed for. MKL takes its blocks from it: weights that are packed for 50 rows
# multiply 100 to 400 rows up to a quarter more slowly. Those that are packed for more rows than they are wide multiply
# any number up to 400 rows a third more slowly, on a Xeon without AMX. In between any number of rows is multiplied as
# fast as by weights that are packed for that number, to 4 %.
_PACKED_FOR = 320
_FEW_ROWS = 64  # Up to so many rows are multiplied faster by half weights as they are, more rows in float32.
# oneDNN keeps 0.6 MiB for each shape of a weight and number of rows. A tower has products of few rows in its last block
# alone, one row for each image. Four rows take no longer than one.
_NUMBERS_OF_FEW_ROWS = (4, 16)
_PARTS = 32  # of a weight that few rows are multiplied by: enough for many threads
# Numbers of rows for which oneDNN 3.12 leaves an AMX product of a narrow result to one of two threads.
_LEFT_TO_ONE_THREAD = range(401, 1340)
_NARROW = 1024  # columns of a result, from which on it seldom does
_ROWS_APART = 384  # of a part, which both threads share
_ROWS_IN_CACHE = 128  # of an activation, whose passes take a fifth longer for 64 rows or for 256
GELU_TANH_SLOPE = 2 * math.sqrt(2 / math.pi)
GELU_TANH_CUBIC = 0.044715
# activation -> oneDNN's name for it, and for the algorithm where oneDNN has several
_FUSED = {"none": ("none", ""), "swish": ("swish", ""), "gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh")}


def _quick_gelu_(x: Tensor) -> Tensor:
    return x.mul_((QUICK_GELU_SLOPE * x).sigmoid_())


def _tanh_gelu_(x: Tensor) -> Tensor:
    """s times GELU at x, by its tanh approximation, for a given x' = s x, s = 2 √(2 / π); written over it.

    It is x' · σ(x' + c x'³), since (1 + tanh y) / 2 = σ(2 y). On a Zen 4, for 196 rows of 3,072, PyTorch's own pass
    takes 1.7 times as long, and one with MKL's tanh six times. A part of the rows at a time stays in the caches.
    """
    parts: tuple[Tensor, ...] = torch.split(x, _ROWS_IN_CACHE)
    for rows in parts:
        gate = rows * rows
        torch.addcmul(rows, rows, gate, value=GELU_TANH_CUBIC / GELU_TANH_SLOPE**2, out=gate)
        rows.mul_(gate.sigmoid_())
    return x


_IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "swish": torch.ops.aten.silu_.default,
    "quick_gelu": _quick_gelu_,
    "gelu": torch.ops.aten.gelu_.default,
    "gelu_tanh": lambda x: torch.ops.aten.gelu_.default(x, approximate="tanh"),
    "scaled_gelu_tanh": _tanh_gelu_,
}


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


def _has_amx() -> bool:
    return bool(_capabilities().get("amx_bf16"))


@cache
def multiplies_fast(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies in `dtype` at least as fast as in float32.

    Without AMX bfloat16 reached half of float32's rate on an Intel Xeon that has instructions for it. Others emulate
    them.
    """
    if dtype == torch.bfloat16 and _is_intel():
        return _has_amx()
    return can_multiply(dtype)


@cache
def multiplies_in_tiles(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies in `dtype` by AMX, many times as fast as in float32."""
    return dtype == torch.bfloat16 and _has_amx() and can_multiply(dtype)


def rows_at_once(dtype: torch.dtype) -> int:
    """The number of tokens that a ViT encodes together.

    More than 800 are no faster by two cores, and take memory. By AMX 1,600 to 2,100 take a quarter less time than 800,
    which is one of the numbers that oneDNN leaves to one thread.
    """
    return 2100 if multiplies_in_tiles(dtype) else 800


@cache
def keep_freed_memory() -> None:
    """Makes glibc keep up to 64 MiB of freed memory for the next tensors, once for the process.

    It keeps twice the size of the largest block that was freed and had been mapped by itself, up to 32 MiB (mallopt(3),
    M_MMAP_THRESHOLD). Whatever more is free at the heap's end it gives back to the system, and new pages are cleared.
    The activations of a ViT by AMX are just about so many: for 8 and 20 images of ViT-B/16 that took 8 to 13 per cent
    of the time. Here such a block is freed that no one has written to.
    """
    around = 2**13  # more than PyTorch and glibc put around a block, which must not be over 32 MiB with that
    torch.empty(2**25 - around, dtype=torch.uint8, device="cpu")


def can_pack_for_mkl() -> bool:
    """Whether this build of PyTorch has MKL's packed products, and this is a CPU of MKL's maker."""
    return pytorch.has_mkl() and _is_intel()


def stays_half(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether `weight` stays in its half precision, and a copy in `dtype`, float32, is made for each product.

    Kept, that copy would take twice the memory of the weights. Where MKL is slow, it is kept, in oneDNN's layout.
    """
    on_cpu = weight.device.type == "cpu" and can_pack_for_mkl()
    return on_cpu and dtype == torch.float32 and weight.dtype.itemsize < 4 and not multiplies_fast(weight.dtype)


def _with_more_rows(x: Tensor) -> Tensor:
    """`x`, and zeros below it if it has few rows: as many as `_NUMBERS_OF_FEW_ROWS` says."""
    given = x.shape[0]
    rows = next((number for number in _NUMBERS_OF_FEW_ROWS if number >= given), given)
    return x if rows == given else F.pad(x, (0, 0, 0, rows - given))


def linear_of_few_rows(x: Tensor, weight: Tensor, bias: Tensor, alpha: float = 1.0) -> Tensor:
    """α x Wᵀ + b of a few rows by a weight as it is: (M, K), (N, K) and (N,) -> (M, N).

    On AMD's CPUs MKL reads a weight for one row with one thread, and is slow for few rows. W in parts is a batch of
    products, which all threads share. On a Zen 4 of two cores that takes a third of the time for one row, and two
    thirds for 4 to 32.
    """
    parts = math.gcd(len(weight), _PARTS)
    by_mkl = x.device.type == "cpu" and x.dtype.itemsize >= 4 and pytorch.has_mkl()
    if not by_mkl or _is_intel() or parts == 1:
        return torch.addmm(bias, x, weight.T, alpha=alpha)
    blocks = weight.view(parts, -1, weight.shape[1])
    if len(x) == 1:
        y = torch.bmm(blocks, x.T.expand(parts, -1, -1)).view(1, -1)
    else:
        y = torch.bmm(x.expand(parts, -1, -1), blocks.transpose(1, 2)).transpose(0, 1).flatten(1)
    return torch.add(bias, y, alpha=alpha)


class Product:
    """activation(x Wᵀ + b), or residual + α (x Wᵀ + b), by the library that is fastest for the dtype on this CPU.

    | dtype | library | why |
    |---|---|---|
    | float32 of half weights that multiply slowly | BLAS, a copy in float32 for each call | see `stays_half` |
    | the same, up to 64 rows by bfloat16 | oneDNN, packed weights in bfloat16 | the copy would take longer |
    | float32 on Intel's CPUs | MKL, packed weights | 6 to 11 % faster than oneDNN, from 50 rows to 800 |
    | float32 and bfloat16 elsewhere | oneDNN, packed weights | bias and residual are fused, and bfloat16's activation |
    | up to 16 rows by float32 weights there | BLAS, weights as they are, in parts | see `linear_of_few_rows` |
    | others | BLAS, weights as they are | |

    Where W does not stay as it is, it has one layout for all numbers of rows and of threads, made when it is first
    needed. oneDNN's fused activation costs a quarter of a float32 product, PyTorch's pass in place a twentieth. With
    AMX a narrow product is made in parts where oneDNN would leave it to one thread.

    Args:
        weight: (N, K), of any float dtype; multiplied by `scale`, then cast to the bias's dtype.
        bias: (N,), of the dtype to compute in.
        alpha: the factor of the product in a sum with a residual.
        few_in_half: a half weight that stays so multiplies few rows in its own precision, where that is faster.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor,
        activation: str = "none",
        scale: float = 1.0,
        alpha: float = 1.0,
        few_in_half: bool = False,
    ) -> None:
        self.bias = bias
        self.activation = activation
        self.alpha = alpha
        self._few_in_half = few_in_half
        self._shared_in_parts = multiplies_in_tiles(bias.dtype) and bias.shape[0] < _NARROW
        self._given, self._scale = weight, scale
        self._multiply = Product._by_blas  # the function, not a bound method: the instance would hold on to itself
        if stays_half(weight, bias.dtype):
            self._multiply = Product._by_widening
        elif bias.device.type == "cpu" and bias.dtype == torch.float32 and can_pack_for_mkl():
            self._multiply = Product._by_mkl
            # MKL would multiply by this operand where no packed one is given. Here it reads the operand's shape alone.
            self._unpacked = bias.new_full((), torch.nan).expand(weight.shape)
        elif bias.device.type == "cpu" and can_fuse(bias.dtype):
            self._multiply = Product._by_onednn

    @property
    def weight(self) -> Tensor:
        """W, (N, K), scaled and cast; the given tensor itself where nothing is to be done."""
        wide = torch.promote_types(self._given.dtype, torch.float32)
        weight = self._given if self._scale == 1 else self._given.to(wide, copy=True).mul_(self._scale)
        return weight.to(self.bias.dtype).contiguous()

    @cached_property
    def _operand(self) -> Tensor:
        """W in the layout of the library."""
        if self._multiply is Product._by_mkl:
            return pytorch.mkl_reorder_linear_weight(self.weight, _PACKED_FOR)
        if self._multiply is Product._by_widening:
            return pytorch.reorder_linear_weight(self._given.contiguous(), _FEW_ROWS)
        if self._multiply is Product._by_onednn:
            return pytorch.reorder_linear_weight(self.weight, _PACKED_FOR)
        return self.weight.T

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """(M, K) -> (M, N). The result may be written over the residual (M, N)."""
        return self._multiply(self, x, residual)

    def _by_mkl(self, x: Tensor, residual: Tensor | None) -> Tensor:
        y = pytorch.mkl_linear(x, self._operand, self._unpacked, self.bias, x.shape[0])
        return self._finish(y, residual)

    def _by_widening(self, x: Tensor, residual: Tensor | None) -> Tensor:
        if self._few_in_half and x.shape[0] <= _FEW_ROWS and can_fuse(self._given.dtype):
            y = pytorch.linear_pointwise(_with_more_rows(x.to(self._given.dtype)), self._operand, None, "none", [], "")
            y = y[: x.shape[0]]
            return self._finish(torch.add(self.bias, y, alpha=self._scale), residual)
        return self._finish(torch.addmm(self.bias, x, self.weight.T), residual)

    def _by_onednn(self, x: Tensor, residual: Tensor | None) -> Tensor:
        rows = x.shape[0]  # `len` of a tensor takes ten times as long, which shows in a call for one image
        if rows <= _NUMBERS_OF_FEW_ROWS[-1]:
            if x.dtype == self._given.dtype == torch.float32:
                return self._finish(linear_of_few_rows(x, self._given, self.bias, self._scale), residual)
            padded = _with_more_rows(x)
            if padded is not x:
                return self._by_onednn(padded, None if residual is None else _with_more_rows(residual))[:rows]
        if self._shared_in_parts and rows in _LEFT_TO_ONE_THREAD:
            parts = -(-rows // _ROWS_APART)
            residuals = (None,) * parts if residual is None else residual.tensor_split(parts)
            return torch.cat(list(map(self._by_onednn, x.tensor_split(parts), residuals)))
        if residual is not None and self.alpha == 1:
            return pytorch.linear_pointwise.binary(x, residual, self._operand, self.bias, "add")
        fused = residual is None and self.activation in _FUSED and x.dtype != torch.float32
        name, algorithm = _FUSED[self.activation if fused else "none"]
        y = pytorch.linear_pointwise(x, self._operand, self.bias, name, [], algorithm)
        return y if fused else self._finish(y, residual)

    def _by_blas(self, x: Tensor, residual: Tensor | None) -> Tensor:
        if x.shape[0] <= _NUMBERS_OF_FEW_ROWS[-1]:
            return self._finish(linear_of_few_rows(x, self._operand.T, self.bias), residual)
        if residual is not None and x.dtype.itemsize >= 4:  # in half precision the sum would be rounded twice
            return residual.add_(self.bias, alpha=self.alpha).addmm_(x, self._operand, alpha=self.alpha)
        return self._finish(torch.addmm(self.bias, x, self._operand), residual)

    def _finish(self, y: Tensor, residual: Tensor | None) -> Tensor:
        return _IN_PLACE[self.activation](y) if residual is None else residual.add_(y, alpha=self.alpha)


def one_query_attention(
    query: Tensor, tokens: Tensor, key_weight: Tensor, value_weight: Tensor, value_bias: Tensor
) -> Tensor:
    """`ops.attention_pool` with the softmax scale 1 / √D: its sums are re-associated, keys and values never formed.

    Scores and sums of tokens are computed in the tokens' dtype, products by weights in the weights'.

    Args:
        query: (B, H, D), bias included.
        tokens: (B, N, W).
        key_weight, value_weight: (H, D, W).
        value_bias: (H · D,).

    Returns:
        (B, H · D).
    """
    towards = torch.bmm(query.transpose(0, 1), key_weight).transpose(0, 1)  # W_kᵀ q, (B, H, W)
    return attention_towards(towards.to(tokens.dtype), tokens, value_weight, value_bias)


def attention_towards(towards: Tensor, tokens: Tensor, value_weight: Tensor, value_bias: Tensor) -> Tensor:
    """`one_query_attention` where W_kᵀ q is known: `towards` (B, H, W)."""
    scale = value_weight.shape[1] ** -0.5
    p = (torch.bmm(towards, tokens.transpose(1, 2)) * scale).softmax(dim=-1)  # (B, H, N)
    z = torch.bmm(p, tokens).to(value_weight.dtype)  # (B, H, W)
    return torch.bmm(z.transpose(0, 1), value_weight.transpose(1, 2)).transpose(0, 1).flatten(1) + value_bias
