"""What decoding processes need. The fork server imports this module, once for all of them, and nothing else does."""

from __future__ import annotations

import gc
import sys
from types import TracebackType

from PIL import Image

from ..inputs.images import image_formats
from . import workers as workers

# Pillow has an image in blocks of at most 16 MiB: three for 12 megapixels. By default it gives each back to the system,
# which clears every page of the next image anew.
_KEPT_BLOCKS = 4


def _report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A job that is stopped while its decoders start takes their semaphores and pipes away, which is no fault to show.

    An error of a semaphore names no file.
    """
    taken_away = isinstance(error, EOFError) or (isinstance(error, FileNotFoundError) and error.filename is None)
    if not taken_away:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = _report
image_formats()  # imports Pillow's plug-ins
Image.core.set_blocks_max(_KEPT_BLOCKS)
gc.freeze()  # what is there lasts: no process looks for garbage in it, nor gets a copy of its pages by looking
