"""Test set-up shared by all tests."""

from __future__ import annotations

import os
import random
import secrets
import signal

import numpy as np
import pytest
import torch
from interpreter import import_kernels_interpreted

# Ray turns its token authentication on for the whole process, and keeps the token under HOME, which tests change.
os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--compatibility", metavar="FILE", help="where test_compatibility.py writes its table")
    parser.addoption("--seed", type=int, help="seeds every test's random data; by default a new one each time")


def _leaves_slow_tests_out(config: pytest.Config) -> bool:
    """Whether the slow tests are left out: neither a -m nor a single test was asked for."""
    return not config.option.markexpr and not any("::" in argument for argument in config.args)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if _leaves_slow_tests_out(config):
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if not item.get_closest_marker("slow")]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    left = len(terminalreporter.stats.get("deselected", ()))
    distributed = getattr(config.option, "numprocesses", None)  # then workers leave them out, and do not count
    if _leaves_slow_tests_out(config) and (left or distributed):
        terminalreporter.write_line(
            f"{left or 'all'} slow tests were left out: `python -m pytest -m slow` runs them, "
            '`python -m pytest -m "slow or not slow"` runs everything'
        )


@pytest.fixture(autouse=True)
def _random_data(request: pytest.FixtureRequest) -> None:
    """Random data are new in every run. The report of a failed test gives the option that repeats them."""
    seed = request.config.getoption("--seed")
    seed = random.SystemRandom().randrange(2**32) if seed is None else seed
    print(f"random data of --seed {seed}")
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (what tests and packages draw from)
    torch.manual_seed(seed)


def _declare_torchvision_operators() -> None:
    """Lets torchvision's Python part (all that openai-clip and open_clip use) import beside any build of torch.

    Its compiled operators exist for one CUDA build of torch only. When they do not load, importing torchvision fails on
    two names that it expects. Declaring these names is enough. It is harmless to a torchvision whose operators load.
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
if "PYTEST_XDIST_WORKER" in os.environ:  # processes that each take all cores slow each other down fiftyfold
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background process starts with SIGINT ignored
if not torch.cuda.is_available():
    import_kernels_interpreted()
