"""What the driver tells the engine of a launch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from .build import default_cache
from .commands import require_emulator
from .single import kernel


def _findings(names: tuple[str, str], programmatic: bool) -> set[str]:
    """Of a kernel that reads its first tensor, waits for the kernels before it, and writes its second."""
    require_emulator()
    from .driver import EmulatorDriver  # which imports Triton

    driver = EmulatorDriver(lambda: 90, default_cache())
    source: Any = SimpleNamespace(signature=dict.fromkeys(names, "*i32"), fn=SimpleNamespace(__name__="kernel"))
    metadata = SimpleNamespace(shared=0, launch_pdl=programmatic, target=SimpleNamespace(arch=90))
    ptx = kernel("ld.global.b32 %r1, [%d30]; griddepcontrol.wait; st.global.b32 [%d31], %r1;")
    tensors = torch.ones(2, 4, dtype=torch.int32)
    driver.launcher_cls(source, metadata)(1, 1, 1, None, ptx, *tensors)
    (run,) = driver.runs
    assert run.tensors == list(names)
    return {finding.kind for finding in run.findings}


@pytest.mark.parametrize(
    ("first", "programmatic", "found"),
    [("x_ptr", True, {"EARLY"}), ("x", False, set()), ("weight_ptr", True, set()), ("bias", True, set())],
)
def test_weights_alone_are_read_before_a_wait(first: str, programmatic: bool, found: set[str]) -> None:
    assert _findings((first, "y_ptr"), programmatic) == found
