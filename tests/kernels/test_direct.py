"""Launches that pass Triton's binder over: always the kernel that Triton itself would choose."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from clip_fast.kernels.sizes import cdiv, next_power_of_2

ROOT = Path(__file__).parents[2]

# A stand-in is in place of the driver of a GPU, and one in place of the compiler.
PROGRAM = """
import random
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor


class Driver:
    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


class Compiled:
    function = packed_metadata = None

    def run(self, *args):
        launched.append((self, args[:3], args[9:]))

    def launch_metadata(self, *args):
        return None

    def __getitem__(self, grid):
        return lambda *args: launched.append((self, grid, args))


def compile(self, key, *_):
    self.device_caches[0][0][key] = Compiled()
    return self.device_caches[0][0][key]


driver.set_active(Driver())
JITFunction._do_compile = compile
from clip_fast.kernels import direct

launched, bound = [], []
plans = {}
binding = JITFunction.run


def run(self, *args, warmup, **options):
    if not warmup:
        bound.append(self)
    return binding(self, *args, warmup=warmup, **options)


JITFunction.run = run


@triton.jit
def kernel(x_ptr, y, n, m, scale, N: triton.language.constexpr, WIDE: triton.language.constexpr):
    pass


@triton.jit
def other(x_ptr, y, n, m, scale, N: triton.language.constexpr, WIDE: triton.language.constexpr):
    pass


def check(jit, grid, arguments, **constants):
    \"\"\"Whether Triton bound the arguments. The kernel is the one that Triton chooses for them.\"\"\"
    bound.clear()
    launched.clear()
    if random.random() < 0.5:
        direct.launch_kernel(jit, torch.device("cpu"), grid, *arguments, **constants)
    else:
        tensors, numbers = arguments[:2], arguments[2:]
        settled = jit, grid, numbers, tuple(constants.items())
        if settled not in plans:
            plans[settled] = direct.Plan(jit, torch.device("cpu"), grid, numbers, **constants)
        plans[settled].launch(*tensors)
    (compiled, size, given), = launched
    assert tuple(size) == (*grid, 1, 1)[:3]
    assert given[: len(arguments)] == arguments
    assert compiled is jit.run(*arguments, grid=grid, warmup=True, **constants), (arguments, constants)
    return bool(bound)


memory = torch.zeros(4096, dtype=torch.int8)
start = -memory.data_ptr() % 16


def pointer(dtype):
    offset = start + random.choice([0, 0, 8, 16, 24])
    return memory[offset : offset + 512].view(dtype)[: random.choice([1, 16])]


def descriptor():
    rows = torch.zeros(32, 32, dtype=random.choice([torch.float16, torch.float32]))
    return TensorDescriptor.from_tensor(rows, random.choice([[16, 32], [32, 16]]))


integers = [0, 1, 2, 16, 17, 32, 48, 2**31 - 16, 2**31, 2**31 + 1, 2**40, -1, -16]
first = 0
for _ in range(4000):
    arguments = (
        pointer(random.choice([torch.float16, torch.bfloat16, torch.float32])),
        random.choice([None, pointer(torch.float32), descriptor()]),
        random.choice(integers),
        random.choice(integers),
        random.choice([0.0, 1.0, 0.125]),
    )
    grid = random.choice([(3,), (3, 2), (3, 2, 1)])
    constants = {"N": random.choice([16, 32]), "WIDE": random.choice([False, True])}
    first += check(random.choice([kernel, other]), grid, arguments, num_warps=random.choice([4, 8]), **constants)
assert 0 < first < 4000

aligned, ends = memory[start : start + 64].view(torch.float16), memory[start + 2 : start + 66].view(torch.float16)
chosen = {}
for name, x, n in (("aligned", aligned, 32), ("not aligned", ends, 32), ("one", aligned, 1), ("odd", aligned, 33)):
    for _ in range(20):
        check(kernel, (1,), (x, None, n, 64, 1.0), N=16, WIDE=False)
    assert not bound
    chosen[name] = launched[0][0]
assert len(set(chosen.values())) == 4, chosen

# Plans that differ in numbers for which nothing is compiled share a kernel.
for n in (48, 80):
    bound.clear()
    plan = direct.Plan(kernel, torch.device("cpu"), (1,), (n, 64, 1.0), N=16, WIDE=False)
    for _ in range(2):
        launched.clear()
        plan.launch(ends, ends)
        assert launched[0][0] is kernel.run(ends, ends, n, 64, 1.0, grid=(1,), warmup=True, N=16, WIDE=False)
    assert bound == [kernel] * (n == 48), bound

# Where a kernel has a run of its own it is not launched past it, and nothing that it returns is kept.
kept = len(direct._compiled)
kernel.run = lambda *args, grid, warmup, **options: Compiled()
launched.clear()
direct.launch_kernel(kernel, torch.device("cpu"), (1,), aligned, None, 32, 64, 1.0, N=16, WIDE=False)
direct.launch_kernel(kernel, torch.device("cpu"), (1,), aligned, None, 32, 64, 1.0, N=99, WIDE=False)
assert not launched and len(direct._compiled) == kept
print("done")
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="a stand-in is in place of the driver")
def test_the_kernel_is_the_one_that_triton_chooses(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    program = tmp_path / "program.py"  # Triton reads the source of its kernels
    program.write_text(PROGRAM)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "done"


def test_sizes() -> None:
    for size in range(1, 300):
        assert cdiv(size, 16) == len(range(0, size, 16))
        power = next_power_of_2(size)
        assert power & (power - 1) == 0
        assert power // 2 < size <= power
