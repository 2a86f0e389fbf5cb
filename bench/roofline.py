"""The least cost of encoding images: a tower's arithmetic and bytes, and the throughput that they allow.

The counts are those of the mathematics, not of an implementation. In the last attention only the one query that leaves
the encoder counts, with its sums re-associated (see `kernels/attention_pool.py`). Norms and activations are left out.

    python -m bench.roofline

measures the machine's ceilings, and prints the throughput that they allow for each model.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clip_fast.checkpoint.published import OPENAI_MODELS
from clip_fast.towers import reference
from clip_fast.towers.config import Config, ResNetConfig, SiglipConfig, sides

from .environment import Environment, chosen_device, environment
from .models import MODELS
from .report import document, save, table
from .timing import DTYPES, Ceilings, ceilings


def operations(config: Config) -> int:
    """Multiplications and additions of one image."""
    if isinstance(config, ResNetConfig):
        pool = _one_query(config.tokens, config.features, config.heads) + 2 * config.features * config.embed_dim
        return _convolutions(config) + pool
    n, w, mlp = config.tokens, config.width, 4 * config.width * config.mlp_width
    patches = 2 * config.patches * 3 * config.patch_size**2 * w
    block = n * (8 * w * w + mlp) + 4 * n * n * w
    if isinstance(config, SiglipConfig):  # W_q q and W_kᵀ q are the same for every image
        return patches + config.layers * block + 4 * config.heads * n * w + 4 * w * w + mlp
    last = _one_query(n, w, config.heads) + 2 * w * w + mlp
    return patches + (config.layers - 1) * block + last + 2 * w * config.embed_dim


def _one_query(n: int, w: int, heads: int) -> int:
    """Attention of one query to n tokens of width w: W_q, W_kᵀ q, scores, the weighted sum of tokens, W_v."""
    return 6 * w * w + 4 * heads * n * w


def _convolutions(config: Config) -> int:
    """The operations of a ResNet's convolutions, counted on tensors without storage."""
    count = 0

    def add(module: nn.Module, _: tuple[Tensor], output: Tensor) -> None:
        nonlocal count
        if isinstance(module, nn.Conv2d):
            count += 2 * output.numel() * module.weight[0].numel()

    with torch.device("meta"):
        tower = reference.build(config)
        for module in tower.modules():
            module.register_forward_hook(add)
        tower(torch.empty(1, 3, *sides(config.image_size)))
    return count


def weights(config: Config) -> int:
    """Number of weights."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in reference.build(config).parameters())


def traffic(config: Config, batch: int, precision: str) -> int:
    """Bytes of weights, images and results, each moved once."""
    elements = weights(config) + batch * (3 * prod(sides(config.image_size)) + config.embed_dim)
    return elements * DTYPES[precision].itemsize


def least_seconds(operations: float, traffic: float, precision: str, ceilings: Ceilings) -> float:
    """Time at the ceilings: all arithmetic at the product's rate or all traffic at the copy's, whichever is longer."""
    return max(operations / ceilings.flops[precision], traffic / ceilings.bytes)


# --- the command -----------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> None:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="python -m bench.roofline", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", default=",".join(OPENAI_MODELS), help="names, separated by commas")
    parser.add_argument("--batches", default="256,1", help="separated by commas")
    parser.add_argument("--precisions", default="fp32,tf32,fp16,bf16" if on_gpu else "fp32", help="of these four")
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--json", type=Path, help="write the results there, and the tables beside them as markdown")
    options = parser.parse_args(arguments)
    device, precisions = chosen_device(options.device), options.precisions.split(",")
    where, limits = environment(device), ceilings(device, precisions)
    rows: list[dict[str, Any]] = []
    for model in options.models.split(","):
        config = MODELS[model]
        for batch in map(int, options.batches.split(",")):
            for precision in precisions:
                row = {"model": model, "batch": batch, "precision": precision}
                row |= {"operations": batch * operations(config), "traffic": traffic(config, batch, precision)}
                least = least_seconds(row["operations"], row["traffic"], precision, limits)
                rows.append(row | {"images_per_second": batch / least})
    text = markdown(rows, where, limits)
    if options.json:
        save(options.json, document("roofline", where, limits, rows))
        save(options.json.with_suffix(".md"), text)
    print(text)


def markdown(rows: Sequence[Mapping[str, Any]], where: Environment, limits: Ceilings) -> str:
    """The ceilings, and the images per second that they allow."""
    lines = []
    for model, batch in dict.fromkeys((row["model"], row["batch"]) for row in rows):
        these = [row for row in rows if (row["model"], row["batch"]) == (model, batch)]
        lines.append([f"{model}, batch {batch}", *(f"{row['images_per_second']:,.0f}" for row in these)])
    parts = [
        f"{limits.line()}.",
        "Images per second that these allow:",
        table(["model", *limits.flops], lines),
        f"{where.line()}.",
    ]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    main()
