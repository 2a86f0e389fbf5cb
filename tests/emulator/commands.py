"""The emulator's commands as tests run them: in a process of their own, where Triton compiles.

In the tests' own process Triton may be the interpreter's, which it decides at its import.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from .build import NoCompiler, compiler

_ROOT = Path(__file__).parents[2]


def require_emulator(triton: bool = True) -> None:
    """Skips the test where there is nothing to emulate with."""
    if triton and find_spec("triton") is None:
        pytest.skip("Triton is not installed: there is no PTX to emulate")
    try:
        compiler()
    except NoCompiler as error:
        pytest.skip(str(error))


@cache
def json_of(*arguments: str) -> list[dict[str, Any]]:
    """What a command prints with --json, once for each run of the tests."""
    require_emulator()
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).parent), *arguments, "--json"]
    done = subprocess.run(command, cwd=_ROOT, env=environment, capture_output=True, text=True)
    # 1 says that something did not pass, which its row says better
    assert done.returncode in (0, 1), f"{' '.join(command)}\n{done.stderr[-4000:]}"
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert rows, f"{' '.join(command)} printed nothing\n{done.stderr[-4000:]}"
    return rows
