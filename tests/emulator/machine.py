"""A launch of a translated kernel on the engine."""

from __future__ import annotations

import ctypes
import time
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from .build import engine
from .program import Inst, Program
from .registers import SHARED_BASE

Mode = Literal["earliest", "latest", "random"]
_MODES: tuple[Mode, ...] = ("earliest", "latest", "random")

# What is told of, but is no fault: see README.md.
HARMLESS = ("NOTE", "PROXY_CPASYNC", "PROXY_MBARRIER", "UNINIT_REG", "SAME", "LANES")

# The structures of engine/vocabulary.h.
_NUMBERS = ("op", "mode", "guard", "guard_negated", "results", "sources", "first_operand", "target", "line", "extra")
_INST = np.dtype([(name, "<i4") for name in _NUMBERS] + [("immediate", "<i8"), ("immediate2", "<i8")])
COUNTERS = np.dtype([(name, "<u8") for name in ("warps", "lanes", "wavefronts", "ideal", "bytes", "sectors")])


class _Launch(ctypes.Structure):
    _fields_ = (
        ("program", ctypes.c_void_p),
        ("operands", ctypes.c_void_p),
        ("constants", ctypes.c_void_p),
        ("first_constant", ctypes.c_int64),
        ("constant_units", ctypes.c_int64),
        ("units", ctypes.c_int64),
        ("warps", ctypes.c_int64),
        ("shared_bytes", ctypes.c_int64),
        ("shared_base", ctypes.c_int64),
        ("specials", ctypes.c_void_p),
        ("special_count", ctypes.c_int64),
        ("params", ctypes.c_void_p),
        ("param_bytes", ctypes.c_int64),
        ("grid", ctypes.c_int64 * 3),
        ("allocations", ctypes.c_void_p),
        ("allocation_count", ctypes.c_int64),
        ("mode", ctypes.c_int64),
        ("seed", ctypes.c_int64),
        ("slice", ctypes.c_int64),
        ("favourite", ctypes.c_int64),
        ("count", ctypes.c_int64),
        ("truncating", ctypes.c_int64),
        ("hopper", ctypes.c_int64),
        ("programmatic", ctypes.c_int64),
        ("first_block", ctypes.c_int64),
        ("block_count", ctypes.c_int64),
        ("counters", ctypes.c_void_p),
        ("report", ctypes.c_char_p),
        ("report_bytes", ctypes.c_int64),
        ("executed", ctypes.c_uint64),
    )


@dataclass(frozen=True)
class Finding:
    """What the checker saw at one instruction, and how often."""

    kind: str
    line: int  # of the PTX
    count: int
    text: str
    instruction: str

    def __str__(self) -> str:
        return f"{self.kind} at PTX line {self.line} ({self.count} times): {self.text} | {self.instruction[:160]}"

    @property
    def harmless(self) -> bool:
        return self.kind in HARMLESS


class Extent(NamedTuple):
    """A tensor of a launch."""

    address: int
    bytes: int
    constant: bool = False  # no kernel writes it: a weight


@dataclass
class Settings:
    """How launches are emulated."""

    mode: Mode = "earliest"  # when what is asynchronous happens
    seed: int = 0  # 0 takes the warps in turn, each until it waits; others take them at random
    count: bool = False
    truncating: bool = False  # sums as tensor cores have been seen to take them
    slice: int = 40  # at most so many instructions of one warp at a time, where the seed is not 0
    favourite: int = 0  # where the seed is 0: 1 + the warp that goes whenever it can, or minus that of the last to go
    cache: Path | None = None  # where the engine is kept


@dataclass
class Run:
    """One launch: what was found and counted."""

    kernel: str
    grid: tuple[int, int, int]
    program: Program
    findings: list[Finding]
    executed: int  # instructions of warps
    seconds: float
    blocks: int
    shared: int
    hopper: bool
    counters: np.ndarray | None = None
    ptx: str = ""
    tensors: list[str] = field(default_factory=list)  # names, by the number that findings give them

    @property
    def faults(self) -> list[Finding]:
        return [finding for finding in self.findings if not finding.harmless]


