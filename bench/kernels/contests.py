"""The contests: every op at the shapes of every CLIP model, ours beside PyTorch's ways to compute the same.

A `Contest` is one op at one shape. `operands` makes fresh random operands, and each of `systems` computes the op's
result from them. The rivals read the weights that their users have, with a LayerNorm's gain and shift beside the
matrix. Ours reads the folded weights, and in float32 the operands that its epilogues add. "separate passes" is eager
PyTorch: cuBLAS for the product, and a kernel of its own for everything else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from clip_fast.kernels import ops
from clip_fast.kernels.resampling import CHANNELS
from clip_fast.kernels.statistics import row_statistics
from clip_fast.kernels.targets import InputPrecision
from clip_fast.towers.config import IMAGE_MEAN, IMAGE_STD, Config, ResNetConfig, VitConfig, sides

from ..photographs import PHOTOGRAPH, resizing
from ..timing import DTYPES

Operands = Mapping[str, Tensor]
Compute = Callable[[Operands], Tensor]

OURS = "clip_fast"
SEPARATE = "separate passes"
COMPILED = "compiled"  # torch.compile(mode="max-autotune") of the separate passes
# The 1×1 convolution with bias, residual and ReLU fused: another way to compute a ResNet.
CONVOLUTION = "cuDNN's convolution"
PRODUCT = "product alone"  # the library's product without the steps that we fuse into it: a bound, not a rival
OPS = ("linear", "flash_attention", "patch_embed", "layer_norm", "attention_pool", "mean_token", "resize")
PIXELS = "u8"  # the precision of what computes in integers, whatever the model's

_BACKENDS = {"cuDNN": "CUDNN_ATTENTION", "flash": "FLASH_ATTENTION", "efficient": "EFFICIENT_ATTENTION"}
_EPS = 1e-5


@dataclass(frozen=True)
class Contest:
    """One op at one shape.

    `operations` counts multiplications and additions. `traffic` counts the bytes that ours must move: each operand is
    read once, and the result is written once.
    """

    op: str
    model: str
    part: str  # of the model, such as "ln+qkv"
    count: int  # the number of times that the model does it for a batch
    batch: int
    precision: str
    operands: Callable[[torch.device], dict[str, Tensor]]
    systems: Mapping[str, Compute]
    operations: int
    traffic: int

    @property
    def name(self) -> str:
        return f"{self.op} {self.model} {self.part} batch {self.batch} {self.precision}"


def contests(
    models: Mapping[str, Config], batches: Sequence[int], precisions: Sequence[str], chosen: Sequence[str] = OPS
) -> Iterator[Contest]:
    """All contests, those that take most of a model's time first. A shape that two models share comes once."""
    met: set[tuple[object, ...]] = set()
    for op in OPS:
        if op not in chosen:
            continue
        for batch in sorted(batches, reverse=True):
            for precision in precisions:
                for model, config in models.items():
                    for contest in _MAKERS[op](model, config, batch, precision):
                        shapes = {name: t.shape for name, t in contest.operands(torch.device("meta")).items()}
                        key = (op, contest.part, contest.precision, *sorted(shapes.items()))
                        if key not in met:
                            met.add(key)
                            yield contest


# --- operands --------------------------------------------------------------------------------------------------------


def _random(device: torch.device, dtype: torch.dtype, *shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, device=device) * scale).to(dtype)


def _precision(name: str) -> InputPrecision:
    return "tf32" if name == "tf32" else "ieee"


def _activation(x: Tensor, name: str) -> Tensor:
    if name == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    return F.gelu(x) if name == "gelu" else F.relu(x) if name == "relu" else x


# --- linear ----------------------------------------------------------------------------------------------------------


