"""Compiles every kernel in every launch configuration for every architecture, without a GPU; reads the machine code.

    python -m bench.machine_code [--arch sm_90 …] [--only linear] [--json FILE]

The launchers of `kernels/` are called as a model calls them, on tensors without storage. Each launch is caught before
it needs a device, so that the compiled kernels are those that would run. For each launch the table shows:

* registers and spilled bytes;
* shared memory, and the limit for a block;
* the matrix and copy instructions in the code, and the bytes that the copy engine moves;
* the widths of the global loads in the main loop;
* the share of a multiprocessor's warps that can be resident.

The exit status is 1 if a kernel

* spills registers, or needs more shared memory than there is;
* is a matrix product without matrix instructions;
* moves its tiles without the copy instructions of its architecture;
* loads less than 16 bytes at a time in its main loop;
* is launched before the last kernel has ended, and touches memory before it has waited for that;
* or writes to registers that a matrix instruction may still be reading.

Kernels that are exempt from wide loads are printed with the reason.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import math
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clip_fast.kernels import dispatch, ops, resampling
from clip_fast.kernels.launches import TABLE
from clip_fast.kernels.targets import REGISTERS, SYSTEM_SHARED_MEMORY, TARGETS, assume, pinned

from .report import save

HALF, BFLOAT, FLOAT = torch.float16, torch.bfloat16, torch.float32
_DTYPE_NAMES = {
    HALF: "fp16", BFLOAT: "bf16", FLOAT: "fp32", torch.float64: "fp64",
    torch.uint8: "u8", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip
_WIDE = 128  # bits of the widest load
# Of a launch, what the compiler is given.
_OPTIONS = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion", "launch_pdl")


# --- the launches ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One call of an op as a model makes it."""

    name: str
    call: Callable[[], object]


def _why_narrow(case: str, kernel: str, arch: str) -> str:
    """The reason why some loads in a kernel's main loop cannot be 16 bytes wide; empty where all must be."""
    if "P=14" in case:
        return "runs of 14 pixels begin at any multiple of 2 pixels"
    if case.endswith("of u8") and arch == "sm_90":
        return (
            "pixels that become a register operand of wgmma are copied in its swizzle of 8 elements; weights are wide"
        )
    if case.endswith("of u8") and arch == "gfx942" and "16" not in case.split()[1]:
        return "a tile of 64 x 32 pixels is 8 bytes for each of 256 threads; weights are wide"
    if case.endswith("16 SO400M/14") and kernel == "_head_linear_kernel" and arch == "sm_100":
        return "the bias of a head of 72 begins at any multiple of 8 elements; tokens and weights are wide"
    if kernel in ("_scores_kernel", "_weighted_sum_kernel"):
        return "scores and moments, a few bytes a token, begin at any token; the tokens themselves are wide"
    return ""


def _empty(*shape: int, dtype: torch.dtype = HALF) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _launch(op: str, *args: object) -> object:
    return dispatch.launcher(op)(*args)


