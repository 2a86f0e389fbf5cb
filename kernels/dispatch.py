"""Which implementation of an op runs, and its registration with PyTorch.

The Triton kernel runs where Triton can run: on a GPU, or on a CPU under Triton's interpreter (`TRITON_INTERPRET=1` in
the environment before the first call). Elsewhere, and for a dtype or size that no kernel serves, the plain PyTorch
oracle in `oracles.py` runs. It also runs in place of a launch that fails, see `toolchain.py`. Their results agree to
rounding.
"""

from __future__ import annotations

import importlib
import itertools
import threading
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, nullcontext
from contextvars import ContextVar, copy_context
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from . import oracles, toolchain
from .launches import TABLE
from .targets import pinned, why_not_computed

Impl = Literal["auto", "triton", "reference"]

_LIBRARY = torch.library.Library("clip_fast", "DEF")

_launching: dict[str, threading.RLock] = {}  # by op; held by the thread that launches it
_trusted: ContextVar[bool] = ContextVar("trusted", default=False)
_every_launch: ContextVar[bool] = ContextVar("every_launch", default=False)  # of the table, whatever the rows


@contextmanager
def trusted() -> Generator[None]:
    """Within this context ops take their operands unchecked, and PyTorch's dispatcher is passed over.

    For callers who know that the operands are sound, and that nothing is traced. The engine is one:

    * `engine.checked` has seen the images: four dimensions, three channels, the tower's size, a dtype that is taken.
      `Engine.checked` has put them on the device of the weights.
    * Owners give weights in a tower's own shapes, on one device, or raise `NotServed` (`_canonical` and `_checked` in
      `dropin/served.py`, `_difference` in `encoder.py`). `prepare` casts them all to one dtype.
    * All other operands are results of ops, or views of these, in shapes that the tower's configuration gives.
    * `route` takes traces and tensors without values elsewhere.
    """
    token = _trusted.set(True)
    try:
        yield
    finally:
        _trusted.reset(token)


def is_trusted() -> bool:
    return not torch.compiler.is_compiling() and _trusted.get()  # in this order: a trace cannot read the variable


@dataclass(frozen=True)
class Op:
    """An op, called with the implementation that is asked for, its tensors, and its other arguments.

    `lead` is the position, among the arguments, of the tensor whose dtype is computed in; ops of `bytes` compute in
    integers. The lead's last dimension may be at most `widest` for the kernel; `wide` is the plural of what that
    dimension is, in words.
    """

    name: str
    check: Callable[..., None]
    lead: int
    widest: int | None
    wide: str
    bytes: bool

    def __call__(self, impl: Impl, tensors: tuple[Tensor | None, ...], *options: Any) -> Any:
        """The op's results.

        Raises:
            RuntimeError: `impl` is "triton", and the kernel does not serve these operands.
            ValueError, TypeError: the operands are refused, or `impl` is none of the three.
        """
        if impl == "auto":
            if is_trusted():
                return self.dispatched(*tensors, *options)
            return getattr(torch.ops.clip_fast, self.name).default(*tensors, *options)
        self.check(*tensors, *options)
        if impl == "reference":
            return getattr(oracles, self.name)(*tensors, *options)
        if impl != "triton":
            raise ValueError(f"impl must be 'auto', 'triton' or 'reference', got {impl!r}")
        lead = tensors[self.lead]
        assert lead is not None
        reason = self.why_not_triton(lead)
        if reason is not None:
            raise RuntimeError(f"{self.name} cannot run on Triton: {reason}")
        return _launched(self.name, *tensors, *options)

    def checked(self, *args: Any) -> Any:
        """What PyTorch's dispatcher calls: `torch.ops.clip_fast` is open to everyone."""
        self.check(*args)
        return self.dispatched(*args)

    def dispatched(self, *args: Any) -> Any:
        """The op's results by the kernel, or by the oracle where no kernel serves."""
        lead: Tensor = args[self.lead]
        if self.why_not_triton(lead) is None:
            try:
                return _launched(self.name, *args)
            except Exception as error:  # Triton's own, the C compiler's, the file system's: they have no common type
                if not toolchain.gives_way(lead.device, error):
                    raise
        return getattr(oracles, self.name)(*args)

    def why_not_triton(self, lead: Tensor) -> str | None:
        """The reason why the kernel does not serve operands with this lead; None where it does."""
        if not triton_can_run(lead.device):
            return toolchain.why_not(lead.device)
        if not self.bytes and (reason := why_not_computed(lead.dtype)):
            return reason
        if self.widest is not None and lead.shape[-1] > self.widest:
            return f"{self.wide} are at most {self.widest} wide, got {lead.shape[-1]}"
        return None