def _linears(model: str, config: Config, batch: int, precision: str) -> Iterator[Contest]:
    """Every product of a tower that the project's own GEMM may compute, in the order in which an image meets them."""

    def contest(part: str, count: int, m: int, n: int, k: int, **features: Any) -> Contest:
        return linear_contest(model, part, count, batch, precision, m, n, k, **features)

    if isinstance(config, VitConfig):
        n, w, mlp = config.tokens, config.width, config.mlp_width
        activation = config.activation
        others = config.layers - 1  # the blocks before the last one, in which the class tokens are the only rows
        yield contest("ln+qkv", others, batch * n, 3 * w, w, norm=True)
        yield contest("out+residual", others, batch * n, w, w, residual=True)
        yield contest(f"ln+fc1+{activation}", others, batch * n, mlp, w, norm=True, activation=activation)
        yield contest("fc2+residual", others, batch * n, w, mlp, residual=True)
        yield contest("last block's ln+query", 1, batch, w, w, norm=True, x_step=n)
        yield contest("last block's out+residual", 1, batch, w, w, residual=True, residual_step=n)
        yield contest(f"last block's ln+fc1+{activation}", 1, batch, mlp, w, norm=True, activation=activation)
        yield contest("last block's fc2+residual", 1, batch, w, mlp, residual=True)
        yield contest("ln_post+projection", 1, batch, config.embed_dim, w, norm=True)
        return
    assert isinstance(config, ResNetConfig)
    width, grid = config.width, config.image_size // 4  # of the map that the stage reads
    for stage, layers in enumerate(config.layers):
        planes, rows = config.width << stage, batch * grid**2
        pooled = grid if stage == 0 else grid // 2  # the first block pools after its second convolution
        rows_out = batch * pooled**2
        first = {"scaled": True, "activation": "relu", "grid": grid}
        block = {"scaled": True, "activation": "relu", "grid": pooled}
        yield contest(f"stage {stage + 1}, first 1x1+relu of the first block", 1, rows, planes, width, **first)
        if layers > 1:
            yield contest(f"stage {stage + 1}, first 1x1+relu", layers - 1, rows_out, planes, 4 * planes, **block)
        yield contest(f"stage {stage + 1}, shortcut", 1, rows_out, 4 * planes, width, scaled=True, grid=pooled)
        part = f"stage {stage + 1}, last 1x1+residual+relu"
        yield contest(part, layers, rows_out, 4 * planes, planes, residual=True, **block)
        width, grid = 4 * planes, pooled
    yield contest("pool's query", 1, batch, width, width)
    yield contest("pool's projection", 1, batch, config.embed_dim, width)


