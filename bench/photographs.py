"""The photographs that whole jobs are timed with: single files, or tars as webdataset has them.

A kind of photographs is "given", which stands for files as they are, or a size such as "640x480", which they are fitted
to. With ".tar" behind the size they lie in tars.
"""

from __future__ import annotations

import math
import re
import shutil
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from clip_fast.inputs.inputs import find_inputs
from clip_fast.inputs.items import Unreadable
from clip_fast.kernels.resampling import CHANNELS, Plan, Source, plan

from .environment import ROOT

PHOTOGRAPH = (640, 480)  # pixels, of an image that is resized on a GPU
GIVEN = "given"
_KIND = re.compile(rf"{GIVEN}|([1-9]\d*)x([1-9]\d*)(\.tar)?")
_OWN = ROOT / "tests" / "data"
_TARS = 16  # at least
_QUALITY = 90  # of JPEGs
_NOISE = 4.0  # levels: without noise, as a camera has it, a photograph that was enlarged decodes too fast


@dataclass(frozen=True)
class Photographs:
    """Photographs of a kind. `paths` are those of the photographs, or of the tars that they lie in."""

    count: int
    paths: tuple[Path, ...]
    in_tars: bool
    mean_bytes: float  # of one photograph


def resizing(side: int, batch: int) -> Plan:
    """How a batch of `PHOTOGRAPH`s, behind each other, is resized to the squares in their middle."""
    width, height = PHOTOGRAPH
    resized = side * width // height, side
    left, size = (resized[0] - side) // 2, CHANNELS * width * height
    return plan([Source(i * size, width, height, resized, left, 0) for i in range(batch)], side)


def checked_kind(text: str) -> str:
    """`text`, which names a kind of photographs.

    Raises:
        ValueError: it names none.
    """
    if not _KIND.fullmatch(text):
        raise ValueError(f'photographs are "{GIVEN}", or of a size such as 640x480 or 640x480.tar, not {text!r}')
    return text


def size_of_kind(kind: str) -> tuple[int, int] | None:
    """Width and height; None where they are those of the given files."""
    width, height, _ = _KIND.fullmatch(checked_kind(kind)).groups()  # pyright: ignore[reportOptionalMemberAccess]
    return None if width is None else (int(width), int(height))


def make_photographs(kind: str, count: int, sources: Sequence[str], folder: Path, workers: int) -> Photographs:
    """Writes `count` photographs into a new folder: the files in `sources`, repeated as often as needed.

    Each of `workers` decoding processes has a tar, since webdataset gives them whole tars and fails where one has none.

    Raises:
        ValueError: `sources` has none. By default it is the few photographs of this repository.
    """
    found = find_inputs(sources or [_OWN])
    files = [Path(item.location) for item in found if not isinstance(item, Unreadable)]
    if not files:
        raise ValueError(f"no photographs in {', '.join(sources)}")
    folder.mkdir(parents=True)
    size = size_of_kind(kind)
    if size is not None:
        files = [_fitted(file, size, folder.with_name(f"{folder.name}-{i}.jpg")) for i, file in enumerate(files)]
    photographs = [(f"{i:06}{files[i % len(files)].suffix}", files[i % len(files)]) for i in range(count)]
    mean_bytes = sum(file.stat().st_size for _, file in photographs) / count
    in_tars = kind.endswith(".tar")
    if in_tars:
        # As many for each worker: systems that give a worker whole tars wait for the one that has most.
        readers = max(1, workers)
        tars = min(count, readers * math.ceil(_TARS / readers))
        parts = [photographs[i * count // tars : (i + 1) * count // tars] for i in range(tars)]
        paths = [_tar(part, folder / f"{i:04}.tar") for i, part in enumerate(parts)]
    else:
        paths = [Path(shutil.copy(file, folder / name)) for name, file in photographs]
    return Photographs(count, tuple(paths), in_tars, mean_bytes)


def _fitted(file: Path, size: tuple[int, int], target: Path) -> Path:
    """The photograph in another size, as a JPEG."""
    with Image.open(file) as image:
        pixels = np.asarray(ImageOps.fit(image.convert("RGB"), size), np.float32)
    noise = np.random.default_rng(0).standard_normal(pixels.shape, np.float32) * _NOISE
    Image.fromarray((pixels + noise).clip(0, 255).astype(np.uint8)).save(target, quality=_QUALITY)
    return target


def _tar(photographs: Sequence[tuple[str, Path]], target: Path) -> Path:
    with tarfile.open(target, "w") as tar:
        for name, file in photographs:
            tar.add(file, name)
    return target
