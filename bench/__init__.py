"""Measurements of the kernels and encoders, and the check of the machine code that Triton makes of them."""

import os

os.environ.setdefault("CLIP_FAST_STRICT", "1")  # what is measured is the kernels, or an error
