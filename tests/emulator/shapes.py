"""Kernels at shapes of ViT-L/14, for their counters."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from .cases import EPILOGUES, attention_pool, flash_attention, layer_norm, linear, patch_embed
from .problem import Kind, Problem

_ROWS = 128  # one tile

SHAPES: dict[str, Callable[[Kind], Problem]] = {
    "linear_qkv": partial(linear, _ROWS, 3072, 1024, **EPILOGUES["qkv"]),
    "linear_out": partial(linear, _ROWS, 1024, 1024, **EPILOGUES["out"]),
    "linear_fc1": partial(linear, _ROWS, 4096, 1024, **EPILOGUES["fc1 quick_gelu"]),
    "linear_fc1_gelu": partial(linear, _ROWS, 4096, 1024, **EPILOGUES["fc1 gelu"]),
    "linear_fc2": partial(linear, _ROWS, 1024, 4096, **EPILOGUES["out"]),
    "flash_attention": partial(flash_attention, 257, 1, 64),
    "flash_attention_50": partial(flash_attention, 50, 1, 64),
    "flash_attention_80": partial(flash_attention, 257, 1, 80),
    "patch_embed_14": partial(patch_embed, 14, "its dtype"),
    "patch_embed_14_uint8": partial(patch_embed, 14, "uint8"),
    "attention_pool": partial(attention_pool, 1, 16, 64, 257, False),
    "layer_norm": partial(layer_norm, 1024),
}
