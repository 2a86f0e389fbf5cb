"""Every op at small shapes with ragged edges, such that persistent kernels take several tiles.

The plain twin computes as the project's tests of the same kernels have it. Products in TF32 have no twin on a CPU:
there the twin is the kernel's own formula, its operands cut.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .problem import Case, Kind, Problem
from .subject import Guards, merge_statistics, ops, oracles, resampling, row_statistics

_WITHOUT_PRODUCTS = ("fp16", "bf16", "fp32")  # kinds of an op that has no TF32


def _copies(guards: Guards, *tensors: Tensor | None) -> list[Any]:
    return [None if tensor is None else guards.copy(tensor) for tensor in tensors]


def _doubles(*tensors: Tensor | None) -> list[Any]:
    return [None if tensor is None else tensor.double() for tensor in tensors]


# --- linear ----------------------------------------------------------------------------------------------------------


def linear(
    m: int,
    n: int,
    k: int,
    kind: Kind,
    *,
    norm: bool = False,
    bias: bool = False,
    residual: bool = False,
    scale: bool = False,
    statistics: bool = False,
    activation: ops.Activation = "none",
) -> Problem:
    x = kind.random(m, k)
    weight = ops.operand(kind.random(n, k, scale=k**-0.5), kind.dtype, kind.precision)
    b = torch.randn(n) if bias else None
    r = kind.random(m, n) if residual else None
    s = torch.randn(n) if scale else None
    normed = (row_statistics(x), weight.double().sum(dim=1).float()) if norm else None

    def call(guards: Guards) -> Any:
        x_, weight_, b_, r_, s_ = _copies(guards, x, weight, b, r, s)
        norm_ = None if normed is None else (guards.copy(normed[0]), guards.copy(normed[1]))
        return ops.linear(
            x_, weight_, b_, residual=r_, scale=s_, norm=norm_, activation=activation, statistics=statistics,
            precision=kind.precision, impl="triton",
        )  # fmt: skip

    def plain() -> Tensor:
        wide, norm_ = kind.cut(x).float(), normed
        if norm_ is not None and kind.half:  # the formula with colsum is of no use to a twin that rounds in between
            wide, norm_ = F.layer_norm(wide, (k,)), None
        added = None if r is None else r.float()
        y = oracles.linear(wide, weight.float(), b, added, *(norm_ or (None, None)), s, activation)[0]
        return y.to(kind.dtype)

    def exact() -> Tensor:
        wide = F.layer_norm(x.double(), (k,)) if norm else x.double()
        b_, r_, s_ = _doubles(b, r, s)
        return oracles.linear(wide, weight.double(), b_, r_, scale=s_, activation=activation)[0]

    return Problem(call, plain, exact, statistics)


EPILOGUES: dict[str, dict[str, Any]] = {
    "plain": {},
    "qkv": {"norm": True, "bias": True},
    "out": {"bias": True, "residual": True, "statistics": True},
    "fc1 quick_gelu": {"norm": True, "bias": True, "activation": "quick_gelu"},
    "fc1 gelu": {"norm": True, "bias": True, "activation": "gelu"},
    "fc1 gelu_tanh": {"norm": True, "bias": True, "activation": "gelu_tanh"},
    "conv3 relu": {"scale": True, "bias": True, "residual": True, "activation": "relu"},
    "all": {"norm": True, "scale": True, "bias": True, "activation": "gelu", "residual": True, "statistics": True},
}

_LINEAR = (
    ("plain", 131, 264, 88),
    ("out", 131, 257, 88),
    ("qkv", 17, 512, 768),
    ("out", 150, 320, 1024),
    ("fc1 quick_gelu", 140, 512, 1024),
    ("fc1 gelu", 50, 320, 256),
    ("fc1 gelu_tanh", 140, 272, 208),  # 17 and 13 times 16, as 4304 is 269 times
    ("conv3 relu", 98, 320, 80),
    ("all", 150, 320, 200),
    ("out", 300, 640, 128),
    ("plain", 2, 256, 6144),  # the longest sum
)


# --- layer_norm ------------------------------------------------------------------------------------------------------


def layer_norm(width: int, kind: Kind) -> Problem:
    x = torch.randn(6, 4, width, dtype=torch.float64)
    x[1] += 100
    x[2, :, width // 2] *= 300
    x[4] *= 1e-3
    x = x.flatten(0, 1).to(kind.dtype)
    weight, bias = 1 + 0.2 * torch.randn(width), 0.1 * torch.randn(width)
    return Problem(
        lambda guards: ops.layer_norm(*_copies(guards, x, weight, bias), statistics=True, impl="triton"),
        lambda: oracles.layer_norm(x, weight, bias)[0],
        lambda: oracles.layer_norm(x.double(), weight.double(), bias.double())[0],
        statistics=True,
    )


# --- patch_embed -----------------------------------------------------------------------------------------------------


def patch_embed(patch: int, images: str, kind: Kind, *, class_token: bool = True, statistics: bool = False) -> Problem:
    dtype = {"uint8": torch.uint8, "float32": torch.float32}.get(images, kind.dtype)
    batch, width = 3, 200
    rows, columns = (7, 7) if patch < 32 else (3, 7)
    shape = (batch, 3, rows * patch, columns * patch)
    bytes_ = dtype == torch.uint8
    pixels = torch.randint(0, 256, shape, dtype=dtype) if bytes_ else torch.randn(shape).to(dtype)
    features = 3 * patch**2
    weight = torch.zeros(width, -(-features // ops.PATCH_K_STEP) * ops.PATCH_K_STEP)
    weight[:, :features] = torch.randn(width, features) / features**0.5 / (64 if bytes_ else 1)
    weight = ops.operand(weight.to(kind.dtype), kind.dtype, kind.precision)
    position = torch.randn(class_token + rows * columns, width)

    def call(guards: Guards) -> Any:
        pixels_, weight_, position_ = _copies(guards, pixels, weight, position)
        tokens, left = ops.patch_embed(
            pixels_, weight_, position_, patch, class_token=class_token, statistics=statistics,
            precision=kind.precision, impl="triton",
        )  # fmt: skip
        return (tokens, left) if statistics else tokens

    def plain() -> Tensor:
        cut = pixels if bytes_ else kind.cut(pixels.to(kind.dtype))
        return oracles.patch_embed(cut, weight, position, patch, class_token)[0]

    def exact() -> Tensor:
        wide = pixels.double() - 128 if bytes_ else pixels.to(kind.dtype).double()
        return oracles.patch_embed(wide, weight.double(), position.double(), patch, class_token)[0]

    return Problem(call, plain, exact, statistics=statistics)


# --- flash_attention -------------------------------------------------------------------------------------------------


def flash_attention(tokens: int, heads: int, head_dim: int, kind: Kind) -> Problem:
    qkv = kind.random(2 if tokens < 100 else 1, tokens, 3, heads, head_dim)
    scale = head_dim**-0.5

    def plain() -> Tensor:
        if not kind.tf32:
            return oracles.flash_attention(qkv, scale)
        q, k, v = kind.cut(qkv).permute(2, 0, 3, 1, 4)
        score = (q @ k.transpose(-2, -1)) * scale
        p = (score - score.amax(-1, keepdim=True)).exp()
        return (kind.cut(p) @ v / p.sum(-1, keepdim=True)).transpose(1, 2).flatten(2)

    return Problem(
        lambda guards: ops.flash_attention(guards.copy(qkv), scale, precision=kind.precision, impl="triton"),
        plain,
        lambda: oracles.flash_attention(qkv.double(), scale),
    )


_ATTENTION = (
    (50, 2, 64), (197, 1, 64), (257, 1, 64), (257, 1, 80), (50, 2, 88), (197, 1, 104), (66, 1, 128), (1, 2, 64),
    (67, 3, 40), (577, 1, 64), (196, 1, 72),
)  # fmt: skip


# --- attention_pool, mean_token --------------------------------------------------------------------------------------


def attention_pool(
    batch: int, heads: int, head_dim: int, tokens: int, resnet: bool, kind: Kind, *, shared: bool = False
) -> Problem:
    """A ViT's last block takes the class token, and normalises; a ResNet's pool takes the mean, and adds positions.

    With `shared`, all images have one query, as in SigLIP's head.
    """
    width, scale = heads * head_dim, head_dim**-0.5
    hidden = kind.random(batch, tokens, width)
    query = kind.random(batch, heads, head_dim)
    key_weight, value_weight = (
        ops.operand(kind.random(heads, head_dim, width, scale=width**-0.5), kind.dtype, kind.precision)
        for _ in range(2)
    )
    asked = ops.operand(torch.einsum("hd,hdw->hw", query[0], key_weight), kind.dtype, kind.precision)
    bias = torch.randn(width)
    first, rest = hidden[:, 0], hidden[:, 1:]
    statistics = None if resnet else row_statistics(hidden)
    position = torch.randn(tokens - 1, width) if resnet else None

    def call(guards: Guards) -> Any:
        if resnet:
            first_, rest_ = _copies(guards, first, rest)
        else:
            whole = guards.copy(hidden)
            first_, rest_ = whole[:, 0], whole[:, 1:]
        query_, keys, values, bias_, statistics_, position_ = _copies(
            guards, asked if shared else query, None if shared else key_weight, value_weight, bias, statistics, position
        )  # fmt: skip
        return ops.attention_pool(
            query_, first_, rest_, keys, values, bias_, statistics=statistics_, position=position_, scale=scale,
            precision=kind.precision, impl="triton",
        )  # fmt: skip

    def in_form(query: Tensor, first: Tensor, rest: Tensor, keys: Tensor, *others: Any) -> Any:
        return (asked.to(query.dtype), first, rest, None, *others) if shared else (query, first, rest, keys, *others)

    def in_tf32() -> Tensor:
        x = torch.cat([first[:, None], rest if position is None else rest + position], dim=1)
        if statistics is not None:
            mean, rstd = merge_statistics(statistics, width, 1e-5)
            x = (x - mean[..., None]) * rstd[..., None]
        each = asked.expand(batch, -1, -1) if shared else torch.einsum("bhd,hdw->bhw", kind.cut(query), key_weight)
        score = torch.einsum("bhw,bnw->bhn", kind.cut(each.contiguous()), kind.cut(x)) * scale
        p = (score - score.amax(-1, keepdim=True)).exp()
        others = torch.einsum("bhn,bnw->bhw", kind.cut(p[..., 1:].contiguous()), kind.cut(x[:, 1:].contiguous()))
        mixed = (others + p[..., :1] * x[:, :1]) / p.sum(-1, keepdim=True)
        return torch.einsum("bhw,hdw->bhd", kind.cut(mixed), value_weight).flatten(1) + bias

    def plain() -> Tensor:
        if kind.tf32:
            return in_tf32()
        tensors = query, first, rest, key_weight, value_weight, bias, statistics, position
        return oracles.attention_pool(*in_form(*tensors), scale=scale)

    def exact() -> Tensor:
        wide_statistics = None if resnet else row_statistics(hidden.double())
        tensors = query, first, rest, key_weight, value_weight, bias, wide_statistics, position
        return oracles.attention_pool(*in_form(*_doubles(*tensors)), scale=scale)

    return Problem(call, plain, exact)


_POOLS = {
    "ViT-L/14": (1, 16, 64, 257, False),
    "ViT-B/32": (3, 12, 64, 50, False),
    "ViT-H/14 cut": (1, 8, 80, 70, False),
    "RN50 cut": (2, 16, 64, 50, True),
    "RN50x64 cut": (1, 16, 32, 197, True),
}


def mean_token(batch: int, positions: int, width: int, kind: Kind) -> Problem:
    features, position = kind.random(batch, positions, width), torch.randn(width)
    return Problem(
        lambda guards: ops.mean_token(*_copies(guards, features, position), impl="triton"),
        lambda: oracles.mean_token(features, position),
        lambda: oracles.mean_token(features.double(), position.double()),
    )


# --- resize ----------------------------------------------------------------------------------------------------------


def resize(side: int, sizes: tuple[tuple[int, int], ...], squash: bool, kind: Kind) -> Problem:
    """Noise of these sizes, width and height, every second one along y first. The twin's error is none."""
    sources: list[resampling.Source] = []
    offset = 0
    for number, (width, height) in enumerate(sizes):
        shortest = min(width, height)
        wide, high = (side, side) if squash else (side * width // shortest, side * height // shortest)
        corner = (wide - side) // 2, (high - side) // 2
        sources.append(resampling.Source(offset, width, height, (wide, high), *corner, number % 2 == 1))
        offset += 3 * width * height
    pixels = torch.randint(-128, 384, (offset,)).clamp(0, 255).to(kind.dtype)
    steps, tables, scratch = resampling.plan(sources, side)
    tensors = pixels, torch.from_numpy(steps), torch.from_numpy(tables)

    def call(guards: Guards) -> Tensor:
        pixels_, steps_, tables_ = _copies(guards, *tensors)
        return ops.resize(pixels_, steps_, tables_, scratch, side, impl="triton")

    def plain() -> Tensor:
        return oracles.resize(*tensors, scratch, side)

    return Problem(
        call,
        plain,
        lambda: plain().double(),
    )


# --- all of them -----------------------------------------------------------------------------------------------------


def _cases() -> tuple[Case, ...]:
    cases: list[Case] = []

    def add(op: str, name: str, build: Callable[[Kind], Problem], kinds: tuple[str, ...] | None = None) -> None:
        cases.append(Case(op, name, build) if kinds is None else Case(op, name, build, kinds))

    for width in (63, 768, 1000, 1024, 1664):
        add("layer_norm", f"W={width}", partial(layer_norm, width), _WITHOUT_PRODUCTS)
    for patch in (14, 16, 32):
        for images in ("uint8", "its dtype", "float32"):
            kinds = ("fp16", "bf16") if images == "its dtype" else None
            add("patch_embed", f"P={patch} of {images}", partial(patch_embed, patch, images), kinds)
    no_class_token: dict[str, Any] = {"class_token": False, "statistics": True}
    add("patch_embed", "P=14 without a class token", partial(patch_embed, 14, "uint8", **no_class_token))
    add("patch_embed", "P=16 without a class token", partial(patch_embed, 16, "its dtype", **no_class_token))
    add("patch_embed", "P=14 without ln_pre", partial(patch_embed, 14, "uint8", statistics=True))
    add("patch_embed", "P=16 without ln_pre", partial(patch_embed, 16, "its dtype", statistics=True))
    for epilogue, m, n, k in _LINEAR:
        add("linear", f"{epilogue} {m}x{n}x{k}", partial(linear, m, n, k, **EPILOGUES[epilogue]))
    for tokens, heads, head_dim in _ATTENTION:
        name = f"N={tokens} H={heads} D={head_dim}"
        add("flash_attention", name, partial(flash_attention, tokens, heads, head_dim))
    for name, arguments in _POOLS.items():
        add("attention_pool", name, partial(attention_pool, *arguments))
    add("attention_pool", "SO400M/14 cut", partial(attention_pool, 2, 4, 72, 256, False, shared=True))
    for batch, positions, width in ((2, 49, 2048), (2, 197, 200)):
        add("mean_token", f"G={positions} W={width}", partial(mean_token, batch, positions, width), _WITHOUT_PRODUCTS)
    sizes = (67, 45), (20, 50), (3, 5), (40, 40)
    add("resize", "S=40 crop", partial(resize, 40, sizes, False), ("u8",))
    add("resize", "S=24 squash", partial(resize, 24, sizes, True), ("u8",))
    add("resize", "S=16 of rows and columns", partial(resize, 16, ((1, 90), (90, 1)), True), ("u8",))
    return tuple(cases)


CASES = _cases()
OPS = tuple(dict.fromkeys(case.op for case in CASES))


def find(op: str, name: str) -> Case:
    return next(case for case in CASES if (case.op, case.name) == (op, name))