def _patch_embed(
    patch: int,
    images: torch.dtype,
    dtype: torch.dtype,
    precision: str,
    *,
    class_token: bool = True,
    statistics: bool = False,
) -> object:
    width, grid = 1024 if class_token else 1152, 224 // patch
    features = -(-3 * patch**2 // ops.PATCH_K_STEP) * ops.PATCH_K_STEP
    weight, position = _empty(width, features, dtype=dtype), _empty(class_token + grid**2, width, dtype=FLOAT)
    pixels = _empty(256, 3, 224, 224, dtype=images)
    return _launch("patch_embed", pixels, weight, position, patch, class_token, statistics, precision)


def _layer_norm(width: int, dtype: torch.dtype) -> object:
    gain = _empty(width, dtype=FLOAT)
    return _launch("layer_norm", _empty(512, width, dtype=dtype), gain, gain, 1e-5, True)


def _linear(
    n: int,
    k: int,
    dtype: torch.dtype,
    precision: str,
    *,
    norm: bool,
    activation: str = "none",
    residual: bool = False,
    scaled: bool = False,
) -> object:
    m = 256 * 257
    x, weight, bias = _empty(m, k, dtype=dtype), _empty(n, k, dtype=dtype), _empty(n, dtype=FLOAT)
    added = _empty(m, n, dtype=dtype) if residual else None
    row_statistics = _empty(m, ops.statistics_tiles(k), 2, dtype=FLOAT) if norm else None
    colsum = _empty(n, dtype=FLOAT) if norm else None
    scale = _empty(n, dtype=FLOAT) if scaled else None
    statistics = residual and activation == "none"
    return _launch(
        "linear", x, weight, bias, added, row_statistics, colsum, scale, activation, 1e-5, statistics, precision
    )  # fmt: skip


def _flash_attention(tokens: int, head_dim: int, dtype: torch.dtype, precision: str) -> object:
    return _launch("flash_attention", _empty(64, tokens, 3, 16, head_dim, dtype=dtype), 0.125, precision)


def _attention_pool(
    heads: int,
    head_dim: int,
    tokens: int,
    dtype: torch.dtype,
    precision: str,
    *,
    resnet: bool = False,
    shared: bool = False,  # the query, by all images
) -> object:
    width, batch, g = heads * head_dim, 64, tokens - 1
    weight = _empty(heads, head_dim, width, dtype=dtype)
    query = _empty(heads, width, dtype=dtype) if shared else _empty(batch, heads, head_dim, dtype=dtype)
    keys = None if shared else weight
    hidden = _empty(batch, tokens, width, dtype=dtype)
    if resnet:  # a feature map in the channels-last memory format
        first, rest, statistics = _empty(batch, width, dtype=dtype), _empty(batch, g, width, dtype=dtype), None
        position = _empty(g, width, dtype=FLOAT)
    else:
        first, rest, position = hidden[:, 0], hidden[:, 1:], None
        statistics = _empty(batch, tokens, ops.statistics_tiles(width), 2, dtype=FLOAT)
    bias = _empty(width, dtype=FLOAT)
    return _launch(
        "attention_pool", query, first, rest, keys, weight, bias, statistics, position, 0.125, 1e-5, precision
    )


def _mean_token(dtype: torch.dtype) -> object:
    return _launch("mean_token", _empty(64, 49, 2048, dtype=dtype), _empty(2048, dtype=FLOAT))


def _resize() -> object:
    """256 photographs of 640 x 480."""
    steps, tables, scratch = resampling.plan([resampling.Source(0, 640, 480, (298, 224), 37, 0)] * 256, 224)
    pixels = _empty(256 * 640 * 480 * 3, dtype=torch.uint8)
    return _launch(
        "resize",
        pixels,
        _empty(*steps.shape, dtype=torch.int64),
        _empty(*tables.shape, dtype=torch.int32),
        scratch,
        224,
    )


def cases() -> Iterator[Case]:
    """Every kernel in every launch configuration, at shapes of ViT-B, L, H, g and bigG, SigLIP and the ResNets."""
    kinds = (("fp16", HALF, "ieee"), ("bf16", BFLOAT, "ieee"), ("fp32", FLOAT, "ieee"), ("tf32", FLOAT, "tf32"))
    for kind, dtype, precision in kinds:
        for patch in (14, 16, 32):
            for images in dict.fromkeys((torch.uint8, dtype, FLOAT)):
                name = f"patch_embed {kind} P={patch} of {_DTYPE_NAMES[images]}"
                call = _bind(_patch_embed, patch, images, dtype, precision)
                yield Case(name, call)
        for patch in (14, 16):
            call = _bind(_patch_embed, patch, dtype, dtype, precision, class_token=False, statistics=True)
            yield Case(f"patch_embed {kind} P={patch} of {_DTYPE_NAMES[dtype]}, no class token", call)
        call = _bind(_patch_embed, 14, dtype, dtype, precision, statistics=True)
        yield Case(f"patch_embed {kind} P=14 of {_DTYPE_NAMES[dtype]}, no ln_pre", call)
        yield Case(f"linear {kind} ln+qkv", _bind(_linear, 3072, 1024, dtype, precision, norm=True))
        yield Case(
            f"linear {kind} out+residual", _bind(_linear, 1024, 1024, dtype, precision, norm=False, residual=True)
        )
        call = _bind(_linear, 1024, 256, dtype, precision, norm=False, activation="relu", residual=True, scaled=True)
        yield Case(f"linear {kind} 1x1+residual+relu", call)
        for activation in ("quick_gelu", "gelu"):
            call = _bind(_linear, 4096, 1024, dtype, precision, norm=True, activation=activation)
            yield Case(f"linear {kind} ln+fc1+{activation}", call)
        call = _bind(_linear, 4304, 1152, dtype, precision, norm=True, activation="gelu_tanh")
        yield Case(f"linear {kind} ln+fc1+gelu_tanh", call)
        call = _bind(_linear, 1152, 4304, dtype, precision, norm=False, residual=True)
        yield Case(f"linear {kind} fc2+residual of 4304", call)
        for tokens, head_dim in (
            (257, 64),
            (50, 64),
            (256, 64),
            (729, 72),
            (257, 80),
            (730, 80),
            (257, 88),
            (257, 104),
        ):
            call = _bind(_flash_attention, tokens, head_dim, dtype, precision)
            yield Case(f"flash_attention {kind} N={tokens} D={head_dim}", call)
        call = _bind(_attention_pool, 16, 64, 257, dtype, precision)
        yield Case(f"attention_pool {kind} ViT-L/14", call)
        call = _bind(_attention_pool, 16, 72, 729, dtype, precision, shared=True)
        yield Case(f"attention_pool {kind} SO400M/14", call)
        call = _bind(_attention_pool, 64, 64, 197, dtype, precision, resnet=True)
        yield Case(f"attention_pool {kind} RN50x64", call)
        if precision == "ieee":
            yield Case(f"layer_norm {kind} W=1024", _bind(_layer_norm, 1024, dtype))
            yield Case(f"mean_token {kind}", _bind(_mean_token, dtype))
    yield Case("resize u8", _resize)


def _bind(function: Callable[..., object], *args: object, **kwargs: object) -> Callable[[], object]:
    return lambda: function(*args, **kwargs)


# --- catching a launch -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One kernel to compile: the arguments of Triton's compiler, in a form that identifies the kernel."""

    case: str
    kernel: str
    module: str  # that has the kernel
    arch: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[int, ...]  # positions of arguments that are multiples of 16
    options: tuple[tuple[str, int], ...]

    @property
    def identity(self) -> tuple[Any, ...]:
        """What the compiler is given: jobs that share it share their machine code."""
        return (self.kernel, self.arch, self.signature, self.constants, self.divisible, self.options)


@contextmanager
def caught() -> Iterator[list[tuple[Any, tuple[Any, ...], dict[str, Any]]]]:
    """Within this context kernels are noted and not launched: function, arguments, keyword arguments."""
    from triton.runtime.jit import JITFunction

    launches: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
    original = JITFunction.run
    JITFunction.run = lambda self, *args, **kwargs: launches.append((self, args, kwargs))  # type: ignore[method-assign]
    try:
        yield launches
    finally:
        JITFunction.run = original  # type: ignore[method-assign]


def jobs_of(case: Case, arch: str) -> list[Job]:
    """The kernels that `case` launches on `arch`, by every launch that some number of rows would choose."""
    with assume(arch), caught() as launches:
        for number in range(TABLE.most):
            with pinned(number):
                case.call()
    jobs = [job_of(case.name, arch, *launch) for launch in launches]
    return list({job.identity: job for job in jobs}.values())


def arguments_of(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A caught launch's arguments by the names that the kernel has for them."""
    named = {name: value for name, value in kwargs.items() if name in function.arg_names}
    return dict(zip(function.arg_names, args, strict=False)) | named


def job_of(case: str, arch: str, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Job:
    """What a caught launch has the compiler make."""
    options = {name: kwargs[name] for name in _OPTIONS if name in kwargs}
    values = arguments_of(function, args, kwargs)
    signature, constants, divisible = [], [], []
    for position, parameter in enumerate(function.params):
        value = values[parameter.name]
        specialised = type(value) is int and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (specialised and value == 1):
            signature.append((parameter.name, "constexpr"))
            constants.append((parameter.name, value))
            continue
        signature.append((parameter.name, _type_of(value)))
        if isinstance(value, Tensor) or (specialised and value % 16 == 0):
            divisible.append(position)
    return Job(
        case, function.__name__, function.__module__, arch, tuple(signature), tuple(constants), tuple(divisible),
        tuple(sorted(options.items())),
    )  # fmt: skip


def _type_of(value: Any) -> str:
    if isinstance(value, Tensor):
        return "*" + _DTYPE_NAMES[value.dtype]
    if isinstance(value, bool):
        return "u1"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    if isinstance(value, float):
        return "fp32"
    return f"tensordesc<{_DTYPE_NAMES[value.base.dtype]}{list(value.block_shape)}>".replace(" ", "")


# --- compiling a kernel, and reading its code ------------------------------------------------------------------------


@dataclass
class Row:
    """The properties of one launch's machine code."""

    case: str
    kernel: str
    arch: str
    num_warps: int
    num_stages: int
    instructions: int
    registers: int
    spilled: int  # bytes of local memory that a thread needs
    shared: int  # bytes
    shared_limit: int
    matrix: dict[str, int]  # matrix instruction -> its count in the code
    copies: dict[str, int]  # asynchronous copy between global and shared memory -> its count in the code
    loads: dict[int, int]  # width in bits of a thread's load in the main loop -> the number of such loads
    bytes_loaded: int  # by a thread in one pass of the main loop, without those that a copy engine loads
    bulk_loaded: int  # bytes that the copy engine's instructions load; each instruction in the code counts once
    bulk_stored: int  # bytes that they store
    occupancy: float  # resident warps, as a fraction of those that a multiprocessor holds
    seconds: float
    dependent: bool = False  # launched before the last kernel has ended
    resident: int = 0  # blocks that a multiprocessor holds at a time
    early: int = 0  # instructions that touch global memory, or lead past, before the last kernel is waited for
    overwritten: int = 0  # instructions that write to registers that a matrix instruction may still be reading
    exempt: str = ""
    problems: list[str] = field(default_factory=list)


def compiled_kernel(job: Job) -> Any:
    """Compiles `job`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(
        fn=getattr(importlib.import_module(job.module), job.kernel),
        signature=dict(job.signature),
        constexprs=dict(job.constants),
        attrs={(position,): [["tt.divisibility", 16]] for position in job.divisible},
    )
    amd = job.arch.startswith("gfx")
    target = GPUTarget("hip", job.arch, 64) if amd else GPUTarget("cuda", int(job.arch[3:]), 32)
    return triton.compile(source, target=target, options=dict(job.options))


def compile_job(job: Job) -> Row:
    """Compile `job` and judge its machine code."""
    started = time.perf_counter()
    compiled = compiled_kernel(job)
    amd = job.arch.startswith("gfx")
    row = Row(
        case=job.case, kernel=job.kernel, arch=job.arch, num_warps=compiled.metadata.num_warps,
        num_stages=compiled.metadata.num_stages, instructions=0, registers=0, spilled=0,
        shared=compiled.metadata.shared, shared_limit=TARGETS[job.arch].shared_memory, matrix={}, copies={}, loads={},
        bytes_loaded=0, bulk_loaded=0, bulk_stored=0, occupancy=0.0, seconds=0.0,
        exempt=_why_narrow(job.case, job.kernel, job.arch), dependent=dict(job.options).get("launch_pdl", 0) == 1,
    )  # fmt: skip
    blocks = [_block_bytes(kind) for _, kind in job.signature if kind.startswith("tensordesc")]
    (_read_amdgcn if amd else _read_sass)(row, compiled.asm["amdgcn" if amd else "cubin"])
    row.bytes_loaded = sum(width // 8 * count for width, count in row.loads.items())
    if blocks:
        row.bulk_loaded, row.bulk_stored = _bulk_bytes(compiled.asm["ptx"], blocks)
    row.seconds = round(time.perf_counter() - started, 2)
    row.problems = _problems(row, descriptors=bool(blocks))
    return row


_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?);", re.MULTILINE)
_MATRIX_SASS = re.compile(r"^(HGMMA|HMMA|IGMMA|UTCHMMA|UTCQMMA|UTC\w*MMA)\b")
_COPY_SASS = re.compile(r"^(UTMALDG|UTMASTG|LDGSTS)\b")


def disassembled(cubin: bytes) -> tuple[str, str]:
    """What cuobjdump prints of a cubin: its use of resources, and its instructions."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return _cuobjdump("--dump-resource-usage", file.name), _cuobjdump("--dump-sass", file.name)


def _read_sass(row: Row, cubin: bytes) -> None:
    usage, sass = disassembled(cubin)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, f"cuobjdump printed no resource usage: {usage}"
    row.registers = int(found[1])
    code = [(int(address, 16), name, operands) for address, name, operands in _INSTRUCTION.findall(sass)]
    assert code, "cuobjdump printed no instructions"
    row.instructions = len(code)
    row.spilled = int(found[2]) if any(name.split(".")[0] in ("LDL", "STL") for _, name, _ in code) else 0
    for counts, pattern in ((row.matrix, _MATRIX_SASS), (row.copies, _COPY_SASS)):
        for _, name, _ in code:
            if match := pattern.match(name):
                counts[match[1]] = counts.get(match[1], 0) + 1
    for name in _main_loop(code):
        kind, *suffixes = name.split(".")
        if kind in ("LDG", "LDGSTS"):
            narrow = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128}
            width = next((narrow[suffix] for suffix in suffixes if suffix in narrow), 32)
            row.loads[width] = row.loads.get(width, 0) + 1
    row.early = _early(code)
    row.overwritten = _overwritten(code)
    row.resident, row.occupancy = _occupancy(row)


_GLOBAL = re.compile(r"(LDG|STG|LDGSTS|LD|ST|REDG?|ATOMG?|UTMA\w+|UBLKCP)\b")  # shared memory is a block's own


def _early(code: Sequence[tuple[int, str, str]]) -> int:
    """The number of instructions before ACQBULK, PTX's `griddepcontrol.wait`, that touch global memory or lead past it.

    Constants, which hold the arguments, and shared and tensor memory are the kernel's own.
    """
    wait = next((address for address, name, _ in code if name == "ACQBULK"), math.inf)

    def leads_past(name: str, operands: str) -> bool:
        target = re.search(r"0x([0-9a-f]+)", operands)
        return name.startswith("BRA") and (target is None or int(target[1], 16) > wait)

    return sum(
        bool(_GLOBAL.match(name)) or leads_past(name, operands) or name in ("EXIT", "BRX", "JMP", "CALL", "RET")
        for address, name, operands in code
        if address < wait
    )


def _overwritten(code: Sequence[tuple[int, str, str]]) -> int:
    """The number of instructions in loops that write to registers that an HGMMA may still be reading.

    HGMMA is Hopper's asynchronous matrix instruction. It takes its left operand from registers or shared memory. One
    that ends with "gsb0" ends a group, and `WARPGROUP.DEPBAR gsb0, N` waits for all groups except the last N. A loop is
    read twice, so that the second pass meets the groups that the first one left open.
    """
    found: set[int] = set()
    for start, end in _loops(code):
        groups: list[set[int]] = [set()]  # registers that each group in flight reads; the last is being made
        for address, name, operands in [line for line in code if start <= line[0] <= end] * 2:
            if name.startswith("HGMMA"):
                if left := re.match(r"R\d+, R(\d+)", operands):
                    groups[-1] |= set(range(int(left[1]), int(left[1]) + 4))
                if "gsb0" in operands:
                    groups.append(set())
            elif name.startswith("WARPGROUP.DEPBAR"):
                left_open = int(operands.rpartition("0x")[2], 16)
                groups = groups[-1 - left_open :]
            elif _written(name, operands) & set().union(*groups):
                found.add(address)
    return len(found)


def _written(name: str, operands: str) -> set[int]:
    """The registers that an instruction writes."""
    first = re.match(r"R(\d+)\b", operands)
    if first is None or re.match(r"ST|RED|ATOM|LDGSTS|BRA|BAR", name):
        return set()
    kind, *suffixes = name.split(".")
    count = 4 if "128" in suffixes else 2 if "64" in suffixes or "WIDE" in suffixes else 1
    if kind == "LDSM":
        count = int(suffixes[-1]) if suffixes[-1] in ("2", "4") else 1
    return set(range(int(first[1]), int(first[1]) + count))


def _loops(code: Sequence[tuple[int, str, str]]) -> list[tuple[int, int]]:
    """The first and last addresses of loops, which are branches backwards."""
    loops = []
    for address, name, operands in code:
        if name.startswith("BRA") and (target := re.search(r"0x([0-9a-f]+)", operands)):
            start = int(target[1], 16)
            if start < address:
                loops.append((start, address))
    return loops


def _block_bytes(descriptor: str) -> int:
    """The bytes of a descriptor's block: 16384 for "tensordesc<fp16[128,64]>"."""
    dtype, *sides = re.findall(r"\w+", descriptor.removeprefix("tensordesc"))
    itemsizes = {name: dtype.itemsize for dtype, name in _DTYPE_NAMES.items()}
    return itemsizes[dtype] * math.prod(map(int, sides))


def _bulk_bytes(ptx: str, blocks: Sequence[int]) -> tuple[int, int]:
    """The bytes that the copy engine's instructions load and store; each instruction in the code counts once.

    An instruction moves the block of a descriptor. It names the register that holds the descriptor's address.

    Args:
        blocks: the bytes of each descriptor's block, in the order of the kernel's parameters of 128 bytes.
    """
    parameters = re.findall(r"\.param \.align \d+ \.b8 (\w+)\[128\]", ptx)
    moved = dict(zip(parameters, blocks, strict=True))
    for register, source in re.findall(r"(?:mov|cvta?)\.\S+\s+(%\w+), ([%\w]+);", ptx):
        if source in moved:
            moved[register] = moved[source]
    copies = re.findall(r"cp\.async\.bulk\.tensor\.\dd\.(shared|global)\S+ .*?\[(%rd\d+), \{", ptx)
    loaded, stored = (sum(moved[register] for to, register in copies if to == side) for side in ("shared", "global"))
    return loaded, stored


def _main_loop(code: Sequence[tuple[int, str, str]]) -> Iterable[str]:
    """Names of the instructions in the smallest loops that hold a matrix instruction.

    Where the compiler unrolled a loop of few steps, no loop is left around the matrix instructions. Then these are the
    asynchronous copies of the whole code, which feed them. Without matrix instructions the smallest loops are taken.
    """
    loops = _loops(code)
    bodies = [[name for address, name, _ in code if start <= address <= end] for start, end in loops]
    spans = list(zip(loops, bodies, strict=True))
    matrix = [(loop, body) for loop, body in spans if any(_MATRIX_SASS.match(name) for name in body)]
    if not matrix and any(_MATRIX_SASS.match(name) for _, name, _ in code):
        return [name for _, name, _ in code if name.startswith("LDGSTS")]
    chosen = matrix or spans
    inner = [
        body
        for (start, end), body in chosen
        if not any(start <= s and e <= end and (s, e) != (start, end) for (s, e), _ in chosen)
    ]
    return [name for body in inner for name in body]


def _occupancy(row: Row) -> tuple[int, float]:
    """Blocks that a multiprocessor holds at a time, and the fraction of its warps that they are."""
    most = TARGETS[row.arch].resident
    assert most is not None
    resident = resident_blocks(row.arch, row.registers, row.num_warps, row.shared)
    return resident, resident * row.num_warps / most.warps


def resident_blocks(arch: str, registers: int, num_warps: int, shared: int) -> int:
    """How many blocks one multiprocessor of NVIDIA's holds at a time."""
    most = TARGETS[arch].resident
    assert most is not None
    registers_per_warp = -(-registers * 32 // 256) * 256
    return min(
        most.blocks,
        most.warps // num_warps,
        REGISTERS // (registers_per_warp * num_warps),
        most.shared_memory // (shared + SYSTEM_SHARED_MEMORY),
    )


def _read_amdgcn(row: Row, assembly: str) -> None:
    def entry(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", assembly)
        assert found, f"the assembly does not say {name}"
        return int(found[1])

    row.instructions = len(re.findall(r"^\s+(?:[vs]|ds|global|buffer|flat|scratch)_\w+", assembly, re.MULTILINE))
    row.registers = entry("vgpr_count")
    row.spilled = 4 * (entry("vgpr_spill_count") + entry("sgpr_spill_count"))
    for name in re.findall(r"\bv_mfma\w*", assembly):
        row.matrix[name.split("_")[1].upper()] = row.matrix.get(name.split("_")[1].upper(), 0) + 1
    widths = {"ubyte": 8, "ushort": 16, "short": 16, "dword": 32, "dwordx2": 64, "dwordx3": 96, "dwordx4": 128}
    for body in _amd_loops(assembly):
        for kind in re.findall(r"(?:global|buffer)_load_(\w+?)\b", body):
            width = widths.get(kind.split("_d16")[0], 32)
            row.loads[width] = row.loads.get(width, 0) + 1
    threads = 64 * row.num_warps
    per_simd = 512 // max(8, -(-row.registers // 8) * 8)
    row.resident = min(32 * 64 // threads, 4 * per_simd // row.num_warps, 65_536 // max(row.shared, 1))
    row.occupancy = row.resident * row.num_warps / 32


def _amd_loops(assembly: str) -> list[str]:
    """The bodies of the smallest loops that hold a matrix instruction; without any, of the smallest loops."""
    labels = {match[1]: match.start() for match in re.finditer(r"^(\.LBB\w+):", assembly, re.MULTILINE)}
    spans = []
    for match in re.finditer(r"s_c?branch\w*\s+(\.LBB\w+)", assembly):
        start = labels.get(match[1], match.end())
        if start < match.start():
            spans.append((start, match.start()))
    matrix = [span for span in spans if "v_mfma" in assembly[span[0] : span[1]]]
    chosen = matrix or spans
    return [
        assembly[start:end]
        for start, end in chosen
        if not any(start <= s and e <= end and (s, e) != (start, end) for s, e in chosen)
    ]


@cache
def _cuobjdump_path() -> Path:
    import triton.backends.nvidia

    return Path(triton.backends.nvidia.__path__[0]) / "bin" / "cuobjdump"


def _cuobjdump(option: str, file: str) -> str:
    return subprocess.run([_cuobjdump_path(), option, file], check=True, capture_output=True, text=True).stdout


_NO_MATRIX = ("_layer_norm_kernel", "_mean_token_kernel", "_resize_kernel")  # memory decides


def _problems(row: Row, descriptors: bool) -> list[str]:
    problems = []
    if row.spilled:
        problems.append(f"spills {row.spilled} bytes a thread")
    if row.shared > row.shared_limit:
        problems.append(f"wants {row.shared} bytes of shared memory, {row.shared_limit} are there")
    exact_float = row.case.split()[1] == "fp32"  # NVIDIA has no matrix instruction for exact float32 products
    if row.kernel not in _NO_MATRIX and not exact_float and not row.matrix:
        problems.append("has no matrix instruction")
    if row.arch == "sm_90" and row.kernel == "_linear_kernel" and not exact_float and "HGMMA" not in row.matrix:
        problems.append("has no HGMMA")
    if row.dependent and row.early:
        problems.append(f"{row.early} instructions touch memory before the last kernel is waited for")
    if row.overwritten:
        problems.append(f"{row.overwritten} instructions write to what HGMMA may still be reading")
    if descriptors and not {"UTMALDG", "UTMASTG"} <= row.copies.keys():
        problems.append("has descriptors but no UTMALDG and UTMASTG")
    narrow = {width: count for width, count in row.loads.items() if width < _WIDE}
    if narrow and row.matrix and not descriptors and not row.exempt:
        problems.append(f"narrow loads in the main loop: {_widths(narrow)}")
    if row.exempt and row.loads and not row.loads.get(_WIDE):
        problems.append(f"no wide load at all in the main loop: {_widths(row.loads)}")
    return problems


# --- the command -----------------------------------------------------------------------------------------------------


def _widths(loads: dict[int, int]) -> str:
    return " ".join(f"{count}×{width // 8}B" for width, count in sorted(loads.items(), reverse=True))


def _line(row: Row) -> str:
    instructions = " ".join(f"{name}:{count}" for name, count in (row.matrix | row.copies).items())
    mark = "FAIL" if row.problems else "ok"
    return (
        f"{row.arch:7}{row.case:34}{row.kernel:24}{row.num_warps:>3}w{row.num_stages:>2}s{row.registers:>4} reg"
        f"{row.spilled:>5} spill {row.shared:>7}/{row.shared_limit} B shared{row.occupancy:>5.0%} warps  {mark:5}"
        f"{instructions}  loads {_widths(row.loads) or 'none'}"
        f"{f'  bulk {row.bulk_loaded} B in, {row.bulk_stored} B out' if row.bulk_loaded else ''}"
    )


def document(rows: Sequence[Row]) -> str:
    """The table as JSON, one kernel a line, without the seconds, which differ from run to run."""
    lines = [json.dumps({name: value for name, value in asdict(row).items() if name != "seconds"}) for row in rows]
    version = json.dumps(importlib.metadata.version("triton"))
    return f'{{"triton": {version}, "rows": [\n' + ",\n".join(lines) + "\n]}\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.machine_code", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--arch", nargs="+", choices=list(TARGETS), default=list(TARGETS), help="default: all")
    parser.add_argument("--only", default="", help="only the cases whose name contains this")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table as JSON")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: one per CPU core)")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: there is nothing to compile")

    started = time.perf_counter()
    unique: dict[tuple[Any, ...], Job] = {}
    for arch in options.arch:
        for case in cases():
            if options.only in case.name:
                for job in jobs_of(case, arch):
                    unique.setdefault(job.identity, job)
    if not unique:
        parser.error(f"no case has {options.only!r} in its name")

    rows: dict[int, Row] = {}
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, mp_context=spawn) as pool:
        places = {pool.submit(compile_job, job): place for place, job in enumerate(unique.values())}
        for done in as_completed(places):
            row = rows[places[done]] = done.result()
            print(_line(row), *(f"\n        {problem}" for problem in row.problems), flush=True)
    table = [rows[place] for place in sorted(rows)]
    if options.json:
        save(options.json, document(table))
    for reason in sorted({row.exempt for row in table if row.exempt}):
        print(f"exempt from wide loads ({', '.join(sorted({r.case for r in table if r.exempt == reason}))}): {reason}")
    failed = [row for row in table if row.problems]
    print(f"{len(rows)} kernels in {time.perf_counter() - started:.0f} s, {len(failed)} with problems")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
