"""Similarity search with transformers: which of these pictures look most like that one?

    pip install transformers
    python examples/similarity_search.py query.jpg photos/*.jpg

`clip-fast encode` and `clip-fast search` do the same for more pictures than fit into memory, and take words as a query.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import clip_fast


def embed(model: Any, preprocess: Callable[[Image.Image], Tensor], paths: Sequence[str], batch: int = 64) -> Tensor:
    """Normalised embeddings, (pictures, embed_dim)."""
    rows = []
    for start in range(0, len(paths), batch):
        images = []
        for path in paths[start : start + batch]:
            with Image.open(path) as picture:
                images.append(preprocess(picture))
        with torch.no_grad():
            output = model(pixel_values=torch.stack(images).to(model.device, model.dtype))
        rows.append(F.normalize(output.image_embeds.float(), dim=-1))
    return torch.cat(rows)


def most_similar(
    model: Any, preprocess: Callable[[Image.Image], Tensor], query: str, paths: Sequence[str], k: int = 5
) -> list[tuple[str, float]]:
    """The k pictures whose embeddings have the highest cosine with the query's, and that cosine."""
    scores = embed(model, preprocess, paths) @ embed(model, preprocess, [query])[0]
    best: list[int] = scores.argsort(descending=True)[:k].tolist()
    return [(paths[i], float(scores[i])) for i in best]


def main() -> None:
    parser = argparse.ArgumentParser(description="Similarity search")
    parser.add_argument("query")
    parser.add_argument("pictures", nargs="+")
    parser.add_argument("--model", default="openai/clip-vit-base-patch32")
    parser.add_argument("-k", type=int, default=5)
    options = parser.parse_args()

    from transformers import CLIPVisionModelWithProjection

    model: Any = CLIPVisionModelWithProjection.from_pretrained(options.model)
    if torch.cuda.is_available():
        model = model.half().cuda()
    model = clip_fast.accelerate(model.eval())  # the one line
    preprocess = clip_fast.Preprocess(model.config.image_size)
    for path, score in most_similar(model, preprocess, options.query, options.pictures, options.k):
        print(f"{score:.4f}  {path}")


if __name__ == "__main__":
    main()
