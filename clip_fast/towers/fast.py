"""The interface of a fast tower: a tower as one kind of device computes it fast, made once from its weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor

from . import cpu
from .config import Rgb, Task, TaskName
from .precision import Precision

Results = tuple[Tensor, ...]


class FastTower(ABC):
    """A tower that is prepared for one precision. There is a subclass for each family and kind of device.

    `config` is the family's configuration. A subclass is entered in `families.py`.
    """

    @classmethod
    @abstractmethod
    def prepare(cls, state_dict: Mapping[str, Tensor], config: Any, precision: Precision, mean: Rgb, std: Rgb) -> Self:
        """Folds canonical weights, of any float dtype, into the form that `run` computes with.

        Args:
            state_dict: the weights under the names of the plain tower, on the device to compute on.
            mean, std: of the RGB channels of pixels scaled to [0, 1]. They normalise raw pixels.
        """

    @property
    @abstractmethod
    def tasks(self) -> Mapping[TaskName, Callable[..., Tensor | Results]]:
        """The function of each task of the family: images and the task's arguments -> its results."""

    def run(self, images: Tensor, task: Task) -> Results:
        """A task's results for images (B, 3, H, W), normalised floats or raw uint8 pixels."""
        return as_tuple(self.tasks[task.name](images, *task.arguments))

    @staticmethod
    @abstractmethod
    def activations(config: Any) -> int:
        """The most elements of one image that are in memory at once."""

    @classmethod
    def largest_batch(cls, config: Any, device: torch.device, precision: Precision) -> int | None:
        """The most images to encode together, apart from what memory allows; None where there is no such limit."""
        return max(1, cpu.rows_at_once(precision.weights) // config.tokens) if device.type == "cpu" else None


def as_tuple(result: Tensor | Results) -> Results:
    """Results as a tuple, even a single one."""
    return result if isinstance(result, tuple) else (result,)


def normalised(images: Tensor, dtype: torch.dtype, mean: Rgb, std: Rgb) -> Tensor:
    """Images as a plain tower takes them, in `dtype`: raw uint8 pixels are scaled and normalised."""
    if images.dtype == torch.uint8:
        wide = torch.promote_types(dtype, torch.float32)
        mu, sigma = (torch.tensor(x, dtype=wide, device=images.device)[:, None, None] for x in (mean, std))
        images = images.to(wide).div_(255).sub_(mu).div_(sigma)
    return images.to(dtype)
