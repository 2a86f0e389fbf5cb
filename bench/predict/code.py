"""What machine code executes: instructions of one step of the main loop, and of everything else a block does once.

cuobjdump's listing is cut into basic blocks. The main loop's step is the shortest cycle through the block that has the
most matrix instructions (float32 multiply-adds where there are none, and loads where there are neither). A kernel whose
programs walk over tiles has a loop around it, or both in one loop; the rest of that loop runs once a tile. Elsewhere
the rest is all that is no step. A loop of few steps may be unrolled whole. Its matrix instructions are then in no loop,
and the code from the first of them to the last is one step that does all.

A pipeline's first loads stand before its loop, whose last passes then load nothing. The wavefronts of what the loop
copies are counted in every pass, and so not once more before it.

A listing has no trip counts and no bank conflicts. Conflicts of 16-bit stores are taken from `tests.emulator count`,
which executes the same kernels: two wavefronts for each.
"""

from __future__ import annotations

import heapq
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace

_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?);", re.MULTILINE)
_MATRIX = ("HGMMA", "HMMA", "IGMMA", "UTCHMMA", "UTCQMMA")
_FLOAT = ("FFMA", "FADD", "FMUL", "FSEL", "FMNMX", "FSETP", "FSET", "FFMA2", "FADD2", "FMUL2", "FCHK")
_SHARED = ("LDS", "STS", "LDSM", "STSM")
_GLOBAL = ("LDG", "STG", "LDGSTS")
_END = ("EXIT", "RET", "BRA", "BRX", "JMP")


@dataclass(frozen=True)
class Line:
    address: int
    conditional: bool
    name: str
    operands: str
    never: bool = False  # the assembler's padding: issued, and never executed

    @property
    def kind(self) -> str:
        return self.name.partition(".")[0]

    @property
    def target(self) -> int | None:
        """Where a branch goes."""
        found = re.search(r"0x([0-9a-f]+)", self.operands) if self.kind in ("BRA", "JMP") else None
        return int(found[1], 16) if found else None


@dataclass(frozen=True)
class Counts:
    """Instructions of one warp, by what they keep busy."""

    instructions: int = 0
    matrix: int = 0
    matrix_operations: int = 0  # of a warp
    matrix_bytes: int = 0  # of shared memory, that a group of four warps' HGMMA read
    special: int = 0  # functions: exponentials, reciprocals
    floats: int = 0  # of float32
    barriers: int = 0
    shared: int = 0
    wavefronts: int = 0  # of 128 bytes, of shared memory and the first-level cache
    bulk_loads: int = 0  # by the tensor copy engine
    covered_loads: int = 0  # of these, those that are waited for while a tile's last product still runs

    def __add__(self, other: Counts) -> Counts:
        mine, theirs = asdict(self), asdict(other)
        return Counts(**{name: mine[name] + theirs[name] for name in mine})


@dataclass(frozen=True)
class Code:
    """A kernel's counts: of one step of its main loop, and of what runs once a tile, or once a block."""

    step: Counts
    once: Counts


def read(sass: str) -> Code:
    """The counts of cuobjdump's listing of one kernel."""
    blocks = _basic_blocks([_line(found) for found in _LINE.findall(sass)])
    following = _edges(blocks)
    reachable = _reached(0, following)
    anchor = _anchor([i for i in reachable if i in _after(i, following)], blocks)
    if anchor is None or (not _multiplies(blocks[anchor]) and any(_multiplies(blocks[i]) for i in reachable)):
        return _unrolled([line for i in sorted(reachable) for line in blocks[i]])
    around = {i for i in _after(anchor, following) if anchor in _after(i, following)}
    step = _shortest_cycle(anchor, around, blocks, following)
    # A loop that is more than its step goes on to the next tile. Blocks of a few instructions spin on a barrier.
    walks = sum(len(blocks[i]) for i in around - step) > sum(len(blocks[i]) for i in step)
    rest = sorted((around if walks else reachable) - step)
    looped, once = ([line for i in part for line in blocks[i]] for part in (sorted(step), rest))
    counts = _count(once)
    wavefronts = counts.wavefronts - _asked_ahead(looped, once)
    return Code(_count(looped), replace(counts, wavefronts=wavefronts, covered_loads=_covered(once)))


def _unrolled(lines: Sequence[Line]) -> Code:
    """The counts of code without a loop of products: from the first to the last is the one step."""
    products = [number for number, line in enumerate(lines) if line.kind in _MATRIX]
    if not products:
        return Code(Counts(), _count(lines))
    first, end = products[0], products[-1] + 1
    return Code(_count(lines[first:end]), _count([*lines[:first], *lines[end:]]))


def _multiplies(block: Iterable[Line]) -> bool:
    return any(line.kind in _MATRIX for line in block)


def _covered(once: Sequence[Line]) -> int:
    """The number of the copy engine's loads that are asked for and waited for before the last product is.

    A load is waited for by spinning on its barrier, `SYNCS…TRYWAIT`; the last product by `WARPGROUP.DEPBAR.LE gsb0,
    0x0`.
    """
    covered = asked = 0
    for line in once:
        if line.name.startswith("WARPGROUP.DEPBAR") and line.operands.rstrip().endswith(" 0x0"):
            return covered
        if line.kind == "UTMALDG":
            asked += 1
        elif line.kind == "SYNCS" and "TRYWAIT" in line.name:
            covered = asked
    return 0


