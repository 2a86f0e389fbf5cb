"""What a kernel executes, by class of instruction."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, fields

from .machine import Run
from .program import Inst

# What the class of an operation is, by name; else by how the name begins, the first that fits.
_CLASSES = {
    "matrix": ("mma", "wgmma"),
    "special functions": ("fex2", "frcp", "frsqrt", "fsqrt", "flg2", "ftanh"),
    "division f32": ("fdiv",),
    "fma f32": ("ffma", "ffma2", "mixfma"),
    "add, mul f32": ("fadd", "fsub", "fmul", "fadd2", "fsub2", "fmul2", "mixadd", "mixsub"),
    "min, max, sign, compare f32": ("fmin", "fmax", "fneg", "fabs", "setp_f32"),
    "conversions": ("cvt", "cvt_f16x2", "cvt_bf16x2"),
    "ld.shared": ("lds",),
    "st.shared": ("sts",),
    "ldmatrix": ("ldmatrix",),
    "stmatrix": ("stmatrix",),
    "ld.global": ("ldg",),
    "st.global": ("stg",),
    "cp.async": ("cpasync",),
    "tensor load": ("tma_load",),
    "tensor store": ("tma_store",),
    "shuffles and votes": ("shfl", "vote", "elect", "redux", "activemask"),
    "barriers": ("bar", "barwarp"),
    "mbarriers": ("mbar_init", "mbar_inval", "mbar_arrive", "mbar_expect", "mbar_try", "mbar_test"),
    "waits and fences": (
        "cpasync_commit", "cpasync_wait", "bulk_commit", "bulk_wait", "wg_fence", "wg_commit", "wg_wait", "fence_proxy",
        "fence", "grid_wait",
    ),
    "branches": ("bra", "exit", "trap"),
    "parameters": ("ldparam", "cvta_param"),
}  # fmt: skip
_PREFIXES = {
    "moves": ("mov", "pack", "unpack"),
    "integer multiply": ("mul", "mad"),
    "integer division": ("div", "rem"),
    "arithmetic f64": ("dadd", "dsub", "dmul", "dfma", "ddiv"),
    "arithmetic in 16 bits": ("hadd", "hsub", "hmul", "hfma", "hneg", "habs", "hmin", "hmax"),
}
_BY_NAME = {name: label for label, names in _CLASSES.items() for name in names}


def class_of(op: str) -> str:
    if op in _BY_NAME:
        return _BY_NAME[op]
    return next((label for label, starts in _PREFIXES.items() if op.startswith(starts)), "integer")


def flops(inst: Inst) -> int:
    """Of one warp's matrix instruction."""
    if inst.op == "mma":
        return 2 * 16 * 8 * inst.extra
    if inst.op == "wgmma":
        return 2 * 16 * inst.extra * (8 if inst.mode & 3 == 2 else 16)
    return 0


@dataclass
class Count:
    instructions: int = 0  # of warps
    lanes: int = 0
    flops: int = 0
    wavefronts: int = 0  # of shared memory
    ideal: int = 0  # such without bank conflicts
    bytes: int = 0
    sectors: int = 0  # 32 bytes of global memory each


def count(run: Run) -> dict[str, Count]:
    """By class, of all blocks that were run."""
    if run.counters is None:
        raise ValueError("the launch was not counted")
    table: dict[str, Count] = defaultdict(Count)
    for inst, row in zip(run.program.insts, run.counters, strict=True):
        if not row["warps"]:
            continue
        entry = table[class_of(inst.op)]
        entry.instructions += int(row["warps"])
        entry.flops += flops(inst) * int(row["warps"])
        for name in ("lanes", "wavefronts", "ideal", "bytes", "sectors"):
            setattr(entry, name, getattr(entry, name) + int(row[name]))
    return dict(table)


def table(run: Run) -> str:
    """Markdown: what `count` gives, the commonest class first."""
    names = [field.name for field in fields(Count)]
    lines = [
        f"{run.kernel}: {run.blocks} of {run.grid} blocks, {run.program.warps} warps, {run.shared} bytes of shared "
        "memory",
        "",
        f"| class | {' | '.join(names)} |",
        "|---" * (1 + len(names)) + "|",
    ]
    for label, entry in sorted(count(run).items(), key=lambda item: -item[1].instructions):
        lines.append(f"| {label} | {' | '.join(str(getattr(entry, name) or '') for name in names)} |")
    return "\n".join(lines)


def by_line(run: Run) -> str:
    """Every executed instruction that touches memory, in the order of the PTX: its line, and what it cost."""
    if run.counters is None:
        raise ValueError("the launch was not counted")
    lines: list[str] = []
    for inst, row in zip(run.program.insts, run.counters, strict=True):
        if row["warps"] and (row["bytes"] or class_of(inst.op) == "barriers"):
            cost = f"{row['warps']:>8}{row['wavefronts']:>9} of ideally {row['ideal']:<8}{row['bytes']:>10} B"
            lines.append(f"{inst.line:>6}{cost}{row['sectors']:>8} sectors  {inst.text[:100]}")
    return "\n".join(lines)
