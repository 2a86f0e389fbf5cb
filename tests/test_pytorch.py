"""A release of PyTorch that has lost a private name: the package imports, computes the same, and says what it costs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from subprocess import PIPE

import pytest

# Has imported PyTorch, which takes most of a process's time, and not clip_fast. For each line of names it forks a child
# that takes the names away, imports clip_fast, and prints whether an embedding is the plain tower's. A line `status N`
# ends the answer.
PROGRAM = """
import os, sys, traceback, warnings
from operator import attrgetter
import torch, torch.autograd.forward_ad, torch.multiprocessing.reductions, torch._subclasses.fake_tensor

class Without:
    def __init__(self, whole, lost):
        self.__dict__.update(whole=whole, lost=lost)
    def __getattr__(self, name):
        if name == self.lost:
            raise AttributeError(name)
        return getattr(self.whole, name)

def run_without(*names):
    for path in names:
        parent, _, leaf = path.rpartition(".")
        place, _, name = parent.rpartition(".")
        module = f"torch.{parent}"
        lost = Without(sys.modules[module] if module in sys.modules else attrgetter(parent)(torch), leaf)
        if module in sys.modules:
            sys.modules[module] = lost
        setattr(attrgetter(place)(torch) if place else torch, name, lost)

    import clip_fast
    with warnings.catch_warnings(record=True) as said, torch.no_grad():
        warnings.simplefilter("always")
        model, _ = clip_fast.load("tiny-digits", "cpu")
        images = torch.rand(2, 3, 32, 32)
        close = torch.allclose(model.encode_image(images), model.visual(images), atol=1e-5)
        model.visual.proj.mul_(2)
        close &= torch.allclose(model.encode_image(images), model.visual(images), atol=1e-5)
    print(close, "|".join(str(each.message) for each in said), flush=True)

for line in sys.stdin:
    assert "clip_fast" not in sys.modules
    child = os.fork()
    if child == 0:
        status = 1
        try:
            run_without(*line.split())
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    print("status", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""

# The names of `clip_fast.pytorch`, and a part of the warning that tells what is lost with each.
NAMES = {
    "autograd.forward_ad._current_level": "",
    "_C._functorch.maybe_current_level": "",
    "_subclasses.fake_tensor.FakeTensor": "",
    "_C._get_dispatch_mode": "",
    "_C._TorchDispatchModeKey.FAKE": "",
    "Tag.cudagraph_unsafe": "",
    "nn.modules.module._global_forward_hooks": "hooks are registered",
    "multiprocessing.reductions.StorageWeakRef": "prepares the weights at every call",
    "UntypedStorage._new_shared": "",
    "UntypedStorage._expired": "prepares the weights at every call",
    "optim.optimizer.register_optimizer_step_post_hook": "prepares the weights at every call",
    "nn.modules.module.register_module_module_registration_hook": "prepares the weights at every call",
    "ops.mkldnn._linear_pointwise": "",
    "ops.mkldnn._reorder_linear_weight": "",
    "ops.mkldnn._convolution_pointwise": "",
    "ops.mkldnn._is_mkldnn_bf16_supported": "",
    "ops.mkldnn._get_mkldnn_serialized_md": "",
    "ops.mkl._mkl_linear": "",
}


RunWithout = Callable[..., str]


@pytest.fixture(scope="module")
def run_without() -> Iterator[RunWithout]:
    """Gives the warnings of a process of its own without some names; its embeddings must be right."""
    with subprocess.Popen([sys.executable, "-c", PROGRAM], stdin=PIPE, stdout=PIPE, text=True) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        requests, answers = server.stdin, server.stdout

        def run(*names: str) -> str:
            print(*names, file=requests, flush=True)
            lines: list[str] = []
            while not (line := answers.readline()).startswith("status"):
                assert line, "the process has ended"
                lines.append(line)
            assert line == "status 0\n"  # otherwise its traceback is in the captured stderr
            right, _, said = "".join(lines).strip().partition(" ")
            assert right == "True"
            return said

        yield run


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_without_a_name(name: str, run_without: RunWithout) -> None:
    assert NAMES[name] in run_without(name)


def test_without_any_fast_operator_of_a_cpu(run_without: RunWithout) -> None:
    assert run_without(*(name for name in NAMES if name.startswith("ops."))) == ""


def test_with_all_names_nothing_is_said(run_without: RunWithout) -> None:
    assert run_without() == ""
