"""Runs one contest: every system's error against float64 and its times, as the rows of a table."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ..timing import Ceilings, Failed, Fault, Times, failure, lost, measure, products_in, reason, rotated
from .contests import OURS, PIXELS, PRODUCT, SEPARATE, Contest, Operands

KEY = ("op", "model", "part", "batch", "precision")  # the columns that name a row's contest
_MOST_ERROR = 0.05  # relative to the result; a system with a larger error computes something else

Row = dict[str, Any]


@dataclass(frozen=True)
class Measured:
    """A system's times, and its error relative to the result's norm: None for one that computes only a part."""

    error: float | None
    times: Times


def compare(contest: Contest, systems: Iterable[str], rounds: int, limits: Ceilings, device: torch.device) -> list[Row]:
    """A row for each of `systems`. One that fails has a reason in place of numbers.

    Raises:
        Fault: a system has ended this process's use of the GPU.
    """
    rows: list[Row] = []
    for name, found in measured(contest, systems, rounds, device).items():
        row = named(contest, name)
        if isinstance(found, Failed):
            row["failed"] = found.reason
        else:
            seconds = found.times.median
            row |= {"seconds": seconds, "spread": found.times.spread, "samples": list(found.times.samples)}
            row |= {"error": found.error, "flops": contest.operations / seconds, "bytes": contest.traffic / seconds}
            row["of_ceiling"] = of_ceiling(row, limits)
        rows.append(row)
    timed = [row for row in rows if "failed" not in row]
    best = min((row["seconds"] for row in timed if row["system"] not in (OURS, PRODUCT)), default=None)
    for row in timed:
        row["to_best_rival"] = None if best is None else best / row["seconds"]
    return rows


def named(contest: Contest, system: str) -> Row:
    """The columns that name the row of one of a contest's systems."""
    return {column: getattr(contest, column) for column in KEY} | {"system": system}


def of_ceiling(row: Row, limits: Ceilings) -> float:
    """The fraction that an op reached of the ceiling that limits it: of integers, that of bytes."""
    flops = 0.0 if row["precision"] == PIXELS else row["flops"] / limits.flops[row["precision"]]
    return max(flops, row["bytes"] / limits.bytes)


def measured(
    contest: Contest, systems: Iterable[str], rounds: int, device: torch.device
) -> dict[str, Measured | Failed]:
    """Compares some of a contest's systems with its separate passes in float64, and times those that agree.

    Raises:
        Fault: a system has ended this process's use of the GPU.
    """
    names = list(systems)
    results: dict[str, Measured | Failed] = {}
    errors: dict[str, float | None] = {}
    try:
        with torch.inference_mode(), products_in(contest.precision):
            copies = rotated(lambda: contest.operands(device), contest.traffic, device)
            exact = contest.systems[SEPARATE]({name: tensor.double() for name, tensor in copies[0].items()})
            for name in names:
                found = None if name == PRODUCT else _error(contest, name, copies[0], exact, device)
                if isinstance(found, Failed):
                    results[name] = found
                else:
                    errors[name] = found
            del exact
            calls = {name: [partial(contest.systems[name], operands) for operands in copies] for name in errors}
            graph = device.type == "cuda" and not torch.version.hip
            for name, times in measure(calls, device, rounds, graph=graph).items():
                results[name] = times if isinstance(times, Failed) else Measured(errors[name], times)
    except Exception as error:  # the operands or the float64 result may not fit on the device
        if isinstance(error, Fault) or lost(device):
            raise
        return dict.fromkeys(names, Failed(reason(error)))
    return {name: results[name] for name in names}


def _error(
    contest: Contest, name: str, operands: Operands, exact: torch.Tensor, device: torch.device
) -> float | Failed:
    try:
        error = float((contest.systems[name](operands).double() - exact).norm() / exact.norm())
    except Exception as why:  # any failure of a rival is its result
        return failure(name, why, device)
    return error if error < _MOST_ERROR else Failed(f"computes something else: relative error {error:.2g}")
