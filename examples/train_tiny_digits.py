"""Trains the bundled model: a tiny CLIP that tells handwritten digits from captions, in minutes on a CPU.

    python examples/train_tiny_digits.py --output /tmp/tiny-digits

The image tower is CLIP's Vision Transformer, from `clip_fast.towers.reference`. The text tower is a small causal
transformer over the words of captions such as "a photo of the digit seven". Both learn together from CLIP's symmetric
contrastive loss with a learned temperature. The ten digits repeat within a batch: all images and captions of one digit
are positive pairs, and the positives of a row share its target equally.

The program writes the two files that the package ships: `model.safetensors` (the image tower, and one text embedding
for each digit) and `digits.npz` (the held-out images and labels). The data come with scikit-learn.

Sources: Radford et al. 2021 (CLIP), section 2.3, the loss and the text tower; Khosla et al. 2020, several positives per
row; Alpaydin & Kaynak 1998, the digits.
"""

from __future__ import annotations

import argparse
import io
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor, nn

from clip_fast.checkpoint.published import BUNDLED_MODELS
from clip_fast.cli.demo import WORDS, digit_image
from clip_fast.preprocess import Preprocess
from clip_fast.towers import reference
from clip_fast.towers.config import VitConfig

CONFIG = BUNDLED_MODELS["tiny-digits"]
HELD_OUT = 360  # of 1797 images: one in five
SPLIT_SEED = 0  # fixed for the split, so that no --seed trains on a held-out image
TEMPLATES = (
    "a photo of the digit {}",
    "a scan of a handwritten {}",
    "a blurry photo of the number {}",
    "the digit {} written by hand",
    "a small picture of the number {}",
    "someone wrote the number {} on a form",
    "a handwritten digit {}",
    "{}",
)
CAPTIONS = [template.format(word) for word in WORDS for template in TEMPLATES]  # caption // len(TEMPLATES) is the digit
START, END, PADDING = "<start>", "<end>", "<padding>"


# --- Data ------------------------------------------------------------------------------------------------------------


def load_split() -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint8]]:
    """Training images (1437, 8, 8) of ink from 0 to 16 and labels (1437,); held-out images (360, 8, 8) and labels."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = cast(dict[str, NDArray[Any]], load_digits())
    images, labels = digits["images"].astype(np.uint8), digits["target"].astype(np.uint8)
    train, held_out = train_test_split(
        np.arange(len(labels)), test_size=HELD_OUT, stratify=labels, random_state=SPLIT_SEED
    )
    return images[train], labels[train], images[held_out], labels[held_out]


def preprocess_digits(images: NDArray[np.uint8], config: VitConfig) -> Tensor:
    """Digits (B, 8, 8) as the image tower sees them: float32 (B, 3, image_size, image_size)."""
    preprocess = Preprocess(config.image_size)
    return torch.stack([preprocess(digit_image(pixels)) for pixels in images])


def augment(images: Tensor, black: Tensor, generator: torch.Generator) -> Tensor:
    """Rotates, scales, shears and shifts each image a little, fills its borders with black, and adds noise.

    Args:
        images: (B, 3, S, S), preprocessed.
        black: (3, S, S), a black image, preprocessed.
        generator: draws the random numbers.
    """

    def uniform(limit: float) -> Tensor:
        return (torch.rand(len(images), generator=generator) * 2 - 1) * limit

    angle, shear, scale_x, scale_y = uniform(math.radians(12)), uniform(0.15), 1 + uniform(0.12), 1 + uniform(0.12)
    cos, sin = angle.cos(), angle.sin()
    theta = torch.stack(
        [
            torch.stack([scale_x * cos, shear - scale_y * sin, uniform(0.15)], dim=1),
            torch.stack([scale_x * sin, scale_y * cos, uniform(0.15)], dim=1),
        ],
        dim=1,
    )  # (B, 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    moved = F.grid_sample(images - black, grid, align_corners=False) + black
    noise = torch.randn(len(images), 1, *images.shape[2:], generator=generator)  # grey, as the digits are
    return moved + 0.1 * noise


# --- Text ------------------------------------------------------------------------------------------------------------


def tokenise(captions: list[str]) -> Tensor:
    """Captions as word numbers (captions, words of the longest + 2): start, the words, end, padding."""
    words = [[START, *caption.split(), END] for caption in captions]
    vocabulary = {word: i for i, word in enumerate([PADDING, *sorted({word for line in words for word in line})])}
    tokens = torch.full((len(words), max(map(len, words))), vocabulary[PADDING])
    for row, line in zip(tokens, words, strict=True):
        row[: len(line)] = torch.tensor([vocabulary[word] for word in line])
    return tokens


class TextTower(nn.Module):
    """A causal transformer, read at the last token that is not padding: (C, T) word numbers -> (C, embed_dim)."""

    def __init__(self, words: int, length: int, embed_dim: int, width: int = 64, layers: int = 2) -> None:
        super().__init__()
        self.word_embedding = nn.Embedding(words, width)
        self.positional_embedding = nn.Parameter(width**-0.5 * torch.randn(length, width))
        block = nn.TransformerEncoderLayer(
            width, nhead=1, dim_feedforward=4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.transformer = nn.TransformerEncoder(block, layers, enable_nested_tensor=False)
        self.ln_final = nn.LayerNorm(width)
        self.proj = nn.Linear(width, embed_dim, bias=False)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(length))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.word_embedding(tokens) + self.positional_embedding
        x = self.ln_final(self.transformer(x, mask=self.mask, is_causal=True))
        end = (tokens != 0).sum(dim=1) - 1  # padding is word 0; a causal tower never looks past the end
        return self.proj(x[torch.arange(len(x)), end])


# --- Training --------------------------------------------------------------------------------------------------------


class TinyClip(nn.Module):
    """Both towers and the temperature."""

    def __init__(self, config: VitConfig, tokens: Tensor) -> None:
        super().__init__()
        self.visual = reference.VisionTransformer(config)
        self.text = TextTower(int(tokens.max()) + 1, tokens.shape[1], config.embed_dim)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def loss(self, images: Tensor, texts: Tensor, labels: Tensor) -> Tensor:
        """CLIP's loss. Both embeddings are (B, E), row by row an image and its caption; labels (B,)."""
        logits = self.log_scale.clamp(max=math.log(100)).exp() * F.normalize(images) @ F.normalize(texts).T  # (B, B)
        positives = (labels[:, None] == labels).float()
        targets = positives / positives.sum(dim=1)  # symmetric blocks: rows and columns both sum to one
        return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


