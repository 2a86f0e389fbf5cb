"""Runs the kernels of these tests on a GPU if there is one, and in Triton's interpreter elsewhere.

The interpreter can show that the arithmetic, the masks and the shapes are right, that every result is written, and that
no value from outside a tensor enters a result. It cannot show TF32 rounding, races and speed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from interpreter import ORIGINALS
from kernel_checks import DEVICE, Guards

INTERPRETED = DEVICE.type == "cpu"


@pytest.fixture(autouse=True)
def _interpret(monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRETED:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    else:
        assert os.environ.get("TRITON_INTERPRET") != "1", "there is a GPU: unset TRITON_INTERPRET to test on it"


@pytest.fixture
def interpreter_originals() -> dict[str, Any]:
    """The interpreter's methods as Triton ships them; none on a GPU."""
    return ORIGINALS


@pytest.fixture
def guards(monkeypatch: pytest.MonkeyPatch) -> Iterator[Guards]:
    """Guard bands around tensors. `guards.copy` guards an input. Tensors that a launcher allocates are guarded anyway.

    Launchers allocate with `new_empty`, which poisons the tensor here. Elements that they do not write stay NaN in the
    result. A write to an input, or outside of an allocated tensor, fails the test at its end.
    """
    guards = Guards()

    def new_empty(self: torch.Tensor, *size: Any, dtype: torch.dtype | None = None, **_: Any) -> torch.Tensor:
        shape = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        return guards.empty(shape, dtype or self.dtype, self.device)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    yield guards
    monkeypatch.undo()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    guards.check()


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that were launched since the test began, interpreted or compiled."""
    from triton.runtime.interpreter import GridExecutor
    from triton.runtime.jit import JITFunction

    from clip_fast.kernels import direct

    def bound(key: Any, kernel: Any, grid: Any, arguments: Any, constants: Any) -> None:
        kernel[grid](*arguments, **constants)

    monkeypatch.setattr(direct, "_launch", bound)  # no launch passes Triton's binder over
    seen: list[str] = []
    run, interpret = JITFunction.run, GridExecutor.__call__

    def recorded_run(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(self.fn.__name__)
        return run(self, *args, **kwargs)

    def recorded_interpret(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(self.fn.__name__)
        return interpret(self, *args, **kwargs)

    monkeypatch.setattr(JITFunction, "run", recorded_run)
    monkeypatch.setattr(GridExecutor, "__call__", recorded_interpret)
    return seen
