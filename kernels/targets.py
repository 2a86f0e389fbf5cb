"""What a device can do, and how each kernel is launched on it.

A committed table, so that nothing is tuned at run time. Block sizes, warps and stages are looked up by op, dtype and
architecture, never by batch: every row of a result is then reduced in the same order whatever batch it is in.

The shared-memory limits are those of the CUDA C++ Programming Guide, table "Technical specifications per compute
capability", and of AMD's CDNA 3 instruction-set reference.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch


@dataclass(frozen=True)
class Target:
    """An architecture: the bytes of shared memory that one block may have, and whether it has a tensor copy engine."""

    name: str
    shared_memory: int
    descriptors: bool = False


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target("sm_80", 166_912),
        Target("sm_86", 101_376),
        Target("sm_89", 101_376),
        Target("sm_90", 232_448, descriptors=True),
        Target("sm_100", 232_448, descriptors=True),
        Target("sm_120", 101_376),
        Target("gfx942", 65_536),
    )
}


@dataclass(frozen=True)
class Launch:
    """How a kernel is launched: tile of the result, reduction step, warps, and pipeline stages.

    `block_m` × `block_n` are rows × columns for a GEMM, queries × keys for attention, images × channels for a pool.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, int]:
        """What the compiler is told. Multiply-adds are fused by our word, not by the Triton version's default."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


Table = dict[str, dict[str, dict[str, Launch]]]  # op -> kind of dtype -> architecture -> launch

# What an architecture does not list it takes from the one named in _LIKE. "half" stands for float16 and bfloat16,
# "tf32" for float32 on tensor cores; "flash_attention_64" for head sizes to 64, "_128" to 128. With one stage where
# wgmma wants TF32 values transposed: copies of 4 bytes are in its way. `bench/tune.py` writes this.
TABLE: Table = {
    "linear": {
        "half": {
            "sm_80": Launch(128, 128, 64, num_warps=8, num_stages=3),
            "sm_86": Launch(128, 128, 32, num_warps=8, num_stages=3),
            "sm_90": Launch(128, 256, 64, num_warps=8, num_stages=3),
            "gfx942": Launch(128, 128, 64, num_warps=8, num_stages=2),
        },
        "float32": {
            "sm_80": Launch(64, 128, 32, num_warps=8, num_stages=2),
        },
        "tf32": {
            "sm_80": Launch(128, 128, 32, num_warps=8, num_stages=2),
        },
    },
    "patch_embed": {
        "half": {
            "sm_80": Launch(128, 128, 64, num_warps=8, num_stages=3),
            "gfx942": Launch(128, 128, 64, num_warps=8, num_stages=2),
        },
        "float32": {
            "sm_80": Launch(64, 64, 32, num_warps=8, num_stages=2),
        },
        "tf32": {
            "sm_80": Launch(64, 64, 32, num_warps=4, num_stages=2),
        },
    },
    "flash_attention_64": {
        "half": {
            "sm_80": Launch(128, 64, 0, num_warps=4, num_stages=3),
            "sm_120": Launch(128, 64, 0, num_warps=8, num_stages=3),
        },
        "float32": {
            "sm_80": Launch(64, 32, 0, num_warps=8, num_stages=2),
        },
        "tf32": {
            "sm_80": Launch(64, 32, 0, num_warps=4, num_stages=2),
            "sm_90": Launch(64, 32, 0, num_warps=4, num_stages=1),
            "gfx942": Launch(64, 32, 0, num_warps=4, num_stages=1),
        },
    },
    "flash_attention_128": {
        "half": {
            "sm_80": Launch(128, 64, 0, num_warps=8, num_stages=3),
            "sm_86": Launch(128, 64, 0, num_warps=8, num_stages=2),
            "sm_90": Launch(128, 64, 0, num_warps=8, num_stages=3),
            "gfx942": Launch(128, 32, 0, num_warps=8, num_stages=2),
        },
        "float32": {
            "sm_80": Launch(64, 16, 0, num_warps=8, num_stages=2),
        },
        "tf32": {
            "sm_80": Launch(64, 32, 0, num_warps=8, num_stages=2),
            "sm_90": Launch(64, 32, 0, num_warps=8, num_stages=1),
            "gfx942": Launch(64, 32, 0, num_warps=8, num_stages=1),
        },
    },
}
# Whose a 1 × 1 convolution is on a GPU, by kind of dtype: "linear" is the project's own GEMM on the map's rows. This is
# reasoned, not yet measured; `bench.kernels` measures both on a ResNet.
POINTWISE: dict[str, Literal["linear", "cudnn"]] = {"half": "linear", "float32": "linear", "tf32": "linear"}

_LIKE = {"sm_86": "sm_80", "sm_89": "sm_86", "sm_90": "sm_80", "sm_100": "sm_90", "sm_120": "sm_89", "gfx942": "sm_80"}

_assumed: ContextVar[Target | None] = ContextVar("assumed", default=None)


def target_of(device: torch.device) -> Target:
    """The architecture to launch for on `device`; a CPU (Triton's interpreter) counts as the plainest one."""
    return _assumed.get() or _detect(device)


@contextmanager
def assume(name: str) -> Iterator[Target]:
    """Within this context every launch is configured for architecture `name`, whatever the device."""
    token = _assumed.set(TARGETS[name])
    try:
        yield TARGETS[name]
    finally:
        _assumed.reset(token)


def launch_for(op: str, dtype: torch.dtype, target: Target, precision: str = "ieee") -> Launch:
    """The table's entry for `op` in `dtype` on `target`."""
    return entry(op, kind_of(dtype, precision), target)


def kind_of(dtype: torch.dtype, precision: str) -> str:
    """The kind of dtype that tables know: "half", "float32" or "tf32"."""
    return "half" if dtype.itemsize == 2 else "tf32" if precision == "tf32" else "float32"


def entry(op: str, kind: str, target: Target) -> Launch:
    """The table's entry for `op` in a kind of dtype, or that of the architecture which `target` is like."""
    entries, name = TABLE[op][kind], target.name
    while name not in entries:
        name = _LIKE[name]
    return entries[name]


@cache
def has_tf32(device: torch.device) -> bool:
    """Whether Triton multiplies in TF32 on `device`: of AMD's GPUs, on the MI300 alone."""
    amd = device.type == "cuda" and torch.version.hip is not None
    return not amd or torch.cuda.get_device_properties(device).gcnArchName.startswith("gfx942")


@cache
def has_tensor_cores(device: torch.device) -> bool:
    """Whether Triton multiplies on tensor cores on a GPU: on NVIDIA's before Ampere (sm_80) it does not."""
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


@cache
def multiprocessors(device: torch.device) -> int:
    """How many blocks of a persistent kernel run at once: the device's multiprocessors, one for the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@cache
def _detect(device: torch.device) -> Target:
    if device.type != "cuda":
        return TARGETS["sm_80"]
    if torch.version.hip:
        return TARGETS["gfx942"]
    major, minor = torch.cuda.get_device_capability(device)
    known = [name for name in TARGETS if name.startswith("sm_") and int(name[3:]) <= 10 * major + minor]
    return TARGETS[known[-1] if known else "sm_80"]
