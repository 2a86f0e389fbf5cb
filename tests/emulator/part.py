"""The part of the gate that runs with the other tests. All of it: `python -m tests.emulator`."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from .cases import CASES, OPS
from .commands import json_of
from .gate import Row


@dataclass(frozen=True)
class Part:
    arch: str
    dtype: str
    ops: tuple[str, ...] = OPS

    def parameters(self) -> list[object]:
        cases = [case for case in CASES if case.op in self.ops and self.dtype in case.kinds]
        names = [f"{self.arch}-{case.op}-{self.dtype}-{case.name}" for case in cases]
        return [pytest.param(self, case.op, case.name, id=name) for case, name in zip(cases, names, strict=True)]

    def row(self, op: str, case: str) -> Row:
        rows = [Row(**row) for row in json_of("--arch", self.arch, "--dtype", self.dtype, "--op", *self.ops)]
        (found,) = (row for row in rows if (row.op, row.case) == (op, case))
        return found


def assert_passes(row: Row) -> None:
    assert not row.problems, "\n".join([row.name, *(text for _, text in row.problems)])
    assert row.adversaries > 1
    assert row.instructions > 0
