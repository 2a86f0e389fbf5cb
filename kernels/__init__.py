"""CLIP's image-encoder operations as Triton kernels, each with a plain PyTorch oracle of the same name.

Call them through `clip_fast.kernels.ops`. Nothing here knows a model; nothing here imports `clip_fast` beyond itself.
"""
