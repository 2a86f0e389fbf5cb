"""The demonstration behind `clip-fast demo`: the bundled tiny CLIP on handwritten digits, offline, in seconds.

The package ships a real CLIP in miniature (`assets/tiny-digits`, see its MODEL_CARD.md): the image tower's weights, one
text embedding per digit, and digits that it never saw in training. So an installation is checked end to end, from PIL
images to a zero-shot answer, on any device and in any precision.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load
from torch import Tensor

from ..checkpoint.published import resolve
from ..checkpoint.reading import read_checkpoint
from ..encoder import ImageEncoder
from ..loading import load as load_model
from ..preprocess import Preprocess
from ..towers import reference
from .messages import show

MODEL = "tiny-digits"
ASSETS = Path(__file__).parents[1] / "assets" / MODEL
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
REQUIRED_ACCURACY = 0.95

_INK = 16  # the darkest value of a pixel in the data set
_SHADES = " .:-=+*#@"  # from no ink to full
_EXAMPLES = (0, 3, 7)  # digits to show, besides one that the model gets wrong
_ROUNDS = 7  # of timing
_ROUND_SECONDS = 0.1


def digit_image(pixels: NDArray[np.uint8]) -> Image.Image:
    """A digit (8, 8) of ink from 0 to 16 as an RGB image, white on black."""
    grey = np.rint(pixels * (255 / _INK)).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")


def held_out_digits() -> tuple[NDArray[np.uint8], Tensor]:
    """The bundled digits that training never saw: pixels (360, 8, 8) of ink from 0 to 16, and labels (360,)."""
    with np.load(ASSETS / "digits.npz") as file:
        return file["images"], torch.tensor(file["labels"], dtype=torch.long)


def text_embeddings() -> Tensor:
    """One embedding of length one per digit from 0 to 9: float32 (10, embed_dim)."""
    return load((ASSETS / "model.safetensors").read_bytes())["text_embeddings"]


def _preprocess_all(pixels: NDArray[np.uint8], preprocess: Preprocess) -> Tensor:
    return torch.stack([preprocess(digit_image(each)) for each in pixels])


@torch.inference_mode()
def _cosines(model: ImageEncoder, images: Tensor) -> Tensor:
    """Cosine of each image with each digit's text: float32 (B, 10), on the CPU."""
    embeddings = model.encode_image(images).float().cpu()
    return F.normalize(embeddings, dim=1) @ text_embeddings().T


def accuracy(model: ImageEncoder, preprocess: Preprocess) -> float:
    """Zero-shot accuracy on the held-out digits, from 0 to 1: the share whose nearest text is that of their label."""
    pixels, labels = held_out_digits()
    answers = _cosines(model, _preprocess_all(pixels, preprocess)).argmax(dim=1)
    return (answers == labels).double().mean().item()


def _print_examples(pixels: NDArray[np.uint8], labels: Tensor, cosines: Tensor) -> None:
    """A few digits drawn side by side, and under them what the model makes of each."""
    wrong = [int(row) for row in (cosines.argmax(dim=1) != labels).nonzero()]
    rows = [int((labels == digit).nonzero()[0]) for digit in _EXAMPLES] + wrong[:1]
    shades = pixels[rows].astype(np.int64) * (len(_SHADES) - 1) // _INK  # (examples, 8, 8)
    for lines in shades.transpose(1, 0, 2):  # a line of every digit; a character is half as wide as high
        show("  ".join("".join(_SHADES[shade] * 2 for shade in line) for line in lines).rstrip())
    show(f"\n{'label':<7}{'nearest caption':<30}{'cosine':>6}   {'runner-up':<9}  {'cosine':>6}")
    for row in rows:
        best, runner_up = (int(digit) for digit in cosines[row].topk(2).indices)
        show(
            f"{int(labels[row]):<7}{'a photo of the digit ' + WORDS[best]:<30}{float(cosines[row, best]):>6.2f}   "
            f"{WORDS[runner_up]:<9}  {float(cosines[row, runner_up]):>6.2f}"
        )


def _seconds_per_call(contenders: list[Callable[[], Tensor]], device: torch.device) -> list[float]:
    """Median time of each contender over rounds in which they take turns, so that a busy spell meets them all."""

    def seconds(call: Callable[[], Tensor], repeats: int) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - start) / repeats

    repeats: list[int] = []
    for call in contenders:
        seconds(call, repeats=2)  # the first calls compile and allocate
        repeats.append(max(1, round(_ROUND_SECONDS / seconds(call, repeats=1))))
    times: list[list[float]] = [[] for _ in contenders]
    order = list(range(len(contenders)))
    for _ in range(_ROUNDS):
        for i in order:
            times[i].append(seconds(contenders[i], repeats[i]))
        order.reverse()  # neither always runs in the other's wake
    return [statistics.median(each) for each in times]


@torch.inference_mode()
def _print_speed(model: ImageEncoder, images: Tensor) -> None:
    """Measures the model beside the plain encoder with the same weights, in the same precision, on the same images."""
    plain = reference.build(model.config)
    plain.load_state_dict(read_checkpoint(resolve(MODEL)).state_dict)
    plain.to(device=model.device, dtype=model.dtype)
    batch = images.to(device=model.device, dtype=model.dtype)
    ours, theirs = _seconds_per_call([lambda: model.encode_image(batch), lambda: plain(batch)], model.device)
    show(f"speed     clip_fast        {len(batch) / ours:>10,.0f} images/s")
    show(f"          plain PyTorch    {len(batch) / theirs:>10,.0f} images/s   ratio {theirs / ours:.2f}")
    show(f"          batches of {len(batch)} in memory; medians of {_ROUNDS} rounds taken in turn;")
    show("          a model this small says little about the speed of a large one")


def run(device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> int:
    """Shows the bundled model at work and checks its accuracy.

    Args:
        device: where to compute, as in `clip_fast.load`.
        dtype: the precision, as in `clip_fast.load`.

    Returns:
        0 where at least 95 % of the held-out digits are told apart, else 1: an exit status.
    """
    model, preprocess = load_model(MODEL, device, dtype)
    pixels, labels = held_out_digits()
    images = _preprocess_all(pixels, preprocess)
    cosines = _cosines(model, images)
    correct = int((cosines.argmax(dim=1) == labels).sum())
    share = correct / len(labels)
    precision = str(model.dtype).removeprefix("torch.")

    show(f"{MODEL}: a tiny CLIP, trained on handwritten digits ({model.device}, {precision})\n")
    _print_examples(pixels, labels, cosines)
    show(f"\naccuracy  {share:.1%}: {correct} of {len(labels)} digits that it never saw in training")
    if share < REQUIRED_ACCURACY:
        print(f"error: accuracy is {share:.1%}, below the {REQUIRED_ACCURACY:.0%} that it must reach", file=sys.stderr)
        return 1
    _print_speed(model, images)
    show("\nnext, with a real model and a folder of your own:\n")
    show("  clip-fast encode PHOTOS --model ViT-B/32 --output embeddings.npy")
    return 0
