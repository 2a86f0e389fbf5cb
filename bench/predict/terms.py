"""The terms of a launch's time, each a function of counts and rates: its formula, units and source stand beside it.

A block works on a tile: a main loop of steps, then an epilogue, in series, since the same warps do both.

    alone = passes · step + once
    step  = max(tensor, issue, special, memory pipe, latency / stages ahead)
    once  = fill and drain + barriers + waits + max(issue, special, memory pipe)

Products outside the loop are in `once`, too. Of loads that are waited for while the last step's product runs, what is
longer than that is a wait. A pass is a step, or as many as the compiler made one loop of; loads are asked for step by
step.

Loads and products run by themselves, so the slowest decides a step. Where a step's products wait for its own softmax,
as attention's do, a step is tensor + issue + special.

Blocks that share a multiprocessor fill each other's gaps, but no pipe does two things at once. With `busy` the time
that the busiest pipe has of a tile, c of them take

    alone + (c − 1) · busy

which is a block's own time for one, and the pipe's for many. Left out: conflicts of shared memory beyond 16-bit stores,
uncoalesced loads, what the second-level cache cannot deliver, and how the clock follows power.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from .code import Code, Counts
from .devices import SCHEDULERS, SHARED_BYTES, SPECIAL_FUNCTIONS, Device

# Clocks. None is measured on a GPU by this project.
BARRIER = 57  # of a block's warps. Half of a round of store, barrier, load, barrier: estimated
FILL_AND_DRAIN = (
    1200  # of a tile: last product, first load, handing over the store. Of K₀ = 120 in `devices`: estimated
)
LATENCY = 1000  # of a load from memory or second-level cache that nothing hides: estimated
WITHIN_LATENCY = 32 * 1024  # bytes that the copy engine brings in that time. More take as many times as long: estimated
GAP = 1e-6  # seconds between two launches of a graph: estimated
# The same where the second kernel's blocks are in place before the first ends (`primitives.wait_for_the_last`), so that
# only its end and its stores are waited for, not the launch: estimated as a half.
DEPENDENT_GAP = 0.5e-6

# Seconds of the host for a launch, and for one with tensor descriptors. Timed on an AMD EPYC of the third generation
# that other work shared, with a stand-in for the driver: the engine's calls, descriptors, Triton's own launcher (18 to
# 25 and 28 to 30 µs, by Triton's binder 102 to 104). The driver adds 8 µs.
HOST_LAUNCH, HOST_DESCRIPTORS = 30e-6, 37e-6


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel: what it executes, and how many blocks of it a multiprocessor holds."""

    code: Code
    warps: int
    stages: int
    resident: int
    registers: int
    shared: int  # bytes
    spilled: int  # bytes


@dataclass(frozen=True)
class Tile:
    """Seconds of one tile."""

    tensor: float
    loop: float  # of the main loop alone
    once: float  # of everything else alone
    busy: float  # of the busiest pipe

    @property
    def alone(self) -> float:
        return self.loop + self.once


@dataclass(frozen=True)
class Time:
    """Seconds of one launch, and the terms that it is made of."""

    tensor: float  # of the matrix instructions, on the multiprocessor that has most tiles
    loop: float  # of its main loops, which the tensor time is part of; what blocks hide is taken off both shares alike
    epilogue: float  # of everything else there
    memory: float
    gap: float
    host: float
    waves: float  # tiles over the blocks that run at a time

    @property
    def device(self) -> float:
        return max(self.loop + self.epilogue, self.memory) + self.gap


# --- pipes: clocks of one multiprocessor -----------------------------------------------------------------------------


def issue_clocks(counts: Counts, warps: int, device: Device) -> float:
    """Instructions · warps / 4 schedulers; float32 ones where there are fewer lanes than schedulers issue for."""
    return max(counts.instructions * warps / SCHEDULERS, counts.floats * warps * 32 / device.fp32_lanes)


def special_clocks(counts: Counts, warps: int) -> float:
    """MUFU instructions · warps · 32 lanes / 16 results a clock."""
    return counts.special * warps * 32 / SPECIAL_FUNCTIONS


def memory_pipe_clocks(counts: Counts, warps: int, copied: int) -> float:
    """Shared memory and first-level cache: wavefronts · warps, and the bytes of HGMMA's operands and of the tensor
    copy engine's loads, over 128 a clock. HGMMA's are read by each group of four warps."""
    moved = counts.matrix_bytes * warps / 4 + (copied if counts.bulk_loads else 0)
    return counts.wavefronts * warps + moved / SHARED_BYTES


