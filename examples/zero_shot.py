"""Zero-shot classification with open_clip: which of these labels fits a picture best?

    pip install open_clip_torch
    python examples/zero_shot.py photo.jpg --labels cat dog bird

Radford et al. 2021, section 3.1: a picture's embedding is compared with the embedding of "a photo of a <label>".
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


def classify(
    model: Any, preprocess: Callable[[Image.Image], Tensor], tokenize: Callable[[list[str]], Tensor],
    pictures: Sequence[Image.Image], labels: Sequence[str],
) -> Tensor:  # fmt: skip
    """The probability of each label for each picture: (pictures, labels)."""
    device = model.logit_scale.device
    with torch.no_grad():
        texts = model.encode_text(tokenize([f"a photo of a {label}" for label in labels]).to(device))
        images = model.encode_image(torch.stack([preprocess(picture) for picture in pictures]).to(device))
        logits = model.logit_scale.exp() * F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T
        if getattr(model, "logit_bias", None) is not None:  # a SigLIP says of each pair by itself how probable it is
            return (logits + model.logit_bias).sigmoid()
    return logits.softmax(dim=-1)


def main() -> None:
    parser = argparse.ArgumentParser(description="Zero-shot classification")
    parser.add_argument("pictures", nargs="+")
    parser.add_argument("--labels", nargs="+", required=True)
    parser.add_argument("--model", default="ViT-B-32-quickgelu")
    parser.add_argument("--pretrained", default="openai")
    options = parser.parse_args()

    import open_clip

    device = "cuda" if torch.cuda.is_available() else "cpu"
    created: Any = open_clip.create_model_and_transforms(options.model, options.pretrained, device=device)
    model, _, preprocess = created
    model = clip_fast.accelerate(model.eval())  # the one line
    pictures = [Image.open(path) for path in options.pictures]
    tokenize = open_clip.get_tokenizer(options.model)
    for path, row in zip(
        options.pictures, classify(model, preprocess, tokenize, pictures, options.labels), strict=True
    ):
        best = int(row.argmax())
        print(f"{path}: {options.labels[best]} ({float(row[best]):.0%})")


if __name__ == "__main__":
    main()
