"""Kernels as compiled for Ampere and Ada, emulated: cp.async, ldmatrix, mma.sync."""

from __future__ import annotations

import pytest

from .part import Part, assert_passes

# The launches of sm_89 are those of sm_86, which differ from sm_80's in these ops.
PARTS = (
    Part("sm_80", "fp16"),
    Part("sm_80", "tf32"),
    Part("sm_80", "u8"),
    Part("sm_86", "fp16", ("linear", "flash_attention")),
)


@pytest.mark.slow
@pytest.mark.timeout(1800)  # the first test of a part compiles its kernels
@pytest.mark.parametrize(("part", "op", "case"), [p for part in PARTS for p in part.parameters()])
def test_gate(part: Part, op: str, case: str) -> None:
    assert_passes(part.row(op, case))
