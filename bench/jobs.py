"""Whole jobs, from photographs on disk to embeddings on disk, as each tool does them.

* `ours` is `clip_fast.bulk.pipeline`, as `clip-fast encode --output FOLDER/` runs it.
* `on_ray` is `clip-fast encode --ray`, on a cluster that consists of this machine.
* `theirs` is the code that a user of openai-clip writes: its `preprocess` and `encode_image` with a DataLoader between
  them, which reads files, or tars by webdataset.
* `clip_retrieval` is the inference of a tool made for such jobs, around the same tower of openai-clip.

All have the same weights and the same number of decoding processes, and write float32 rows, with two exceptions:
clip-retrieval writes float16, and on Ray the cluster's CPUs are divided among its tasks.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import time
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from clip_fast.bulk.decoder import Decoder
from clip_fast.bulk.pipeline import Options, Step, run
from clip_fast.bulk.shards import OutputFolder
from clip_fast.encoder import ImageEncoder
from clip_fast.inputs.inputs import find_inputs
from clip_fast.preprocess import Preprocess

from .photographs import Photographs
from .systems import Encode, Task, Unavailable

Transform = Callable[[Image.Image], Tensor]

_RAY_BATCHES = 8  # of images in each file of embeddings, as in clip_fast.bulk.ray_job


@dataclass(frozen=True)
class Job:
    """Photographs and the settings to encode them with."""

    photographs: Photographs
    task: Task
    batch_size: int
    workers: int  # processes that decode


@dataclass(frozen=True)
class Run:
    """One run of a job. The decoding processes, which start meanwhile, are at work from its `start_up` on."""

    seconds: float  # in all
    start_up: float  # up to the end of the first batches, one of each decoding process
    images_per_second: float  # of the others
    rows: NDArray[Any]  # the embeddings, in the order of the photographs


class Clock:
    """Notes the times at which batches are done. Speed is that after the first ones, of each of `workers` processes."""

    def __init__(self, workers: int) -> None:
        self._first = max(1, workers)
        self._batches = self._done = 0
        self._from: tuple[float, int] | None = None
        self._started = time.perf_counter()

    def tick(self, images: int) -> None:
        self._done += images
        self._batches += 1
        if self._batches == self._first:
            self._from = (time.perf_counter(), self._done)

    def result(self, rows: NDArray[Any]) -> Run:
        ended = time.perf_counter()
        if self._from is None or self._done == self._from[1]:
            raise ValueError(f"needs photographs for more than {self._first} batches, got {self._done}")
        at, count = self._from
        return Run(ended - self._started, at - self._started, (self._done - count) / (ended - at), rows)


def ours(job: Job, encoder: ImageEncoder, folder: Path, *, fast: bool) -> Run:
    clock = Clock(job.workers)
    decoder = Decoder(Preprocess(job.task.config.image_size, encoder.mean, encoder.std), fast)
    count = job.photographs.count
    options = Options(batch_size=job.batch_size, shard_size=count, workers=job.workers)
    left = count

    def report(step: Step) -> None:
        nonlocal left
        if step.encoding:  # like the rivals, count a batch when it is encoded, not when it is written
            clock.tick(min(job.batch_size, left))
            left -= job.batch_size

    with OutputFolder(folder / "out") as output:
        output.begin({})
        run(encoder, decoder, find_inputs(job.photographs.paths), output, options, report)
        totals = output.finish(1)
    if (totals.images, totals.failed) != (count, 0):
        raise ValueError(f"{totals.images} of {count} photographs are there, and {totals.failed} could not be read")
    return clock.result(np.load(output.embeddings_path(0)))


def save_checkpoint(task: Task, path: Path) -> None:
    """Writes the weights as a file that `clip_fast.load` takes on any machine."""
    save_file({f"visual.{name}": tensor.contiguous() for name, tensor in task.state_dict.items()}, path)


def enough_for_ray(job: Job) -> bool:
    """Whether `on_ray` can time a job: one of files, enough for three files of embeddings."""
    return not job.photographs.in_tars and job.photographs.count >= 3 * _RAY_BATCHES * job.batch_size


def on_ray(job: Job, checkpoint: Path, folder: Path) -> Run:
    """The speed is that between the first and the last file of embeddings: the actors are far from our clock."""
    if importlib.util.find_spec("ray") is None:
        raise Unavailable("ray is not installed")
    ray_job = importlib.import_module("clip_fast.bulk.ray_job")
    parquet = importlib.import_module("pyarrow.parquet")
    output = folder / "out"
    started = time.time()
    ray_job.encode(
        [str(path) for path in job.photographs.paths],
        str(checkpoint),
        str(output),
        address="local",  # not a cluster that happens to run here
        workers=1,
        batch_size=job.batch_size,
        dtype=job.task.dtype,
        activation=getattr(job.task.config, "activation", None),
    )
    ended = time.time()
    written = sorted((file.stat().st_mtime, file) for file in output.glob("*.parquet"))
    tables = [parquet.read_table(file, columns=["key", "embedding"]) for _, file in written]
    rows = np.concatenate([np.stack(table["embedding"].to_numpy()) for table in tables])
    names = [name for table in tables for name in table["key"].to_pylist()]
    (first, _), *_, (last, _) = written
    speed = (len(rows) - tables[0].num_rows) / (last - first)
    return Run(ended - started, first - started, speed, rows[_order(names)])


class _Files(Dataset[tuple[Tensor, str]]):
    """The dataset that users of openai-clip write: gives a photograph by its number, preprocessed, and its name."""

    def __init__(self, paths: Sequence[Path], preprocess: Transform) -> None:
        self._paths, self._preprocess = paths, preprocess

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        path = self._paths[index]
        return self._preprocess(Image.open(path)), path.stem


def _samples(paths: Sequence[Path], preprocess: Transform, batch_size: int) -> Any:
    """The same of tars, as webdataset's users write it. Each process makes batches of its own tars."""
    webdataset = _webdataset()
    samples = webdataset.WebDataset([str(path) for path in paths], shardshuffle=False)
    return samples.decode("pil").to_tuple("jpg", "__key__").map_tuple(preprocess, None).batched(batch_size)


