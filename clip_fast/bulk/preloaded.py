"""What decoding processes need. The fork server imports this module, once for all of them, and nothing else does."""

from __future__ import annotations

import gc

from ..inputs.images import image_formats
from . import workers as workers

image_formats()  # imports Pillow's plug-ins
gc.freeze()  # what is there lasts: no process looks for garbage in it, nor gets a copy of its pages by looking
