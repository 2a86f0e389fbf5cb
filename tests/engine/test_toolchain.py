"""Where Triton cannot launch, plain PyTorch computes on the same device, with one warning; a strict process fails.

Triton's interpreter stands for a GPU: launches work until one of them is made to fail as it does on users' machines.
"""

from __future__ import annotations

import fnmatch
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from random_towers import random_tower, relative_error
from torch import Tensor

import clip_fast
from clip_fast import loading
from clip_fast.encoder import ImageEncoder
from clip_fast.engine import ahead, graphs
from clip_fast.engine.engine import Engine
from clip_fast.engine.graphs import Graphs
from clip_fast.kernels import dispatch, ops, toolchain
from clip_fast.towers.config import ResNetConfig, Task, VitConfig

VIT = VitConfig(image_size=32, patch_size=16, width=64, layers=2, heads=1, embed_dim=32)
RESNET = ResNetConfig(layers=(1, 1, 1, 1), width=4, heads=2, image_size=32, embed_dim=32)
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter stands for a GPU")


def failures() -> dict[str, tuple[Exception, str]]:
    """What Triton raises on users' machines, and a part of the remedy."""
    errors = pytest.importorskip("triton.runtime.errors")
    return {
        "no C compiler": (
            RuntimeError("Failed to find C compiler. Please specify via CC or set triton.knobs.build.impl."),
            "apt-get install gcc python3-dev",
        ),
        "no Python.h": (
            subprocess.CalledProcessError(1, ["/usr/bin/gcc", "main.c", "-O3", "-shared"]),
            "apt-get install gcc python3-dev",
        ),
        "no ldconfig": (
            FileNotFoundError(2, "No such file or directory", "/sbin/ldconfig"),
            "TRITON_LIBCUDA_PATH",
        ),
        "shared memory": (errors.OutOfResources(213032, 101376, "shared memory"), "no launch that fits this GPU"),
        "unknown architecture": (
            errors.PTXASError("PTXAS error: `ptxas` failed, gpu-name sm_130a not known"),
            "A newer PyTorch",
        ),
        "old driver": (
            RuntimeError("Triton Error [CUDA]: device kernel image is invalid"),
            "Update the GPU's driver",
        ),
        "read-only cache": (PermissionError(13, "Permission denied", "/root/.triton"), "Set TRITON_CACHE_DIR"),
        "full cache": (OSError(28, "No space left on device"), "Free some space, or set TRITON_CACHE_DIR"),
    }


FAILURES = failures()


@pytest.fixture(autouse=True)
def _as_on_a_users_machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.delenv("CLIP_FAST_STRICT")
    toolchain.forget()
    monkeypatch.setattr(ahead, "_probed", set())
    yield
    toolchain.forget()


@pytest.fixture
def graphed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every batch that Triton computes asks for a graph; a capture runs once to compile, and once more."""

    def capture(self: Graphs, bucket: int, images: Tensor, task: Task, size: int) -> Any:
        self._run(images, task)
        return self._run(images, task)

    monkeypatch.setattr(Engine, "_bucket", lambda self, images: 2 if dispatch.triton_can_run(CPU) else None)
    monkeypatch.setattr(graphs, "allowed", lambda: True)
    monkeypatch.setattr(Graphs, "__call__", capture)


def fail(monkeypatch: pytest.MonkeyPatch, error: Exception, *names: str) -> None:
    """Makes the launches of the kernels of these names fail; of all, where none is named."""
    launcher = dispatch.launcher

    def failing(name: str) -> Callable[..., Any]:
        def launch(*args: Any) -> Any:
            raise error

        return launch if not names or name in names else launcher(name)

    monkeypatch.setattr(dispatch, "launcher", failing)


def encoder(config: VitConfig | ResNetConfig = VIT) -> tuple[ImageEncoder, Tensor, Tensor]:
    """An encoder, images, and what the plain tower makes of them."""
    model = ImageEncoder(config, random_tower(config).state_dict(), CPU, torch.float32)
    images = torch.randn(2, 3, 32, 32)
    return model, images, model.visual(images)


def messages(said: list[warnings.WarningMessage]) -> list[str]:
    """Our own; the interpreter's NumPy may warn of an overflow."""
    return [str(warning.message) for warning in said if warning.category is UserWarning]


