"""What decoding processes need. The fork server imports this module, once for all of them, and nothing else does."""

from __future__ import annotations

import gc

from PIL import Image

from ..inputs.images import image_formats
from . import workers as workers

# Pillow has an image in blocks of at most 16 MiB: three for 12 megapixels. By default it gives each back to the system,
# which clears every page of the next image anew.
_KEPT_BLOCKS = 4

image_formats()  # imports Pillow's plug-ins
Image.core.set_blocks_max(_KEPT_BLOCKS)
gc.freeze()  # what is there lasts: no process looks for garbage in it, nor gets a copy of its pages by looking
