"""PTX broken on purpose, one instruction at a time: whether the emulator notices.

Which breaks must be noticed follows from what is broken, not from a count: a compiler may put in more barriers and
waits than a kernel needs. `Rule` has the reasons.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from .cases import find
from .gate import build, call
from .machine import Mode
from .problem import KINDS, Problem
from .subject import bits

if TYPE_CHECKING:
    from .driver import EmulatorDriver
    from .machine import Finding

# What of a kind of break must be noticed. In each kind: one at least, and all together.
#   order: every one by the checker, unless another instruction orders the same: no schedule of `_skewed` shows it then.
#   value: one that changes results; another changes nothing.
#   always: every one.
Rule = Literal["order", "value", "always"]

_ADVERSARIES: tuple[tuple[Mode, int, int], ...] = (("earliest", 0, 0), ("latest", 0, 0), ("random", 5, 0))


def _removed(line: str) -> str:
    return ""


def _number_more(more: int) -> Callable[[str], str]:
    """The change of a line's last number."""

    def change(line: str) -> str:
        return re.sub(r"(\d+);", lambda match: f"{int(match[1]) + more};", line)

    return change


def _executed(counter: Any) -> bool:
    return counter["warps"] > 0


def _holds_lanes_back(counter: Any) -> bool:
    """Whether a guard was false for a lane of a warp that came to it."""
    return counter["lanes"] < 32 * counter["warps"]


@dataclass(frozen=True)
class Break:
    """What is done to each of at most `limit` lines that match and that matter in this case."""

    title: str
    arch: str
    op: str
    case: str
    pattern: str
    rule: Rule
    change: Callable[[str], str] = _removed
    limit: int = 8
    matters: Callable[[Any], bool] = _executed  # asked of a line's counters

    @property
    def name(self) -> str:
        return f"{self.arch} {self.op} {self.case}: {self.title}"


_QKV = ("sm_80", "linear", "qkv 17x512x768")
_OUT = ("sm_90", "linear", "out 300x640x128")
_AMPERE = ("sm_80", "flash_attention", "N=257 H=1 D=64")
_HOPPER = ("sm_90", "flash_attention", "N=257 H=1 D=64")
_GUARD = re.compile(r"@%p\d+")

BREAKS = (
    Break("cp.async.wait_group removed", *_QKV, r"cp\.async\.wait_group", "order"),
    Break("cp.async.wait_group leaves one more in flight", *_QKV, r"cp\.async\.wait_group", "order", _number_more(1)),
    Break("bar.sync removed", *_QKV, r"bar\.sync", "order", limit=12),
    Break("bar.sync removed", *_AMPERE, r"bar\.sync", "order", limit=12),
    Break("a swizzle's xor is an or", *_QKV, r"xor\.b32", "value", lambda line: line.replace("xor", "or"), 6),
    Break(
        "a store's guard removed", *_QKV, r"@%p\d+ st\.global", "always", lambda line: _GUARD.sub("", line), 4,
        _holds_lanes_back,
    ),
    Break("bar.sync removed", *_OUT, r"bar\.sync", "order", limit=24),
    Break("wgmma.wait_group removed", *_OUT, r"wgmma\.wait_group", "order"),
    Break("wgmma.fence removed", *_OUT, r"wgmma\.fence", "order"),
    Break("fence.proxy.async removed", *_OUT, r"fence\.proxy\.async", "order"),
    Break("griddepcontrol.wait removed", *_OUT, r"griddepcontrol\.wait", "always"),
    Break("cp.async.bulk.wait_group removed", *_OUT, r"cp\.async\.bulk\.wait_group", "order"),
    Break("no wait for an mbarrier", *_OUT, r"@!complete bra", "order"),
    Break("expect_tx of 128 bytes less", *_OUT, r"expect_tx", "always", _number_more(-128)),
    Break("bar.sync removed", *_HOPPER, r"bar\.sync", "order", limit=12),
    Break("wgmma.wait_group leaves one more in flight", *_HOPPER, r"wgmma\.wait_group", "order", _number_more(1)),
    Break("fence.proxy.async removed", *_HOPPER, r"fence\.proxy\.async", "order"),
    Break("cp.async.wait_group removed", *_HOPPER, r"cp\.async\.wait_group", "order"),
)  # fmt: skip


