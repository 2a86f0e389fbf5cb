"""Kernels that are launched before the last one has ended: which, where, and that they wait first."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

from clip_fast.kernels import primitives, targets

KERNELS = [
    (file.name, node)
    for file in sorted(Path(targets.__file__).parent.glob("*.py"))
    for node in ast.parse(file.read_text()).body
    if isinstance(node, ast.FunctionDef) and node.name.startswith("_") and node.name.endswith("_kernel")
]


@pytest.mark.parametrize("kernel", [node for _, node in KERNELS], ids=[f"{file} {node.name}" for file, node in KERNELS])
def test_a_kernel_waits_first(kernel: ast.FunctionDef) -> None:
    statements = [one for one in kernel.body if not (isinstance(one, ast.Expr) and isinstance(one.value, ast.Constant))]
    assert ast.unparse(statements[0]) == "wait_for_the_last(DEPENDENT)"


def test_there_are_kernels() -> None:
    assert len(KERNELS) >= 8


@pytest.mark.parametrize(
    ("arch", "device", "driver", "wanted"),
    [
        ("sm_90", "cuda", 12_030, True),
        ("sm_90", "cuda", 12_020, False),  # its graphs know no such launches
        ("sm_120", "cuda", 13_000, True),
        ("sm_89", "cuda", 13_000, False),
        ("gfx942", "cuda", 13_000, False),
        ("sm_90", "meta", 0, True),  # compiled for, not launched
    ],
)
def test_where(arch: str, device: str, driver: int, wanted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "_driver", lambda: driver)
    compiled = {"DEPENDENT": True, "launch_pdl": True} if wanted else {"DEPENDENT": False}
    for interpreted, arguments in ((False, compiled), (True, {"DEPENDENT": False})):
        monkeypatch.setattr(primitives.knobs.runtime, "interpret", interpreted)
        with targets.assume(arch):
            assert primitives.dependent_launch(torch.device(device)) == arguments
