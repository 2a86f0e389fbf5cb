"""Test set-up shared by all tests."""

from __future__ import annotations

import os
import random
import signal

import numpy as np
import pytest
import torch
from interpreter import import_kernels_interpreted


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--compatibility", metavar="FILE", help="where test_compatibility.py writes its table")
    parser.addoption("--seed", type=int, help="of every test's random data, which is otherwise fresh")


@pytest.fixture(autouse=True)
def _random_data(request: pytest.FixtureRequest) -> None:
    """Fresh in every run; the report of a test that fails says how to have the same again."""
    seed = request.config.getoption("--seed")
    seed = random.SystemRandom().randrange(2**32) if seed is None else seed
    print(f"random data of --seed {seed}")
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (what tests and packages draw from)
    torch.manual_seed(seed)


def _declare_torchvision_operators() -> None:
    """Let torchvision's Python part (all that openai-clip and open_clip use) import beside any build of torch.

    Its compiled operators exist for one CUDA build of torch only. When they do not load, importing torchvision fails on
    two names that it expects; declaring them is enough, and harmless to a torchvision whose operators do load.
    """
    try:
        import torchvision  # noqa: F401
    except ImportError:
        return
    except RuntimeError:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


_declare_torchvision_operators()
os.environ["CLIP_FAST_STRICT"] = "1"  # a kernel that cannot be launched fails its test
if "PYTEST_XDIST_WORKER" in os.environ:  # processes that each take all cores slow each other fiftyfold
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a process in the background is started to ignore
if not torch.cuda.is_available():
    import_kernels_interpreted()