def linear_contest(
    model: str, part: str, count: int, batch: int, precision: str, m: int, n: int, k: int, *, norm: bool = False,
    scaled: bool = False, residual: bool = False, activation: ops.Activation = "none", x_step: int = 1,
    residual_step: int = 1, grid: int = 0,
) -> Contest:  # fmt: skip
    """One product as a contest: x (m, k) by a weight (n, k).

    Args:
        x_step, residual_step: the rows in memory for each row of x or of the residual. The first of them is used, as a
            class token is the first of all tokens.
        grid: the side of the maps whose positions are the rows; 0 where the rows are tokens.
    """
    dtype = DTYPES[precision]

    def operands(device: torch.device) -> dict[str, Tensor]:
        x, weight = _random(device, dtype, m, x_step, k)[:, 0], _random(device, dtype, n, k, scale=k**-0.5)
        bias = _random(device, dtype, n)
        made = {"x": x, "weight": weight, "bias": bias, "wide_bias": bias.float()}
        if residual:
            made["residual"] = _random(device, dtype, m, residual_step, n)[:, 0]
        if scaled:  # a batch norm's scale; powers of two do not round the weight that they are folded into
            scale = 2.0 ** torch.randint(-1, 2, (n,), device=device)
            made |= {"scale": scale, "scaled": (weight * scale[:, None]).to(dtype)}
        if norm:
            gain, shift = 1 + _random(device, torch.float32, k, scale=0.1), _random(device, torch.float32, k, scale=0.1)
            folded = (weight.float() * gain).to(dtype)
            made |= {
                "gain": gain.to(dtype),
                "shift": shift.to(dtype),
                "folded": folded,
                "wide_bias": bias.float() + weight.float() @ shift,
                "colsum": folded.float().sum(1),
                "statistics": row_statistics(x)[:, None].repeat(1, x_step, 1, 1)[:, 0],
            }
        return made

    def ours(o: Operands) -> Tensor:
        folded = (o["statistics"], o["colsum"]) if norm else None
        keep = residual and activation == "none"  # the next LayerNorm reads them
        return ops.linear(
            o["x"], o["folded" if norm else "weight"], o["wide_bias"], residual=o.get("residual"), norm=folded,
            scale=o.get("scale"), activation=activation, eps=_EPS, statistics=keep, precision=_precision(precision),
            impl="triton",
        )[0]  # fmt: skip

    def product(o: Operands) -> Tensor:
        return F.linear(o["x"], o["scaled" if scaled else "weight"], o["bias"])

    def separate(o: Operands) -> Tensor:
        y = product({**o, "x": F.layer_norm(o["x"], (k,), o["gain"], o["shift"], _EPS)} if norm else o)
        return _activation(y + o["residual"] if residual else y, activation)

    def as_map(rows: Tensor) -> Tensor:
        return rows.view(batch, grid, grid, -1).permute(0, 3, 1, 2)  # channels-last

    def convolution(o: Operands) -> Tensor:
        x, weight, once = as_map(o["x"]), o["scaled"][:, :, None, None], ([1, 1], [0, 0], [1, 1], 1)
        if residual:
            y = torch.cudnn_convolution_add_relu(x, weight, as_map(o["residual"]), 1.0, o["bias"], *once)
        elif activation == "relu":
            y = torch.cudnn_convolution_relu(x, weight, o["bias"], *once)
        else:
            y = torch.cudnn_convolution(x, weight, [0, 0], [1, 1], [1, 1], 1, False, True, precision == "tf32")
            y = y.add_(o["bias"][:, None, None])
        return y.permute(0, 2, 3, 1).flatten(0, 2)

    elements = m * k + n * k + m * n * (2 if residual else 1)
    systems: dict[str, Compute] = {OURS: ours, SEPARATE: separate, COMPILED: _compiled(separate), PRODUCT: product}
    return Contest(
        "linear", model, part, count, batch, precision, operands,
        systems | {CONVOLUTION: convolution} if grid else systems,
        2 * m * n * k, elements * dtype.itemsize,
    )  # fmt: skip


# --- attention -------------------------------------------------------------------------------------------------------


def _attentions(model: str, config: Config, batch: int, precision: str) -> Iterator[Contest]:
    if not isinstance(config, VitConfig):
        return
    dtype, n, heads, head_dim = DTYPES[precision], config.tokens, config.heads, config.width // config.heads
    scale = head_dim**-0.5

    def operands(device: torch.device) -> dict[str, Tensor]:
        return {"qkv": _random(device, dtype, batch, n, 3, heads, head_dim)}

    def ours(o: Operands) -> Tensor:
        return ops.flash_attention(o["qkv"], scale, precision=_precision(precision), impl="triton")

    def parts(o: Operands) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = o["qkv"].permute(2, 0, 3, 1, 4)
        return q, k, v

    def merged(y: Tensor) -> Tensor:
        return y.transpose(1, 2).reshape(batch, n, heads * head_dim)

    def separate(o: Operands) -> Tensor:
        q, k, v = parts(o)
        return merged(torch.softmax(scale * (q @ k.transpose(-1, -2)), dim=-1) @ v)

    def fused(o: Operands) -> Tensor:
        return merged(F.scaled_dot_product_attention(*parts(o), scale=scale))

    def pinned(backend: SDPBackend) -> Compute:
        def attention(o: Operands) -> Tensor:
            with sdpa_kernel([backend]):
                return fused(o)

        return attention

    systems: dict[str, Compute] = {OURS: ours, SEPARATE: separate, COMPILED: _compiled(separate)}
    systems |= {f"SDPA, {name}": pinned(getattr(SDPBackend, member)) for name, member in _BACKENDS.items()}
    yield Contest(
        "flash_attention", model, f"{n} tokens, {heads} heads of {head_dim}", config.layers - 1, batch, precision,
        operands, systems, 4 * batch * heads * n * n * head_dim, 4 * batch * n * heads * head_dim * dtype.itemsize,
    )  # fmt: skip


