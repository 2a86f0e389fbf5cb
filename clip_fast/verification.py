"""Original and fast side by side: whether to trust the fast path on this model and this device.

    print(clip_fast.verify(model))

Both are judged against the plain encoder in float64 with the model's own weights.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .dropin import served
from .dropin.accelerate import accelerate, is_accelerated, restore
from .dropin.forward import Forward
from .encoder import ImageEncoder
from .engine import route
from .engine.engine import checked
from .engine.tower import Tower
from .errors import NotServed
from .towers import reference
from .towers.config import ENCODE, Config, Task, sides
from .towers.fast import normalised

_IMAGES = 8  # random ones, where none are given
_ROUNDS = 5
_Embed = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Verdict:
    """The findings of `verify`.

    Errors are ‖embeddings − exact‖ / ‖exact‖ over all images, where exact is the plain encoder in float64; cosines
    are of corresponding embeddings. Seconds are medians of a whole batch.
    """

    tower: str
    device: str
    dtype: torch.dtype
    images: int
    error: float
    original_error: float
    lowest_cosine: float
    seconds: float
    original_seconds: float
    batch_invariant: bool  # an image's embedding has the same bits alone, in the batch, and at any position

    def __str__(self) -> str:
        speed = self.original_seconds / self.seconds
        return "\n".join(
            [
                f"{self.tower} on {self.device} in {str(self.dtype).removeprefix('torch.')}, {self.images} images",
                f"relative error    {self.error:.1e} fast, {self.original_error:.1e} original",
                f"lowest cosine     1 - {max(1 - self.lowest_cosine, 0.0):.0e}",
                f"a batch takes     {self.seconds * 1e3:.4g} ms fast, {self.original_seconds * 1e3:.4g} ms original: "
                f"{speed:.2f} x",
                f"batch-invariant   {'yes, bit for bit' if self.batch_invariant else 'no'}",
            ]
        )


def verify(model: nn.Module, images: Tensor | None = None, *, show: bool = False) -> Verdict:
    """Compares a model's fast image path with its original one.

    Args:
        model: an `ImageEncoder`, or a model with one image tower that `accelerate` serves, accelerated or not; it is
            left as it was.
        images: (B, 3, H, W), preprocessed floats; an `ImageEncoder` takes raw pixels, too, see `encode_image`. By
            default a few of random values.
        show: also print the verdict.

    Raises:
        NotServed: (a ValueError) the fast path does not run, because of hooks or training mode for example; the message
            says why.
        ValueError: the model has several image towers, there is no image, or images have another shape.
        TypeError: `model` is no module, or `images` are no tensor that it takes.
    """
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"model must be a module, got {type(model).__qualname__}: `load` gives one, and a `preprocess`")
    if isinstance(model, ImageEncoder):
        plain: Any = model.visual
        source = Tower(model.config, (plain,), plain.state_dict, lambda: next(plain.parameters()))
        if isinstance(images, Tensor) and images.dtype == torch.uint8:
            images = normalised(checked(images, model.config.image_size), torch.float32, model.mean, model.std)
        sample = _sample(source, images)
        _check_fast(model, sample, ENCODE)
        verdict = _verdict(plain, source, model.encode_image, plain.forward, sample)
    else:
        found = served.find(model)
        if len(found) != 1:
            raise ValueError(f"the model has {len(found)} image towers: verify them one by one")
        verdict = _of_tower(found[0], images)
    if show:
        print(verdict)
    return verdict


def _of_tower(tower: nn.Module, images: Tensor | None) -> Verdict:
    source = served.read(tower)
    images = _sample(source, images)
    part: Any = tower
    original: Any = type(tower).forward
    borrowed = not is_accelerated(tower)
    if borrowed:
        accelerate(tower)
    try:
        forward = Forward.of(tower)
        assert forward is not None
        _check_fast(forward, images, forward.task)
        fast, plain = part.forward, partial(original, tower)
        index = 1 if served.is_transformers(tower) else 0  # of the embeddings in a tuple
        embed: tuple[_Embed, _Embed] = (
            lambda x: _embeddings(fast(x), index),
            lambda x: _embeddings(plain(x), index),
        )
        return _verdict(tower, source, *embed, images)
    finally:
        if borrowed:
            restore(tower)


def _check_fast(owner: route.Owner, images: Tensor, task: Task) -> None:
    """Raises NotServed where the fast path does not run, and runs it once where it does."""
    with torch.no_grad():
        results = route.judge(owner, images, task)
    if isinstance(results, str):
        raise NotServed(results)


def _embeddings(output: Any, index: int) -> Tensor:
    """The embeddings in the output of a tower, without patch tokens and hidden states."""
    if isinstance(output, Tensor):
        return output
    embeddings: Tensor = cast(Any, output)[index] if type(output) is tuple else output.pooler_output
    return embeddings


def _sample(source: Tower, images: Tensor | None) -> Tensor:
    """The images to compare with, as the tower takes them."""
    size = source.config.image_size
    if images is None:
        images = torch.randn(_IMAGES, 3, *sides(size), generator=torch.Generator().manual_seed(0), device="cpu")
    if not isinstance(images, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"images must be a tensor, got {type(images).__qualname__}: torch.stack makes one of a list")
    if images.dtype == torch.uint8:
        raise TypeError("images must be preprocessed floats, got torch.uint8")
    images = checked(images, size)
    if len(images) == 0:
        raise ValueError("there is no image to compare with")
    weight = source.weight()
    return images.to(weight.device, weight.dtype)


def _verdict(tower: nn.Module, source: Tower, fast: _Embed, original: _Embed, images: Tensor) -> Verdict:
    weight = source.weight()
    with torch.no_grad():
        exact = _exact(source.config, source.state_dict(), images)
        got, wanted = fast(images), original(images)
        alone = all(torch.equal(fast(images[i : i + 1]), got[i : i + 1]) for i in range(len(images)))
        seconds, original_seconds = _times(images, fast, original)
        return Verdict(
            tower=f"{type(tower).__module__.partition('.')[0]}'s {type(tower).__qualname__}",
            device=_name(weight.device),
            dtype=weight.dtype,
            images=len(images),
            error=_error(got, exact),
            original_error=_error(wanted, exact),
            lowest_cosine=float(F.cosine_similarity(got.to(exact), exact).min()),
            seconds=seconds,
            original_seconds=original_seconds,
            batch_invariant=alone and torch.equal(fast(images.flip(0)).flip(0), got),
        )


def _exact(config: Config, state: dict[str, Tensor], images: Tensor) -> Tensor:
    """Embeddings by the plain encoder in float64, on the CPU where the device has no room for it or no float64."""
    with torch.device("meta"):
        plain = reference.build(config)
    plain.load_state_dict({name: tensor.double().cpu() for name, tensor in state.items()}, strict=False, assign=True)
    for name, buffer in plain.named_buffers():  # counters that no embedding depends on
        if buffer.is_meta:
            module, _, leaf = name.rpartition(".")
            setattr(plain.get_submodule(module), leaf, torch.zeros_like(buffer, device="cpu"))
    plain.eval()
    try:
        return plain.to(images.device)(images.double())
    except (torch.OutOfMemoryError, TypeError):
        return plain.cpu()(images.cpu().double())


def _error(got: Tensor, exact: Tensor) -> float:
    return float(((got.to(exact) - exact).square().sum() / exact.square().sum()).sqrt())


def _times(images: Tensor, *ways: _Embed) -> list[float]:
    """Medians of interleaved rounds; both ways have run before."""
    samples: list[list[float]] = [[] for _ in ways]
    for _ in range(_ROUNDS):
        for way, taken in zip(ways, samples, strict=True):
            _wait(images.device)
            start = time.perf_counter()
            way(images)
            _wait(images.device)
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in samples]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
