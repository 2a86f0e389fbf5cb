"""Runs tasks on batches by a tower's fast path, and prepares the weights again whenever they have changed.

The engine runs a tower whoever owns it: an `ImageEncoder`, or a model of another package that `accelerate` serves.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import toolchain
from ..kernels.dispatch import triton_can_run, trusted
from ..towers import cpu
from ..towers.config import ENCODE, IMAGE_MEAN, IMAGE_STD, ImageSize, Rgb, Task, sides
from ..towers.families import fast_tower
from ..towers.fast import FastTower, Results
from ..towers.precision import Precision, PrecisionName, precision_of
from . import ahead, graphs
from .changes import Storages, fingerprint, follow
from .tower import Tower

_MEMORY_SHARE = 0.8  # the share of a GPU's free memory that a batch may take
_WHOLE_BATCH = 64  # images; up to this batch size free memory is not checked


@dataclass(frozen=True)
class Prepared:
    """A tower's fast path, and the state of the weights that it was prepared from."""

    state: object
    storages: Storages
    run: Callable[[Tensor, Task], Results]
    graphs: graphs.Graphs  # of `run`


class Engine:
    """Runs a tower's tasks on batches of images.

    Args:
        tower: the shape and the weights.
        precision: the precision to compute in, see `ImageEncoder`; None is that of the weights' dtype.
        mean, std: normalise raw pixels.
        cuda_graphs: whether batches that are small for a GPU may be replayed as CUDA graphs.
    """

    def __init__(
        self,
        tower: Tower,
        *,
        precision: PrecisionName | None = None,
        mean: Rgb = IMAGE_MEAN,
        std: Rgb = IMAGE_STD,
        cuda_graphs: bool = True,
    ) -> None:
        self.tower = tower
        self.config = tower.config
        self.precision: PrecisionName | None = precision
        self.mean, self.std = mean, std
        self.cuda_graphs = cuda_graphs
        self.prepared: Prepared | None = None
        self._lock = threading.Lock()
        self._pause = graphs.Pause()
        self._slots = [vars(m)[kind] for m in tower.modules for kind in ("_parameters", "_buffers") if vars(m)[kind]]
        follow(self, tower.modules)

    @property
    def device(self) -> torch.device:
        return self.tower.weight().device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights and the results."""
        return self.tower.weight().dtype

    @property
    def in_double(self) -> bool:
        """Whether the precision is float64, which no fast path computes in."""
        return self.precision is None and self.dtype == torch.float64

    @property
    def computed_in(self) -> Precision:
        """The precision that the engine computes in. Raises NotServed for weights of a dtype that is not served."""
        return precision_of(self.precision, self.tower.weight())

    def checked(self, images: Tensor) -> Tensor:
        """`images` on the tower's device as (B, 3, H, W).

        Raises:
            ValueError, TypeError: say what is wrong with their shape or dtype.
        """
        return checked(images, self.config.image_size).to(self.device)

    def gradients_wanted(self, images: Tensor) -> bool:
        """Whether gradients are enabled, and the images or a weight require them."""
        if not torch.is_grad_enabled():
            return False
        return images.requires_grad or any(map(_requires_grad, self.tensors()))

    def tensors(self) -> list[Tensor]:
        """The tower's parameters and buffers. Does not walk through the modules, since this runs at every call."""
        return [tensor for slot in self._slots for tensor in slot.values() if tensor is not None]

    def run(self, images: Tensor, task: Task) -> Results:
        """A task's results for checked images. Gradients do not flow through it.

        Raises:
            NotServed: weights are gone, or others have been put in.
        """
        if len(images) == 0:
            self.tower.state_dict()  # raises where the results would have another shape
            return self.without_values(images, task)
        current = torch.cuda.device(images.device) if images.is_cuda else nullcontext()
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False), current:
            fast = self._fast_path()
            key = (self.config, self.computed_in, task)
            ahead.compile_kernels(lambda images: fast.run(images, task), images, key)
            results = self._replayed(fast, images, task)
            return results or self.in_parts(images, lambda part: fast.run(part, task), task)

    def _replayed(self, fast: Prepared, images: Tensor, task: Task) -> Results | None:
        """A task's results by a CUDA graph; None where no graph serves."""
        bucket = self._bucket(images)
        if bucket is None or not graphs.allowed() or not self._pause.is_over():
            return None
        try:
            return fast.graphs(bucket, images, task, lambda: bucket * self._memory_of_one(images, task))
        except Exception as error:  # of a capture; where the fault is not the capture's, launching raises it again
            if toolchain.is_out_of_memory(error):
                self._pause.begin()
            elif toolchain.is_strict():
                raise
            else:
                told = self._bucket(images) is None  # the kernels themselves have failed, and a warning said so
                self.cuda_graphs = False
                if not told:
                    warnings.warn(f"clip_fast launches its kernels one by one from now on: {error}", stacklevel=3)
        fast.graphs.release()
        return None

    def in_parts(self, images: Tensor, run: Callable[[Tensor], Results], task: Task = ENCODE) -> Results:
        """`run` over the batch in parts that fit into memory. A part that does not fit after all is halved."""
        limit = self._fitting(images, task)
        while True:
            try:
                parts = [run(part) for part in torch.tensor_split(images, max(1, -(-len(images) // limit)))]
                break
            except Exception as error:
                if limit == 1 or not toolchain.is_out_of_memory(error):
                    raise
                limit = -(-min(limit, len(images)) // 2)
        return tuple(column[0] if len(column) == 1 else torch.cat(column) for column in zip(*parts, strict=True))

    def without_values(self, images: Tensor, task: Task) -> Results:
        """Results without values, with a row for each image."""
        shapes = self.config.row_shapes(task)
        batch = images.shape[0]  # `len` would make a number of a graph's symbol
        return tuple(images.new_empty(batch, *s, dtype=self.dtype, device=self.device) for s in shapes)

    def _bucket(self, images: Tensor) -> int | None:
        """The batch size of the CUDA graph that encodes `images`; None if no graph does."""
        if not (images.is_cuda and self.cuda_graphs and triton_can_run(images.device)):
            return None
        return graphs.bucket_of(len(images), self.config)

    def _memory_of_one(self, images: Tensor, task: Task) -> int:
        """The bytes that one image takes while it is encoded, and its results, at most."""
        config = self.config
        elements = self._fast_tower.activations(config) + sum(torch.Size(s).numel() for s in config.row_shapes(task))
        height, width = sides(config.image_size)
        return elements * self.computed_in.weights.itemsize + 3 * height * width * images.itemsize

    def _fitting(self, images: Tensor, task: Task) -> int:
        """The number of images to encode together."""
        most = self._fast_tower.largest_batch(self.config, images.device, self.computed_in)
        if images.device.type == "cpu" and most is not None:
            return most
        if len(images) <= _WHOLE_BATCH or not images.is_cuda or torch.cuda.is_current_stream_capturing():
            return max(1, len(images))
        free = torch.cuda.mem_get_info(images.device)[0]
        free += torch.cuda.memory_reserved(images.device) - torch.cuda.memory_allocated(images.device)
        fitting = max(1, int(_MEMORY_SHARE * free / self._memory_of_one(images, task)))
        return fitting if most is None else min(fitting, most)

    # --- weights -----------------------------------------------------------------------------------------------------

    @property
    def _fast_tower(self) -> type[FastTower]:
        return fast_tower(self.config, self.device)

    def _fast_path(self) -> Prepared:
        """The fast path, prepared again where the tower's tensors have changed."""
        tensors = self.tensors()
        state = self._state(tensors)
        prepared = self.prepared
        if prepared is None or prepared.state != state or prepared.storages.gone():
            with self._lock, torch.inference_mode(False), torch.no_grad():
                prepared = self.prepared
                if prepared is None or prepared.state != state or prepared.storages.gone():
                    ahead.probe(self.device)
                    state, storages = self._state(tensors), Storages(tensors)
                    run = self._prepare()
                    if tensors[0].is_cuda and not torch.cuda.is_current_stream_capturing():
                        # Other streams will read the new weights, and may still read the old ones.
                        if prepared is None:
                            torch.cuda.current_stream().synchronize()
                        else:
                            graphs.synchronize()
                    prepared = self.prepared = Prepared(
                        state, storages, run, graphs.Graphs(run, graphs.memory_for(self.device))
                    )
        return prepared

    def _state(self, tensors: list[Tensor]) -> object:
        """All that a fast path is prepared from, with how it computes: a launch that fails ends the kernels' use."""
        return self.precision, self._fast_tower, triton_can_run(self.device), fingerprint(tensors)

    def _prepare(self) -> Callable[[Tensor, Task], Results]:
        """The tower's fast path on this device, as a function that keeps no reference to the engine."""
        dtype = self.dtype
        if self.device.type == "cpu":
            cpu.keep_freed_memory()
        state = {name: t.clone() if t.is_inference() else t for name, t in self.tower.state_dict().items()}
        fast = self._fast_tower.prepare(state, self.config, self.computed_in, self.mean, self.std)

        def run(images: Tensor, task: Task) -> Results:
            with trusted():
                return tuple(result.to(dtype) for result in fast.run(images, task))

        return run


def checked(images: Tensor, size: ImageSize) -> Tensor:
    """`images` as (B, 3, height, width), of this size.

    Raises:
        ValueError, TypeError: say what is wrong with their shape or dtype.
    """
    height, width = sides(size)
    if images.dtype == torch.uint8 and images.ndim == 4 and images.shape[1:] == (height, width, 3):
        images = images.permute(0, 3, 1, 2)
    if images.ndim != 4 or images.shape[1:] != (3, height, width):
        raise ValueError(f"images must be [batch, 3, {height}, {width}], got {list(images.shape)}")
    if not images.is_floating_point() and images.dtype != torch.uint8:
        raise TypeError(f"images must be of a floating-point dtype, or raw pixels in uint8, got {images.dtype}")
    return images


def _requires_grad(tensor: Tensor) -> bool:
    return tensor.requires_grad
