"""The encoder as a stage of Ray Data, for clusters.

    import ray
    from clip_fast.ray import ImageEncoder

    embedded = ray.data.read_binary_files("s3://photos", include_paths=True).map_batches(
        ImageEncoder, fn_constructor_kwargs={"model": "ViT-L/14"}, batch_size=256, num_gpus=1,
        compute=ray.data.ActorPoolStrategy(size=8),
    )
    embedded.write_parquet("s3://embeddings")

`encode` builds such a pipeline, as `clip-fast encode --ray ADDRESS` does. Ray does again what dies with a worker; a
row's embedding does not depend on who made it.
"""

from __future__ import annotations

import importlib
import json
import os
import pickle
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from io import BytesIO
from itertools import islice
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from . import available_models, load
from .config import Activation
from .decode import Decoder
from .encoder import default_dtype
from .pipeline import NOT_FINITE, weights_digest
from .shards import Record, as_text, table_of
from .sources import (
    IMAGE_COLUMN,
    PARQUET_SUFFIX,
    TAR_SUFFIX,
    ImageFile,
    Inputs,
    Item,
    Parquet,
    ParquetCell,
    Tar,
    Unreadable,
    find_inputs,
    image_suffixes,
    pyarrow,
)

MANIFEST_NAME = "_manifest.json"  # readers of a folder of parquet files pass over names that begin with _

_BYTES = "bytes"  # column of `read_binary_files`, whose path is in
_PATH = "path"
_KEY = "__key__"  # of webdatasets

_FILES_LISTED = 1000  # by a task
_BATCHES_A_BLOCK = 8  # what one call of an actor encodes, one file holds, and is done again where a worker dies

