"""Kernels that are compiled ahead: side by side, without a launch; a stand-in is in place of the driver of a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PROGRAM = """
import sys, threading
import torch
from triton.backends.compiler import GPUTarget
import triton.compiler
from triton.compiler import compiler
from triton.runtime import driver
from triton.runtime.jit import JITFunction

launched, loaded = [], []


class Utils:
    def load_binary(self, name, *_):
        loaded.append(name)
        return 1, 1, 200, 0, 1024

    def __getattr__(self, name):
        return lambda *_: 0


class Driver:
    utils = Utils()

    def launcher_cls(self, src, metadata):
        return lambda *_: launched.append((metadata.name, threading.current_thread().name))

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 80, 32)


driver.set_active(Driver())
compiler.max_shared_mem = lambda device: 166_912
from clip_fast.kernels import dispatch, ops
from clip_fast.kernels.launches import TABLE
from clip_fast.kernels.targets import pinned

dispatch.triton_can_run = lambda device: True
x, gain = torch.zeros(4, 64).half(), torch.zeros(64)
weight = torch.zeros(64, 64).half()


def run():
    y, statistics = ops.layer_norm(x, gain, gain, statistics=True)
    y, _ = ops.linear(y, weight, gain, norm=(statistics, gain))
    ops.linear(y, weight, gain, norm=(statistics, gain))  # the same kernel again
    return ops.mean_token(y[None], gain)


said = []
original = compiler.compile


def compile(*args, **options):
    if threading.current_thread().name.startswith("clip_fast compiles"):
        with counting:
            begun.append(None)
            number = len(begun)
        if number == 3:  # two others compile
            thread = threading.Thread(target=other, name="other")
            thread.start()
            thread.join(300)
            assert not thread.is_alive(), "no other thread launches while kernels are compiled"
            together.set()
        assert together.wait(400)
    return original(*args, **options)


begun, counting, together = [], threading.Lock(), threading.Event()
triton.compiler.compile = compile

elsewhere = threading.Event()


def other():  # another thread goes on launching
    ops.mean_token(x[None].float(), gain)
    elsewhere.set()


def first():
    threading.Thread(target=other, name="other").start()
    assert elsewhere.wait(300)
    return run()


dispatch.compile_ahead(first, said.append)
assert [thread for _, thread in launched] == ["other"] * 2, launched
launched.clear()
ahead = list(loaded)  # in the capture of a graph none could be
triton.compiler.compile = lambda *_, **__: sys.exit("compiled again")
for kernel in vars(dispatch._module("linear")).values():
    assert "run" not in getattr(kernel, "__dict__", {})
bound = JITFunction.run
for JITFunction.run in (bound, lambda *_, **__: sys.exit("bound again")):  # the second time past Triton's binder
    launched.clear()
    run()
    assert [name for name, _ in launched] == [
        "_layer_norm_kernel", "_linear_kernel", "_linear_kernel", "_mean_token_kernel",
    ], launched
JITFunction.run = bound
launches = TABLE["linear"]["half"]["sm_80"]
kernels = 2 + len(launches)
assert said in ([], [kernels]), said
assert len(begun) == kernels
for number in range(len(launches)):  # whatever the rows
    with pinned(number):
        run()
assert loaded == ahead, (loaded, ahead)

triton.compiler.compile = original
late = threading.Thread(target=lambda: ops.mean_token(x[None].bfloat16(), gain))
waited = []


def load_binary(self, name, *_):  # of a kernel that is launched first, and that Triton shows to other threads by now
    if late.ident is None:
        late.start()
        late.join(0.5)
        waited.append(late.is_alive())
    return 1, 1, 200, 0, 1024


Utils.load_binary = load_binary
ops.mean_token(x[None].bfloat16(), gain)
late.join(300)
assert waited == [True], "another thread launches a kernel that is not loaded yet"
print("done")
"""


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="a stand-in is in place of the driver")
def test_kernels_are_compiled_side_by_side_and_not_launched(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "done"
