"""Every op at every CLIP shape beside its rivals: `python -m bench.kernels`, or `pytest bench/kernels`."""
