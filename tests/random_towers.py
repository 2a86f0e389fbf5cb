"""Random towers that tests share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from clip_fast import pytorch
from clip_fast.towers import cpu, reference
from clip_fast.towers.config import HIDDEN_STATES, Config


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


def assert_as_exact(fast: Any, tower: Any, images: Tensor) -> None:
    """Every task of a fast tower gives what the plain one gives, both in float64, where no rounding hides a mistake."""
    assert relative_error(fast.encode(images), tower(images)) < 1e-13
    for got, exact in zip(fast.encode_tokens(images), tower.encode_tokens(images), strict=True):
        assert relative_error(got, exact) < 1e-13
    states = fast.hidden_states(images)
    for layer, exact in enumerate(tower.results(images, HIDDEN_STATES)):
        assert relative_error(states[layer], exact) < 1e-13
        assert relative_error(fast.hidden_state(images, layer), exact) < 1e-13


@contextmanager
def products_of_this_cpu(dtype: torch.dtype) -> Iterator[None]:
    """Within this context PyTorch's own layers multiply by the library that the encoder for CPUs takes in `dtype`.

    In float32 that is oneDNN on CPUs that are not Intel's. It adds up to 1,024 products in a row, MKL about 200, so
    that its products err by twice as much (2.3 times at K = 1,024 on an AMD EPYC without AVX-512).
    """
    if dtype != torch.float32 or cpu.can_pack_for_mkl() or not cpu.can_fuse(dtype):
        yield
        return

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        y = pytorch.linear_pointwise(x.flatten(0, -2).contiguous(), weight.contiguous(), bias, "none", [], "")
        return y.view(*x.shape[:-1], len(weight))

    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # it multiplies by MKL
    try:
        with patch.object(F, "linear", linear):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)


def worst_cosine(got: Tensor, exact: Tensor) -> float:
    """The smallest cosine between corresponding rows."""
    return float(torch.nn.functional.cosine_similarity(got.double(), exact.double(), dim=-1).min())