Batch = dict[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class _Bytes(Item):
    data: bytes

    def source(self) -> BytesIO:
        if not self.data:
            raise ValueError("not an image: zero bytes")
        return BytesIO(self.data)


@dataclass(frozen=True, slots=True)
class _Pixels(Item):
    """An image that Ray has decoded: (H, W, 3) or (H, W), uint8. What `Image.open` takes is made of it again."""

    data: NDArray[np.uint8]

    def source(self) -> BytesIO:
        file = BytesIO()
        Image.fromarray(self.data).save(file, "BMP")
        file.seek(0)
        return file


class ImageEncoder:
    """A callable class for `Dataset.map_batches`: adds embeddings to batches of images, and drops the images.

    Args:
        model: a name or a checkpoint, as `clip_fast.load` takes it, there on every worker.
        device, dtype, activation: as of `clip_fast.load`; on a worker with a GPU, that one.
        column: that holds images: their bytes, Hugging Face's {bytes, path}, paths, or decoded arrays. By default
            "bytes", "image", or one named like a webdataset's file, "jpg".
        normalize: give embeddings of length 1.
        fast_decode: let JPEGs decode at a reduced scale.
        threads: that decode, by default one for every CPU.

    A batch comes back with its other columns, `embedding` float32 (B, embed_dim), and `width`, `height`, `status`
    ("ok" or "failed") and `error`: an image that cannot be read has an embedding of zeros and its reason.
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
    ) -> None:
        self.encoder, preprocess = load(model, device, dtype, activation=activation)
        self.decoder = Decoder(preprocess, fast_decode)
        self.column = column
        self.normalize = normalize
        self.threads = ThreadPoolExecutor(threads or os.cpu_count() or 1)

    def __call__(self, batch: Batch) -> Batch:
        """Raises ValueError where no column holds images, or one has the name of a column that is added."""
        column = self.column or _image_column(list(batch))
        if column not in batch:
            raise ValueError(f"no column {column!r}, only {', '.join(batch)}")
        kept = {name: values for name, values in batch.items() if name != column}
        added = self.embed([_item(value) for value in batch[column]])
        lost = sorted(kept.keys() & added.keys())
        if lost:
            raise ValueError(f"columns of the batch would be lost, rename or drop them: {', '.join(lost)}")
        return kept | added

    def embed(self, items: Sequence[Item]) -> Batch:
        """The columns that a batch of `items` is given."""
        pixels = self.decoder.black(len(items))
        found = list(self.threads.map(self.decoder.into, pixels, items))
        errors = [error for _, error in found]
        with torch.no_grad():
            embeddings = self.encoder.encode_image(pixels).float()
            if self.normalize:
                embeddings = torch.nn.functional.normalize(embeddings, dim=-1)
            for i in np.flatnonzero(~embeddings.isfinite().all(dim=1).cpu().numpy()):
                errors[i] = errors[i] or NOT_FINITE
            failed = torch.tensor([error is not None for error in errors], dtype=torch.bool, device=embeddings.device)
            embeddings[failed] = 0
        sizes = np.array([size for size, _ in found], np.int32).reshape(-1, 2)
        return {
            "width": sizes[:, 0],
            "height": sizes[:, 1],
            "status": np.array(["ok" if error is None else "failed" for error in errors], object),
            "error": np.array([error or "" for error in errors], object),
            "embedding": embeddings.cpu().numpy(),
        }


def _image_column(names: Sequence[str]) -> str:
    for name in (_BYTES, "image"):
        if name in names:
            return name
    found = [name for name in names if f".{name.rpartition('.')[2].lower()}" in image_suffixes()]
    if not found:
        raise ValueError(f"none of the columns {', '.join(names)} is known to hold images: name it, column=")
    return found[0]


def _item(value: Any, key: str = "", location: str = "") -> Item:
    if isinstance(value, dict):  # Hugging Face's
        cell = cast(dict[str, Any], value)
        return _item(cell.get("path") if cell.get("bytes") is None else cell["bytes"], key, location)
    if isinstance(value, str):
        return ImageFile(key or value, value)
    if isinstance(value, np.ndarray):
        return _Pixels(key, location, cast(NDArray[np.uint8], value))
    if value is None or isinstance(value, bytes):
        return _Bytes(key, location, value or b"")
    return Unreadable(key, location, f"a {type(value).__name__} is no image")


# --- The command's pipeline ------------------------------------------------------------------------------------------


def encode(
    paths: Sequence[str],
    model: str,
    output: str,
    *,
    address: str | None = None,
    workers: int | None = None,
    batch_size: int = 256,
    image_column: str = IMAGE_COLUMN,
    key_column: str | None = None,
    dtype: torch.dtype | None = None,
    activation: Activation | None = None,
    normalize: bool = False,
    fast_decode: bool = False,
) -> dict[str, int]:
    """Embeds images on a Ray cluster and writes parquet files, of the columns that `shards.ParquetFile` writes.

    Args:
        paths: in places that every worker reaches. On a shared disk, all that `sources.find_inputs` takes; rows are
            then those of a run without Ray, in another order and with absolute places. Or URLs that Ray reads, s3://…,
            all of one kind: tars, parquet files, or files and folders of images, taken by their suffixes.
        model: a name, or a checkpoint in such a place.
        output: a folder for parquet files, likewise; it must not have any.
        address: of the cluster, as of `ray.init`; None joins the one that this process is in, or starts one here.
        workers: actors that encode, by default one for every GPU of the cluster, or one for every two CPUs.
        key_column: of parquet files; those at URLs must have one.
        dtype, activation, normalize, fast_decode: as of `ImageEncoder`.

    Returns:
        The numbers of "images" and of "failed" ones among them.

    Raises:
        ImportError: without the extra `ray`.
        ValueError: URLs of several kinds, no image, or an output that has parquet files already.
        RuntimeError: where the cluster gave up; what is written then is not whole.
    """
    ray, data = _ray()
    filesystem, folder = _place(output)
    if model not in available_models():
        model = _absolute(os.path.expanduser(model))
    joined = not ray.is_initialized()
    if joined:
        ray.init(address=address)
    try:
        resources = ray.cluster_resources()
        gpus = int(resources.get("GPU", 0))
        device = "cuda" if gpus else "cpu"
        dtype = dtype or default_dtype(torch.device(device))
        loaded, _ = load(model, "cpu", dtype, activation=activation)  # what cannot be loaded is better known before
        rows = _read_urls if any("://" in path for path in paths) else _read_places
        rows(data, paths, image_column, key_column).repartition(
            target_num_rows_per_block=_BATCHES_A_BLOCK * batch_size
        ).map_batches(
            _TableEncoder,
            fn_constructor_kwargs={
                "model": model,
                "device": device,
                "dtype": dtype,
                "activation": activation,
                "normalize": normalize,
                "fast_decode": fast_decode,
            },
            batch_size=batch_size,
            compute=data.ActorPoolStrategy(size=workers or gpus or max(1, int(resources.get("CPU", 1)) // 2)),
            num_gpus=1 if gpus else 0,
            num_cpus=1,
        ).write_parquet(folder, filesystem=filesystem)
    except ray.exceptions.RayError as error:
        raise RuntimeError(f"the cluster gave up: {_last_line(error)}") from error
    finally:
        if joined:
            ray.shutdown()
    written = importlib.import_module("pyarrow.dataset").dataset(folder, filesystem=filesystem, format="parquet")
    failed = importlib.import_module("pyarrow.compute").field("status") == "failed"
    totals = {"images": written.count_rows(), "failed": written.count_rows(filter=failed)}
    settings = {
        "inputs": list(paths),
        "image_column": image_column,
        "key_column": key_column,
        "model": model,
        "activation": activation,
        "weights": weights_digest(loaded),
        "dtype": str(dtype).removeprefix("torch."),
        "normalize": normalize,
        "fast_decode": fast_decode,
    }
    with filesystem.open_output_stream(f"{folder}/{MANIFEST_NAME}") as file:
        file.write(json.dumps({"settings": settings, "done": totals}, indent=2, sort_keys=True).encode() + b"\n")
    return totals


class _TableEncoder(ImageEncoder):
    """For `encode`: from the rows of `_read_places` or `_read_urls` to a table with the columns of the output."""

    def __call__(self, batch: Batch) -> Any:
        if "item" in batch:
            items: list[Item] = [pickle.loads(item) for item in batch["item"]]
        else:
            items = [_item(*row) for row in zip(batch["image"], batch["key"], batch["image_path"], strict=True)]
        added = self.embed(items)
        records = [
            Record(item.key, item.location, int(width), int(height), error or None)
            for item, width, height, error in zip(items, added["width"], added["height"], added["error"], strict=True)
        ]
        return table_of(added["embedding"], records)


def _ray() -> Any:
    try:
        return importlib.import_module("ray"), importlib.import_module("ray.data")
    except ImportError as error:
        raise ImportError("clusters need Ray Data: pip install clip-fast[ray]") from error


def _place(output: str) -> tuple[Any, str]:
    """A folder as pyarrow has it: the file system and the path there."""
    fs = importlib.import_module("pyarrow.fs")
    filesystem, folder = fs.FileSystem.from_uri(output if "://" in output else _absolute(output))
    there = filesystem.get_file_info(fs.FileSelector(folder, allow_not_found=True))
    if any(file.path.endswith(PARQUET_SUFFIX) for file in there):
        raise ValueError(f"the folder {output} has parquet files already: choose another")
    return filesystem, folder.rstrip("/")


def _absolute(path: str) -> str:
    """The same place for a worker, whose working directory is another; `..` after a link is left as it is."""
    return os.path.join(os.getcwd(), path)


def _last_line(error: Exception) -> str:
    """Of Ray's errors, which are the worker's whole traceback."""
    return str(error).rstrip().rpartition("\n")[2] or type(error).__name__


# --- Reading: images are read as bytes and decoded beside the encoder, not by Ray, where a broken one ends the job ---


def _read_places(data: Any, paths: Sequence[str], image_column: str, key_column: str | None) -> Any:
    """A dataset with a column `item`, pickled: tars and tables are listed by tasks, all is read where it is decoded."""
    inputs = find_inputs(paths, image_column=image_column, key_column=key_column)
    if all(isinstance(item, Unreadable) for item in inputs):
        raise ValueError("no image found")
    parts = [{"part": pickle.dumps(part)} for part in _parts(inputs)]
    return data.from_items(parts).flat_map(_list, fn_kwargs={"folder": os.getcwd()})


def _parts(inputs: Inputs) -> Iterator[Sequence[Item] | Tar | Parquet]:
    for part in inputs.parts:
        if isinstance(part, (Tar, Parquet)):
            yield replace(part, path=_absolute(part.path))
        else:
            files = iter(part)
            while some := list(islice(files, _FILES_LISTED)):
                yield some


def _list(row: dict[str, Any], folder: str) -> Iterator[dict[str, bytes]]:
    for item in pickle.loads(row["part"]):
        if isinstance(item, ParquetCell):
            item = replace(item, folder=folder)
        yield {"item": pickle.dumps(replace(item, location=os.path.join(folder, item.location)))}


def _read_urls(data: Any, urls: Sequence[str], image_column: str, key_column: str | None) -> Any:
    """A dataset with columns `key`, `image_path` and `image`."""
    kinds = {url.rpartition(".")[2] if url.endswith((TAR_SUFFIX, PARQUET_SUFFIX)) else "image" for url in urls}
    if len(kinds) != 1 or not all("://" in url for url in urls):
        raise ValueError("URLs must be of one kind, tars, parquet files or images, and not among paths")
    (kind,) = kinds
    if kind == "tar":
        samples = data.read_webdataset(list(urls), decoder=False, filerename=_one_sample, include_paths=True)
        return samples.map_batches(_members, batch_format="pyarrow")
    if kind == "parquet":
        if key_column is None:
            raise ValueError("parquet files at URLs need a column of keys: name it, --key-column")
        table = data.read_parquet(list(urls), include_paths=True).select_columns([image_column, key_column, _PATH])
        return table.map_batches(_named, batch_format="pyarrow", fn_kwargs={"image": image_column, "key": key_column})
    suffixes = sorted(suffix.removeprefix(".") for suffix in image_suffixes())
    files = data.read_binary_files(list(urls), include_paths=True, file_extensions=suffixes)
    return files.map_batches(_named, batch_format="pyarrow", fn_kwargs={"image": _BYTES, "key": _PATH})


def _named(table: Any, image: str, key: str) -> Any:
    arrow, _ = pyarrow()
    keys = table[key].cast(arrow.string())
    return arrow.table({"key": keys, "image_path": table[_PATH], "image": table[image]})


def _one_sample(member: str) -> str:
    """A tar's member renamed for webdataset: what `sources.Tar` takes is a sample of its own, the rest is none.

    Samples would else be rows of one table with as many columns as there are suffixes.
    """
    name = os.path.basename(member)
    is_image = os.path.splitext(name)[1].lower() in image_suffixes() and not name.startswith(".")
    return f"{member.encode('utf-8', 'surrogateescape').hex()}.image" if is_image else ""


def _members(table: Any) -> Any:
    """Keys and places as `sources.Tar` has them."""
    arrow, _ = pyarrow()
    members = [as_text(bytes.fromhex(key).decode("utf-8", "surrogateescape")) for key in table[_KEY].to_pylist()]
    keys = [os.path.join(folder, name.partition(".")[0]) for folder, name in map(os.path.split, members)]
    places = [f"{tar}/{member}" for tar, member in zip(table[_PATH].to_pylist(), members, strict=True)]
    return arrow.table({"key": keys, "image_path": places, "image": table["image"]})
