"""What an encoder launches on a device: every kernel's code, its grid, and how much work a block of it has.

The tower's own `encode` runs on tensors without storage. Each op goes to its launcher, as on a GPU, and each launch is
caught as `bench.machine_code` catches it. A kernel is known here by the names of its own arguments alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from clip_fast.kernels import dispatch
from clip_fast.kernels.targets import assume
from clip_fast.towers import precision as precisions
from clip_fast.towers import reference
from clip_fast.towers.config import IMAGE_MEAN, IMAGE_STD, SiglipConfig, VitConfig, sides
from clip_fast.towers.siglip import FastSiglip
from clip_fast.towers.vit import FastVit, KernelVit

from ..machine_code import Job, arguments_of, caught, job_of
from ..photographs import PHOTOGRAPH, resizing
from .devices import Device


@dataclass(frozen=True)
class Work:
    """What a launch computes: so many tiles, in each so many steps of the main loop."""

    tiles: int
    steps: int
    operations: int  # of a step
    copied: int  # bytes that a step brings into shared memory
    added: int = 0  # bytes that one of the copy engine's loads in the epilogue brings there


@dataclass(frozen=True)
class Launch:
    """One launch. `job` has its code compiled."""

    label: str
    job: Job
    grid: int  # blocks
    work: Work
    moved: int  # bytes: each operand read once, each result written once


class _Launching(TorchDispatchMode):
    """Within this context ops on tensors without storage are launched, not only given shapes."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func.namespace != "clip_fast":
            return func(*args, **(kwargs or {}))
        return dispatch.launcher(func._schema.name.partition("::")[2])(*args)


def launches_of(config: VitConfig | SiglipConfig, batch: int, precision: str, device: Device) -> list[Launch]:
    """Every launch of `encode` for a batch, in its order; from images that are normalised before."""
    tower = _tower(config, precision)
    size = (batch, 3, *sides(config.image_size))
    images = torch.empty(size, dtype=tower.precision.weights, device="meta")
    with assume(device.arch, device.multiprocessors), caught() as launches, torch.no_grad(), _Launching():
        tower.encode(images)
    return [_launch(device.arch, *launch) for launch in launches]


def resize_of(side: int, batch: int, device: Device) -> list[Launch]:
    """The launches that resize a batch of photographs before they are encoded, as `clip-fast encode` has them."""
    width, height = PHOTOGRAPH
    steps, tables, scratch = resizing(side, batch)
    pixels = torch.empty(batch * 3 * width * height, dtype=torch.uint8, device="meta")
    shapes = ((steps.shape, torch.int64), (tables.shape, torch.int32))
    operands = [torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in shapes]
    with assume(device.arch, device.multiprocessors), caught() as launches:
        dispatch.launcher("resize")(pixels, *operands, scratch, side)
    them: list[Launch] = []
    for axis, step, launch in zip("xy", steps[:, 0], launches, strict=True):
        plain, a = _launch(device.arch, *launch), arguments_of(*launch)
        rows, columns, taps = (int(step[field]) for field in (2, 3, 6))
        tiles = batch * _tiles(rows, a["BLOCK_Y"]) * _tiles(columns, a["BLOCK_X"])
        them.append(replace(plain, label=f"resize {width} × {height} along {axis}", work=Work(tiles, taps, 0, 0)))
    return them


@cache
def _tower(config: VitConfig | SiglipConfig, precision: str) -> KernelVit:
    with torch.device("meta"):
        state = reference.build(config).state_dict()
        settings = precisions.BY_NAME[precision], IMAGE_MEAN, IMAGE_STD
        if isinstance(config, SiglipConfig):
            return FastSiglip.prepare(state, config, *settings)
        return FastVit.prepare(state, config, *settings)


