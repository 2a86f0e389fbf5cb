"""The encoder as a stage of Ray Data, for clusters.

    import ray
    from clip_fast.ray import ImageEncoder

    embedded = ray.data.read_binary_files("s3://photos", include_paths=True).map_batches(
        ImageEncoder, fn_constructor_kwargs={"model": "ViT-L/14"}, batch_size=256, num_gpus=1,
        compute=ray.data.ActorPoolStrategy(size=8),
    )
    embedded.write_parquet("s3://embeddings")

`ray_job.encode` builds such a pipeline for `clip-fast encode --ray ADDRESS`. Ray repeats the work of a
worker that dies; a row's embedding does not depend on the worker that made it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from ..extras import pyarrow
from ..inputs.base64_text import is_base64, without_base64
from ..inputs.images import image_suffixes
from ..inputs.items import ImageFile, Item, Unreadable, image_bytes
from ..loading import load
from ..towers.config import Activation
from .decoder import Decoder
from .packing import packing_for
from .rows import encode_rows, settle
from .workers import FEW_WORKERS, MEMORY_LIMIT, ROOMS, TIME_LIMIT, Decoded, Workers, WorkItem

BYTES = "bytes"  # the column of files' contents that `read_binary_files` makes
CELL_LIMIT = MEMORY_LIMIT // 4  # bytes of an image in a batch: its decoding process holds it twice when it arrives
# A part of a batch goes to one process. A part of one image would take the encoder's process ten times as long.
_IMAGES_OF_PART = 16
_BYTES_OF_PART = 64 << 20  # or one image

Batch = dict[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class _Bytes(Item):
    data: bytes

    def source(self) -> BytesIO:
        data = without_base64(self.data)
        return image_bytes(data, len(data))


@dataclass(frozen=True, slots=True)
class _Pixels(Item):
    """An image that Ray has decoded, (H, W) or (H, W, C), in the dtypes and channels that Pillow's arrays have."""

    data: NDArray[Any]

    def open(self) -> Image.Image:
        data = self.data.astype(self.data.dtype.newbyteorder("="), copy=False)
        if data.ndim == 3 and data.shape[2] == 1:
            data = data[..., 0]
        elif data.ndim == 3 and data.shape[0] == 1 and data.shape[2] > 4:  # Ray's (H, W) among images of (H, W, C)
            data = data[0]
        try:
            if data.ndim > 1:
                return Image.fromarray(data)
        except (TypeError, ValueError):  # what Pillow has no mode for
            pass
        raise ValueError(f"an array of shape {self.data.shape} and dtype {self.data.dtype} is no image")


