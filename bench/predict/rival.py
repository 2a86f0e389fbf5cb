"""The same arithmetic for the rival: torch.compile of a plain tower, replayed as CUDA graphs.

A block is four cuBLAS products, cuDNN's attention, and three fused passes over memory: two of residual and LayerNorm,
one of the activation. All tokens go through the last block. The host takes no time.
"""

from __future__ import annotations

from dataclasses import dataclass

from clip_fast.towers.config import SiglipConfig, VitConfig

from ..timing import DTYPES
from .devices import Device, Library

# Seconds that even the smallest takes, its way from the last launch in it: estimated.
_LEAST = {"product": 5e-6, "attention": 4e-6, "pass": 2e-6}


@dataclass(frozen=True)
class Step:
    """One kernel of the rival's, and how often it runs."""

    name: str
    kind: str  # of _LEAST
    count: int
    operations: float
    moved: float  # bytes


def steps_of(config: VitConfig | SiglipConfig, batch: int, precision: str) -> list[Step]:
    """What it launches for a batch."""
    size = DTYPES[precision].itemsize
    n, w, hidden, layers = config.tokens, config.width, config.mlp_width, config.layers
    m, features = batch * n, 3 * config.patch_size**2

    def product(name: str, count: int, rows: int, columns: int, inner: int) -> Step:
        moved = size * (rows * inner + columns * inner + rows * columns)
        return Step(name, "product", count, 2.0 * rows * columns * inner, moved)

    siglip = isinstance(config, SiglipConfig)
    head = [
        product("keys and values of the head", 1, m, 2 * w, w),
        Step("attention of the head", "attention", 1, 4.0 * batch * n * w, 2.0 * size * m * w),
        product("out of the head", 1, batch, w, w),
        product("fc1 of the head", 1, batch, hidden, w),
        product("fc2 of the head", 1, batch, w, hidden),
    ]
    return [
        product("patches", 1, batch * config.patches, w, features),
        Step("position" if siglip else "class token, position, ln_pre", "pass", 1, 0, 4.0 * size * m * w),
        product("qkv", layers, m, 3 * w, w),
        Step("attention", "attention", layers, 4.0 * batch * n * n * w, 4.0 * size * m * w),
        product("out", layers, m, w, w),
        Step("residual and LayerNorm", "pass", 2 * layers, 0, 4.0 * size * m * w),
        product("fc1", layers, m, hidden, w),
        Step("activation", "pass", layers, 0, 2.0 * size * m * hidden),
        product("fc2", layers, m, w, hidden),
        *(head if siglip else [product("projection", 1, batch, config.embed_dim, w)]),
    ]


def step_seconds(step: Step, precision: str, device: Device, library: Library) -> float:
    """max(operations / rate, least + bytes / rate): a large one is bound by its work, a small one by its latency."""
    reached = library.attention if step.kind == "attention" else library.product
    return max(
        step.operations / (reached * device.chip(precision)),
        _LEAST[step.kind] + step.moved / (library.passes * device.memory),
    )


def seconds_of(config: VitConfig | SiglipConfig, batch: int, precision: str, device: Device) -> float | None:
    """The rival's time for a batch; None where the device's libraries are not known."""
    if device.library is None or precision not in device.sustained:
        return None
    steps = steps_of(config, batch, precision)
    return sum(step.count * step_seconds(step, precision, device, device.library) for step in steps)