@dataclass
class Outcome:
    """Of the lines that were broken, one at a time: how many were noticed, and which others should have been."""

    matching: int
    tried: int
    noticed: int = 0
    missed: list[str] = field(default_factory=list)
    together: bool = False  # whether it is noticed that all of them are broken at once
    details: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return self.noticed > 0 and not self.missed and self.together


def attempt(driver: EmulatorDriver, what: Break) -> Outcome:
    """Break a kernel in one way at a time, then in all of them; float16, one program of a persistent kernel."""
    trial = _Trial(driver, what)
    outcome = Outcome(len(trial.matching), len(trial.tried))
    for n in trial.tried:
        by_checker, differing = trial.findings([n], _ADVERSARIES)
        found = sorted(by_checker) + differing
        if what.rule == "order" and not by_checker:
            by_checker, shown = trial.findings([n], _skewed(trial.warps))
            found, differing = sorted(by_checker), differing + shown
            if differing:
                outcome.missed.append(f"line {n + 1}: the checker is silent, but there are {', '.join(differing)}")
        elif what.rule == "always" and not found:
            outcome.missed.append(f"line {n + 1}: nothing")
        outcome.noticed += bool(found)
        outcome.details.append(f"line {n + 1}: {', '.join(found) or 'nothing'}")
    by_checker, differing = trial.findings(trial.matching, _ADVERSARIES)
    outcome.together = bool(by_checker or (what.rule != "order" and differing))
    return outcome


def _skewed(warps: int) -> Iterator[tuple[Mode, int, int]]:
    """Schedules in which each warp in turn runs as far ahead of the others, or falls as far behind, as waits let it.

    Ahead with copies that land at once, behind with such as land late: two accesses that nothing orders then change
    places, whatever the checker makes of them. Fences are the exception: the emulator's memory is always up to date, so
    only the checker knows of them.
    """
    for warp in range(1, warps + 1):
        yield "earliest", 0, warp
        yield "latest", 0, -warp


def _tells(finding: Finding) -> bool:
    # A fence that orders cp.async copies against the tensor cores is missed in this way alone.
    return not finding.harmless or finding.kind == "PROXY_CPASYNC"


class _Trial:
    """A kernel, its results while it is whole, and the lines to break."""

    def __init__(self, driver: EmulatorDriver, what: Break) -> None:
        self.driver, self.what = driver, what
        self.problem: Problem = build(find(what.op, what.case), KINDS["fp16"])
        driver.rewrite, driver.settings.count = None, True
        self.whole, runs = call(driver, self.problem, what.arch, "earliest", 0, programs=1)
        driver.settings.count = False
        if any(run.faults for run in runs):
            raise RuntimeError(f"{what.op} {what.case} has faults before it is broken")
        run = runs[-1]
        assert run.counters is not None
        self.warps = run.program.warps
        counted = zip(run.program.insts, run.counters, strict=True)
        matter = {inst.line for inst, counter in counted if what.matters(counter)}
        self.lines = run.ptx.split("\n")
        self.matching = [n for n, line in enumerate(self.lines) if re.search(what.pattern, line) and n + 1 in matter]
        self.tried = self.matching[:: max(1, len(self.matching) // what.limit)][: what.limit]

    def findings(self, broken: list[int], schedules: Iterable[tuple[Mode, int, int]]) -> tuple[set[str], list[str]]:
        """With these lines broken: what the checker finds, and the schedules under which bits differ."""
        by_checker: set[str] = set()
        differing: list[str] = []
        change = self.what.change
        broken_lines = {n: change(self.lines[n]) for n in broken}
        text = "\n".join(broken_lines.get(n, line) for n, line in enumerate(self.lines))
        self.driver.rewrite = lambda ptx: text
        try:
            for mode, seed, favourite in schedules:
                self.driver.settings.favourite = favourite
                try:
                    outputs, runs = call(self.driver, self.problem, self.what.arch, mode, seed, programs=1)
                except AssertionError:
                    by_checker.add("GUARD")
                    continue
                by_checker |= {finding.kind for run in runs for finding in run.findings if _tells(finding)}
                if any((bits(a) != bits(b)).any() for a, b in zip(self.whole, outputs, strict=True)):
                    differing.append(f"other bits ({mode}{f' {favourite:+}' if favourite else ''})")
        finally:
            self.driver.rewrite, self.driver.settings.favourite = None, 0
        return by_checker, differing
