"""`clip-fast warm`: compiles a model's kernels before anyone waits for them."""

from __future__ import annotations

import argparse
import time

import torch

from ..kernels import ops
from ..kernels.dispatch import triton_can_run
from ..kernels.resampling import CHANNELS, Source, plan
from ..loading import default_device, load
from ..towers.config import sides
from .messages import EXIT_OK, say
from .parser import dtype_of


def warm(arguments: argparse.Namespace) -> int:
    """Runs `clip-fast warm` and returns its exit status. Triton keeps on disk what it compiles."""
    device = arguments.device or default_device()
    model, _ = load(arguments.model, device, dtype_of(arguments.dtype), activation=arguments.activation)
    if not triton_can_run(model.device):
        say(f"nothing to compile: on {model.device} plain PyTorch computes")
        return EXIT_OK
    began = time.perf_counter()
    size = sides(model.config.image_size)
    with torch.inference_mode():  # with gradients the plain tower would run
        for dtype in dict.fromkeys((torch.uint8, torch.float32, model.dtype)):  # raw pixels, what `preprocess` gives
            model.encode_image(torch.zeros(1, 3, *size, dtype=dtype, device=model.device))
    if size[0] == size[1]:  # others are resized by decoding processes
        _resize(size[0], model.device)
    say(f"the kernels of {arguments.model} in {model.dtype} are compiled: {time.perf_counter() - began:.1f} s")
    return EXIT_OK


def _resize(side: int, device: torch.device) -> None:
    """Resizes a black image of that side to itself, as `clip-fast encode` resizes photographs on a GPU."""
    steps, tables, scratch = plan([Source(0, side, side, (side, side), 0, 0)], side)
    pixels = torch.zeros(CHANNELS * side**2, dtype=torch.uint8, device=device)
    ops.resize(pixels, torch.as_tensor(steps).to(device), torch.as_tensor(tables).to(device), scratch, side)
