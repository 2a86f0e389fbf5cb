"""Test set-up shared by all tests."""

from __future__ import annotations

import torch


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
