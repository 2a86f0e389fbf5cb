"""A drop-in fast image encoder for CLIP.

import clip_fast

model, preprocess = clip_fast.load("ViT-B/32")
with torch.no_grad():
    embeddings = model.encode_image(preprocess(image).unsqueeze(0))  # (1, 512), not normalised

Code that was written for openai-clip runs with `import clip_fast as clip`.
"""

# First, since the other imports take seconds.
from .cli import garbage as _garbage
from .cli import interrupt as _interrupt

# isort: split

from .version import __version__ as __version__

_garbage.imports_begin()

if not _interrupt.is_command():  # which imports what it needs, when it needs it
    from . import clip as clip  # as openai-clip's package has it
    from .checkpoint.published import available_models
    from .dropin.accelerate import accelerate, restore
    from .encoder import ImageEncoder
    from .errors import CheckpointError, NotServed
    from .loading import load
    from .model import Clip
    from .preprocess import Preprocess
    from .simple_tokenizer import tokenize
    from .verification import Verdict, verify

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
