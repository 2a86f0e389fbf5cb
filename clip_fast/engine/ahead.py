"""What is done on a GPU before the first batch: a probe of the toolchain, and all kernels compiled side by side."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from ..kernels import dispatch, ops, toolchain

_log = logging.getLogger("clip_fast")
_probed: set[torch.device] = set()
_compiled: set[Hashable] = set()
_one_at_a_time = threading.Lock()  # a second model of the same kernels waits for the first, and finds them compiled


def probe(device: torch.device) -> None:
    """Finds out whether kernels can be launched on a device, by launching a small one, once in a process.

    Where they cannot, plain PyTorch computes there, and one warning says why and what helps.

    Raises:
        Exception: the launch's own error, or a RuntimeError for a GPU that the kernels are not for, in place of the
            warning where `CLIP_FAST_STRICT=1`.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return
    if not dispatch.triton_can_run(device):
        if device.type == "cuda":
            toolchain.tell(device)
    elif device not in _probed:
        ops.mean_token(torch.zeros(1, 1, 1, device=device), torch.zeros(1, device=device))
        _probed.add(device)


def compile_kernels(run: Callable[[Tensor], object], images: Tensor, key: Hashable) -> None:
    """Compiles all kernels that `run(images)` launches on a GPU, side by side, before any is launched.

    Triton would compile each at its first launch, one after another. A log line says what takes so long. A compilation
    that fails ends as a launch that fails, see `toolchain.py`.

    Args:
        key: of all that decides which kernels these are. It is compiled for once in a process.
    """
    device = images.device
    key = (device, images.dtype, images.is_contiguous(), key)
    if not images.is_cuda or key in _compiled or not dispatch.triton_can_run(device):
        return
    if torch.cuda.is_current_stream_capturing():
        return
    with _one_at_a_time:
        if key in _compiled:
            return
        try:
            dispatch.compile_ahead(lambda: run(images[:1]), lambda kernels: _say(kernels, device))
        except Exception as error:
            if not toolchain.gives_way(device, error):
                raise
        _compiled.add(key)


def _say(kernels: int, device: torch.device) -> None:
    # At the level of a warning, which Python shows where nobody has set up logging.
    _log.warning("compiling %d kernels for %s, once: Triton keeps them", kernels, torch.cuda.get_device_name(device))