# --- patches, LayerNorm ----------------------------------------------------------------------------------------------


def _patches(model: str, config: Config, batch: int, precision: str) -> Iterator[Contest]:
    """Patches of normalised images, and of raw pixels. For these our weights contain the normalisation."""
    if isinstance(config, VitConfig):
        yield _patch_embed(model, config, batch, precision, raw=False)
        yield _patch_embed(model, config, batch, precision, raw=True)


def _patch_embed(model: str, config: VitConfig, batch: int, precision: str, *, raw: bool) -> Contest:
    dtype, p, w, n, size = DTYPES[precision], config.patch_size, config.width, config.tokens, sides(config.image_size)
    features = 3 * p * p
    padded = -(-features // ops.PATCH_K_STEP) * ops.PATCH_K_STEP

    def operands(device: torch.device) -> dict[str, Tensor]:
        weight = _random(device, dtype, w, 3, p, p, scale=features**-0.5)
        class_token, position = _random(device, dtype, w), _random(device, dtype, n, w)
        kernel, folded = weight, position.to(torch.float32, copy=True)
        folded[0] += class_token
        made = {"weight": weight, "class_token": class_token, "position": position}
        if raw:  # a pixel u enters as u − 128, see ops.patch_embed
            mean, std = (torch.tensor(x, device=device)[:, None, None] for x in (IMAGE_MEAN, IMAGE_STD))
            kernel = (weight.float() / (255 * std)).to(dtype)
            folded[1:] += (kernel.float() * (128 - 255 * mean)).sum((1, 2, 3))
            made |= {"images": torch.randint(256, (batch, 3, *size), dtype=torch.uint8, device=device)}
            made |= {"factor": 1 / (255 * std), "offset": -mean / std}
        else:
            made["images"] = _random(device, dtype, batch, 3, *size)
        return made | {"padded": F.pad(kernel.flatten(1), (0, padded - features)), "folded": folded}

    def ours(o: Operands) -> Tensor:
        precise = _precision(precision)
        return ops.patch_embed(o["images"], o["padded"], o["folded"], p, precision=precise, impl="triton")[0]

    def normalised(o: Operands) -> Tensor:
        if not raw:
            return o["images"]
        return torch.addcmul(o["offset"], o["images"], o["factor"]).to(o["weight"].dtype)

    def separate(o: Operands) -> Tensor:
        patches = F.conv2d(normalised(o), o["weight"], stride=p).flatten(2).transpose(1, 2)
        return torch.cat([o["class_token"].expand(batch, 1, w), patches], dim=1) + o["position"]

    def product(o: Operands) -> Tensor:
        return F.conv2d(o["images"], o["weight"], stride=p)

    systems: dict[str, Compute] = {OURS: ours, SEPARATE: separate, COMPILED: _compiled(separate)}
    pixels = batch * 3 * size[0] * size[1] * (1 if raw else dtype.itemsize)
    return Contest(
        "patch_embed", model, f"patches of {p}" + (", raw pixels" if raw else ""), 1, batch, precision, operands,
        systems if raw else systems | {PRODUCT: product},
        2 * batch * (n - 1) * features * w, pixels + (w * padded + batch * n * w) * dtype.itemsize,
    )  # fmt: skip


def _layer_norms(model: str, config: Config, batch: int, precision: str) -> Iterator[Contest]:
    if not isinstance(config, VitConfig) or precision == "tf32":
        return
    dtype, n, w = DTYPES[precision], config.tokens, config.width

    def operands(device: torch.device) -> dict[str, Tensor]:
        gain, shift = _random(device, dtype, w), _random(device, dtype, w)
        wide = {"wide_gain": gain.float(), "wide_shift": shift.float()}
        return {"x": _random(device, dtype, batch * n, w), "gain": gain, "shift": shift, **wide}

    def ours(o: Operands) -> Tensor:
        return ops.layer_norm(o["x"], o["wide_gain"], o["wide_shift"], _EPS, statistics=True, impl="triton")[0]

    def separate(o: Operands) -> Tensor:
        return F.layer_norm(o["x"], (w,), o["gain"], o["shift"], _EPS)

    yield Contest(
        "layer_norm", model, "ln_pre, its statistics kept", 1, batch, precision, operands,
        {OURS: ours, SEPARATE: separate, COMPILED: _compiled(separate)},
        8 * batch * n * w, 2 * batch * n * w * dtype.itemsize,
    )  # fmt: skip


# --- the pools -------------------------------------------------------------------------------------------------------


def _pools(model: str, config: Config, batch: int, precision: str) -> Iterator[Contest]:
    """Attention with one query for each image: a ViT's class token in its last block, or a ResNet's mean token."""
    dtype, n, heads = DTYPES[precision], config.tokens, config.heads
    vit = isinstance(config, VitConfig)
    assert vit or isinstance(config, ResNetConfig)
    w = config.width if vit else config.features
    head_dim, scale = w // heads, (w // heads) ** -0.5

    def operands(device: torch.device) -> dict[str, Tensor]:
        bias = _random(device, dtype, w)
        made = {
            "query": _random(device, dtype, batch, heads, head_dim),
            "key_weight": _random(device, dtype, heads, head_dim, w, scale=w**-0.5),
            "value_weight": _random(device, dtype, heads, head_dim, w, scale=w**-0.5),
            "bias": bias,
            "wide_bias": bias.float(),
        }
        if vit:
            tokens = _random(device, dtype, batch, n, w)
            return made | {"tokens": tokens, "statistics": row_statistics(tokens)}
        first, rest = _random(device, dtype, batch, w), _random(device, dtype, batch, n - 1, w)
        position = _random(device, dtype, n - 1, w)
        return made | {"first": first, "rest": rest, "position": position, "wide_position": position.float()}

    def ours(o: Operands) -> Tensor:
        first, rest = (o["tokens"][:, 0], o["tokens"][:, 1:]) if vit else (o["first"], o["rest"])
        return ops.attention_pool(
            o["query"], first, rest, o["key_weight"], o["value_weight"], o["wide_bias"], scale,
            statistics=o.get("statistics"), position=o.get("wide_position"), eps=_EPS,
            precision=_precision(precision), impl="triton",
        )  # fmt: skip

    def separate(o: Operands) -> Tensor:
        if vit:
            tokens = F.layer_norm(o["tokens"], (w,), eps=_EPS)
        else:
            tokens = torch.cat([o["first"][:, None], o["rest"] + o["position"]], dim=1)
        keys = F.linear(tokens, o["key_weight"].view(w, w)).view(batch, n, heads, head_dim).transpose(1, 2)
        values = F.linear(tokens, o["value_weight"].view(w, w), o["bias"]).view(batch, n, heads, head_dim)
        pooled = F.scaled_dot_product_attention(o["query"].unsqueeze(2), keys, values.transpose(1, 2), scale=scale)
        return pooled.reshape(batch, w)

    elements = batch * n * w + 2 * w * w + 2 * batch * w + (0 if vit else (n - 1) * w)
    yield Contest(
        "attention_pool", model, f"{n} tokens, {heads} heads of {head_dim}", 1, batch, precision, operands,
        {OURS: ours, SEPARATE: separate, COMPILED: _compiled(separate)},
        batch * (4 * w * w + 4 * heads * n * w), elements * dtype.itemsize,
    )  # fmt: skip


def _mean_tokens(model: str, config: Config, batch: int, precision: str) -> Iterator[Contest]:
    if not isinstance(config, ResNetConfig) or precision == "tf32":
        return
    dtype, g, w = DTYPES[precision], config.tokens - 1, config.features

    def operands(device: torch.device) -> dict[str, Tensor]:
        position = _random(device, dtype, w)
        return {
            "features": _random(device, dtype, batch, g, w),
            "position": position,
            "wide_position": position.float(),
        }

    def ours(o: Operands) -> Tensor:
        return ops.mean_token(o["features"], o["wide_position"], impl="triton")

    def separate(o: Operands) -> Tensor:
        return o["features"].mean(1) + o["position"]

    yield Contest(
        "mean_token", model, f"{g} positions", 1, batch, precision, operands,
        {OURS: ours, SEPARATE: separate, COMPILED: _compiled(separate)},
        batch * g * w, (batch * g * w + batch * w) * dtype.itemsize,
    )  # fmt: skip


# --- resize ----------------------------------------------------------------------------------------------------------


def _resizes(model: str, config: Config, batch: int, precision: str) -> Iterator[Contest]:
    """Photographs to a model's squares. Ours rounds to bytes after each axis, as Pillow does; PyTorch rounds once."""
    side, across = sides(config.image_size)
    if side != across:
        return
    width, height = PHOTOGRAPH
    wide, size = side * width // height, CHANNELS * width * height
    left = (wide - side) // 2
    steps, tables, scratch = resizing(side, batch)

    def operands(device: torch.device) -> dict[str, Tensor]:
        pixels = torch.randint(64, 192, (batch * size,), dtype=torch.uint8, device=device)
        return {
            "pixels": pixels,
            "steps": torch.as_tensor(steps).to(device),
            "tables": torch.as_tensor(tables).to(device),
        }

    def ours(o: Operands) -> Tensor:
        return ops.resize(o["pixels"], o["steps"], o["tables"], scratch, side, impl="triton")

    def separate(o: Operands) -> Tensor:
        pixels = o["pixels"].view(batch, height, width, CHANNELS).permute(0, 3, 1, 2)
        floats = pixels if pixels.is_floating_point() else pixels.float()
        whole = F.interpolate(floats, (side, wide), mode="bicubic", antialias=True)[..., left : left + side]
        return whole if pixels.is_floating_point() else whole.round_().clamp_(0, 255).to(torch.uint8)

    rows, columns, taps = (steps[..., field] for field in (2, 3, 6))
    yield Contest(
        "resize", model, f"{width} x {height} to {side}", 1, batch, PIXELS, operands,
        {OURS: ours, SEPARATE: separate, COMPILED: _compiled(separate)},
        int((2 * CHANNELS * rows * columns * taps).sum()),
        batch * (size + CHANNELS * side**2) + 2 * scratch,
    )  # fmt: skip


def _compiled(compute: Compute) -> Compute:
    """`compute`, compiled at the first call, so that making contests is cheap."""
    made: list[Compute] = []

    def compiled(o: Operands) -> Tensor:
        if not made:
            torch.compiler.reset()
            made.append(torch.compile(compute, mode="max-autotune-no-cudagraphs", dynamic=False))
        return made[0](o)

    return compiled


_MAKERS: dict[str, Callable[[str, Config, int, str], Iterator[Contest]]] = {
    "linear": _linears,
    "flash_attention": _attentions,
    "patch_embed": _patches,
    "layer_norm": _layer_norms,
    "attention_pool": _pools,
    "mean_token": _mean_tokens,
    "resize": _resizes,
}
