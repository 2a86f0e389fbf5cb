"""What is done on a GPU before its first batch."""

from __future__ import annotations

import torch

from ..kernels import dispatch, ops, toolchain

_probed: set[torch.device] = set()


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
