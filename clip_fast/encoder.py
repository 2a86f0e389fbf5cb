"""The image encoder that users hold: a tower on a device, in a precision."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import reference
from .config import Config


class ImageEncoder(nn.Module):
    """CLIP's image encoder: `encode_image(images)` gives one embedding per image.

    Args:
        config: the tower's shape.
        state_dict: its weights under canonical names (see `clip_fast.checkpoint`), on any device, of any float dtype.
        device: where to compute.
        dtype: in which precision; images are converted to it, as `clip` does, and embeddings come back in it.
    """

    def __init__(self, config: Config, state_dict: dict[str, Tensor], device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        if not dtype.is_floating_point:
            raise ValueError(f"dtype must be a floating-point type, got {dtype}")
        self.config = config
        self.visual = reference.build(config)
        self.visual.load_state_dict(state_dict)
        self.to(device=device, dtype=dtype).eval().requires_grad_(False)

    @property
    def device(self) -> torch.device:
        return self.visual.conv1.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.visual.conv1.weight.dtype

    def encode_image(self, images: Tensor) -> Tensor:
        """Embeds preprocessed images.

        Args:
            images: (B, 3, image_size, image_size), as `preprocess` gives them, of any float dtype; B may be 0.

        Returns:
            (B, embed_dim) of the encoder's dtype, on its device; not normalised.

        Raises:
            ValueError: for another shape.
            TypeError: for images of an integer dtype.
        """
        size = self.config.image_size
        if images.ndim != 4 or images.shape[1:] != (3, size, size):
            raise ValueError(f"images must be [batch, 3, {size}, {size}], got {list(images.shape)}")
        if not images.is_floating_point():
            raise TypeError(f"images must be of a floating-point dtype, as preprocess gives them, got {images.dtype}")
        if len(images) == 0:
            return torch.empty(0, self.config.embed_dim, dtype=self.dtype, device=self.device)
        return self.visual(images.to(device=self.device, dtype=self.dtype))

    def forward(self, images: Tensor) -> Tensor:
        return self.encode_image(images)
