"""The part of the gate that runs with the other tests. All of it: `python -m tests.emulator`."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from .cases import CASES, OPS
from .commands import json_of
from .gate import Row
from .problem import Case


@dataclass(frozen=True)
class Part:
    arch: str
    dtype: str
    ops: tuple[str, ...] = OPS
    quick: bool = False  # the first case of each op, two adversaries

    def parameters(self) -> list[object]:
        cases: list[Case] = []
        for op in self.ops:
            cases += [case for case in CASES if case.op == op and self.dtype in case.kinds][: 1 if self.quick else None]
        names = [f"{self.arch}-{case.op}-{self.dtype}-{case.name}" for case in cases]
        return [pytest.param(self, case.op, case.name, id=name) for case, name in zip(cases, names, strict=True)]

    def row(self, op: str, case: str) -> Row:
        options = ("--quick", "--each", "1") if self.quick else ()
        rows = [Row(**row) for row in json_of("--arch", self.arch, "--dtype", self.dtype, "--op", *self.ops, *options)]
        (found,) = (row for row in rows if (row.op, row.case) == (op, case))
        return found


def assert_passes(row: Row) -> None:
    assert not row.problems, "\n".join([row.name, *(text for _, text in row.problems)])
    assert row.adversaries > 1
    assert row.instructions > 0
