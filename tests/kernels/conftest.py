"""Where the kernels run in these tests: on a GPU where there is one, in Triton's interpreter elsewhere.

What the interpreter can show: the arithmetic, masks, shapes, everything written, nothing read from beyond its tensor
into a result. What it cannot: TF32 rounding, races, speed.
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
    """The interpreter's methods as Triton ships them; empty on a GPU."""
    return ORIGINALS


@pytest.fixture
def guards(monkeypatch: pytest.MonkeyPatch) -> Iterator[Guards]:
    """Guard bands: `guards.copy` for inputs; all that a launcher allocates is poisoned and guarded without asking.

    Launchers allocate with `new_empty`. What they do not write stays NaN in the result, and a change to anything
    outside what they allocated, or to an input, fails the test at its end.
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
    """Names of the kernels launched since the test began, interpreted or compiled."""
    from triton.runtime.interpreter import GridExecutor
    from triton.runtime.jit import JITFunction

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
