"""One case on one architecture under every adversary, held to the project's own bounds."""

from __future__ import annotations

import hashlib
import re
import time
import zlib
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .machine import Mode, Run
from .problem import Case, Kind, Problem
from .subject import Guards, assert_as_accurate, assert_statistics_of, assume, bits, persistent_programs, poisoned, rms

if TYPE_CHECKING:  # so that rows and cases can be named without Triton
    from .driver import EmulatorDriver

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_120")
ADVERSARIES: tuple[tuple[Mode, int], ...] = (
    ("earliest", 0), ("latest", 0), ("latest", 1), ("random", 2), ("random", 3),
)  # fmt: skip
PROGRAMS = 2  # of a persistent kernel, so that each takes several tiles


@dataclass
class Row:
    """What became of one case."""

    op: str
    arch: str
    dtype: str
    case: str
    triton: str  # its version
    like: str = ""  # the architecture that has the very same PTX: what follows is its row's
    adversaries: int = 0
    ratio: float = float("nan")  # error over the plain twin's
    problems: list[tuple[str, str]] = field(default_factory=list)  # kind and text
    notes: list[tuple[str, str]] = field(default_factory=list)
    instructions: int = 0
    emulated: float = 0.0  # seconds in the engine
    seconds: float = 0.0

    @property
    def name(self) -> str:
        return f"{self.arch} {self.op} {self.dtype} {self.case}"

    @property
    def status(self) -> str:
        return "FAIL" if self.problems else "ok"

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def build(case: Case, kind: Kind, seed: int = 0) -> Problem:
    """The case's data: the same for every architecture, whatever ran before."""
    torch.manual_seed(zlib.crc32(f"{case.op} {case.name} {kind.name} {seed}".encode()))
    return case.build(kind)


def call(
    driver: EmulatorDriver, problem: Problem, arch: str, mode: Mode, seed: int, programs: int = PROGRAMS
) -> tuple[list[Tensor], list[Run]]:
    """The kernel's results under one adversary, and its launches. AssertionError if anything else has changed."""
    driver.settings.mode, driver.settings.seed = mode, seed
    driver.runs.clear()
    guards = Guards()
    with ExitStack() as stack:
        for context in (assume(arch), poisoned(guards), persistent_programs(programs)):
            stack.enter_context(context)
        result = problem.call(guards)
    guards.check()
    return list(result) if isinstance(result, tuple) else [result], list(driver.runs)


class Gate:
    """Cases on a driver, each under the same adversaries.

    What a program does over the same data is known once it has been emulated. So an architecture for which Triton makes
    the very same PTX as for one before, sm_89 after sm_86, gets that one's row.
    """

    def __init__(
        self, driver: EmulatorDriver, adversaries: tuple[tuple[Mode, int], ...] = ADVERSARIES, seed: int = 0
    ) -> None:
        self.driver, self.adversaries, self.seed = driver, adversaries, seed
        self._rows: dict[tuple[object, ...], Row] = {}

    def check(self, case: Case, kind: Kind, arch: str) -> Row:
        row = Row(case.op, arch, kind.name, case.name, version("triton"))
        started = time.perf_counter()
        try:
            problem = build(case, kind, self.seed)
            programs = (case.op, case.name, kind.name, *self._programs(problem, arch))
            if known := self._rows.get(programs):
                row = replace(known, arch=arch, like=known.arch, emulated=0.0)
            else:
                _check(self.driver, problem, arch, self.adversaries, row)
                self._rows[programs] = row
        except Exception as error:  # which is what became of this case; the others go on
            row.problems.append(("ERROR", f"{type(error).__name__}: {str(error)[:1000]}"))
        row.seconds = time.perf_counter() - started
        return row

    def _programs(self, problem: Problem, arch: str) -> list[object]:
        """What is launched, of which nothing is executed."""
        self.driver.blocks = (0, 0)
        _, runs = call(self.driver, problem, arch, "earliest", 0)
        self.driver.blocks = None
        return [(run.grid, run.shared, run.hopper, _digest(run.ptx)) for run in runs]


def _digest(ptx: str) -> bytes:
    """Of PTX without what it says of its target and its source."""
    instructions = re.sub(r"^\s*\.(version|target|loc|file|section)\b.*$|//.*$", "", ptx, flags=re.MULTILINE)
    return hashlib.sha256(instructions.encode()).digest()


def _check(
    driver: EmulatorDriver, problem: Problem, arch: str, adversaries: tuple[tuple[Mode, int], ...], row: Row
) -> None:
    first: list[Tensor] | None = None
    for mode, seed in adversaries:
        label = f"[{mode} {seed}]"
        try:
            outputs, runs = call(driver, problem, arch, mode, seed)
        except AssertionError as error:
            row.problems.append(("GUARD", f"{label} {error}"))
            continue
        if not runs:
            raise RuntimeError("no kernel was launched")
        row.adversaries += 1
        for run in runs:
            row.emulated += run.seconds
            row.instructions += run.executed
            for finding in run.findings:
                text = f"{label} {run.kernel}: {finding}"
                (row.notes if finding.harmless else row.problems).append((finding.kind, text))
        if first is None:
            first = [output.clone() for output in outputs]
            _judge(problem, outputs, row)
            continue
        for one, other in zip(first, outputs, strict=True):
            differ = (bits(one) != bits(other)).sum().item()
            if differ:
                text = f"{label} {differ} of {bits(one).numel()} bytes are not those of {adversaries[0][0]}"
                row.problems.append(("BITS", text))


def _judge(problem: Problem, outputs: list[Tensor], row: Row) -> None:
    plain, exact = problem.plain(), problem.exact()
    errors = [rms(x.double() - exact).item() for x in (outputs[0], plain, exact.to(plain.dtype))]
    row.ratio = errors[0] / max(*errors[1:], 1e-300)
    checks = {"ACCURACY": lambda: assert_as_accurate(outputs[0], plain, exact)}
    if problem.statistics:
        checks["STATISTICS"] = lambda: assert_statistics_of(outputs[1], outputs[0])
    for kind, assertion in checks.items():
        try:
            assertion()
        except AssertionError as error:
            row.problems.append((kind, str(error)))