def train(
    images: Tensor,
    labels: Tensor,
    black: Tensor,
    *,
    config: VitConfig = CONFIG,
    epochs: int,
    seed: int,
    batch: int = 128,
    report: Callable[[int, float], None] | None = None,
) -> TinyClip:
    """Trains both towers from scratch.

    Args:
        images: (B, 3, S, S), preprocessed.
        labels: (B,), their digits.
        black: (3, S, S), a black image, preprocessed.
        report: called after each epoch with its number from 1 and its mean loss.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    tokens = tokenise(CAPTIONS)
    model = TinyClip(config, tokens)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimiser = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}])
    steps = epochs * math.ceil(len(images) / batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=1e-3, total_steps=steps, pct_start=0.1)
    for epoch in range(epochs):
        total = 0.0
        for rows in torch.randperm(len(images), generator=generator).split(batch):
            template = torch.randint(len(TEMPLATES), (len(rows),), generator=generator)
            captions = labels[rows] * len(TEMPLATES) + template
            texts = model.text(tokens)[captions]  # there are few captions: embed them all, take the batch's
            loss = model.loss(model.visual(augment(images[rows], black, generator)), texts, labels[rows])
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            total += loss.item() * len(rows)
        if report is not None:
            report(epoch + 1, total / len(images))
    return model.eval()


@torch.no_grad()
def text_embeddings(model: TinyClip) -> Tensor:
    """One embedding of length one for each digit, the mean over the templates: (10, embed_dim)."""
    each = F.normalize(model.text(tokenise(CAPTIONS)), dim=1)
    return F.normalize(each.unflatten(0, (len(WORDS), len(TEMPLATES))).mean(dim=1), dim=1)


@torch.no_grad()
def zero_shot_accuracy(visual: nn.Module, texts: Tensor, images: Tensor, labels: Tensor) -> float:
    """The share of images whose nearest text embedding, by cosine, is that of their digit."""
    return ((visual(images) @ texts.T).argmax(dim=1) == labels).double().mean().item()  # no length changes an argmax


# --- Files -----------------------------------------------------------------------------------------------------------


def _write(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def write_model(model: TinyClip, path: Path) -> None:
    """The image tower in float16, as OpenAI ships its own, and the text embeddings in float32."""
    tensors = {f"visual.{name}": value.half() for name, value in model.visual.state_dict().items()}
    tensors["text_embeddings"] = text_embeddings(model)
    _write(path, save(tensors, metadata={"activation": CONFIG.activation}))


def write_digits(images: NDArray[np.uint8], labels: NDArray[np.uint8], path: Path) -> None:
    """Images (B, 8, 8) of ink from 0 to 16 and labels (B,)."""
    archive = io.BytesIO()
    np.savez_compressed(archive, images=images, labels=labels)
    _write(path, archive.getvalue())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder to write both files to")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0, help="of the weights, the batches and the augmentation")
    args = parser.parse_args()

    pixels, labels, held_out_pixels, held_out_labels = load_split()
    images, held_out_images = preprocess_digits(pixels, CONFIG), preprocess_digits(held_out_pixels, CONFIG)
    black = preprocess_digits(np.zeros((1, 8, 8), np.uint8), CONFIG)[0]
    start = time.perf_counter()

    def report(epoch: int, loss: float) -> None:
        if epoch % 5 == 0 or epoch == args.epochs:
            print(f"epoch {epoch:3d}  loss {loss:.4f}  {time.perf_counter() - start:4.0f} s", flush=True)

    model = train(images, torch.from_numpy(labels).long(), black, epochs=args.epochs, seed=args.seed, report=report)
    args.output.mkdir(parents=True, exist_ok=True)
    write_model(model, args.output / "model.safetensors")
    write_digits(held_out_pixels, held_out_labels, args.output / "digits.npz")
    accuracy = zero_shot_accuracy(
        model.visual, text_embeddings(model), held_out_images, torch.from_numpy(held_out_labels).long()
    )
    print(f"held-out zero-shot accuracy {accuracy:.2%} on {len(held_out_labels)} images; wrote {args.output}")


if __name__ == "__main__":
    main()
