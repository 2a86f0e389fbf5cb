"""Random towers that tests share."""

from __future__ import annotations

import torch
from torch import Tensor

from clip_fast.towers import reference
from clip_fast.towers.config import Config


def random_tower(config: Config, outliers: bool = False) -> reference.VisionTransformer | reference.ModifiedResNet:
    """A plain tower with random weights everywhere, so that no gain of one or bias of zero hides a mistake.

    With `outliers` a few channels of a ViT's residual stream reach several hundred, as in trained networks.
    """
    tower = reference.build(config)
    with torch.no_grad():
        for name, tensor in tower.named_parameters():
            if tensor.ndim == 1:
                tensor.copy_(torch.randn_like(tensor) * 0.2 + (1 if name.endswith("weight") else 0))
        for name, tensor in tower.named_buffers():
            if name.endswith("running_mean"):
                tensor.normal_()
            elif name.endswith("running_var"):
                tensor.copy_(torch.randn_like(tensor).exp())
        if outliers:
            assert isinstance(tower, reference.VisionTransformer)
            for block in tower.transformer.resblocks:
                for layer in (block.mlp.c_proj, block.attn.out_proj):  # type: ignore[union-attr]
                    layer.weight[::61] *= 400  # type: ignore[index, union-attr]
    return tower


def relative_error(got: Tensor, exact: Tensor) -> float:
    """‖got − exact‖ / ‖exact‖, in float64."""
    assert got.shape == exact.shape
    return float((got.double() - exact.double()).norm() / exact.double().norm())


def worst_cosine(got: Tensor, exact: Tensor) -> float:
    """The smallest cosine between corresponding rows."""
    return float(torch.nn.functional.cosine_similarity(got.double(), exact.double(), dim=-1).min())
