"""The command line."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import date
from itertools import groupby, product
from pathlib import Path

import torch

from . import counts
from .breaks import BREAKS, attempt
from .build import NoCompiler, compiler
from .cases import CASES, OPS
from .driver import EmulatorDriver, install
from .gate import ADVERSARIES, ARCHITECTURES, Gate, Row, call
from .hazard import HAZARDS, look
from .launches import PRODUCTS, compare
from .problem import KINDS
from .shapes import SHAPES
from .subject import architecture, kernels_run

_HEADING = """# The kernels in the emulator

Every kernel's PTX, emulated on a CPU; none of it is run on a GPU. `python -m tests.emulator --json` makes the rows, and
`python -m tests.emulator table` makes this page of them. Cases are shapes. Adversaries decide when asynchronous copies
and products happen. The error ratio is the kernel's error over that of plain PyTorch in the same dtype, both against
float64. A case has faults if the emulator finds any of those in `tests/emulator/README.md`, if bits differ between
adversaries, or if the error is beyond the tests' bound."""


def main(arguments: list[str]) -> int:
    commands: dict[str, Callable[[list[str]], int]] = {
        "check": _check,
        "table": _table,
        "count": _count,
        "break": _break,
        "hazard": _hazard,
        "launches": _launches,
    }
    name = arguments[0] if arguments and arguments[0] in commands else "check"
    try:
        compiler()
    except NoCompiler as error:
        print(error)
        return 2
    return commands[name](arguments[arguments[:1] == [name] :])


def emulator(cache: Path | None) -> EmulatorDriver:
    """The emulator as Triton's device, and as the one that the project's ops run on."""
    torch.set_num_threads(1)
    driver = install(architecture, cache)
    kernels_run()
    return driver


def parser(text: str) -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(prog="python -m tests.emulator", description=text)
    result.add_argument("--cache", type=Path, help="where the engine and compiled kernels are kept")
    return result


def _check(arguments: list[str]) -> int:
    options = parser("Every kernel's PTX, emulated on this CPU, against its float64 oracle under every adversary.")
    options.add_argument("--arch", nargs="+", default=list(ARCHITECTURES), choices=ARCHITECTURES)
    options.add_argument("--op", nargs="+", default=list(OPS), choices=OPS)
    options.add_argument("--dtype", nargs="+", default=list(KINDS), choices=list(KINDS))
    options.add_argument("--case", default="", help="only cases whose names contain this")
    options.add_argument("--each", type=int, metavar="N", help="at most N cases of each op, architecture and dtype")
    options.add_argument("--quick", action="store_true", help="the first two adversaries only")
    options.add_argument("--truncating", action="store_true", help="sums as tensor cores have been seen to take them")
    options.add_argument("--seed", type=int, default=0, help="of the data")
    options.add_argument("--json", action="store_true", help="a line of JSON for each case, and no table")
    chosen = options.parse_args(arguments)
    driver = emulator(chosen.cache)
    driver.settings.truncating = chosen.truncating
    gate = Gate(driver, ADVERSARIES[:2] if chosen.quick else ADVERSARIES, chosen.seed)
    rows: list[Row] = []
    started = time.perf_counter()
    for arch, op, dtype in product(chosen.arch, chosen.op, chosen.dtype):
        cases = [case for case in CASES if case.op == op and dtype in case.kinds and chosen.case in case.name]
        for case in cases[: chosen.each]:
            row = gate.check(case, KINDS[dtype], arch)
            rows.append(row)
            print(json.dumps(row.as_json()) if chosen.json else _line(row), flush=True)
    if not chosen.json:
        print(f"\n{table(rows)}\n\n{len(rows)} cases in {time.perf_counter() - started:.0f} s")
    return any(row.problems for row in rows)


def _line(row: Row) -> str:
    text = f"{row.status:7}{row.name:55} ratio {row.ratio:.3f}  {row.instructions / 1e6:7.2f} M instructions  "
    text += f"as {row.like}" if row.like else f"{row.emulated:6.2f} of {row.seconds:6.2f} s"
    return "\n       ".join([text, *(problem[:400] for _, problem in row.problems[:6])])