class ImageEncoder:
    """A callable class for `Dataset.map_batches`: adds embeddings to batches of images, and drops the images.

    Args:
        model: a name or a checkpoint, as `clip_fast.load` takes it, that every worker can reach.
        device, dtype, activation: as in `clip_fast.load`. A worker with a GPU takes its own GPU by default.
        column: the column with the images: their bytes, base64, Hugging Face's {bytes, path}, paths, or decoded arrays.
            By default "bytes", "image", or a column named like a webdataset's file, "jpg".
        normalize: give embeddings of length 1.
        fast_decode: let JPEGs decode at a reduced scale.
        threads: the number of images that are decoded at a time, each in a process of its own; by default one for every
            CPU, and at most 8.
        time_limit: seconds for an image.

    A batch of any of Ray's formats, numpy, pyarrow or pandas, comes back in the same. It has its other columns,
    `embedding` float32 (B, embed_dim), `width`, `height`, `status` ("ok" or "failed") and `error`. An image that cannot
    be read has an embedding of zeros, and the reason in `error`. So has one that takes longer than the time limit, or
    more than 2 GiB of memory (on Linux), or that kills its decoder.

    Arrays are those of `ray.data.read_images`: (H, W) or (H, W, 1) is grey in 8 or 16 bits, (H, W, 2) grey with alpha,
    (H, W, 3) RGB and (H, W, 4) RGBA. No array tells a palette's indices from grey, nor CMYK from RGBA: read such files
    with mode="RGB", or as bytes.
    """

    def __init__(
        self,
        model: str,
        *,
        device: str | None = None,
        dtype: torch.dtype | None = None,
        activation: Activation | None = None,
        column: str | None = None,
        normalize: bool = False,
        fast_decode: bool = False,
        threads: int | None = None,
        time_limit: float = TIME_LIMIT,
    ) -> None:
        self.encoder, preprocess = load(model, device, dtype, activation=activation)
        self.column = column
        self.normalize = normalize
        self.threads = threads or min(FEW_WORKERS, os.cpu_count() or 1)
        packing = packing_for(preprocess, self.encoder.device, self.threads * ROOMS, _IMAGES_OF_PART)
        self.workers = Workers(Decoder(preprocess, fast_decode), self.threads, time_limit=time_limit, packing=packing)

    def __call__(self, batch: Any) -> Any:
        """A batch of columns with the embeddings added.

        Args:
            batch: a dictionary of arrays, a `pyarrow.Table` or a `pandas.DataFrame`.

        Raises:
            TypeError: the batch is something else.
            ValueError: no column holds images, or a column has the name of one that is added.
        """
        names = _names(batch)
        column = self.column or _image_column(names)
        if column not in names:
            raise ValueError(f"no column {column!r}, only {', '.join(names)}")
        values = batch[column]
        items = [item_of(value) for value in (values.to_pylist() if _is_arrow(batch) else values)]
        added = self.embed(items)
        lost = sorted(({*names} - {column}) & added.keys())
        if lost:
            raise ValueError(f"columns of the batch would be lost, rename or drop them: {', '.join(lost)}")
        return _replaced(batch, column, added)

    def embed(self, items: Sequence[Item]) -> Batch:
        """The columns that a batch of `items` gets."""
        parts = self._parts(items)
        device = self.encoder.device
        decoded = Decoded.joined((pixels for _, pixels in self.workers.decode(iter(parts))), len(items), device)
        rows = encode_rows(self.encoder, decoded.images(), self.normalize).cpu().numpy()
        failed = settle(rows, decoded.errors)
        sizes = decoded.sizes.numpy()
        return {
            "width": sizes[:, 0],
            "height": sizes[:, 1],
            "status": np.array(["failed" if i in failed else "ok" for i in range(len(items))], object),
            "error": np.array([failed.get(i, "") for i in range(len(items))], object),
            "embedding": rows,
        }

    def _parts(self, items: Sequence[Item]) -> list[WorkItem]:
        """The items in parts, each for one process. What a process is sent counts against its memory."""
        most = min(_IMAGES_OF_PART, -(-len(items) // self.threads))
        starts, sent = [0], 0
        for i, item in enumerate(items):
            size = _bytes_sent(item)
            sent += size
            if i > starts[-1] and (i == starts[-1] + most or sent > _BYTES_OF_PART):
                starts.append(i)
                sent = size
        ends = [*starts[1:], len(items)]
        return [WorkItem(list(items[start:end]), 0, start, len(items)) for start, end in zip(starts, ends, strict=True)]


def _bytes_sent(item: Item) -> int:
    match item:
        case _Bytes():
            return len(item.data)
        case _Pixels():
            return item.data.nbytes
        case _:
            return 0


def _is_arrow(batch: Any) -> bool:
    """Whether a batch is a `pyarrow.Table`. PyArrow need not be there for the other formats."""
    return hasattr(batch, "column_names") and isinstance(batch, pyarrow()[0].Table)


def _names(batch: Any) -> list[str]:
    if isinstance(batch, dict):
        return list(cast(Batch, batch))
    if _is_arrow(batch):
        return batch.column_names
    if hasattr(batch, "assign"):
        return list(batch.columns)
    raise TypeError(f"a batch must be of Ray's format numpy, pyarrow or pandas, got a {type(batch).__name__}")


def _replaced(batch: Any, column: str, added: Batch) -> Any:
    """A batch, in its format, with columns in the place of one."""
    if isinstance(batch, dict):
        return {name: values for name, values in cast(Batch, batch).items() if name != column} | added
    if not _is_arrow(batch):
        return batch.drop(columns=[column]).assign(**{name: list(values) for name, values in added.items()})
    arrow, _ = pyarrow()
    batch = batch.drop_columns([column])
    for name, values in added.items():
        array = arrow.array(values.reshape(-1), arrow.string() if values.dtype == object else None)
        batch = batch.append_column(
            name, array if values.ndim == 1 else arrow.FixedSizeListArray.from_arrays(array, values.shape[1])
        )
    return batch


def _image_column(names: Sequence[str]) -> str:
    for name in (BYTES, "image"):
        if name in names:
            return name
    found = [name for name in names if f".{name.rpartition('.')[2].lower()}" in image_suffixes()]
    if not found:
        raise ValueError(f"none of the columns {', '.join(names)} is known to hold images: name it, column=")
    return found[0]


def item_of(value: Any, key: str = "", location: str = "") -> Item:
    if isinstance(value, dict):  # Hugging Face's
        cell = cast(dict[str, Any], value)
        return item_of(cell.get("path") if cell.get("bytes") is None else cell["bytes"], key, location)
    if isinstance(value, str):
        data = os.fsencode(value)
        return item_of(data, key, location) if is_base64(data) else ImageFile(key or value, value)
    if isinstance(value, np.ndarray):
        array = cast(NDArray[Any], value)
        return _cell(_Pixels(key, location, array), array.nbytes)
    if value is None or isinstance(value, bytes):
        return _cell(_Bytes(key, location, value or b""), len(value or b""))
    return Unreadable(key, location, f"a {type(value).__name__} is no image")


def _cell(item: Item, size: int) -> Item:
    if size <= CELL_LIMIT:
        return item
    return Unreadable(item.key, item.location, f"{size} bytes: an image in a batch may have {CELL_LIMIT}")