def tensor_seconds(operations: float, precision: str, busy_multiprocessors: int, device: Device) -> float:
    """Operations over a multiprocessor's rate: its peak, or its share of what the device sustains as a whole.

    Power limits the device, not the multiprocessor: where few have work, each runs at its peak.
    """
    return operations / min(
        device.peak[precision] * device.clock, device.chip(precision) / max(1, busy_multiprocessors)
    )


# --- a tile, a launch ------------------------------------------------------------------------------------------------


def passes(kernel: Kernel, steps: int, operations: int) -> float:
    """How often the main loop runs for a tile: its steps, over those that one pass does where it was unrolled."""
    step = kernel.code.step
    done = kernel.warps * (step.matrix_operations if step.matrix else 64 * step.floats)
    return steps * operations / done if done and operations else steps if step.instructions else 0


def tile_of(
    kernel: Kernel, steps: int, operations: int, copied: int, precision: str, busy_multiprocessors: int, device: Device,
    added: int = 0,
) -> Tile:  # fmt: skip
    """See the equations at the top. `operations` and `copied` bytes are those of a step, `added` those of one load by
    the copy engine in the epilogue."""
    step, once, warps = kernel.code.step, kernel.code.once, kernel.warps
    times = passes(kernel, steps, operations)
    matrix = 0.0 if precision == "fp32" else tensor_seconds(operations, precision, busy_multiprocessors, device)
    outside = 0.0 if precision == "fp32" else tensor_seconds(
        warps * once.matrix_operations, precision, busy_multiprocessors, device
    )  # fmt: skip
    tensor = steps * matrix
    issue = [issue_clocks(part, warps, device) / device.clock for part in (step, once)]
    special = [special_clocks(part, warps) / device.clock for part in (step, once)]
    pipe = [memory_pipe_clocks(step, warps, copied) / device.clock, memory_pipe_clocks(once, warps, 0) / device.clock]
    if step.special:
        loop = tensor + times * (issue[0] + special[0])
    else:
        ahead = LATENCY / max(1, kernel.stages - 1) / device.clock if times else 0.0
        loop = max(tensor, times * max(issue[0], special[0], pipe[0]), steps * ahead)
    load = LATENCY * max(1.0, added / WITHIN_LATENCY) / device.clock
    covered = max(0.0, once.covered_loads * load - matrix)
    waits = (FILL_AND_DRAIN + BARRIER * once.barriers) / device.clock
    waits += (once.bulk_loads - once.covered_loads) * load + covered
    rest = waits + outside + max(issue[1], special[1], pipe[1])
    busy = max(tensor + outside, *(times * term[0] + term[1] for term in (issue, special, pipe)))
    return Tile(tensor + outside, loop, rest, busy)


def rounds_of(tiles: int, grid: int, slots: int) -> list[int]:
    """Blocks that run at a time, over the slots of the device, in each round of tiles.

    A persistent grid has its blocks at once, and each walks over tiles. Another has a block a tile, slots at a time.
    """
    at_once = min(grid, slots)
    return [min(at_once, tiles - done) for done in range(0, tiles, at_once)]


def compute_seconds(tile: Tile, rounds: list[int], multiprocessors: int) -> float:
    """Σ over rounds: alone + (blocks on the fullest multiprocessor − 1) · busy."""
    return sum(tile.alone + (ceil(blocks / multiprocessors) - 1) * tile.busy for blocks in rounds)


def memory_seconds(moved: int, device: Device) -> float:
    """Bytes, each operand read once and each result written once, over the rate of a large copy."""
    return moved / device.memory


def launch_time(
    kernel: Kernel, tiles: int, grid: int, steps: int, operations: int, copied: int, moved: int, precision: str,
    descriptors: bool, device: Device, dependent: bool = False, added: int = 0,
) -> Time:  # fmt: skip
    """The time of a launch on `device`, with all its terms."""
    slots = device.multiprocessors * max(1, kernel.resident)
    rounds = rounds_of(tiles, grid, slots)
    tile = tile_of(kernel, steps, operations, copied, precision, min(grid, device.multiprocessors), device, added)
    fullest = sum(ceil(blocks / device.multiprocessors) for blocks in rounds)
    compute = compute_seconds(tile, rounds, device.multiprocessors)
    loop = compute * tile.loop / tile.alone
    return Time(
        tensor=fullest * tile.tensor,
        loop=loop,
        epilogue=compute - loop,
        memory=memory_seconds(moved, device),
        gap=DEPENDENT_GAP if dependent else GAP,
        host=HOST_DESCRIPTORS if descriptors else HOST_LAUNCH,
        waves=tiles / min(grid, slots),
    )