def table(rows: list[Row]) -> str:
    """A line for each version of Triton, op, architecture and dtype."""
    lines = ["| Triton | op | architecture | dtype | cases | adversaries | worst error ratio | faults |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    rows = sorted(rows, key=_group)
    for _, members in groupby(rows, key=_group):
        group = list(members)
        triton, op, arch, dtype = group[0].triton, group[0].op, group[0].arch, group[0].dtype
        number = f"{len(group)} of {sum(case.op == op and dtype in case.kinds for case in CASES)}"
        if all(row.like for row in group):
            arch += f", as {group[0].like}"
        worst = max((row.ratio for row in group if row.ratio == row.ratio), default=float("nan"))
        faults = sum(bool(row.problems) for row in group)
        adversaries = min(row.adversaries for row in group)
        lines.append(f"| {triton} | {op} | {arch} | {dtype} | {number} | {adversaries} | {worst:.3f} | {faults} |")
    return "\n".join(lines)


def _group(row: Row) -> tuple[object, ...]:
    return row.triton, row.op, ARCHITECTURES.index(row.arch), row.dtype


def _table(arguments: list[str]) -> int:
    options = parser("One page of what several runs have written with --json; of a case's rows, the last counts.")
    options.add_argument("results", nargs="+", type=Path)
    lines = [line for path in options.parse_args(arguments).results for line in path.read_text().splitlines()]
    rows = {(row.triton, row.name): row for row in (Row(**json.loads(line)) for line in lines)}
    print(f"{_HEADING} Made on {date.today()}.\n\n{table(list(rows.values()))}")
    for triton in sorted({row.triton for row in rows.values()}):
        run = {(row.op, row.arch, row.dtype) for row in rows.values() if row.triton == triton}
        kinds = sorted({(case.op, dtype) for case in CASES for dtype in case.kinds})
        left = [f"{op} {arch} {dtype}" for arch in ARCHITECTURES for op, dtype in kinds if (op, arch, dtype) not in run]
        print(f"\nNot run with Triton {triton}: {', '.join(left) or 'nothing'}.")
    return 0


def _count(arguments: list[str]) -> int:
    options = parser("What the first block of a kernel executes, by class of instruction.")
    options.add_argument("shape", nargs="+", choices=list(SHAPES))
    options.add_argument("--arch", default="sm_90", choices=ARCHITECTURES)
    options.add_argument("--dtype", default="bf16", choices=list(KINDS))
    options.add_argument("--lines", action="store_true", help="every instruction that touches memory, too")
    chosen = options.parse_args(arguments)
    driver = emulator(chosen.cache)
    driver.settings.count, driver.blocks = True, (0, 1)
    for name in chosen.shape:
        problem = SHAPES[name](KINDS[chosen.dtype])
        for run in call(driver, problem, chosen.arch, "earliest", 0, programs=1 << 20)[1]:  # a tile for each program
            print(f"{name} {chosen.dtype} {chosen.arch}, {counts.table(run)}\n")
            if chosen.lines:
                print(f"{counts.by_line(run)}\n")
    return 0


def _break(arguments: list[str]) -> int:
    options = parser("PTX broken on purpose, one instruction at a time: how much of it the emulator notices.")
    options.add_argument("--arch", nargs="+", default=["sm_80", "sm_90"], choices=["sm_80", "sm_90"])
    options.add_argument("--json", action="store_true", help="a line of JSON for each way to break it")
    chosen = options.parse_args(arguments)
    driver = emulator(chosen.cache)
    missed = False
    for what in BREAKS:
        if what.arch not in chosen.arch:
            continue
        outcome = attempt(driver, what)
        missed |= not outcome.passed
        if chosen.json:
            print(json.dumps({"name": what.name, **asdict(outcome)}), flush=True)
            continue
        status = "ok" if outcome.passed else "FAIL"
        together = "together, too" if outcome.together else "but not all of them together"
        print(f"{status:5} {what.name}: {outcome.noticed} of {outcome.tried} noticed, {together}", flush=True)
        print("".join(f"    {text}\n" for text in outcome.details + outcome.missed), end="", flush=True)
    return missed


def _hazard(arguments: list[str]) -> int:
    options = parser("Registers written over while wgmma reads them, with the project's workaround and without.")
    options.add_argument("--json", action="store_true", help="a line of JSON for each case")
    chosen = options.parse_args(arguments)
    driver = emulator(chosen.cache)
    unexpected = False
    for op, case, dtype, needed in HAZARDS:
        for on in (True, False):
            seen = look(driver, op, case, dtype, needed, on)
            unexpected |= not seen.as_expected
            if chosen.json:
                print(json.dumps(asdict(seen)), flush=True)
                continue
            print(
                f"{op} {dtype} {case:20} workaround {'on ' if on else 'off'} {seen.races:3} faults, "
                f"{'same' if seen.same_bits else 'OTHER'} bits, error {seen.error:.1e} (twin {seen.twin:.1e})  "
                f"{seen.example[:160]}",
                flush=True,
            )
    return unexpected


def _launches(arguments: list[str]) -> int:
    options = parser("Products by every launch that the table has for them: sound each, and the same bits by all.")
    multiplied = [name for name, kind in KINDS.items() if kind.dtype.is_floating_point]
    options.add_argument("--arch", nargs="+", default=list(ARCHITECTURES), choices=ARCHITECTURES)
    options.add_argument("--dtype", nargs="+", default=multiplied, choices=multiplied)
    options.add_argument("--case", default="", help="only cases whose names contain this")
    options.add_argument("--json", action="store_true", help="a line of JSON for each launch of each case")
    chosen = options.parse_args(arguments)
    gate = Gate(emulator(chosen.cache), ADVERSARIES[:2])
    failed = False
    for arch in chosen.arch:
        for dtype in chosen.dtype:
            for case in PRODUCTS:
                if chosen.case not in f"{case.op} {case.name}":
                    continue
                for row in compare(gate, case, KINDS[dtype], arch):
                    failed |= bool(row.problems)
                    print(json.dumps(row.as_json()) if chosen.json else _line(row), flush=True)
    return failed