def define(
    name: str,
    schema: str,
    fake: Callable[..., Any],
    check: Callable[..., None],
    *,
    lead: int = 0,
    widest: int | None = None,
    wide: str = "",
    bytes: bool = False,
) -> Op:
    """Registers an op with PyTorch.

    Args:
        name: of the op, of its oracle in `oracles.py`, and of the kernel's file and launcher.
        schema: arguments and results in PyTorch's language.
        fake: results without values for arguments without values, which are checked before.
        check: raises ValueError or TypeError for arguments that the op does not take.
        lead, widest, wide, bytes: see `Op`.
    """
    op = Op(name, check, lead, widest, wide, bytes)
    _launching[name] = threading.RLock()
    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CPU", "CUDA"):
        _LIBRARY.impl(name, op.checked, key)

    def checked_fake(*args: Any) -> Any:
        check(*args)
        return fake(*args)

    torch.library.register_fake(f"clip_fast::{name}", checked_fake, lib=_LIBRARY)
    return op


def triton_can_run(device: torch.device) -> bool:
    """Whether Triton launches on `device`: a GPU that the kernels are for, or a CPU under its interpreter."""
    return toolchain.why_not(device) is None


def _launched(name: str, *args: Any) -> Any:
    """The kernel's results, launched on the device of its operands; Triton by itself takes the current device.

    One thread launches a kernel at a time: during its first launch Triton shows it to other threads before it is
    loaded.
    """
    device: torch.device = args[0].device
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with _launching[name], torch.cuda.device(device) if elsewhere else nullcontext():
        if _every_launch.get():
            for number in range(TABLE.most):
                with pinned(number):
                    launcher(name)(*args)
        return launcher(name)(*args)


@cache
def launcher(name: str) -> Callable[..., Any]:
    """A kernel's launcher, imported at its first use: importing Triton takes a while and is not always possible."""
    return getattr(_module(name), name)


def _module(name: str) -> Any:
    return importlib.import_module(f".{name}", __package__)


# --- compiling ahead -------------------------------------------------------------------------------------------------

_compiling = threading.Lock()  # of the process: kernels are compiled ahead for one caller at a time


class _Compilers(ThreadPoolExecutor):
    """Threads that compile, each a kernel. Triton compiles outside of Python's lock for the most part."""

    def __init__(self) -> None:
        super().__init__(thread_name_prefix="clip_fast compiles")
        self.begun: list[Future[Any]] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.begun.append(super().submit(fn, *args, **kwargs))
        return self.begun[-1]


def compile_ahead(run: Callable[[], object], say: Callable[[int], None]) -> None:
    """Compiles and loads all kernels of the ops that `run` calls, side by side; other threads go on launching theirs.

    Each is compiled for any number of rows. Nothing is launched by `run`: the results of its ops have no values.

    Args:
        say: called with the number of kernels, if compiling them takes longer than a second.

    Raises:
        Exception: any error of Triton's, or of the toolchain that it calls.
    """
    with _compiling:
        copy_context().run(_compile_ahead, run, say)  # Triton 3.6 leaves its mode on after an error


def _compile_ahead(run: Callable[[], object], say: Callable[[int], None]) -> None:
    from triton import AsyncCompileMode
    from triton.runtime.jit import JITFunction

    _every_launch.set(True)
    kernels = {
        name: [each for each in vars(_module(name)).values() if isinstance(each, JITFunction)] for name in _launching
    }
    with ExitStack() as locked, _Compilers() as compilers, ExitStack() as changed, AsyncCompileMode(compilers):
        for kernel in itertools.chain(*kernels.values()):
            kernel.run = _compiling_run(kernel)
            changed.callback(vars(kernel).pop, "run", None)
        run()
        if wait(compilers.begun, timeout=1).not_done:
            say(len(compilers.begun))
        wait(compilers.begun)
        # Triton's mode ends with the locks held: no launch may wait for a kernel while it is entered as compiled.
        for lock in _launching.values():
            locked.enter_context(lock)
    for name, lock in _launching.items():
        with lock:  # no launch may find a kernel half loaded
            for kernel in kernels[name]:
                _load(kernel)


def _load(kernel: Any) -> None:
    """Loads all that is compiled of a kernel for the current device. None can be loaded while a graph is captured."""
    from triton.runtime import driver

    active: Any = driver.active
    caches = kernel.device_caches.get(active.get_current_device())
    for compiled in () if caches is None else tuple(caches[0].values()):
        ready = compiled.result() if hasattr(type(compiled), "result") else compiled  # of a thread that compiled it
        _ = ready.run  # the property loads it


def _compiling_run(kernel: Any) -> Callable[..., Any]:
    """In place of a kernel's `run`: only compiles where this thread asks, and launches where another one does."""
    mine = threading.get_ident()

    def run(*args: Any, warmup: bool, **options: Any) -> Any:
        return type(kernel).run(kernel, *args, warmup=warmup or threading.get_ident() == mine, **options)

    return run
