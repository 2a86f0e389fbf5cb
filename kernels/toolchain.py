"""Whether Triton can launch on a device; where it cannot, why not, and what helps.

Some reasons are known beforehand: Triton is missing or too old, or the kernels are not for the GPU. Others are found by
a launch that fails: a missing C compiler, a cache that cannot be written to, a driver older than Triton's CUDA. From
then on plain PyTorch computes on the same device. One warning for each device gives the reason and the remedy.

`CLIP_FAST_STRICT=1` in the environment turns every warning of this file into an error.
"""

from __future__ import annotations

import errno
import importlib
import os
import re
import threading
import warnings
from functools import cache

import torch

from .targets import not_for_the_kernels

OLDEST_TRITON = (3, 6)  # older releases are not tested

_failed: dict[torch.device, str] = {}  # the devices on which a launch has failed, with the reason and the remedy
_told: set[torch.device] = set()  # the devices whose warning has been given
_lock = threading.Lock()

# Of the system's errors, those that say that the machine or this process has no more of something at the moment.
_PASSING = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN)

# What helps, by a pattern of the error's type and text. The first that matches is told.
_REMEDIES: tuple[tuple[str, str], ...] = (
    (
        r"C compiler|CalledProcessError.*\b(gcc|cc|clang|g\+\+)\b|Python\.h",
        "Triton needs a C compiler and Python's headers: apt-get install gcc python3-dev",
    ),
    (r"ldconfig|libcuda", "Set TRITON_LIBCUDA_PATH to the folder that holds libcuda.so.1"),
    (r"OutOfResources|out of resource", "The kernels have no launch that fits this GPU; please report its name"),
    (r"PTXAS|ptxas|gpu-name", "A newer PyTorch brings a newer Triton, which may know this GPU"),
    (
        r"kernel image|unsupported toolchain|PTX was compiled|driver version is insufficient",
        "Update the GPU's driver, or install a PyTorch for an older CUDA",
    ),
    (
        r"No space left|[Qq]uota exceeded",
        "Free some space, or set TRITON_CACHE_DIR to a folder on a disk that has some",
    ),
    (
        r"PermissionError|Permission denied|[Rr]ead-only|home directory",
        "Set TRITON_CACHE_DIR to a folder that can be written to",
    ),
    (r"is not installed|older than", "Install the Triton that belongs to this PyTorch, which its GPU builds bring"),
)


def why_not(device: torch.device) -> str | None:
    """The reason why Triton cannot launch on `device`, in words; None where it can."""
    if device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") != "1":
            return f"there is no GPU behind {device} and TRITON_INTERPRET is not 1, or Triton is not installed"
        return _failed.get(device) or without_triton()
    if device.type != "cuda":
        return f"there is no GPU behind {device}"
    device = _numbered(device)
    return _failed.get(device) or _unfit(device)


@cache
def without_triton() -> str | None:
    """The reason why Triton cannot be used in this process; None where it can."""
    try:
        found: str = importlib.import_module("triton").__version__
    except ModuleNotFoundError:
        return "Triton is not installed"
    except Exception as error:  # a broken installation may raise anything
        return f"Triton cannot be imported: {_line(error)}"
    if tuple(map(int, re.findall(r"\d+", found)[:2])) < OLDEST_TRITON:
        return f"Triton {found} is older than {'.'.join(map(str, OLDEST_TRITON))}"
    return None


@cache
def _unfit(device: torch.device) -> str | None:
    return not_for_the_kernels(device) or without_triton()


def tell(device: torch.device) -> None:
    """Warns, once for each device, that plain PyTorch computes there because Triton cannot launch.

    Raises:
        RuntimeError: in place of the warning, where `CLIP_FAST_STRICT=1`.
    """
    reason = why_not(device)
    device = _numbered(device)
    with _lock:
        if reason is None or device in _told:
            return
        message = f"clip_fast computes by plain PyTorch on {device}, not by its kernels: {_with_remedy(reason)}"
        if is_strict():
            raise RuntimeError(message)
        _told.add(device)
    warnings.warn(message, stacklevel=3)


def gives_way(device: torch.device, error: Exception) -> bool:
    """Whether plain PyTorch may compute in place of a launch that failed. If so, none is tried there from then on.

    Some errors are not the toolchain's, and the caller raises them: a want of memory, of stack or of open files, which
    passes; an error that has broken the device for everyone; and any error while this thread or another captures a
    CUDA graph, which forbids much that is allowed otherwise.

    Raises:
        torch.OutOfMemoryError: the GPU's memory did not suffice for a kernel; Triton calls this a RuntimeError.
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError, RecursionError)):
        return False
    if isinstance(error, OSError) and error.errno in _PASSING:
        return False
    if is_out_of_memory(error):
        raise torch.OutOfMemoryError(str(error)) from error
    if is_strict() or "captur" in str(error) or not _works(device):
        return False
    with _lock:
        _failed.setdefault(_numbered(device), _line(error))
    tell(device)
    return True


def is_out_of_memory(error: Exception) -> bool:
    """Whether a GPU's memory did not suffice, whoever says so: PyTorch's allocator, Triton, or CUDA itself."""
    called_so = isinstance(error, RuntimeError) and "out of memory" in str(error)
    return called_so or isinstance(error, torch.OutOfMemoryError)


def is_strict() -> bool:
    """Whether the user, or a test, wants the error rather than plain PyTorch."""
    return os.environ.get("CLIP_FAST_STRICT") == "1"


def forget() -> None:
    """Forgets all failures and warnings, so that launches are tried again."""
    with _lock:
        _failed.clear()
        _told.clear()
    without_triton.cache_clear()
    _unfit.cache_clear()


def _works(device: torch.device) -> bool:
    """Whether PyTorch can go on with the device: after a fault in a kernel, every later call on it fails."""
    if device.type != "cuda":
        return True
    try:
        with torch.cuda.device(device):
            if torch.cuda.is_current_stream_capturing():
                return False
            torch.cuda.current_stream().synchronize()
    except RuntimeError:
        return False
    return True


def _numbered(device: torch.device) -> torch.device:
    """`device` as tensors on it have it: `cuda` alone is the current GPU."""
    if device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", torch.cuda.current_device())


def _line(error: Exception) -> str:
    """An error in one line that is not too long; a compiler's command line is."""
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text if len(text) <= 200 else text[:199] + '…'}"


def _with_remedy(reason: str) -> str:
    found = (remedy for pattern, remedy in _REMEDIES if re.search(pattern, reason))
    return f"{reason.rstrip('.')}. {next(found, 'CLIP_FAST_STRICT=1 in the environment raises the error')}."
