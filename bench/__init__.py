"""Measurements of the kernels and encoders, and a check of the machine code that Triton compiles."""

import os

os.environ.setdefault("CLIP_FAST_STRICT", "1")  # a kernel that cannot be launched is an error, not a slow result