def check_survives(error: Exception, remedy: str, config: VitConfig | ResNetConfig = VIT) -> None:
    """Both calls give the right embeddings, with one warning between them; so does another model without any."""
    model, images, wanted = encoder(config)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            assert relative_error(model.encode_image(images), wanted) < 1e-5
        another, images, wanted = encoder(config)
        assert relative_error(another.encode_image(images), wanted) < 1e-5
    (message,) = messages(said)
    assert message.startswith(f"clip_fast computes by plain PyTorch on cpu, not by its kernels: {type(error).__name__}")
    assert remedy in message
    assert not dispatch.triton_can_run(CPU)


@pytest.mark.parametrize("failure", FAILURES)
def test_launched(failure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    error, remedy = FAILURES[failure]
    fail(monkeypatch, error)
    check_survives(error, remedy)


@pytest.mark.parametrize("failure", FAILURES)
def test_in_a_graph(failure: str, graphed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe is left out, so that the failure is met while a graph is captured."""
    error, remedy = FAILURES[failure]
    monkeypatch.setattr(ahead, "probe", lambda device: None)
    fail(monkeypatch, error)
    check_survives(error, remedy)


@pytest.mark.parametrize("config", [VIT, RESNET], ids=["vit", "resnet"])
@pytest.mark.parametrize("kernel", ["linear", "attention_pool"])
def test_a_later_kernel(kernel: str, config: VitConfig | ResNetConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe and the first kernels run. The batch is finished, and the tower prepared anew for the next."""
    error, remedy = FAILURES["shared memory"]
    fail(monkeypatch, error, kernel)
    check_survives(error, remedy, config)


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("in_a_graph", [False, True])
def test_strict(
    failure: str, in_a_graph: bool, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if in_a_graph:
        request.getfixturevalue("graphed")
        monkeypatch.setattr(ahead, "probe", lambda device: None)
    monkeypatch.setenv("CLIP_FAST_STRICT", "1")
    error, _ = FAILURES[failure]
    fail(monkeypatch, error)
    model, images, _ = encoder()
    with pytest.raises(type(error)) as raised:
        model.encode_image(images)
    assert raised.value is error
    assert dispatch.triton_can_run(CPU)  # nothing is remembered


def test_an_op_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """With "auto" it survives; "triton" asks for the kernel, and gets the error."""
    error, remedy = FAILURES["no C compiler"]
    x, weight = torch.randn(3, 64), torch.randn(8, 64)
    fail(monkeypatch, error)
    with pytest.raises(RuntimeError, match="Failed to find C compiler"):
        ops.linear(x, weight, impl="triton")
    with pytest.warns(UserWarning, match=remedy):
        y, _ = ops.linear(x, weight)
    torch.testing.assert_close(y, x @ weight.T)
    with pytest.raises(RuntimeError, match="linear cannot run on Triton: RuntimeError: Failed to find C compiler"):
        ops.linear(x, weight, impl="triton")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), RuntimeError("Triton Error [CUDA]: out of memory")])
