"""The options of `pytest bench/kernels`: those of `python -m bench.kernels`, with smaller defaults."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("kernels", "the contests to measure")
    group.addoption("--models", default="ViT-B/32", help="names, separated by commas")
    group.addoption("--batches", default="32,1", help="separated by commas")
    group.addoption("--precisions", help="of fp32, tf32, fp16, bf16; by default bf16 on a GPU, fp32 elsewhere")
    group.addoption("--rounds", type=int, default=7)
