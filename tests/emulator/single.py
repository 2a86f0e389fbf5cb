"""A few PTX instructions as a kernel of their own, for tests."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np

from .machine import Extent, Run, Settings, launch
from .registers import WIDTHS
from .translate import translate

# Types of the operands in PTX, and of the arrays that hold them.
ARRAYS: dict[str, Any] = {
    "u16": np.uint16, "s16": np.int16, "u32": np.uint32, "s32": np.int32, "u64": np.uint64, "s64": np.int64,
    "f16": np.float16, "f32": np.float32, "f64": np.float64, "b16": np.uint16, "b32": np.uint32, "b64": np.uint64,
}  # fmt: skip
_DECLARATIONS = """
    .reg .pred %p<32>; .reg .b16 %h<32>; .reg .b32 %r<64>; .reg .b64 %d<32>;
    ld.param.u64 %d30, [in]; ld.param.u64 %d31, [out];
    mov.u32 %r63, %tid.x;
"""


def generator() -> np.random.Generator:
    """Of random data, which --seed repeats."""
    return np.random.default_rng(random.getrandbits(64))


@dataclass
class Result:
    run: Run
    memory: np.ndarray  # that `out` pointed to

    @property
    def kinds(self) -> set[str]:
        return {finding.kind for finding in self.run.findings}


def kernel(body: str, warps: int = 1, parameters: str = "") -> str:
    """PTX of a kernel with pointers `in` (%d30) and `out` (%d31), and the thread in %r63."""
    return f"""
    .version 8.7 .target sm_90a .address_size 64
    .visible .entry kernel(.param .u64 in, .param .u64 out{parameters}) .reqntid {32 * warps}
    {{ {_DECLARATIONS} {body} ret; }}
    """


def run(
    body: str,
    data: np.ndarray | None = None,
    out_bytes: int = 4096,
    warps: int = 1,
    shared: int = 0,
    settings: Settings | None = None,
    tensor_map: bytes = b"",
    more: tuple[np.ndarray, ...] = (),
    constant: bool = False,
    programmatic: bool = False,
) -> Result:
    """Run a body over `data`, which may be `constant`; `more` are further arrays of its global memory."""
    parameters = ", .param .align 64 .b8 map[128]" if tensor_map else ""
    program = translate(kernel(body, warps, parameters))
    data = np.zeros(1, np.uint8) if data is None else np.ascontiguousarray(data)
    out = np.full(out_bytes, 0xEE, np.uint8)
    params = np.array([data.ctypes.data, out.ctypes.data], np.uint64).tobytes()
    if tensor_map:
        params = params.ljust(program.params[-1].offset, b"\0") + tensor_map
    tensors = [Extent(data.ctypes.data, data.nbytes, constant)]
    tensors += [Extent(array.ctypes.data, array.nbytes) for array in (out, *more)]
    settings = settings or Settings()
    done = launch(program, (1, 1, 1), params, tensors, shared, settings, hopper=True, programmatic=programmatic)
    return Result(done, out)


def evaluate(instruction: str, types: str, *operands: np.ndarray) -> np.ndarray:
    """What "{d}, {a}, {b}" of an instruction gives for 32 lanes. `types`: of the result, then of each operand."""
    result, *sources = types.split()
    body, offset = "", 0
    for i, (kind, operand) in enumerate(zip(sources, operands, strict=True)):
        assert operand.dtype == ARRAYS[kind]
        assert operand.shape == (32,)
        body += _address("%d30", kind) + f"ld.global.{_bits(kind)} {_register(kind, i)}, [%d29+{offset}];"
        offset += operand.nbytes
    places = {name: _register(kind, i) for i, (name, kind) in enumerate(zip("abc", sources, strict=False))}
    body += instruction.format(d=_register(result, 20), **places) + ";" + _address("%d31", result)
    body += f"st.global.{_bits(result)} [%d29], {_register(result, 20)};"
    data = np.concatenate([operand.view(np.uint8) for operand in operands]) if operands else None
    done = run(body, data)
    assert not done.run.findings, done.run.findings
    return done.memory.view(ARRAYS[result])[:32].copy()


def _bits(kind: str) -> str:
    return f"b{16 * WIDTHS[kind]}"


def _register(kind: str, number: int) -> str:
    return f"%{ {1: 'h', 2: 'r', 4: 'd'}[WIDTHS[kind]] }{number}".replace(" ", "")


def _address(base: str, kind: str) -> str:
    """%d29: where a lane's element lies."""
    return f"mul.wide.u32 %d28, %r63, {2 * WIDTHS[kind]}; add.s64 %d29, {base}, %d28;"
