"""Convolution, bias, residual and ReLU in one pass, by the library that is fastest on the device.

All maps are channels-last: a 1 × 1 convolution is then a product of the map's rows. The project's own GEMM computes it
wherever Triton runs, unless `kernels/targets.py` gives it to cuDNN. Larger windows are cuDNN's on an NVIDIA GPU. On a
CPU oneDNN computes both.

Shapes: B images, C input and O output channels, an h × w map.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import pytorch
from ..kernels import ops
from ..kernels.dispatch import triton_can_run
from ..kernels.targets import POINTWISE, InputPrecision
from .cpu import can_fuse, stays_half
from .precision import Precision


def by_kernels(weight: Tensor) -> bool:
    """Whether the project's own kernels multiply by `weight`."""
    return triton_can_run(weight.device) and weight.dtype != torch.float64


def _is_cudnns(precision: Precision) -> bool:
    """Whether the table gives 1 × 1 convolutions to cuDNN. It has no entry for float64, which no kernel computes in."""
    return precision.weights != torch.float64 and POINTWISE[precision.kind] == "cudnn"


class Convolution:
    """relu(scale · conv(x, weight) + bias + residual).

    Args:
        weight: (O, C, k, k), of any float dtype, on the device to compute on. For oneDNN it is kept as it is, and
            folded whenever a layout is made of it.
        scale, bias: (O,), float64. The scale goes into the weight. Only our own GEMM multiplies the product by it, so
            that no weight is rounded another time.
        precision: the precision to compute in.
        stride: of the window.
        padding: the width of the zeros around the map; by default it keeps the map's size at stride one.
        relu: whether a ReLU follows the sum.
    """

    def __init__(
        self,
        weight: Tensor,
        scale: Tensor,
        bias: Tensor,
        precision: Precision,
        *,
        stride: int = 1,
        padding: int | None = None,
        relu: bool = True,
    ) -> None:
        size, dtype = weight.shape[-1], precision.weights
        self.bias = bias.to(dtype)
        self.relu = relu
        self.products: InputPrecision = precision.products
        padding = size // 2 if padding is None else padding
        self._geometry = [padding] * 2, [stride] * 2, [1, 1]  # and dilation, as PyTorch's own operators take them
        self._run = Convolution._plain  # the function, not a bound method: the instance would hold on to itself
        if size == stride == 1 and by_kernels(self.bias) and not _is_cudnns(precision):
            self._run, self.weight = Convolution._by_product, ops.operand(weight.flatten(1), dtype, self.products)
            self.scale, self.bias = scale.to(precision.wide), bias.to(precision.wide)
        elif weight.device.type == "cpu" and can_fuse(dtype):
            self._run = Convolution._by_onednn
            self.weight, self.scale = weight, scale
            self._packed: dict[bool, Tensor] | None = None if stays_half(weight, dtype) else {}  # whether for one image
        else:
            self.weight = _folded(weight, scale, dtype)
            if weight.is_cuda and torch.version.cuda is not None and dtype != torch.float64:
                self._run = Convolution._by_cudnn

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """(B, C, h, w) -> (B, O, h′, w′), both channels-last. The result may be written over the residual."""
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
            precision=self.products,
        )
        return y.permute(0, 3, 1, 2)

    def _by_cudnn(self, x: Tensor, residual: Tensor | None) -> Tensor:
        # PyTorch's operator with the ReLU in it gives cuDNN memory with anything in it, to be added times zero: a NaN
        # there might come out. In float32, besides, a global switch decides whether it takes TF32.
        padding, stride, dilation = self._geometry
        tf32 = self.products == "tf32"
        y = torch.ops.aten.cudnn_convolution(x, self.weight, padding, stride, dilation, 1, False, True, tf32)
        return self._finish(y.add_(self.bias[:, None, None]), residual)

    def _by_onednn(self, x: Tensor, residual: Tensor | None) -> Tensor:
        operands = (x, self._layout(x), self.bias, *self._geometry, 1)
        activation = "relu" if self.relu else "none"
        if residual is None:
            return pytorch.convolution_pointwise(*operands, activation, [], "")
        return pytorch.convolution_pointwise_.binary(
            residual, *operands, "add", 1.0, activation if self.relu else None, [], None
        )

    def _layout(self, x: Tensor) -> Tensor:
        """The weight as oneDNN wants it for as many images as `x` has: another layout for one image than for several.

        The wrong layout is up to 50 times slower. Where both are the same, which is most often, there is one.
        """
        if self._packed is None:
            return self._reordered(_widened(self.weight, self.scale), x)
        alone = x.shape[0] == 1
        packed = self._packed.get(alone)
        if packed is None:
            packed = self._reordered(_folded(self.weight, self.scale, self.bias.dtype), x)
            others = tuple(self._packed.values())  # another thread may add one
            packed = next((other for other in others if pytorch.same_layout(other, packed)), packed)
            self._packed[alone] = packed
        return packed

    def _reordered(self, folded: Tensor, x: Tensor) -> Tensor:
        return pytorch.reorder_convolution_weight(folded, *self._geometry, 1, list(x.shape))

    def _plain(self, x: Tensor, residual: Tensor | None) -> Tensor:
        padding, stride, dilation = self._geometry
        return self._finish(F.conv2d(x, self.weight, self.bias, stride, padding, dilation), residual)

    def _finish(self, y: Tensor, residual: Tensor | None) -> Tensor:
        if residual is not None:
            y.add_(residual)
        return y.relu_() if self.relu else y


def _folded(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight (O, C, k, k) times the scale (O,), in float64, then cast."""
    folded = (weight.double() * scale[:, None, None, None]).to(dtype)
    return folded.contiguous(memory_format=torch.channels_last)


def _widened(weight: Tensor, scale: Tensor) -> Tensor:
    """`_folded` to float32 of a weight in half precision, in float32: for weights that are folded for each call."""
    return weight.float().mul_(scale.float()[:, None, None, None])
