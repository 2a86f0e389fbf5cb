from setuptools import find_packages, setup

# `kernels/` stands at the top of the tree and is imported as `clip_fast.kernels` through the link `clip_fast/kernels`:
# a top-level import name `kernels` belongs to another package, which transformers imports.
setup(packages=find_packages(include=["clip_fast", "clip_fast.*"]))