class _Encoded:
    """A program as the engine takes it."""

    def __init__(self, program: Program, numbers: dict[str, int]) -> None:
        self.insts = np.zeros(len(program.insts), _INST)
        operands: list[int] = []
        for row, inst in zip(self.insts, program.insts, strict=True):
            for name in ("mode", "guard", "guard_negated", "target", "line", "extra", "immediate", "immediate2"):
                row[name] = getattr(inst, name)
            row["op"], row["first_operand"] = numbers[inst.op], len(operands)
            row["results"], row["sources"] = len(inst.results), len(inst.sources)
            operands += [*inst.results, *inst.sources]
        self.operands = np.array([*operands, 0], np.int32)
        self.specials = np.array([*program.specials, (0, 0)], np.int32)
        self.constants = np.frombuffer(program.constants + bytes(64), np.uint8)


@cache
def _library(cache_folder: Path | None) -> tuple[Any, dict[str, int]]:
    """The engine, and the numbers of its operations."""
    library = engine(cache_folder)
    library.operation_name.restype = ctypes.c_char_p
    library.run.restype = ctypes.c_int64
    assert library.instruction_bytes() == _INST.itemsize
    numbers: dict[str, int] = {}
    while name := library.operation_name(len(numbers)):
        numbers[name.decode()] = len(numbers)
    return library, numbers


@lru_cache(maxsize=64)
def _encode(program: Program, cache_folder: Path | None) -> _Encoded:
    return _Encoded(program, _library(cache_folder)[1])


def launch(
    program: Program,
    grid: tuple[int, int, int],
    params: bytes,
    tensors: list[Extent],
    shared: int,
    settings: Settings,
    hopper: bool = False,
    blocks: tuple[int, int] | None = None,
    programmatic: bool = False,
) -> Run:
    """Run a grid, or of it `blocks` (first, number), with `tensors` as its global memory.

    A `programmatic` launch may start before the kernels before it have ended.
    """
    library, _ = _library(settings.cache)
    if program.warps > library.max_warps():
        raise ValueError(f"a block of {program.warps} warps, of at most {library.max_warps()}")
    encoded = _encode(program, settings.cache)
    memory = np.frombuffer(params + bytes(128), np.uint8).copy()
    allocations = np.array([(start, start + size, constant) for start, size, constant in tensors], np.uint64)
    counters = np.zeros(len(program.insts), COUNTERS)
    report = ctypes.create_string_buffer(1 << 20)
    total = grid[0] * grid[1] * grid[2]
    first, number = blocks or (0, total)
    job = _Launch(
        program=encoded.insts.ctypes.data,
        operands=encoded.operands.ctypes.data,
        constants=encoded.constants.ctypes.data,
        first_constant=program.first_constant,
        constant_units=len(program.constants) // 64,
        units=program.units,
        warps=program.warps,
        shared_bytes=shared,
        shared_base=SHARED_BASE,
        specials=encoded.specials.ctypes.data,
        special_count=len(program.specials),
        params=memory.ctypes.data,
        param_bytes=len(params),
        grid=(ctypes.c_int64 * 3)(*grid),
        allocations=allocations.ctypes.data,
        allocation_count=len(tensors),
        mode=_MODES.index(settings.mode),
        seed=settings.seed,
        slice=settings.slice,
        favourite=settings.favourite,
        count=settings.count,
        truncating=settings.truncating,
        hopper=hopper,
        programmatic=programmatic,
        first_block=first,
        block_count=number,
        counters=counters.ctypes.data,
        report=ctypes.cast(report, ctypes.c_char_p),
        report_bytes=len(report),
    )
    started = time.perf_counter()
    if library.run(ctypes.byref(job)) >= len(report):
        raise RuntimeError("the emulator found more than it has room to tell")
    seconds = time.perf_counter() - started
    findings = [_finding(program, entry) for entry in report.value.decode().splitlines()]
    blocks_run = max(0, min(number, total - first))
    return Run(
        program.name, grid, program, findings, job.executed, seconds, blocks_run, shared, hopper,
        counters if settings.count else None,
    )  # fmt: skip


def _finding(program: Program, entry: str) -> Finding:
    kind, index, count, text = entry.split("\t", 3)
    inst: Inst = program.insts[int(index)]
    return Finding(kind, inst.line, int(count), text, inst.text)
