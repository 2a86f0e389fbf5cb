"""Convolution, bias, residual and ReLU in one pass, by the library that is fastest on the device.

All maps are channels-last: a 1 × 1 convolution is then a product of the map's rows, and runs on the project's own GEMM
wherever Triton runs, unless `kernels/targets.py` gives it to cuDNN. Larger windows are cuDNN's on an NVIDIA GPU and
oneDNN's on a CPU, which does the small ones too.

Shapes: B images, C input and O output channels, an h × w map.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .cpu import can_fuse
from .kernels import ops
from .kernels.ops import Precision
from .kernels.targets import POINTWISE, kind_of


def by_kernels(weight: Tensor) -> bool:
    """Whether the project's own kernels multiply by `weight`."""
    return ops.triton_can_run(weight.device) and weight.dtype != torch.float64


class Convolution:
    """relu(scale · conv(x, weight) + bias + residual).

    Args:
        weight: (O, C, k, k), on the device to compute on.
        scale, bias: (O,), float64. The scale goes into the weight, except in our own GEMM, which multiplies the product
            by it, so that no weight is rounded another time.
        dtype: to compute in.
        stride: of the window.
        padding: zeros around the map; by default as many as keep its size at stride one.
        relu: whether the sum ends in one.
        precision: of products of float32 operands on a GPU.
    """

    def __init__(
        self,
        weight: Tensor,
        scale: Tensor,
        bias: Tensor,
        dtype: torch.dtype,
        *,
        stride: int = 1,
        padding: int | None = None,
        relu: bool = True,
        precision: Precision = "ieee",
    ) -> None:
        size = weight.shape[-1]
        folded = (weight * scale[:, None, None, None]).to(dtype)
        self.weight = folded.contiguous(memory_format=torch.channels_last)
        self.bias = bias.to(dtype)
        self.stride, self.relu = stride, relu
        self.precision: Precision = precision
        self.padding = size // 2 if padding is None else padding
        self._run = Convolution._plain  # not bound to this instance, which would hold on to itself
        ours = POINTWISE[kind_of(dtype, precision)] == "linear"
        if size == stride == 1 and ours and by_kernels(folded):
            self._run, self.weight = Convolution._by_product, ops.operand(weight.flatten(1), dtype, precision)
            wide = torch.promote_types(dtype, torch.float32)
            self.scale, self.bias = scale.to(wide), bias.to(wide)
        elif weight.is_cuda and torch.version.cuda is not None and dtype != torch.float64:
            self._run = Convolution._by_cudnn
        elif weight.device.type == "cpu" and can_fuse(dtype):
            self._run = Convolution._by_onednn
            self._packed: dict[bool, Tensor] = {}  # for one image, and for several

    @property
    def _geometry(self) -> tuple[list[int], list[int], list[int]]:
        """Padding, stride and dilation, as PyTorch's own operators take them."""
        return [self.padding] * 2, [self.stride] * 2, [1, 1]

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """(B, C, h, w) -> (B, O, h′, w′), both channels-last, as the residual is; it may be written over."""
        return self._run(self, x, residual)

    def _by_product(self, x: Tensor, residual: Tensor | None) -> Tensor:
        added = None if residual is None else residual.permute(0, 2, 3, 1)
        activation: ops.Activation = "relu" if self.relu else "none"
        rows = x.permute(0, 2, 3, 1)  # (B, h, w, C), contiguous
        y, _ = ops.linear(
            rows,
            self.weight,
            self.bias,
            residual=added,
            scale=self.scale,
            activation=activation,
            precision=self.precision,
        )
        return y.permute(0, 3, 1, 2)

    def _by_cudnn(self, x: Tensor, residual: Tensor | None) -> Tensor:
        padding, stride, dilation = self._geometry
        if x.dtype != torch.float32 and residual is None and self.relu:
            return torch.cudnn_convolution_relu(x, self.weight, self.bias, stride, padding, dilation, 1)
        # in float32 the fused operator would take TF32 or not by a global switch
        tf32 = self.precision == "tf32"
        y = torch.ops.aten.cudnn_convolution(x, self.weight, padding, stride, dilation, 1, False, True, tf32)
        return self._finish(y.add_(self.bias[:, None, None]), residual)

    def _by_onednn(self, x: Tensor, residual: Tensor | None) -> Tensor:
        # For one image oneDNN wants other layouts: multiplying by one of the others' is up to 50 times slower.
        alone = len(x) == 1
        if alone not in self._packed:
            reorder = torch.ops.mkldnn._reorder_convolution_weight
            self._packed[alone] = reorder(self.weight, *self._geometry, 1, list(x.shape))
        operands = (x, self._packed[alone], self.bias, *self._geometry, 1)
        activation = "relu" if self.relu else "none"
        if residual is None:
            return torch.ops.mkldnn._convolution_pointwise(*operands, activation, [], "")
        return torch.ops.mkldnn._convolution_pointwise_.binary(
            residual, *operands, "add", 1.0, activation if self.relu else None, [], None
        )

    def _plain(self, x: Tensor, residual: Tensor | None) -> Tensor:
        return self._finish(F.conv2d(x, self.weight, self.bias, self.stride, self.padding), residual)

    def _finish(self, y: Tensor, residual: Tensor | None) -> Tensor:
        if residual is not None:
            y.add_(residual)
        return y.relu_() if self.relu else y
