"""Runs the PTX that Triton compiles for a GPU, on a CPU, over real tensors. See README.md."""
