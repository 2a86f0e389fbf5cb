"""Measurements of the kernels and encoders, and the check of the machine code that Triton makes of them."""