def _asked_ahead(step: Sequence[Line], once: Sequence[Line]) -> int:
    """Wavefronts of the asynchronous copies that stand before the loop, as far as they are whole steps of it."""
    before = (line for line in once if line.address < step[0].address)
    in_step, ahead = (sum(_wavefronts(line) for line in part if line.kind == "LDGSTS") for part in (step, before))
    return ahead - ahead % in_step if in_step else 0


def _line(found: tuple[str, str, str, str]) -> Line:
    address, predicate, name, operands = found
    conditional = bool(predicate) or bool(re.match(r"!?U?P\d", operands))
    return Line(int(address, 16), conditional, name, operands, never=predicate.strip() == "@!PT")


def _basic_blocks(code: Sequence[Line]) -> list[list[Line]]:
    targets = {line.target for line in code}
    blocks: list[list[Line]] = [[]]
    for line in code:
        if blocks[-1] and line.address in targets:
            blocks.append([])
        blocks[-1].append(line)
        if line.kind in _END:
            blocks.append([])
    return [block for block in blocks if block]


def _edges(blocks: Sequence[Sequence[Line]]) -> list[set[int]]:
    """The blocks that may follow each."""
    begins = {block[0].address: i for i, block in enumerate(blocks)}
    following: list[set[int]] = []
    for i, block in enumerate(blocks):
        last, next_ones = block[-1], set[int]()
        if last.target is not None:
            next_ones.add(begins[last.target])
        if (last.kind not in _END or last.conditional) and i + 1 < len(blocks):
            next_ones.add(i + 1)
        following.append(next_ones)
    return following


def _after(start: int, following: Sequence[set[int]]) -> set[int]:
    """The blocks that may run after `start`: itself only where it is in a loop."""
    found: set[int] = set()
    waiting = list(following[start])
    while waiting:
        block = waiting.pop()
        if block not in found:
            found.add(block)
            waiting += following[block]
    return found


def _reached(start: int, following: Sequence[set[int]]) -> set[int]:
    return {start} | _after(start, following)


def _anchor(looping: Iterable[int], blocks: Sequence[Sequence[Line]]) -> int | None:
    """Of the blocks in loops the one that multiplies most, or else loads most."""

    def weight(i: int) -> tuple[int, int, int]:
        kinds = Counter(line.kind for line in blocks[i])
        return sum(kinds[kind] for kind in _MATRIX), sum(kinds[kind] for kind in _FLOAT), kinds["LDG"]

    best = max(looping, key=weight, default=None)
    return None if best is None or weight(best) == (0, 0, 0) else best


def _shortest_cycle(
    anchor: int, around: set[int], blocks: Sequence[Sequence[Line]], following: Sequence[set[int]]
) -> set[int]:
    """The cycle through `anchor` of the fewest instructions (Dijkstra 1959)."""
    waiting: list[tuple[int, tuple[int, ...]]] = [(0, (anchor,))]
    settled: set[int] = set()
    while waiting:
        length, path = heapq.heappop(waiting)
        for block in following[path[-1]] & around:
            if block == anchor:
                return set(path)
            if block not in settled:
                settled.add(block)
                heapq.heappush(waiting, (length + len(blocks[block]), (*path, block)))
    raise AssertionError("the anchor is in no loop")


def _count(lines: Iterable[Line]) -> Counts:
    return sum(map(_one, lines), Counts())


def _one(line: Line) -> Counts:
    kind = line.kind
    if line.never:
        return Counts(1)
    if kind in _MATRIX:
        operations, shared = _matrix(line)
        return Counts(1, matrix=1, matrix_operations=operations, matrix_bytes=shared)
    return Counts(
        instructions=0 if kind == "NOP" else 1,
        special=kind == "MUFU",
        floats=kind in _FLOAT,
        barriers=kind == "BAR",
        shared=kind in _SHARED,
        wavefronts=_wavefronts(line) if kind in _SHARED + _GLOBAL else 0,
        bulk_loads=kind == "UTMALDG",
    )


def _matrix(line: Line) -> tuple[int, int]:
    """Operations of one warp, and bytes of shared memory that HGMMA's four read; 0 where the name has no shape."""
    if shape := re.search(r"\.(\d+)x(\d+)x(\d+)\.", line.name):  # HGMMA.64x256x16, of four warps
        m, n, k = map(int, shape.groups())
        left = 0 if re.match(r"R\d+, R\d+", line.operands) else m
        return 2 * m * n * k // 4, 32 * (left + n)  # k is 32 bytes of either operand, in every dtype
    if shape := re.search(r"\.16(8)(\d+)\.", line.name):  # HMMA.16816
        return 2 * 16 * 8 * int(shape[2]), 0
    return 0, 0


def _wavefronts(line: Line) -> int:
    kind, *suffixes = line.name.split(".")
    if kind in ("LDSM", "STSM"):
        return int(suffixes[-1]) if suffixes[-1].isdigit() else 1
    if "128" in suffixes:
        return 4
    narrow = {"U8", "S8", "U16", "S16"}
    return 2 if "64" in suffixes or (kind == "STS" and narrow & set(suffixes)) else 1