def _launch(arch: str, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Launch:
    named = arguments_of(function, args, kwargs)
    grid = prod(kwargs["grid"])
    kernel = function.__name__
    label, work = _KERNELS.get(kernel, _unknown)(named, grid)
    return Launch(label or kernel, job_of("", arch, function, args, kwargs), grid, work, _moved(named))


def _moved(named: Mapping[str, Any]) -> int:
    tensors = [value if isinstance(value, Tensor) else getattr(value, "base", None) for value in named.values()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if isinstance(tensor, Tensor))


# --- the work of each kernel -----------------------------------------------------------------------------------------

Named = Mapping[str, Any]


def _tiles(size: int, tile: int) -> int:
    return -(-size // tile)


def _itemsize(operand: Any) -> int:
    return (operand if isinstance(operand, Tensor) else operand.base).element_size()


def _unknown(named: Named, grid: int) -> tuple[str, Work]:
    """Of a kernel without products: one pass over what it moves."""
    return "", Work(grid, 1, 0, 0)


def _linear(a: Named, grid: int) -> tuple[str, Work]:
    m, n, k, (block_m, block_n, block_k) = a["M"], a["N"], a["K"], (a["BLOCK_M"], a["BLOCK_N"], a["BLOCK_K"])
    tiles = _tiles(m, block_m) * _tiles(n, block_n)
    copied = (block_m + block_n) * block_k * _itemsize(a["x"])
    features = ["ln"] if a["NORM"] else []
    features += [a["ACTIVATION"]] if a["ACTIVATION"] != "none" else []
    features += ["residual"] if a["RESIDUAL"] else []
    label = f"linear {m} × {n} × {k} {' + '.join(features)}"
    added = prod(getattr(a["residual"], "block_shape", [0])) * _itemsize(a["x"])
    return label, Work(tiles, _tiles(k, block_k), 2 * block_m * block_n * block_k, copied, added)


def _patch_embed(a: Named, grid: int) -> tuple[str, Work]:
    step = a["BLOCK_K"]
    copied = (a["BLOCK_M"] + a["BLOCK_N"]) * step * _itemsize(a["weight_ptr"])
    operations = 2 * a["BLOCK_M"] * a["BLOCK_N"] * step
    return f"patch_embed of {a['P']}", Work(grid, _tiles(3 * a["P"] ** 2, step), operations, copied)


def _flash_attention(a: Named, grid: int) -> tuple[str, Work]:
    m, n, d = a["BLOCK_M"], a["BLOCK_N"] if a["TILES"] else a["REST"], a["BLOCK_D"] + a["TAIL"]
    # Keys that are left over are in no loop, but for float32, whose class token is in none.
    steps = _tiles(a["N"] - 1, n) if a["MASKED"] else a["N"] // n if a["TILES"] else 1
    work = Work(grid, steps, 4 * m * n * d, 2 * n * d * _itemsize(a["qkv_ptr"]))
    return f"flash_attention of {a['N']} tokens", work


def _head_linear(a: Named, grid: int) -> tuple[str, Work]:
    b, n, k = a["BLOCK_B"], a["BLOCK_N"], a["BLOCK_K"]
    products = 1 if a["x_ptr"].dtype == a["weight_ptr"].dtype else 2
    copied = (b * _itemsize(a["x_ptr"]) + n * _itemsize(a["weight_ptr"])) * k
    return "attention_pool: weights", Work(grid, _tiles(a["K"], k), products * 2 * b * n * k, copied)


def _scores(a: Named, grid: int) -> tuple[str, Work]:
    n, h, k = a["BLOCK_N"], a["BLOCK_H"], a["BLOCK_K"]
    work = Work(grid, _tiles(a["W"], k), 2 * n * h * k, (n + h) * k * _itemsize(a["rest_ptr"]))
    return "attention_pool: scores", work


def _weighted_sum(a: Named, grid: int) -> tuple[str, Work]:
    h, w, n = a["BLOCK_H"], a["BLOCK_W"], a["BLOCK_N"]
    work = Work(grid, _tiles(a["G"], n), 2 * h * w * n, w * n * _itemsize(a["rest_ptr"]))
    return "attention_pool: weighted sum", work


def _layer_norm(a: Named, grid: int) -> tuple[str, Work]:
    return f"layer_norm {grid} × {a['width']}", Work(grid, 1, 0, 0)


_KERNELS: dict[str, Callable[[Named, int], tuple[str, Work]]] = {
    "_linear_kernel": _linear,
    "_patch_embed_kernel": _patch_embed,
    "_flash_attention_kernel": _flash_attention,
    "_head_linear_kernel": _head_linear,
    "_scores_kernel": _scores,
    "_weighted_sum_kernel": _weighted_sum,
    "_layer_norm_kernel": _layer_norm,
}
