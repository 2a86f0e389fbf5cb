"""Measurements of the kernels and encoders, and a check of the machine code that Triton compiles."""
