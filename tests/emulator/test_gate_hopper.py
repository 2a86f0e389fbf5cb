"""Kernels as compiled for Hopper and Blackwell's sm_120, emulated: wgmma, tensor maps, mbarriers, bulk stores."""

from __future__ import annotations

import pytest

from .part import Part, assert_passes

PARTS = (
    Part("sm_90", "fp16"),
    Part("sm_90", "tf32"),
    Part("sm_90", "u8"),
    Part("sm_120", "fp16", ("linear", "flash_attention")),
)


@pytest.mark.slow
@pytest.mark.timeout(1800)  # the first test of a part compiles its kernels
@pytest.mark.parametrize(("part", "op", "case"), [p for part in PARTS for p in part.parameters()])
def test_gate(part: Part, op: str, case: str) -> None:
    assert_passes(part.row(op, case))
