"""Options of `pytest bench/kernels`: those of `python -m bench.kernels`, with less by default."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("kernels", "what is measured")
    group.addoption("--models", default="ViT-B/32", help="names, with commas between")
    group.addoption("--batches", default="32,1", help="with commas between")
    group.addoption("--precisions", help="of fp32, tf32, fp16, bf16; by default bf16 on a GPU, fp32 elsewhere")
    group.addoption("--rounds", type=int, default=7)