def test_a_want_of_memory_is_no_fault_of_the_toolchain(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    fail(monkeypatch, error)
    with pytest.raises(torch.OutOfMemoryError):
        ops.linear(torch.randn(3, 64), torch.randn(8, 64))
    assert dispatch.triton_can_run(CPU)


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RecursionError("maximum recursion depth exceeded"), OSError(24, "Too many open files"),
     BlockingIOError(11, "Resource temporarily unavailable")],
)  # fmt: skip
def test_what_passes_is_no_fault_of_the_toolchain(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as passing:
        fail(passing, error)
        with pytest.raises(type(error)):
            ops.linear(torch.randn(3, 64), torch.randn(8, 64))
    assert dispatch.triton_can_run(CPU)


def test_a_bad_argument_is_no_fault_of_the_toolchain() -> None:
    with pytest.raises(ValueError, match="precision must be one of"):
        ops.linear(torch.randn(3, 64), torch.randn(8, 64), precision="fp32")  # type: ignore[arg-type]
    assert dispatch.triton_can_run(CPU)


def test_an_error_that_broke_the_device_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "_works", lambda device: False)
    fail(monkeypatch, RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        ops.linear(torch.randn(3, 64), torch.randn(8, 64))
    assert dispatch.triton_can_run(CPU)


def test_a_long_command_line_is_cut() -> None:
    assert len(toolchain._line(subprocess.CalledProcessError(1, ["gcc", *map(str, range(1000))]))) < 230


# --- known beforehand ------------------------------------------------------------------------------------------------


def gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (9, 0), amd: str | None = None) -> None:
    """As if there were a GPU of this kind, as far as questions about it go."""
    monkeypatch.setattr(torch.version, "hip", amd and "6.4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(gcnArchName=amd))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    toolchain._unfit.cache_clear()


@pytest.fixture(autouse=True)
def _questions_are_asked_anew() -> Iterator[None]:
    yield
    toolchain._unfit.cache_clear()


@pytest.mark.parametrize(
    ("capability", "amd", "reason"),
    [
        ((7, 0), None, "for sm_80 (Ampere) and later, and this GPU is sm_70"),
        ((7, 5), None, "for sm_80 (Ampere) and later, and this GPU is sm_75"),
        ((8, 0), None, None),
        ((13, 0), None, None),  # tried: its first launch tells
        ((9, 4), "gfx942:sramecc+:xnack-", None),
        ((9, 5), "gfx950:sramecc+:xnack-", None),
        ((11, 0), "gfx1100", "the kernels are not for gfx1100"),
        ((10, 3), "gfx1030", "the kernels are not for gfx1030"),
        ((9, 9), "gfx1250", "the kernels are not for gfx1250"),
    ],
)
def test_gpus(
    capability: tuple[int, int], amd: str | None, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu(monkeypatch, capability, amd)
    assert dispatch.triton_can_run(CUDA) is (reason is None)
    if reason is None:
        return
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            ahead.probe(CUDA)
    (message,) = messages(said)
    assert message.startswith("clip_fast computes by plain PyTorch on cuda:0, not by its kernels: ")
    assert reason in message
    toolchain.forget()
    monkeypatch.setenv("CLIP_FAST_STRICT", "1")
    with pytest.raises(RuntimeError, match="by plain PyTorch"):
        ahead.probe(CUDA)


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (None, "Triton is not installed"),
        (SimpleNamespace(__version__="3.2.0"), r"Triton 3\.2\.0 is older than 3\.6"),
        (SimpleNamespace(__version__="3.10.1+git"), None),
    ],
)
def test_triton_missing_or_old(module: object, reason: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch)
    monkeypatch.setitem(sys.modules, "triton", module)
    assert dispatch.triton_can_run(CUDA) is (reason is None)
    if reason is not None:
        with pytest.warns(UserWarning, match=f"{reason}. Install the Triton that belongs to this PyTorch"):
            ahead.probe(CUDA)


