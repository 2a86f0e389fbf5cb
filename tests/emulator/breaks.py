"""PTX broken on purpose, one instruction at a time: whether the emulator notices."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .cases import find
from .gate import build, call
from .machine import Mode
from .problem import KINDS
from .subject import bits

if TYPE_CHECKING:
    from .driver import EmulatorDriver

_ADVERSARIES: tuple[tuple[Mode, int], ...] = (("earliest", 0), ("latest", 0), ("random", 5))


def _removed(line: str) -> str:
    return ""


def _number_more(more: int) -> Callable[[str], str]:
    """The change of a line's last number."""

    def change(line: str) -> str:
        return re.sub(r"(\d+);", lambda match: f"{int(match[1]) + more};", line)

    return change


@dataclass(frozen=True)
class Break:
    """What is done to each of at most `limit` executed lines that match, and how many of these must be noticed.

    Not all need be: a barrier, say, is redundant where the next one orders the same.
    """

    title: str
    arch: str
    op: str
    case: str
    pattern: str
    least: int
    change: Callable[[str], str] = _removed
    limit: int = 8

    @property
    def name(self) -> str:
        return f"{self.arch} {self.op} {self.case}: {self.title}"


_QKV = ("sm_80", "linear", "qkv 17x512x768")
_OUT = ("sm_90", "linear", "out 300x640x128")
_AMPERE = ("sm_80", "flash_attention", "N=257 H=1 D=64")
_HOPPER = ("sm_90", "flash_attention", "N=257 H=1 D=64")
_UNGUARDED = re.compile(r"@%p\d+")

BREAKS = (
    Break("cp.async.wait_group removed", *_QKV, r"cp\.async\.wait_group", 2),
    Break("cp.async.wait_group leaves one more in flight", *_QKV, r"cp\.async\.wait_group", 2, _number_more(1)),
    Break("bar.sync removed", *_QKV, r"bar\.sync", 11, limit=12),
    Break("bar.sync removed", *_AMPERE, r"bar\.sync", 7, limit=12),
    Break("a swizzle's xor is an or", *_QKV, r"xor\.b32", 6, lambda line: line.replace("xor", "or"), 6),
    Break("a store's guard removed", *_QKV, r"@%p\d+ st\.global", 4, lambda line: _UNGUARDED.sub("", line), 4),
    Break("bar.sync removed", *_OUT, r"bar\.sync", 6, limit=24),
    Break("wgmma.wait_group removed", *_OUT, r"wgmma\.wait_group", 2),
    Break("wgmma.fence removed", *_OUT, r"wgmma\.fence", 1),
    Break("fence.proxy.async removed", *_OUT, r"fence\.proxy\.async", 4),
    Break("cp.async.bulk.wait_group removed", *_OUT, r"cp\.async\.bulk\.wait_group", 3),
    Break("no wait for an mbarrier", *_OUT, r"@!complete bra", 3),
    Break("expect_tx of 128 bytes less", *_OUT, r"expect_tx", 5, _number_more(-128)),
    Break("bar.sync removed", *_HOPPER, r"bar\.sync", 7, limit=12),
    Break("wgmma.wait_group leaves one more in flight", *_HOPPER, r"wgmma\.wait_group", 2, _number_more(1)),
    Break("fence.proxy.async removed", *_HOPPER, r"fence\.proxy\.async", 1),
    Break("cp.async.wait_group removed", *_HOPPER, r"cp\.async\.wait_group", 1),
)


@dataclass
class Outcome:
    executed: int  # such lines
    tried: int
    caught: int
    details: list[str] = field(default_factory=list)


def attempt(driver: EmulatorDriver, what: Break) -> Outcome:
    """Break a kernel in one way at a time; float16, one program of a persistent kernel."""
    problem = build(find(what.op, what.case), KINDS["fp16"])
    driver.rewrite, driver.settings.count = None, True
    whole, runs = call(driver, problem, what.arch, "earliest", 0, programs=1)
    driver.settings.count = False
    if any(run.faults for run in runs):
        raise RuntimeError(f"{what.op} {what.case} has faults before it is broken")
    run = runs[-1]
    assert run.counters is not None
    executed = {i.line for i, counter in zip(run.program.insts, run.counters, strict=True) if counter["warps"]}
    lines = run.ptx.split("\n")
    matching = [n for n, line in enumerate(lines) if re.search(what.pattern, line) and n + 1 in executed]
    tried = matching[:: max(1, len(matching) // what.limit)][: what.limit]
    outcome = Outcome(len(matching), len(tried), 0)
    for n in tried:
        broken = "\n".join([*lines[:n], what.change(lines[n]), *lines[n + 1 :]])
        driver.rewrite = lambda ptx, broken=broken: broken
        found: set[str] = set()
        for mode, seed in _ADVERSARIES:
            try:
                outputs, runs = call(driver, problem, what.arch, mode, seed, programs=1)
            except AssertionError:
                found.add("GUARD")
                continue
            found |= {finding.kind for run in runs for finding in run.faults}
            # A fence that orders cp.async copies against the tensor cores is missed in this way alone.
            found |= {finding.kind for run in runs for finding in run.findings if finding.kind == "PROXY_CPASYNC"}
            if any((bits(a) != bits(b)).any() for a, b in zip(whole, outputs, strict=True)):
                found.add(f"other bits ({mode})")
        outcome.caught += bool(found)
        outcome.details.append(f"line {n + 1}: {', '.join(sorted(found)) or 'nothing'}")
    driver.rewrite = None
    return outcome
