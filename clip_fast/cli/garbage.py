"""No garbage is looked for while the command imports PyTorch, and later none among what the imports have made.

These are a million objects that last as long as the process. Python would go through them again and again, at its end
too: a fifth of a small job's time. As in `interrupt.py`, this is for the command's own process.
"""

from __future__ import annotations

import gc

from .interrupt import is_command


def imports_begin() -> None:
    if is_command():
        gc.disable()


def imports_end() -> None:
    if is_command():
        gc.freeze()
        gc.enable()
