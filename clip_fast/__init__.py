"""A drop-in fast image encoder for CLIP.

import clip_fast

model, preprocess = clip_fast.load("ViT-B/32")
embeddings = model.encode_image(preprocess(image).unsqueeze(0))  # (1, 512), not normalised
"""

# First, since the other imports take seconds.
from .cli import interrupt as _interrupt  # noqa: F401  # pyright: ignore[reportUnusedImport]

# isort: split

from .checkpoint.published import available_models
from .clip import Clip
from .dropin.accelerate import accelerate, restore
from .encoder import ImageEncoder
from .errors import CheckpointError, NotServed
from .loading import load
from .preprocess import Preprocess
from .tokens import tokenize
from .verification import Verdict, verify
from .version import __version__ as __version__

__all__ = [
    "CheckpointError",
    "Clip",
    "ImageEncoder",
    "NotServed",
    "Preprocess",
    "Verdict",
    "accelerate",
    "available_models",
    "load",
    "restore",
    "tokenize",
    "verify",
]
