"""The job of `clip-fast encode --ray`: a pipeline of Ray Data from inputs to parquet files."""

from __future__ import annotations

import importlib
import os
import pickle
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import islice
from typing import Any
from uuid import uuid4

import torch

from ..checkpoint.published import local_path
from ..errors import printable, summary
from ..extras import pyarrow, ray
from ..inputs.containers import IMAGE_COLUMN, Container
from ..inputs.finder import is_leftover
from ..inputs.images import image_suffixes
from ..inputs.inputs import Files, Inputs, find_inputs
from ..inputs.items import Item, Unreadable
from ..inputs.parquet import Parquet, ParquetCell, keys_of
from ..inputs.tars import Tar, sample_key
from ..loading import default_dtype, load
from ..towers.config import Activation
from .manifest import RAY_MANIFEST_NAME, manifest_bytes, preprocessing, weights_digest
from .ray_stage import BYTES, Batch, ImageEncoder, item_of
from .tables import Record, as_text, table_of
from .workers import TIME_LIMIT

_PATH = "path"
_KEY = "__key__"  # of webdatasets
_CLAIM = ".clip-fast-run-"  # begins the name of a file that is there while a run writes to a folder

_FILES_LISTED = 1000  # files that one task lists
_BATCHES_A_BLOCK = 8  # batches that one call of an actor encodes, one file holds, and a worker's death repeats


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
    time_limit: float = TIME_LIMIT,
    find: Callable[..., Inputs] = find_inputs,
) -> dict[str, int]:
    """Embeds images on a Ray cluster and writes parquet files with the columns that `tables.ParquetWriter` writes.

    Args:
        paths: places that every worker reaches. On a shared disk, all that `find_inputs` takes; the rows are then those
            of a run without Ray, in another order and with absolute places. Or URLs that Ray reads, s3://…, all of one
            kind: tars, parquet files, or files and folders of images, chosen by their suffixes.
        model: a name, or a checkpoint that every worker reaches.
        output: a folder for parquet files that every worker reaches; it must be empty, or not be there yet.
        address: the cluster's, as in `ray.init`. None joins the cluster that this process is in, or that Ray finds on
            this machine, or starts one here.
        workers: the number of encoding actors, by default one for every GPU of the cluster, or one for every two CPUs.
        key_column: the column of keys in parquet files; those at URLs must have one.
        dtype, activation, normalize, fast_decode, time_limit: as in `ImageEncoder`.
        find: `find_inputs`, or a function that tells of what it finds, for paths that are no URLs.

    Returns:
        The number of "images", and how many of these "failed".

    Raises:
        ModuleNotFoundError: the extra `ray` is not installed.
        ValueError: URLs of several kinds, no image, or an output that is no empty folder.
        RuntimeError: the cluster gave up; the output is then incomplete.
    """
    cluster, data = ray()
    filesystem, folder = _place(output)
    if path := local_path(model):
        model = _absolute(str(path))
    joined = not cluster.is_initialized()
    with _claimed(filesystem, folder, output):
        if joined:
            with _sigterm_kept():
                cluster.init(address=address)
        try:
            resources = cluster.cluster_resources()
            cpus, gpus = int(resources.get("CPU", 1)), int(resources.get("GPU", 0))
            actors = workers or gpus or max(1, cpus // 2)
            device = "cuda" if gpus else "cpu"
            dtype = dtype or default_dtype(torch.device(device))
            loaded, preprocess = load(model, "cpu", dtype, activation=activation)  # fails here rather than on workers
            if any("://" in path for path in paths):
                rows = _read_urls(data, paths, image_column, key_column)
            else:
                rows = _read_places(data, find(paths, image_column=image_column, key_column=key_column))
            rows.repartition(target_num_rows_per_block=_BATCHES_A_BLOCK * batch_size).map_batches(
                _TableEncoder,
                fn_constructor_kwargs={
                    "model": model,
                    "device": device,
                    "dtype": dtype,
                    "activation": activation,
                    "normalize": normalize,
                    "fast_decode": fast_decode,
                    "threads": max(1, cpus // actors),
                    "time_limit": time_limit,
                },
                batch_size=batch_size,
                compute=data.ActorPoolStrategy(size=actors),
                num_gpus=1 if gpus else 0,
                num_cpus=1 if 2 * actors <= cpus else 0,  # the tasks that list, read and write want CPUs, too
            ).write_parquet(folder, filesystem=filesystem)
        except cluster.exceptions.RayError as error:
            raise RuntimeError(f"the cluster gave up: {_reason(error)}") from error
        finally:
            if joined:
                cluster.shutdown()
        totals = _totals(filesystem, folder)
        settings = {
            "inputs": list(paths),
            "image_column": image_column,
            "key_column": key_column,
            "model": model,
            "activation": activation,
            "weights": weights_digest(loaded),
            **preprocessing(preprocess),
            "dtype": str(dtype).removeprefix("torch."),
            "normalize": normalize,
            "fast_decode": fast_decode,
        }
        with filesystem.open_output_stream(f"{folder}/{RAY_MANIFEST_NAME}") as file:
            file.write(manifest_bytes({"settings": settings, "done": totals}))
    return totals


class _TableEncoder(ImageEncoder):
    """For `encode`: makes the output's table from rows of `_read_places` or `_read_urls`."""

    def __call__(self, batch: Batch) -> Any:
        if "item" in batch:
            items: list[Item] = [pickle.loads(item) for item in batch["item"]]
        else:
            items = [item_of(*row) for row in zip(batch["image"], batch["key"], batch["image_path"], strict=True)]
        added = self.embed(items)
        records = [
            Record(item.key, item.location, int(width), int(height), error or None)
            for item, width, height, error in zip(items, added["width"], added["height"], added["error"], strict=True)
        ]
        return table_of(added["embedding"], records)


def _place(output: str) -> tuple[Any, str]:
    """A folder in pyarrow's terms: the file system and the path in it."""
    if "://" not in output and any(character in "?\n\r\t" for character in output):
        raise ValueError(f"Ray does not write to {printable(output)}: give the folder a name without ? and line breaks")
    fs = importlib.import_module("pyarrow.fs")
    filesystem, folder = fs.FileSystem.from_uri(output if "://" in output else _absolute(output))
    return filesystem, folder.rstrip("/")


def _names(filesystem: Any, folder: str) -> list[str]:
    """The names in a folder."""
    there = filesystem.get_file_info(importlib.import_module("pyarrow.fs").FileSelector(folder))
    return [file.base_name for file in there]


@contextmanager
def _claimed(filesystem: Any, folder: str, output: str) -> Generator[None, None, None]:
    """Refuses a folder that is not empty, and claims it by a file in the block, so that no second run writes there."""
    new = filesystem.type_name == "local" and not os.path.isdir(folder)
    if new:  # other file systems make folders as files come
        filesystem.create_dir(folder)
    claim = f"{_CLAIM}{uuid4().hex}"
    with filesystem.open_output_stream(f"{folder}/{claim}"):
        pass
    try:
        names = [name for name in _names(filesystem, folder) if name != claim]
        if any(not name.startswith(".") for name in names):
            raise ValueError(f"the folder {output} is not empty: choose another")
        if others := [name for name in names if name.startswith(_CLAIM)]:
            raise ValueError(
                f"another run writes to {output}, or was killed there: choose another folder, or remove {others[0]}"
            )
        yield
    finally:
        filesystem.delete_file(f"{folder}/{claim}")
        if new:
            with suppress(OSError):  # it is not empty
                os.rmdir(folder)


@contextmanager
def _sigterm_kept() -> Generator[None, None, None]:
    """The handler of SIGTERM stays what it is, where Ray would put one of its own."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    if handler is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def _totals(filesystem: Any, folder: str) -> dict[str, int]:
    """The number of images in the tables that were written, and of those that failed.

    Raises:
        ValueError: there is none.
    """
    if not any(name.endswith(Parquet.suffix) for name in _names(filesystem, folder)):
        raise ValueError("no image found")
    written = importlib.import_module("pyarrow.dataset").dataset(folder, filesystem=filesystem, format="parquet")
    failed = importlib.import_module("pyarrow.compute").field("status") == "failed"
    return {"images": written.count_rows(), "failed": written.count_rows(filter=failed)}


def _absolute(path: str) -> str:
    """The same place for a worker, whose working directory is another. `..` behind a link is left as it is."""
    return os.path.join(os.getcwd(), path)


def _reason(error: Exception) -> str:
    """What one of Ray's errors says of its cause, in a line. They hold the worker's whole traceback, and advice."""
    cause = getattr(error, "cause", None)
    if cause is not None:
        return summary(cause)
    return str(error).rstrip().rpartition("\n")[2] or type(error).__name__


# --- Reading: images are read as bytes and decoded beside the encoder, not by Ray, where a broken one ends the job ---


def _read_places(data: Any, inputs: Inputs) -> Any:
    """A dataset with a column `item`, pickled. Tasks list tars and tables; images are read where they are decoded."""
    if all(isinstance(item, Unreadable) for item in inputs):
        raise ValueError("no image found")
    parts = [{"part": pickle.dumps(part)} for part in _parts(inputs)]
    return data.from_items(parts).flat_map(_list, fn_kwargs={"folder": os.getcwd()})


def _parts(inputs: Inputs) -> Iterator[Sequence[Item] | Container]:
    for part in inputs.parts:
        if isinstance(part, Files):
            files = iter(part)
            while some := list(islice(files, _FILES_LISTED)):
                yield some
        else:
            container: Any = part  # a frozen dataclass, as `Container` asks
            yield replace(container, path=_absolute(part.path))


def _list(row: dict[str, Any], folder: str) -> Iterator[dict[str, bytes]]:
    for item in pickle.loads(row["part"]):
        if isinstance(item, ParquetCell):
            item = replace(item, folder=folder)
        yield {"item": pickle.dumps(replace(item, location=os.path.join(folder, item.location)))}


def _read_urls(data: Any, urls: Sequence[str], image_column: str, key_column: str | None) -> Any:
    """A dataset with columns `key`, `image_path` and `image`."""
    many = (Tar.suffix, Parquet.suffix)
    kinds = {url.rpartition(".")[2].lower() if url.lower().endswith(many) else "image" for url in urls}
    if len(kinds) != 1 or not all("://" in url for url in urls):
        raise ValueError("URLs must be of one kind, tars, parquet files or images, and not among paths")
    (kind,) = kinds
    if kind == "tar":
        samples = data.read_webdataset(list(urls), decoder=False, filerename=_one_sample, include_paths=True)
        return samples.map_batches(_members, batch_format="pyarrow")
    if kind == "parquet":
        if key_column is None:
            raise ValueError("parquet files at URLs need a column of keys: name it, --key-column")
        if _PATH in (image_column, key_column):
            raise ValueError(f"of parquet files at URLs, the column {_PATH!r} is Ray's own: rename it")
        table = data.read_parquet(list(urls), include_paths=True).select_columns([image_column, key_column, _PATH])
        return table.map_batches(_named, batch_format="pyarrow", fn_kwargs={"image": image_column, "key": key_column})
    suffixes = sorted(suffix.removeprefix(".") for suffix in image_suffixes())
    files = data.read_binary_files(list(urls), include_paths=True, file_extensions=suffixes)
    own = files.map_batches(_without_leftovers, batch_format="pyarrow")
    return own.map_batches(_named, batch_format="pyarrow", fn_kwargs={"image": BYTES, "key": _PATH})


def _named(table: Any, image: str, key: str) -> Any:
    arrow, _ = pyarrow()
    places = table[_PATH].to_pylist()
    keys = [place if name is None else name for name, place in zip(keys_of(table[key]), places, strict=True)]
    return arrow.table({"key": arrow.array(keys, arrow.string()), "image_path": places, "image": table[image]})


def _without_leftovers(table: Any) -> Any:
    return table.filter(pyarrow()[0].array([not is_leftover(path) for path in table[_PATH].to_pylist()], "bool"))


def _one_sample(member: str) -> str:
    """Renames a tar's member for webdataset: each image becomes its own sample; everything else is dropped.

    Otherwise samples would be rows of one table with as many columns as there are suffixes.
    """
    if sample_key(member) is None:
        return ""
    return f"{member.encode('utf-8', 'surrogateescape').hex()}.image"


def _members(table: Any) -> Any:
    """Keys and places as `inputs.tars.Tar` has them."""
    arrow, _ = pyarrow()
    members = [as_text(bytes.fromhex(key).decode("utf-8", "surrogateescape")) for key in table[_KEY].to_pylist()]
    keys = [sample_key(member) for member in members]
    places = [f"{tar}/{member}" for tar, member in zip(table[_PATH].to_pylist(), members, strict=True)]
    return arrow.table({"key": keys, "image_path": places, "image": table["image"]})
