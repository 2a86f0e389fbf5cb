"""From pixels to rows: an embedding for each image, or the reason why it has none."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

NOT_FINITE = "the embedding has numbers that are not finite: its dtype, or the model's, is too narrow for them"


class Encoder(Protocol):
    """Anything with an `encode_image`: (B, 3, H, W) -> (B, E) of any float dtype, on any device."""

    def encode_image(self, images: Tensor, /) -> Tensor: ...


@torch.inference_mode()
def encode_rows(model: Encoder, images: Tensor, normalize: bool = False) -> Tensor:
    """Embeds images: (B, E) float32 on the model's device, of length 1 where `normalize` asks for it."""
    rows = model.encode_image(images).float()
    return F.normalize(rows, dim=1) if normalize else rows


def settle(rows: NDArray[Any], errors: dict[int, str]) -> dict[int, str]:
    """Decides which rows stand: a row of a failed image becomes zero, and a row that is not finite is a failure.

    Args:
        rows: (B, E), written to.
        errors: the reasons of the images that could not be decoded, by their row.

    Returns:
        The reasons of all failed rows, by row.
    """
    not_finite = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    failed = dict.fromkeys(map(int, not_finite), NOT_FINITE) | errors
    rows[list(failed)] = 0
    return failed
