"""From photographs on disk to embeddings on disk: the time of each stage, and the speed of the whole beside rivals.

    python -m bench.pipeline --model ViT-B/32 --photos photos/ --json pipeline.json

The stages come first, one after the other in one process, over a part of the photographs: reading, decoding, resizing,
putting a batch together and copying it to the device, encoding, writing. Then come whole runs, in interleaved rounds:

* `clip_fast.bulk.pipeline`, with and without `--fast-decode`;
* the code that a user of openai-clip writes: its `preprocess` and `encode_image` with a DataLoader between them;
* the inference of clip-retrieval, a tool made for such jobs, around the same tower of openai-clip.

All have the same random weights and the same number of worker processes.

Files are read before the first round, so later reads come from memory. The speed of a whole run is measured from its
first batch on, when the worker processes have started. The time up to the first batch has a column of its own.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import io
import math
import os
import shutil
import statistics
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from clip_fast.bulk.decoder import Decoder
from clip_fast.bulk.pipeline import Options, Step, run
from clip_fast.bulk.shards import OutputFolder
from clip_fast.encoder import ImageEncoder
from clip_fast.inputs.inputs import find_inputs
from clip_fast.inputs.items import Unreadable
from clip_fast.preprocess import Preprocess
from clip_fast.towers.config import sides
from clip_fast.towers.reference import build

from .environment import ROOT, Environment, chosen_device, environment
from .models import MODELS
from .report import document, resumed, save, table
from .systems import BASELINE, OURS, SYSTEMS, Encode, Task, our_encoder
from .timing import Failed, reason

Row = dict[str, Any]

STAGES: tuple[str, ...] = ("read", "decode", "resize", "copy", "encode", "write")
RETRIEVAL = "clip-retrieval"
_STAGED = 1024  # the number of photographs for the stages
_PHOTOS = ROOT / "tests" / "data"


@dataclass(frozen=True)
class Job:
    """Photographs and the settings to encode them with."""

    paths: tuple[Path, ...]
    task: Task
    batch_size: int
    workers: int  # processes that decode

    def rival(self) -> Encode:
        """openai-clip's tower, as in `bench.end_to_end`."""
        return next(system for system in SYSTEMS if system.name == BASELINE).encode(self.task)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# --- the stages ------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def stages(job: Job, preprocess: Preprocess, encode: Encode, *, raw: bool, folder: Path) -> dict[str, float]:
    """Seconds per image of every stage, each alone in this process.

    Args:
        raw: whether uint8 pixels go to the encoder. Otherwise normalised floats do, as clip's `preprocess` makes them;
            the stage "resize" makes these.
    """
    seconds = dict.fromkeys(STAGES, 0.0)

    @contextmanager
    def clock(stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        _wait(job.task.device)
        seconds[stage] += time.perf_counter() - start

    paths = job.paths[:_STAGED]
    for start in range(-job.batch_size, len(paths), job.batch_size):
        if start == 0:  # the batch before this one was the warm-up
            seconds.update(dict.fromkeys(STAGES, 0.0))
        images: list[Tensor] = []
        for path in paths[max(start, 0) : max(start, 0) + job.batch_size]:
            with clock("read"):
                data = path.read_bytes()
            with clock("decode"):
                image = Image.open(io.BytesIO(data))
                image.load()
            with clock("resize"):
                images.append(preprocess.uint8(image) if raw else preprocess(image))
        with clock("copy"):
            batch = torch.stack(images).to(job.task.device)
            if not raw:
                batch = batch.to(job.task.dtype)
        with clock("encode"):
            rows = encode(batch)
        with clock("write"), open(folder / "stage.npy", "wb") as file:
            np.save(file, rows.float().cpu().numpy())
            os.fsync(file.fileno())
    return {stage: total / len(paths) for stage, total in seconds.items()}


# --- the whole -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One run from files to a file."""

    seconds: float  # in all
    start_up: float  # seconds up to the first batch
    images_per_second: float  # after the first batch
    rows: NDArray[Any]  # the embeddings


class _Clock:
    """Notes the times at which batches are done."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.first: tuple[float, int] | None = None
        self.done = 0

    def tick(self, images: int) -> None:
        self.done += images
        if self.first is None and self.done:
            self.first = (time.perf_counter(), self.done)

    def result(self, rows: NDArray[Any]) -> Run:
        ended = time.perf_counter()
        if self.first is None or self.done == self.first[1]:
            raise ValueError(f"needs photographs for more than one batch, got {self.done}")
        at, count = self.first
        return Run(ended - self.started, at - self.started, (self.done - count) / (ended - at), rows)


def ours(job: Job, encoder: ImageEncoder, folder: Path, *, fast: bool) -> Run:
    """`clip_fast.bulk.pipeline`, as `clip-fast encode --output FOLDER/` runs it."""
    clock = _Clock()
    decoder = Decoder(Preprocess(job.task.config.image_size, encoder.mean, encoder.std), fast)
    options = Options(batch_size=job.batch_size, shard_size=len(job.paths), workers=job.workers)

    def report(step: Step) -> None:
        if step.encoding:  # like the rivals, count a batch when it is encoded, not when it is written
            clock.tick(min(job.batch_size, len(job.paths) - clock.done))

    with OutputFolder(folder) as output:
        output.begin({})
        run(encoder, decoder, find_inputs(job.paths), output, options, report)
        totals = output.finish(1)
    if totals.failed:
        raise ValueError(f"{totals.failed} of {totals.images} photographs could not be read")
    return clock.result(np.load(output.embeddings_path(0)))


class _Photos(Dataset[Tensor]):
    """The dataset that users of openai-clip write: gives a photograph by its number, preprocessed."""

    def __init__(self, paths: Sequence[Path], preprocess: Callable[[Image.Image], Tensor]) -> None:
        self._paths, self._preprocess = paths, preprocess

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Tensor:
        return self._preprocess(Image.open(self._paths[index]))


@torch.inference_mode()
def theirs(job: Job, encode: Encode, preprocess: Callable[[Image.Image], Tensor], folder: Path) -> Run:
    """openai-clip's `preprocess` and `encode_image`, with a DataLoader between them."""
    clock = _Clock()
    on_gpu = job.task.device.type == "cuda"
    loader = DataLoader(
        _Photos(job.paths, preprocess), batch_size=job.batch_size, num_workers=job.workers, pin_memory=on_gpu
    )
    rows: list[NDArray[Any]] = []
    for images in loader:
        rows.append(encode(images.to(job.task.device, job.task.dtype, non_blocking=True)).float().cpu().numpy())
        clock.tick(len(images))
    whole = np.concatenate(rows)
    with open(folder / "embeddings.npy", "wb") as file:
        np.save(file, whole)
        os.fsync(file.fileno())
    return clock.result(whole)


def _clip_retrieval(module: str) -> Any:
    """A module of clip-retrieval's inference, without the imports of its packages, such as a web server and wandb."""
    for package in ("clip_retrieval", "clip_retrieval.clip_inference"):
        if package not in sys.modules:
            found = importlib.util.find_spec(package)
            if found is None:
                raise ModuleNotFoundError(f"No module named {package!r}")
            bare = types.ModuleType(package)
            bare.__path__ = list(found.submodule_search_locations or ())
            sys.modules[package] = bare
    return importlib.import_module(f"clip_retrieval.clip_inference.{module}")


@dataclass(frozen=True)
class _BatchLogger:
    """Replaces clip-retrieval's logger. The runner calls it after every batch."""

    clock: _Clock

    def start(self) -> None: ...

    def __call__(self, statistics: Mapping[str, Any]) -> None:
        self.clock.tick(statistics["sample_count"])

    def end(self) -> None: ...


def clip_retrieval(job: Job, encode: Encode, preprocess: Callable[[Image.Image], Tensor], folder: Path) -> Run:
    """clip-retrieval's reader, mapper, writer and the runner that joins them, as its `clip_inference` calls them.

    Only the model and the logger are replaced: it would download the model, and our logger keeps the time.
    """
    clock = _Clock()
    reader, mapper, writer = (_clip_retrieval(name) for name in ("reader", "mapper", "writer"))
    model = types.SimpleNamespace(encode_image=lambda images: encode(images.to(job.task.dtype)), encode_text=None)
    mapper.load_clip = lambda **_: (model, preprocess, None)
    photos_only = {"enable_text": False, "enable_image": True, "enable_metadata": False}

    def read(sampler: Callable[[Any], Any]) -> Any:
        inputs = job.paths[0].parent
        return reader.FilesReader(sampler, preprocess, None, inputs, job.batch_size, job.workers, **photos_only)

    def load() -> Any:
        made = mapper.ClipMapper(**photos_only, use_mclip=False, clip_model="", use_jit=False, mclip_model="")
        made.device = job.task.device
        return made

    def write(partition: int) -> Any:
        return writer.NumpyWriter(partition, str(folder), **photos_only, output_partition_count=1)

    _clip_retrieval("runner").Runner(read, load, write, lambda _: _BatchLogger(clock), 1)(0)
    return clock.result(np.load(folder / "img_emb" / "img_emb_0.npy"))


def clip_preprocess(image_size: int) -> Callable[[Image.Image], Tensor]:
    """openai-clip's own preprocessing."""
    return importlib.import_module("clip.clip")._transform(image_size)


# --- the comparison --------------------------------------------------------------------------------------------------


def compare(job: Job, rounds: int, earlier: Sequence[Row] = (), ends: float = math.inf) -> Iterator[list[Row]]:
    """Rows for the stages of ours and openai-clip's, then rows for the whole runs, in interleaved rounds.

    A system that fails has a row with the reason.

    Args:
        earlier: rows of a run that was cut short. Their stages are kept. Whole runs of fewer rounds are done again.
        ends: the value of `time.monotonic` after which no round begins.

    Yields:
        All rows so far, after the stages of each and after every round.
    """
    encoder, size = our_encoder(job.task), job.task.config.image_size
    ours_alone = Preprocess(size)
    systems: dict[str, Callable[[Path], Run]] = {
        OURS: lambda place: ours(job, encoder, place / "out", fast=False),
        f"{OURS}, fast decode": lambda place: ours(job, encoder, place / "out", fast=True),
    }
    rows = [row for row in earlier if "stages" in row]
    staged = {row["system"] for row in rows}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if OURS not in staged:
            took = stages(job, ours_alone, encoder.encode_image, raw=True, folder=folder)
            rows.append({"system": OURS, "stages": took})
            yield rows
        try:
            rival, preprocess = job.rival(), clip_preprocess(sides(size)[0])
            if BASELINE not in staged:
                # The stages inside clip's transform cannot be timed from outside. Ours computes the same bits.
                rows.append({"system": BASELINE, "stages": stages(job, ours_alone, rival, raw=False, folder=folder)})
                yield rows
            systems[BASELINE] = lambda place: theirs(job, rival, preprocess, place)
            systems[RETRIEVAL] = lambda place: clip_retrieval(job, rival, preprocess, place)
        except Exception as error:  # a rival's failure is its result
            rows += [{"system": name, "failed": reason(error)} for name in (BASELINE, RETRIEVAL)]
        whole = [row for row in earlier if row.get("rounds") == rounds]
        if len(whole) == len(systems):
            yield [*rows, *whole]
            return
        for whole in _whole(systems, rounds, folder, ends):
            yield [*rows, *whole]


def _whole(systems: Mapping[str, Callable[[Path], Run]], rounds: int, folder: Path, ends: float) -> Iterator[list[Row]]:
    """A row for each system, after every round."""
    names = list(systems)
    runs: dict[str, list[Run]] = {name: [] for name in names}
    failed: dict[str, Failed] = {}
    for r in range(rounds):
        if time.monotonic() > ends:
            return
        for name in names[r % len(names) :] + names[: r % len(names)]:
            if name in failed:
                continue
            place = folder / f"{r}-{names.index(name)}"
            place.mkdir()
            try:
                runs[name].append(systems[name](place))
            except Exception as error:
                failed[name] = Failed(reason(error))
            shutil.rmtree(place)
        reference = runs[OURS][0].rows if runs[OURS] else None
        results = {n: {"failed": failed[n].reason} if n in failed else _row(runs[n], reference) for n in names}
        yield [{"system": name, "rounds": r + 1} | result for name, result in results.items()]


def _row(runs: Sequence[Run], reference: NDArray[Any] | None) -> Row:
    speeds = [each.images_per_second for each in runs]
    row: Row = {
        "images_per_second": statistics.median(speeds),
        "range": (max(speeds) - min(speeds)) / statistics.median(speeds),
        "seconds": statistics.median(each.seconds for each in runs),
        "start_up": statistics.median(each.start_up for each in runs),
    }
    if reference is not None:
        got, wanted = (torch.from_numpy(rows).double() for rows in (runs[0].rows, reference))
        row["cosine"] = float(F.cosine_similarity(got, wanted).min())
    return row


def markdown(rows: Sequence[Row], about: str, where: Environment) -> str:
    """Two tables: the stages, and the whole."""
    per_stage = [
        [
            row["system"],
            *(f"{1 / row['stages'][stage]:,.0f}" for stage in STAGES),
            f"{1e3 * sum(row['stages'].values()):.2f}",
        ]
        for row in rows
        if "stages" in row
    ]
    whole = [
        [
            row["system"],
            f"{row['images_per_second']:,.1f}",
            f"{row['range'] * 100:.0f}",
            f"{row['seconds']:.1f}",
            f"{row['start_up']:.1f}",
            f"{row['cosine']:.4f}" if "cosine" in row else "",
        ]
        for row in rows
        if "images_per_second" in row
    ]
    parts = [
        f"**{about}**",
        "Images per second of each stage alone, in one process:",
        table(["system", *STAGES, "ms per image"], per_stage),
        "From files to files:",
        table(["system", "img/s", "range %", "in all, s", "first batch, s", f"lowest cosine to {OURS}"], whole),
    ]
    failed = [f"- {row['system']}: {row['failed']}" for row in rows if "failed" in row]
    if failed:
        parts += ["Not measured:", "\n".join(failed)]
    return "\n\n".join([*parts, f"{where.line()}."]) + "\n"


def _photographs(given: Sequence[str], count: int, folder: Path) -> tuple[Path, ...]:
    """`count` files: copies of the given ones, or of the few in this repository, repeated as often as needed."""
    found = find_inputs(given or [_PHOTOS])
    files = [Path(item.location) for item in found if not isinstance(item, Unreadable)]
    if not files:
        raise ValueError(f"no photographs in {', '.join(given)}")
    copies: list[Path] = []
    for i in range(count):
        source = files[i % len(files)]
        copies.append(Path(shutil.copy(source, folder / f"{i:06}{source.suffix}")))
    return tuple(copies)


def main(arguments: Sequence[str] | None = None) -> int:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="python -m bench.pipeline", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", choices=MODELS, default="ViT-B/32")
    parser.add_argument("--photos", nargs="+", default=[], help="files and folders (default: the tests' photographs)")
    parser.add_argument("--count", type=int, default=8192 if on_gpu else 256, help="how many; fewer files are repeated")
    parser.add_argument("--batch-size", type=int, default=256 if on_gpu else 32)
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 1) // (1 if on_gpu else 2)))
    parser.add_argument("--precision", choices=("fp32", "fp16", "bf16"), default="fp16" if on_gpu else "fp32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--json", type=Path, help="write the results there, and the tables beside them as markdown")
    parser.add_argument("--resume", action="store_true", help="keep the rows of that file, and measure missing ones")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no further round after so many minutes")
    options = parser.parse_args(arguments)
    ends = time.monotonic() + options.minutes * 60

    device, config = chosen_device(options.device), MODELS[options.model]
    where = environment(device)
    about = (
        f"{options.model}, {options.precision}, {options.count} photographs, batches of {options.batch_size}, "
        f"{options.workers} decoding processes"
    )
    job_of_rows = {"model": options.model, "precision": options.precision, "about": about}
    kept = resumed(options.json, "pipeline", where) if options.resume and options.json else []
    earlier = [row for row in kept if row["about"] == about]
    others = [row for row in kept if row["about"] != about]
    state = {name: tensor.detach() for name, tensor in build(config).state_dict().items()}
    text = markdown(earlier, about, where)
    with tempfile.TemporaryDirectory() as folder:
        paths = _photographs(options.photos, options.count, Path(folder))
        job = Job(paths, Task(config, state, device, options.precision), options.batch_size, options.workers)
        for rows in compare(job, options.rounds, earlier, ends):
            text = markdown(rows, about, where)
            if options.json:  # after each round, so that a run which is cut short keeps its rows
                save(options.json, document("pipeline", where, None, [*others, *(job_of_rows | row for row in rows)]))
                save(options.json.with_suffix(".md"), text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
