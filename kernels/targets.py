"""The facts of each architecture: what it can do, how much fits, and whose launches it takes.

Nothing is tuned at run time. Block sizes, warps and stages of products and attention are looked up in `launches.py` by
op, kind of dtype and architecture. The number of rows chooses between launches that reduce a row in the same order: its
bits never depend on its batch.

Sources: the CUDA C++ Programming Guide, table "Technical specifications per compute capability"; AMD's CDNA 3
instruction-set reference; the known issues of NVIDIA's driver 595.71.05 (`dense_below`).
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch

InputPrecision = Literal["ieee", "tf32"]  # how products of float32 operands are taken on a GPU, in Triton's words
Kind = Literal["half", "float32", "tf32"]  # a dtype and input precision, as launch tables know it

REGISTERS = 65_536  # of 32 bits, that an NVIDIA multiprocessor has
SYSTEM_SHARED_MEMORY = 1024  # bytes of shared memory that each block takes beside its own


@dataclass(frozen=True)
class Resident:
    """The most of each that one multiprocessor holds at a time: warps, blocks, bytes of shared memory."""

    warps: int
    blocks: int
    shared_memory: int


@dataclass(frozen=True)
class Target:
    """An architecture.

    `capability` is the compute capability of an NVIDIA GPU, times ten; None for AMD. `shared_memory` is the bytes that
    one block may have. `like` is the architecture whose launches it takes where the table does not list its own.
    `descriptors` tells whether `linear` uses its tensor copy engine, `wgmma` whether it multiplies by Hopper's
    instructions for groups of warps, `dependent_launch` whether a kernel can be launched before the one ahead of it has
    ended. A tensor that spans fewer bytes than `dense_below` must be dense for the copy engine.
    """

    name: str
    capability: int | None
    shared_memory: int
    resident: Resident | None
    like: str | None = None
    descriptors: bool = False
    wgmma: bool = False
    dependent_launch: bool = False
    dense_below: int = 0

    def room(self, blocks: int) -> int:
        """The bytes of shared memory that each of `blocks` on one multiprocessor may have."""
        if self.resident is None:
            return self.shared_memory // blocks
        return min(self.shared_memory, self.resident.shared_memory // blocks - SYSTEM_SHARED_MEMORY)


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target("sm_80", 80, 166_912, Resident(64, 32, 167_936)),
        Target("sm_86", 86, 101_376, Resident(48, 16, 102_400), like="sm_80"),
        Target("sm_89", 89, 101_376, Resident(48, 24, 102_400), like="sm_86"),
        Target(
            "sm_90", 90, 232_448, Resident(64, 32, 233_472), like="sm_80", descriptors=True, wgmma=True,
            dependent_launch=True,
        ),
        Target(
            "sm_100", 100, 232_448, Resident(64, 32, 233_472), like="sm_90", descriptors=True, dependent_launch=True,
            dense_below=131_072,
        ),
        Target("sm_120", 120, 101_376, Resident(48, 24, 102_400), like="sm_89", dependent_launch=True),
        Target("gfx942", None, 65_536, None, like="sm_80"),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """How a kernel is launched: tile of the result, reduction step, warps, and pipeline stages.

    `block_m` × `block_n` are rows × columns for a GEMM, queries × keys for attention. `blocks` of a persistent kernel
    are launched for each multiprocessor, as many as it holds at a time. Of attention so many share its registers, where
    queries wait in them.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    blocks: int = 1

    @property
    def options(self) -> dict[str, int]:
        """The compiler's options. Multiply-adds are fused by our word, not by the Triton version's default."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


_pinned: ContextVar[int | None] = ContextVar("pinned", default=None)


class LaunchTable(dict[str, dict[Kind, dict[str, tuple[Launch, ...]]]]):
    """Launches by op, kind of dtype and name of the architecture.

    Where there are several, the number of rows decides between them, see `fitting`. They have one reduction step.
    """

    def entry(self, op: str, kind: Kind, target: Target) -> tuple[Launch, ...]:
        """The launches of `op` on `target`, or on the architecture that it is like; the first is for many rows."""
        launches = self[op][kind]
        while target.name not in launches:
            assert target.like is not None, f"no launch of {op} for {kind}"
            target = TARGETS[target.like]
        return launches[target.name]

    def launches_for(self, op: str, dtype: torch.dtype, target: Target, precision: str) -> tuple[Launch, ...]:
        """The launches of `op` in `dtype`, by the input precision "ieee" or "tf32"; within `pinned`, one of them."""
        launches, number = self.entry(op, kind_of(dtype, precision), target), _pinned.get()
        return launches if number is None else (launches[min(number, len(launches) - 1)],)

    @property
    def most(self) -> int:
        """The largest number of launches that any entry has."""
        return max(
            len(launches) for kinds in self.values() for entries in kinds.values() for launches in entries.values()
        )


_MARGIN = 32  # rows and columns


def fitting(launches: Sequence[Launch], rows: int, columns: int, multiprocessors: int) -> Launch:
    """The launch whose multiprocessors are done first with `rows` × `columns` of a product.

    The one that has most tiles decides. A tile of m × n takes the time of (m + 32) · (n + 32): the product's m · n, its
    operands' m + n, and what every tile waits for. The margin of 32 was chosen so that the order is that of the times
    that `bench.predict` calculates. Few rows so get small tiles, and many get those that leave the last wave full.
    """

    def time(launch: Launch) -> int:
        tiles = -(-rows // launch.block_m) * -(-columns // launch.block_n)
        return -(-tiles // multiprocessors) * (launch.block_m + _MARGIN) * (launch.block_n + _MARGIN)

    return min(launches, key=time) if len(launches) > 1 else launches[0]


@contextmanager
def pinned(number: int) -> Iterator[None]:
    """Within this context every product has the launch of this number in its entry, or the last, whatever its rows."""
    token = _pinned.set(number)
    try:
        yield
    finally:
        _pinned.reset(token)


_KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_LIKE_MI300 = ("gfx90a", "gfx942", "gfx950")  # AMD's GPUs that take the launches of gfx942

# The library that runs a 1 × 1 convolution on a GPU: "linear" is the project's own GEMM on the rows of the map. The
# choice is reasoned, not measured; `bench.kernels` measures both on a ResNet.
POINTWISE: dict[Kind, Literal["linear", "cudnn"]] = {"half": "linear", "float32": "linear", "tf32": "linear"}


def why_not_computed(dtype: torch.dtype) -> str | None:
    """The reason why no kernel computes in `dtype`, in words; None where kernels do."""
    return None if dtype in _KERNEL_DTYPES else f"kernels take float16, bfloat16 and float32, got {dtype}"


def kind_of(dtype: torch.dtype, precision: str) -> Kind:
    """The kind of dtype that launch tables know.

    Raises:
        ValueError: no kernel computes in `dtype`.
    """
    if reason := why_not_computed(dtype):
        raise ValueError(reason)
    if dtype != torch.float32:
        return "half"
    return "tf32" if precision == "tf32" else "float32"


_assumed: ContextVar[Target | None] = ContextVar("assumed", default=None)
_assumed_multiprocessors: ContextVar[int | None] = ContextVar("assumed_multiprocessors", default=None)


def target_of(device: torch.device) -> Target:
    """The architecture to launch for on `device`; a CPU (Triton's interpreter) counts as the plainest one."""
    return _assumed.get() or _detect(device)


@contextmanager
def assume(name: str, multiprocessors: int | None = None) -> Iterator[Target]:
    """Within this context every launch is configured for architecture `name`, and so many multiprocessors, whatever
    the device."""
    target, count = _assumed.set(TARGETS[name]), _assumed_multiprocessors.set(multiprocessors)
    try:
        yield TARGETS[name]
    finally:
        _assumed.reset(target)
        _assumed_multiprocessors.reset(count)


@cache
def has_tf32(device: torch.device) -> bool:
    """Whether Triton multiplies in TF32 on `device`: of AMD's GPUs, only on the MI300."""
    amd = device.type == "cuda" and torch.version.hip is not None
    return not amd or torch.cuda.get_device_properties(device).gcnArchName.startswith("gfx942")


def not_for_the_kernels(device: torch.device) -> str | None:
    """The reason why the kernels are not for a GPU, in words; None where they are.

    On NVIDIA's GPUs before Ampere (sm_80) Triton does not multiply on tensor cores. Of AMD's GPUs, those with matrix
    units like the MI300's take its launches; on RDNA the kernels spill registers.
    """
    if torch.version.hip is not None:
        name = torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
        return None if name in _LIKE_MI300 else f"the kernels are not for {name}"
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"the kernels are for sm_80 (Ampere) and later, and this GPU is sm_{major}{minor}"


def multiprocessors(device: torch.device) -> int:
    """The number of multiprocessors; 1 for the interpreter."""
    return _assumed_multiprocessors.get() or _multiprocessors(device)


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def has_dependent_launch(device: torch.device) -> bool:
    """Whether kernels can be launched on `device`, also in CUDA graphs, before the one ahead has ended."""
    return target_of(device).dependent_launch and (device.type != "cuda" or _driver() >= _DRIVER_OF_DEPENDENT_GRAPHS)


_DRIVER_OF_DEPENDENT_GRAPHS = 12_030  # CUDA 12.3 has them in its graphs: CUDA C++ Programming Guide


@cache
def _driver() -> int:
    """The newest CUDA that the driver knows, 12030 for 12.3; 0 where there is none."""
    version = ctypes.c_int(0)
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    return version.value


def total_memory(device: torch.device) -> int:
    """The bytes of a GPU's memory, free or not."""
    return torch.cuda.get_device_properties(device).total_memory


@cache
def _detect(device: torch.device) -> Target:
    """The newest known architecture that is no newer than the device."""
    if device.type != "cuda":
        return TARGETS["sm_80"]
    if torch.version.hip:
        return TARGETS["gfx942"]
    major, minor = torch.cuda.get_device_capability(device)
    known = [target for target in TARGETS.values() if target.capability and target.capability <= 10 * major + minor]
    return max(known, key=lambda target: target.capability or 0, default=TARGETS["sm_80"])