def test_a_cpu_is_no_news(monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setenv("CLIP_FAST_STRICT", "1")
    clip_fast.load("tiny-digits", "cpu")
    assert not recwarn


def test_loading_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before any batch, loaded or accelerated; once in a process."""
    launched: list[str] = []
    launcher = dispatch.launcher
    monkeypatch.setattr(dispatch, "launcher", lambda name: launched.append(name) or launcher(name))
    clip_fast.load("tiny-digits", "cpu")
    clip_fast.load("tiny-digits", "cpu")
    assert launched == ["mean_token"]
    fail(monkeypatch, FAILURES["old driver"][0])
    ahead._probed.clear()
    with pytest.warns(UserWarning, match="Update the GPU's driver"):
        clip_fast.load("tiny-digits", "cpu")


@pytest.mark.parametrize(
    ("variable", "visible", "hip", "hidden"),
    [("CUDA", None, None, False), ("CUDA", "0", None, False), ("CUDA", "", None, True), ("CUDA", "-1", None, True),
     ("HIP", "", None, False), ("HIP", "", "7.0", True), ("ROCR", "-1", "7.0", True), ("CUDA", "", "7.0", True)],
)  # fmt: skip
@pytest.mark.parametrize("there", [False, True])
def test_a_gpu_that_pytorch_cannot_use(
    there: bool, variable: str, visible: str | None, hip: str | None, hidden: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nPlease update it.")

    monkeypatch.setattr(loading, "_gpu_is_there", lambda: there)
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(torch.version, "hip", hip)
    for each in ("CUDA", "HIP", "ROCR"):
        monkeypatch.delenv(f"{each}_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv(f"{variable}_VISIBLE_DEVICES", visible)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert loading.default_device() == CPU
    assert len(messages(said)) == (1 if there and not hidden else 0)
    for message in messages(said):
        assert "though this machine has a GPU: The NVIDIA driver on your system is too old" in message
        assert "Please update it" not in message


@pytest.mark.parametrize(
    ("file", "hip", "there"),
    [("/dev/nvidia0", None, True), ("/dev/nvidia0", "7.0", False), ("/dev/kfd", "7.0", True), ("/dev/kfd", None, False),
     ("/usr/lib/wsl/lib/libcuda.so.1", None, True), ("/dev/null", None, False)],
)  # fmt: skip
def test_a_gpu_is_there_where_its_driver_is(
    file: str, hip: str | None, there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(loading.os.path, "exists", lambda path: path == file)
    monkeypatch.setattr(loading.glob, "glob", lambda pattern: fnmatch.filter([file], pattern))
    assert loading._gpu_is_there() == there


# --- compiling ahead -------------------------------------------------------------------------------------------------


class OnGpu(Tensor):
    """A CPU's tensor that says it is on a GPU, as far as the first questions go."""

    is_cuda = True
    device = CUDA


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the batches that kernels were compiled for."""
    gpu(monkeypatch)
    seen: list[tuple[int, ...]] = []

    def compile_ahead(run: Callable[[], object], say: Callable[[int], None]) -> None:
        run()
        say(11)

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(dispatch, "compile_ahead", compile_ahead)
    monkeypatch.setattr(ahead, "_compiled", set())
    return seen


def images_on_gpu(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(*shape, dtype=dtype).as_subclass(OnGpu)


def test_kernels_are_compiled_once_and_it_is_said(
    compilations: list[tuple[int, ...]], caplog: pytest.LogCaptureFixture
) -> None:
    def run(images: Tensor) -> None:
        compilations.append(tuple(images.shape))

    for images in (images_on_gpu(4, 3, 2, 2), images_on_gpu(8, 3, 2, 2), images_on_gpu(4, 3, 2, 2, dtype=torch.uint8)):
        ahead.compile_kernels(run, images, "a tower")
    ahead.compile_kernels(run, images_on_gpu(4, 3, 2, 2), "another")
    ahead.compile_kernels(run, torch.zeros(4, 3, 2, 2), "a CPU's")
    assert compilations == [(1, 3, 2, 2)] * 3
    said = [record.getMessage() for record in caplog.records if record.name == "clip_fast"]
    assert said == ["compiling 11 kernels for NVIDIA H200, once: Triton keeps them"] * 3


def test_a_compilation_that_fails_ends_as_a_launch_that_fails(
    compilations: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    error, remedy = FAILURES["unknown architecture"]
    monkeypatch.setattr(toolchain, "_works", lambda device: True)

    def run(images: Tensor) -> None:
        raise error

    with pytest.warns(UserWarning, match=remedy):
        ahead.compile_kernels(run, images_on_gpu(4, 3, 2, 2), "a tower")
    assert not dispatch.triton_can_run(CUDA)
    ahead.compile_kernels(run, images_on_gpu(4, 3, 2, 2), "another")  # not tried
    toolchain.forget()
    monkeypatch.setenv("CLIP_FAST_STRICT", "1")
    with pytest.raises(type(error)):
        ahead.compile_kernels(run, images_on_gpu(4, 3, 2, 2), "another")
