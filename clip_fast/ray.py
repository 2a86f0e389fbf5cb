"""The encoder as a stage of Ray Data, for pipelines of your own: see `ImageEncoder`."""

from .bulk.ray_stage import ImageEncoder

__all__ = ["ImageEncoder"]
