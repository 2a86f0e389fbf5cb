"""The contract of every op: what it computes, what it takes, and its shape for PyTorch.

Each op is registered with `torch.library` as `clip_fast::<name>`, so that `torch.compile` and `torch.export` see
through it, and is called through the function of that name below. `dispatch.py` decides which implementation runs.
`impl="triton"` and `impl="reference"` ask for one of them and never fall back.

The ops are for inference: they carry no derivative formula.

Shapes: B images, N tokens, G = N − 1 of them patches, W width, H heads, D head_dim; M rows, K and N of a GEMM.
Kernels take float16, bfloat16 and float32, and accumulate in float32; `resize` takes bytes.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .dispatch import Impl, define
from .resampling import FIELDS
from .statistics import empty_statistics, statistics_tiles
from .targets import InputPrecision

Activation = Literal["none", "quick_gelu", "gelu", "gelu_tanh", "relu"]

ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)
PRECISIONS: tuple[InputPrecision, ...] = get_args(InputPrecision)
PATCH_K_STEP = 64  # the patch projection's K is padded with zeros to a multiple of this
MAX_LAYER_NORM_WIDTH = 2048
MAX_HEAD_DIM = 128


def to_tf32(weight: Tensor) -> Tensor:
    """A float32 weight rounded to TF32, whose significand has 11 bits: nearest, ties away from zero.

    Tensor cores do not round: they take float32 operands as they are and pass over the bits that TF32 has not, which
    makes every number smaller. A weight that was rounded beforehand they take exactly.
    """
    bits = weight.contiguous().view(torch.int32)
    return torch.where(weight.isfinite(), (bits + 0x1000).bitwise_and_(-0x2000).view(torch.float32), weight)


def operand(weight: Tensor, dtype: torch.dtype, precision: InputPrecision) -> Tensor:
    """A weight as kernels multiply by it: contiguous, of `dtype`, and rounded where they would cut it."""
    weight = weight.to(dtype).contiguous()
    return to_tf32(weight) if dtype == torch.float32 and precision == "tf32" else weight


# --- resize -----------------------------------------------------------------------------------------------------------


def _fake_resize(pixels: Tensor, steps: Tensor, tables: Tensor, scratch: int, side: int) -> Tensor:
    return pixels.new_empty(steps.shape[1], 3, side, side)


def _check_resize(pixels: Tensor, steps: Tensor, tables: Tensor, scratch: int, side: int) -> None:
    for name, tensor, dtype in (
        ("pixels", pixels, torch.uint8), ("steps", steps, torch.int64), ("tables", tables, torch.int32)
    ):  # fmt: skip
        if tensor.dtype != dtype:
            raise TypeError(f"{name} must be of {dtype}, got {tensor.dtype}")
        _require(tensor.is_contiguous(), f"{name} must be contiguous, got strides {tensor.stride()}")
    _require(pixels.ndim == 1, "pixels must be [bytes], got", pixels)
    _require(steps.ndim == 3 and (steps.shape[0], steps.shape[2]) == (2, FIELDS),
             f"steps must be [2, batch, {FIELDS}], got", steps)  # fmt: skip
    _require(tables.ndim == 1, "tables must be of one dimension, got", tables)
    _require(side > 0 and scratch >= 0, f"side must be positive and scratch not negative, got {side} and {scratch}")
    _require_device(pixels=pixels, steps=steps, tables=tables)


_resize = define(
    "resize",
    "(Tensor pixels, Tensor steps, Tensor tables, int scratch, int side) -> Tensor",
    _fake_resize,
    _check_resize,
    bytes=True,
)


def resize(pixels: Tensor, steps: Tensor, tables: Tensor, scratch: int, side: int, *, impl: Impl = "auto") -> Tensor:
    """Images of any size, resized to squares bit for bit as Pillow does, which may cut them out of a larger result.

    Args:
        pixels: uint8 (bytes,), contiguous: RGB images behind each other, each row by row.
        steps, tables, scratch: what `resampling.plan` gives for these images and this side, the arrays as tensors on
            the device of the pixels. They are trusted: a plan of other images reads beside the pixels.
        side: S, of the squares in pixels.

    Returns:
        uint8 (B, 3, S, S), contiguous.
    """
    return _resize(impl, (pixels, steps, tables), scratch, side)


# --- patch_embed ------------------------------------------------------------------------------------------------------


def _fake_patch_embed(
    images: Tensor,
    weight: Tensor,
    position: Tensor,
    patch_size: int,
    class_token: bool,
    statistics: bool,
    precision: str,
) -> tuple[Tensor, Tensor]:
    out = weight.new_empty(images.shape[0], position.shape[0], weight.shape[0])
    return out, empty_statistics(out, statistics)


def _check_patch_embed(
    images: Tensor,
    weight: Tensor,
    position: Tensor,
    patch_size: int,
    class_token: bool,
    statistics: bool,
    precision: str,
) -> None:
    _require_float("weight", weight)
    _require_float("position", position)
    _require_precision(precision)
    _require(images.ndim == 4 and images.shape[1] == 3, "images must be [batch, 3, height, width], got", images)
    _require(
        images.dtype == torch.uint8 or images.is_floating_point(),
        f"images must be uint8 or of a floating-point dtype, got {images.dtype}",
    )
    features = -(-3 * patch_size**2 // PATCH_K_STEP) * PATCH_K_STEP
    _require(weight.ndim == 2 and weight.shape[1] == features, f"weight must be [width, {features}], got", weight)
    grid = (images.shape[2] // patch_size, images.shape[3] // patch_size)
    tokens = class_token + grid[0] * grid[1]
    _require(min(grid) > 0, f"images must be at least {patch_size} pixels a side, got", images)
    _require(position.shape == (tokens, len(weight)), f"position must be [{tokens}, {len(weight)}], got", position)
    _require_device(images=images, weight=weight, position=position)


_patch_embed = define(
    "patch_embed",
    "(Tensor images, Tensor weight, Tensor position, int patch_size, bool class_token, bool statistics, "
    "str precision) -> (Tensor, Tensor)",
    _fake_patch_embed,
    _check_patch_embed,
    lead=1,
)


def patch_embed(
    images: Tensor,
    weight: Tensor,
    position: Tensor,
    patch_size: int,
    *,
    class_token: bool = True,
    statistics: bool = False,
    precision: InputPrecision = "ieee",
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """Images to positioned tokens: out[b, 0] = position[0], out[b, 1 + g] = patch(b, g) @ weightᵀ + position[1 + g].

    Without a class token, out[b, g] = patch(b, g) @ weightᵀ + position[g]. The class embedding, a bias of the patches,
    and the constant part of a folded normalisation belong into `position`. A uint8 pixel u enters
    as u − 128, which is exact in every dtype and keeps the pixels' mean from being multiplied by the weights' rounding
    errors; normalising with mean μ and deviation σ is then weight / (255 σ), with weight · (128 / 255 − μ) / σ summed
    into `position`.

    Args:
        images: (B, 3, h, w), uint8 or floating, any strides (NHWC data is passed as a permuted view). Pixels past the
            last whole patch are not read.
        weight: (W, K′) with features ordered (channel, row, column) and zero-padded from 3 · patch_size² to a multiple
            of PATCH_K_STEP; its dtype is the compute and result dtype. Images are converted to it.
        position: (1 + G, W), or (G, W) without a class token, any float dtype.
        class_token: whether there is one.
        statistics: also return the row statistics of the tokens, for a `linear` that folds the next LayerNorm in.
        precision: of products of float32 operands on a GPU: exact, or cut to TF32, see `to_tf32`.

    Returns:
        (B, 1 + G, W) or (B, G, W), contiguous; and its row statistics (B, …, T, 2), see `layer_norm`, or an empty
        tensor.
    """
    return _patch_embed(impl, (images, weight, position), patch_size, class_token, statistics, precision)


# --- layer_norm -------------------------------------------------------------------------------------------------------


def _fake_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, statistics: bool) -> tuple[Tensor, Tensor]:
    y = x.new_empty(x.shape)
    return y, empty_statistics(y, statistics)


def _check_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, *_: Any) -> None:
    _require_float("x", x)
    _require(x.ndim >= 1 and x.shape[-1] > 0, "x must be [..., width], got", x)
    _require_vectors(x.shape[-1], weight=weight, bias=bias)
    _require_device(x=x, weight=weight, bias=bias)


_layer_norm = define(
    "layer_norm",
    "(Tensor x, Tensor weight, Tensor bias, float eps, bool statistics) -> (Tensor, Tensor)",
    _fake_layer_norm,
    _check_layer_norm,
    widest=MAX_LAYER_NORM_WIDTH,
    wide="rows",
)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, *, statistics: bool = False, impl: Impl = "auto"
) -> tuple[Tensor, Tensor]:
    """LayerNorm over the last dimension (Ba, Kiros & Hinton 2016, eq. 4), with biased variance.

    Args:
        x: (…, W), W at most MAX_LAYER_NORM_WIDTH for the kernel.
        weight, bias: (W,), any float dtype.
        statistics: also return the row statistics of the result, for a `linear` that folds the next LayerNorm in.

    Returns:
        y like x, contiguous; and its row statistics (…, T, 2), float32, T = ⌈W / STATISTICS_TILE⌉: for each tile of
        columns the mean and the sum of squared deviations from it. An empty tensor where they are not wanted.
    """
    return _layer_norm(impl, (x, weight, bias), eps, statistics)


# --- linear -----------------------------------------------------------------------------------------------------------


def _fake_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    row_statistics: Tensor | None,
    colsum: Tensor | None,
    scale: Tensor | None,
    activation: str,
    eps: float,
    statistics: bool,
    precision: str,
) -> tuple[Tensor, Tensor]:
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    return y, empty_statistics(y, statistics)


def _check_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    row_stats: Tensor | None,
    colsum: Tensor | None,
    scale: Tensor | None,
    activation: str,
    eps: float,
    statistics: bool,
    precision: str,
) -> None:
    _require_float("x", x)
    _require(x.ndim >= 1, "x must be [..., K], got", x)
    rows, k = x.shape[:-1], x.shape[-1]
    _require(weight.ndim == 2 and weight.shape[1] == k, f"weight must be [N, {k}], got", weight)
    _require(k > 0, "x must have features, got", x)
    n = len(weight)
    _require(weight.dtype == x.dtype, f"weight must have the dtype of x, {x.dtype}, got {weight.dtype}")
    _require_vectors(n, bias=bias, colsum=colsum, scale=scale)
    if residual is not None:
        _require(residual.shape == (*rows, n), f"residual must be {[*rows, n]}, got", residual)
        _require(residual.dtype == x.dtype, f"residual must have the dtype of x, {x.dtype}, got {residual.dtype}")
    _require(activation in ACTIVATIONS, f"activation must be one of {ACTIVATIONS}, got {activation!r}")
    _require_precision(precision)
    _require((row_stats is None) == (colsum is None), "row statistics and colsum must be given together")
    if row_stats is not None:
        wanted = (*rows, statistics_tiles(k), 2)
        _require(row_stats.shape == wanted, f"row statistics must be {list(wanted)}, got", row_stats)
        _require_float("row statistics", row_stats)
    _require_device(x=x, weight=weight, bias=bias, residual=residual, statistics=row_stats, colsum=colsum, scale=scale)


_linear = define(
    "linear",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor? row_statistics, Tensor? colsum, "
    "Tensor? scale, str activation, float eps, bool statistics, str precision) -> (Tensor, Tensor)",
    _fake_linear,
    _check_linear,
)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    norm: tuple[Tensor, Tensor] | None = None,
    scale: Tensor | None = None,
    activation: Activation = "none",
    eps: float = 1e-5,
    statistics: bool = False,
    precision: InputPrecision = "ieee",
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """activation(scale · x weightᵀ + bias + residual), with the LayerNorm of x folded in where `norm` is given.

    LN(x) Wᵀ + b = rstd · (x W′ᵀ − mean · colsum) + b′ with W′ = W diag(gain), colsum = W′ summed over K, and
    b′ = b + W · shift: the product reads the raw x, and the statistics enter afterwards.

    Args:
        x: (…, K); read in place where its rows are contiguous, one stride apart and not within each other, copied first
            where not.
        weight: (N, K), x's dtype.
        bias: (N,), any float dtype.
        residual: (…, N), x's dtype; added before the activation.
        norm: row statistics of x, (…, T, 2) float32 as `layer_norm` and `linear` return them, and colsum (N,) float32,
            summed from the weight as rounded to its dtype.
        scale: (N,), any float dtype: of the product's columns, as a batch norm's, which here rounds no weight.
        statistics: also return the row statistics of the result.
        precision: of products of float32 operands on a GPU: exact, or cut to TF32, see `to_tf32`.

    Returns:
        y (…, N) of x's dtype, contiguous; and its row statistics (…, ⌈N / STATISTICS_TILE⌉, 2), or an empty tensor.
    """
    row_stats, colsum = norm if norm is not None else (None, None)
    tensors = (x, weight, bias, residual, row_stats, colsum, scale)
    return _linear(impl, tensors, activation, eps, statistics, precision)


# --- flash_attention --------------------------------------------------------------------------------------------------


def _fake_flash_attention(qkv: Tensor, scale: float, precision: str) -> Tensor:
    batch, tokens, _, heads, head_dim = qkv.shape
    return qkv.new_empty(batch, tokens, heads * head_dim)


def _check_flash_attention(qkv: Tensor, scale: float, precision: str) -> None:
    _require_float("qkv", qkv)
    _require(qkv.ndim == 5 and qkv.shape[2] == 3, "qkv must be [batch, tokens, 3, heads, head_dim], got", qkv)
    _require(min(qkv.shape[1:]) > 0, "qkv must have tokens, heads and head_dim, got", qkv)
    if not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}")
    _require_precision(precision)


_flash_attention = define(
    "flash_attention",
    "(Tensor qkv, float scale, str precision) -> Tensor",
    _fake_flash_attention,
    _check_flash_attention,
    widest=MAX_HEAD_DIM,
    wide="heads",
)


def flash_attention(qkv: Tensor, scale: float, *, precision: InputPrecision = "ieee", impl: Impl = "auto") -> Tensor:
    """softmax(scale · q kᵀ) v for every head (Vaswani et al. 2017, eq. 1), never forming the N × N matrix.

    Args:
        qkv: (B, N, 3, H, D), contiguous, as one GEMM wrote queries, keys and values; D at most MAX_HEAD_DIM.
        scale: positive, usually 1 / √D; ln 2 where 1 / √D and log2 e were folded into the query weights.
        precision: of products of float32 operands on a GPU: exact, or cut to TF32, see `to_tf32`.

    Returns:
        (B, N, H · D), contiguous.
    """
    return _flash_attention(impl, (qkv,), scale, precision)


# --- mean_token -------------------------------------------------------------------------------------------------------


def _fake_mean_token(features: Tensor, position: Tensor) -> Tensor:
    return features.new_empty(features.shape[0], features.shape[2])


def _check_mean_token(features: Tensor, position: Tensor) -> None:
    _require_float("features", features)
    _require(features.ndim == 3 and features.shape[1] > 0, "features must be [batch, positions, width], got", features)
    _require_vectors(features.shape[2], position=position)
    _require_device(features=features, position=position)


_mean_token = define(
    "mean_token",
    "(Tensor features, Tensor position) -> Tensor",
    _fake_mean_token,
    _check_mean_token,
)


def mean_token(features: Tensor, position: Tensor, *, impl: Impl = "auto") -> Tensor:
    """The mean of a feature map's positions plus a positional embedding: the query token of CLIP's ResNets.

    With a position of zero it is the average of a ViT's tokens.

    Args:
        features: (B, G, W), any strides: a (B, W, h, w) map in either memory format is passed as a view.
        position: (W,), any float dtype.

    Returns:
        (B, W) of the features' dtype.
    """
    return _mean_token(impl, (features, position))


# --- attention_pool ---------------------------------------------------------------------------------------------------


def _fake_attention_pool(
    query: Tensor, first: Tensor, rest: Tensor, key_weight: Tensor | None, value_weight: Tensor, *others: Any
) -> Tensor:
    return first.new_empty(first.shape[0], value_weight.shape[0] * value_weight.shape[1])


def _check_attention_pool(
    query: Tensor,
    first: Tensor,
    rest: Tensor,
    key_weight: Tensor | None,
    value_weight: Tensor,
    value_bias: Tensor,
    statistics: Tensor | None,
    position: Tensor | None,
    scale: float,
    eps: float,
    precision: str,
) -> None:
    _require_float("first", first)
    _require(first.ndim == 2, "first must be [batch, width], got", first)
    batch, width = first.shape
    _require(
        rest.ndim == 3 and rest.shape[0] == batch and rest.shape[2] == width,
        f"rest must be [{batch}, positions, {width}], got",
        rest,
    )
    if key_weight is None:
        _require(value_weight.ndim == 3, f"value_weight must be [heads, head_dim, {width}], got", value_weight)
        heads, head_dim = value_weight.shape[:2]
        _require(query.shape == (heads, width), f"query must be {[heads, width]} without key_weight, got", query)
    else:
        _require(query.ndim == 3 and len(query) == batch, f"query must be [{batch}, heads, head_dim], got", query)
        heads, head_dim = query.shape[1:]
    weights = {"value_weight": value_weight} if key_weight is None else {
        "key_weight": key_weight, "value_weight": value_weight,
    }  # fmt: skip
    for name, tensor in weights.items():
        _require(tensor.shape == (heads, head_dim, width), f"{name} must be {[heads, head_dim, width]}, got", tensor)
    for name, tensor in {"rest": rest, "query": query, **weights}.items():
        _require(tensor.dtype == first.dtype, f"{name} must have the dtype of first, {first.dtype}, got {tensor.dtype}")
    _require_vectors(heads * head_dim, value_bias=value_bias)
    if statistics is not None:
        wanted = (batch, 1 + rest.shape[1], statistics_tiles(width), 2)
        _require(statistics.shape == wanted, f"statistics must be {list(wanted)}, got", statistics)
        _require_float("statistics", statistics)
    if position is not None:
        _require_float("position", position)
        _require(position.shape == rest.shape[1:], f"position must be {list(rest.shape[1:])}, got", position)
    _require_precision(precision)
    _require_device(
        first=first, rest=rest, query=query, key_weight=key_weight, value_weight=value_weight, value_bias=value_bias,
        statistics=statistics, position=position,
    )  # fmt: skip


_attention_pool = define(
    "attention_pool",
    "(Tensor query, Tensor first, Tensor rest, Tensor? key_weight, Tensor value_weight, "
    "Tensor value_bias, Tensor? statistics, Tensor? position, float scale, float eps, str precision) -> Tensor",
    _fake_attention_pool,
    _check_attention_pool,
)


def attention_pool(
    query: Tensor,
    first: Tensor,
    rest: Tensor,
    key_weight: Tensor | None,
    value_weight: Tensor,
    value_bias: Tensor,
    scale: float,
    *,
    statistics: Tensor | None = None,
    position: Tensor | None = None,
    eps: float = 1e-5,
    precision: InputPrecision = "ieee",
    impl: Impl = "auto",
) -> Tensor:
    """Attention with one query per image; keys and values are never formed.

    With y_n the tokens, out_h = W_v,h (Σ_n p_hn y_n) + b_v,h, where p_h = softmax_n(scale · (W_k,hᵀ q_h) · y_n): the
    sums are re-associated, so that the two weight matrices meet one vector per head instead of every token. A bias of
    the keys is the same for all n and drops out of the softmax.

    Args:
        query: (B, H, D), projected, bias included. Or (H, W), the vectors W_k,hᵀ q_h of a query that all images share,
            where `key_weight` is None.
        first: (B, W), token 0: the class token, the mean token with its positional embedding, or the first patch.
        rest: (B, G, W), tokens 1 to G, any strides.
        key_weight, value_weight: (H, D, W), contiguous, the tokens' dtype.
        value_bias: (H · D,), any float dtype.
        scale: usually 1 / √D.
        statistics: (B, 1 + G, T, 2) float32, row statistics of all tokens; where given, every token is normalised with
            them (LayerNorm without gain and shift, which belong into the weights and the biases).
        position: (G, W), any float dtype, added to `rest`.
        precision: of products of float32 operands on a GPU: exact, or cut to TF32, see `to_tf32`.

    Returns:
        (B, H · D), contiguous, the tokens' dtype: all heads' results side by side, before the output projection.
    """
    tensors = (query, first, rest, key_weight, value_weight, value_bias, statistics, position)
    return _attention_pool(impl, tensors, scale, eps, precision)


# --- checks -----------------------------------------------------------------------------------------------------------


def _require(holds: bool, message: str, got: Tensor | None = None) -> None:
    if not holds:
        raise ValueError(message if got is None else f"{message} {list(got.shape)}")


def _require_float(name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be of a floating-point dtype, got {tensor.dtype}")


def _require_vectors(width: int, **vectors: Tensor | None) -> None:
    for name, vector in vectors.items():
        if vector is not None:
            _require_float(name, vector)
            _require(vector.shape == (width,), f"{name} must be [{width}], got", vector)


def _require_precision(precision: str) -> None:
    _require(precision in PRECISIONS, f"precision must be one of {PRECISIONS}, got {precision!r}")


def _require_device(**tensors: Tensor | None) -> None:
    devices = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    if len(set(devices.values())) > 1:
        raise ValueError(
            f"all operands must be on one device, got {', '.join(f'{n} on {d}' for n, d in devices.items())}"
        )
