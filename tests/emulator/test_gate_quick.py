"""One case of each op, as compiled for Ampere and for Hopper: with every release of Triton that CI has."""

from __future__ import annotations

import pytest

from .part import Part, assert_passes

PARTS = tuple(Part(arch, dtype, quick=True) for arch in ("sm_80", "sm_90") for dtype in ("fp16", "u8"))


@pytest.mark.parametrize(("part", "op", "case"), [p for part in PARTS for p in part.parameters()])
def test_gate(part: Part, op: str, case: str) -> None:
    assert_passes(part.row(op, case))