def _webdataset() -> Any:
    if importlib.util.find_spec("webdataset") is None:
        raise Unavailable("webdataset is not installed")
    return importlib.import_module("webdataset")


@torch.inference_mode()
def theirs(job: Job, encode: Encode, preprocess: Transform, folder: Path) -> Run:
    clock = Clock(job.workers)
    on_gpu = job.task.device.type == "cuda"
    settings: dict[str, Any] = {"num_workers": job.workers, "pin_memory": on_gpu}
    if job.photographs.in_tars:
        samples = _samples(job.photographs.paths, preprocess, job.batch_size)
        loader: Any = DataLoader(samples, batch_size=None, **settings)
    else:
        loader = DataLoader(_Files(job.photographs.paths, preprocess), batch_size=job.batch_size, **settings)
    rows: list[NDArray[Any]] = []
    names: list[str] = []
    for images, batch_names in loader:
        rows.append(encode(images.to(job.task.device, job.task.dtype, non_blocking=True)).float().cpu().numpy())
        names += batch_names
        clock.tick(len(images))
    whole = np.concatenate(rows)
    with open(folder / "embeddings.npy", "wb") as file:
        np.save(file, whole)
        os.fsync(file.fileno())
    return clock.result(whole[_order(names)])


def _clip_retrieval(module: str) -> Any:
    """A module of clip-retrieval's inference, without the imports of its packages, such as a web server and wandb."""
    for package in ("clip_retrieval", "clip_retrieval.clip_inference"):
        if package not in sys.modules:
            found = importlib.util.find_spec(package)
            if found is None:
                raise Unavailable("clip-retrieval is not installed")
            bare = types.ModuleType(package)
            bare.__path__ = list(found.submodule_search_locations or ())
            sys.modules[package] = bare
    return importlib.import_module(f"clip_retrieval.clip_inference.{module}")


@dataclass(frozen=True)
class _BatchLogger:
    """Replaces clip-retrieval's logger. The runner calls it after every batch."""

    clock: Clock

    def start(self) -> None: ...

    def __call__(self, statistics: Mapping[str, Any]) -> None:
        self.clock.tick(statistics["sample_count"])

    def end(self) -> None: ...


def clip_retrieval(job: Job, encode: Encode, preprocess: Transform, folder: Path) -> Run:
    """clip-retrieval's reader, mapper, writer and the runner that joins them, as its `clip_inference` calls them.

    Only the model and the logger are replaced: it would download the model, and our logger keeps the time.
    """
    clock = Clock(job.workers)
    reader, mapper, writer = (_clip_retrieval(name) for name in ("reader", "mapper", "writer"))
    model = types.SimpleNamespace(encode_image=lambda images: encode(images.to(job.task.dtype)), encode_text=None)
    mapper.load_clip = lambda **_: (model, preprocess, None)
    photos_only = {"enable_text": False, "enable_image": True, "enable_metadata": False}

    def read(sampler: Callable[[Any], Any]) -> Any:
        paths = job.photographs.paths
        if not job.photographs.in_tars:
            return reader.FilesReader(
                sampler, preprocess, None, paths[0].parent, job.batch_size, job.workers, **photos_only
            )
        _webdataset()
        tars = [str(path) for path in paths]
        return reader.WebdatasetReader(sampler, preprocess, None, tars, job.batch_size, job.workers, **photos_only)

    def load() -> Any:
        made = mapper.ClipMapper(**photos_only, use_mclip=False, clip_model="", use_jit=False, mclip_model="")
        made.device = job.task.device
        return made

    def write(partition: int) -> Any:
        return writer.NumpyWriter(partition, str(folder), **photos_only, output_partition_count=1)

    _clip_retrieval("runner").Runner(read, load, write, lambda _: _BatchLogger(clock), 1)(0)
    names = importlib.import_module("pandas").read_parquet(folder / "metadata" / "metadata_0.parquet")["image_path"]
    return clock.result(np.load(folder / "img_emb" / "img_emb_0.npy")[_order(list(names))])


def _order(names: Sequence[str]) -> NDArray[np.int64]:
    """The places of rows in the order of the photographs, which are named by their numbers."""
    return np.argsort([int(Path(name).stem) for name in names])


def clip_preprocess(image_size: int) -> Transform:
    """openai-clip's own preprocessing."""
    return importlib.import_module("clip.clip")._transform(image_size)
