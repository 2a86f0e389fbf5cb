"""From photographs on disk to embeddings on disk: the speed of whole jobs beside rivals, and the time of each stage.

    python -m bench.pipeline --json pipeline.json

For each model and each kind of photographs, whole jobs come in interleaved rounds: those of `jobs.py`. Before them come
the stages, one after the other in one process, over a part of the photographs: reading, decoding, resizing, putting a
batch together and copying it to the device, encoding, writing.

The model "stand-in" is a tower that costs a 300th of ViT-B/32: with it a job is as fast as images can be read. Files
are written just before they are read, so they come from memory. The speed of a job is measured from its first batches
on, when the decoding processes have started. The time up to there has a column of its own.
"""

from __future__ import annotations

import argparse
import io
import math
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from clip_fast.preprocess import Preprocess
from clip_fast.towers.config import Config, VitConfig, sides
from clip_fast.towers.reference import build

from .environment import Environment, chosen_device, environment
from .jobs import Job, Run, clip_preprocess, clip_retrieval, enough_for_ray, on_ray, ours, save_checkpoint, theirs
from .models import MODELS
from .photographs import checked_kind, make_photographs, size_of_kind
from .report import document, resumed, save, table
from .systems import BASELINE, OURS, SYSTEMS, Encode, Task, our_encoder
from .timing import Failed, reason

Row = dict[str, Any]
Way = Callable[[Path], Run]  # does a job, with a folder of its own to write to

STAGES: tuple[str, ...] = ("read", "decode", "resize", "copy", "encode", "write")
FAST_DECODE = f"{OURS}, fast decode"
ON_RAY = f"{OURS} on Ray"
RETRIEVAL = "clip-retrieval"

STAND_IN = "stand-in"
_MODELS: dict[str, Config] = {
    STAND_IN: VitConfig(image_size=224, patch_size=32, width=64, layers=1, heads=1, embed_dim=512),
    **MODELS,
}
KINDS = "640x480,640x480.tar,4000x3000"
_LARGE = 2e6  # pixels
_BATCHES = 8  # in a job, at least
_PER_WORKER = 2  # batches of each decoding process, at least: the speed is that after its first
_STAGED_BATCHES = 4


# --- the stages ------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def stages(job: Job, preprocess: Preprocess, encode: Encode, *, raw: bool, folder: Path) -> dict[str, float]:
    """Seconds per image of every stage, each alone in this process, for photographs that are files.

    Args:
        raw: whether uint8 pixels go to the encoder. Otherwise normalised floats do, as clip's `preprocess` makes them;
            the stage "resize" makes these.
    """
    seconds = dict.fromkeys(STAGES, 0.0)

    @contextmanager
    def clock(stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if job.task.device.type == "cuda":
            torch.cuda.synchronize(job.task.device)
        seconds[stage] += time.perf_counter() - start

    paths = job.photographs.paths[: _STAGED_BATCHES * job.batch_size]
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


# --- the comparison --------------------------------------------------------------------------------------------------


def compare(job: Job, rounds: int, earlier: Sequence[Row] = (), ends: float = math.inf) -> Iterator[list[Row]]:
    """Rows for the stages of ours and openai-clip's, then rows for the whole jobs, in interleaved rounds.

    A system that fails has a row with the reason. Stages are those of files: tars have the same but for reading.

    Args:
        earlier: rows of a run that was cut short. Their stages are kept. Whole jobs of fewer rounds are done again.
        ends: the value of `time.monotonic` after which no round begins.

    Yields:
        All rows so far, after the stages of each and after every round.
    """
    encoder, size = our_encoder(job.task), job.task.config.image_size
    rows = [row for row in earlier if "stages" in row]
    known = {row["system"] for row in rows}

    def staged(system: str, encode: Encode, *, raw: bool) -> Iterator[list[Row]]:
        if system not in known and not job.photographs.in_tars:
            took = stages(job, Preprocess(size), encode, raw=raw, folder=folder)
            rows.append({"system": system, "stages": took})
            yield rows

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        ways: dict[str, Way] = {
            OURS: partial(ours, job, encoder, fast=False),
            FAST_DECODE: partial(ours, job, encoder, fast=True),
        }
        if enough_for_ray(job):
            checkpoint = folder / "model.safetensors"
            save_checkpoint(job.task, checkpoint)
            ways[ON_RAY] = partial(on_ray, job, checkpoint)
        yield from staged(OURS, encoder.encode_image, raw=True)
        try:
            rival, preprocess = rival_of(job.task), clip_preprocess(sides(size)[0])
            # The stages inside clip's transform cannot be timed from outside. Ours computes the same bits.
            yield from staged(BASELINE, rival, raw=False)
            ways[BASELINE] = partial(theirs, job, rival, preprocess)
            ways[RETRIEVAL] = partial(clip_retrieval, job, rival, preprocess)
        except Exception as error:  # a rival's failure is its result
            rows += [{"system": name, "failed": reason(error)} for name in (BASELINE, RETRIEVAL)]
        whole = [row for row in earlier if row.get("rounds") == rounds]
        if len(whole) == len(ways):
            yield [*rows, *whole]
            return
        for whole in _whole(ways, rounds, folder, ends):
            yield [*rows, *whole]


def rival_of(task: Task) -> Encode:
    """openai-clip's tower, as in `bench.end_to_end`."""
    return next(system for system in SYSTEMS if system.name == BASELINE).encode(task)


def _whole(ways: Mapping[str, Way], rounds: int, folder: Path, ends: float) -> Iterator[list[Row]]:
    """A row for each system, after every round."""
    names = list(ways)
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
                runs[name].append(ways[name](place))
            except Exception as error:
                failed[name] = Failed(reason(error))
            shutil.rmtree(place)
        reference = runs[OURS][0].rows if runs[OURS] else None
        baseline = runs[BASELINE] if BASELINE in runs and BASELINE not in failed else None
        rows: list[Row] = []
        for name in names:
            result = {"failed": failed[name].reason} if name in failed else _row(runs[name], baseline, reference)
            rows.append({"system": name, "rounds": r + 1} | result)
        yield rows


def _row(runs: Sequence[Run], baseline: Sequence[Run] | None, reference: NDArray[Any] | None) -> Row:
    speeds = [each.images_per_second for each in runs]
    row: Row = {
        "images_per_second": statistics.median(speeds),
        "range": (max(speeds) - min(speeds)) / statistics.median(speeds),
        "seconds": statistics.median(each.seconds for each in runs),
        "start_up": statistics.median(each.start_up for each in runs),
    }
    if baseline is not None:
        ratios = [speed / rival.images_per_second for speed, rival in zip(speeds, baseline, strict=True)]
        row["to_baseline"] = statistics.median(ratios)
    if reference is not None:
        got, wanted = (torch.from_numpy(rows).double() for rows in (runs[0].rows, reference))
        row["cosine"] = float(F.cosine_similarity(got, wanted).min())
    return row


# --- the tables ------------------------------------------------------------------------------------------------------


def markdown(rows: Sequence[Row], where: Environment) -> str:
    """One table of all speeds, then those of each job: the stages, and the whole."""
    jobs = list(dict.fromkeys(row["about"] for row in rows))
    parts = ["Images per second, from files to files (× openai-clip):", _summary(rows)]
    for about in jobs:
        parts += _of_job(about, [row for row in rows if row["about"] == about])
    return "\n\n".join([*parts, f"{where.line()}."]) + "\n"


def _summary(rows: Sequence[Row]) -> str:
    """A line for each system, a column for each job."""
    measured = {(row["system"], row["model"], row["kind"]): row for row in rows if "images_per_second" in row}
    jobs = list(dict.fromkeys((row["model"], row["kind"]) for row in rows))
    lines: list[list[str]] = []
    for system in dict.fromkeys(name for name, *_ in measured):
        cells = [measured.get((system, *job)) for job in jobs]
        lines.append([system, *("" if cell is None else _speed(cell) for cell in cells)])
    return table(["system", *(f"{model}, {kind}" for model, kind in jobs)], lines)


def _speed(row: Row) -> str:
    speed = row["images_per_second"]
    text = f"{speed:,.3g}" if speed < 1000 else f"{speed:,.0f}"
    return f"{text} ({row['to_baseline']:.2f} ×)" if "to_baseline" in row else text


def _of_job(about: str, rows: Sequence[Row]) -> list[str]:
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
            _speed(row),
            f"{row['range'] * 100:.0f}",
            f"{row['seconds']:.1f}",
            f"{row['start_up']:.1f}",
            f"{row['cosine']:.4f}" if "cosine" in row else "",
        ]
        for row in rows
        if "images_per_second" in row
    ]
    parts = [f"**{about}**"]
    if per_stage:
        parts += ["Images per second of each stage alone, in one process:"]
        parts += [table(["system", *STAGES, "ms per image"], per_stage)]
    header = ["system", "img/s", "range %", "in all, s", "first batches, s", f"lowest cosine to {OURS}"]
    parts += ["From files to files:", table(header, whole)]
    failed = [f"- {row['system']}: {row['failed']}" for row in rows if "failed" in row]
    return [*parts, "Not measured:", "\n".join(failed)] if failed else parts


# --- the command -----------------------------------------------------------------------------------------------------


def numbers(model: str, kind: str, options: argparse.Namespace, device: torch.device) -> tuple[int, int, int]:
    """The count of photographs, the batch size and the number of decoding processes, where `options` gives none.

    Large photographs, and a CPU that encodes, are slow: so fewer of them take long enough. Many processes get more.
    """
    on_gpu, cores, size = device.type == "cuda", os.cpu_count() or 1, size_of_kind(kind)
    large = size is not None and math.prod(size) > _LARGE
    encoding = model != STAND_IN and not on_gpu
    workers = max(1, cores // (2 if encoding else 1)) if options.workers is None else options.workers
    full, needed = 256 if on_gpu else 32, max(_BATCHES, _PER_WORKER * workers)
    count: int = options.count or full * max(32, needed) // (16 if large else 8 if encoding else 1)
    batch_size: int = options.batch_size or max(1, min(full, count // needed))
    return count, batch_size, workers


def main(arguments: Sequence[str] | None = None) -> int:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="python -m bench.pipeline", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--models", default=f"{STAND_IN},ViT-B/32", help="names, separated by commas")
    parser.add_argument(
        "--kinds", default=KINDS, help="of photographs: given, or a size, or 640x480.tar (default: %(default)s)"
    )
    parser.add_argument("--photos", nargs="+", default=[], help="files and folders (default: the tests' photographs)")
    parser.add_argument("--count", type=int, help="photographs for each job; fewer files are repeated")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--workers", type=int, help="decoding processes")
    parser.add_argument("--precision", choices=("fp32", "fp16", "bf16"), default="fp16" if on_gpu else "fp32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--json", type=Path, help="write the results there, and the tables beside them as markdown")
    parser.add_argument("--resume", action="store_true", help="keep the rows of that file, and measure missing ones")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no further round after so many minutes")
    options = parser.parse_args(arguments)
    ends = time.monotonic() + options.minutes * 60

    models, kinds = options.models.split(","), [checked_kind(kind) for kind in options.kinds.split(",")]
    if unknown := [model for model in models if model not in _MODELS]:
        parser.error(f"unknown model {unknown[0]!r}, expected one of {', '.join(_MODELS)}")
    device = chosen_device(options.device)
    where = environment(device)
    done = resumed(options.json, "pipeline", where) if options.resume and options.json else []
    with tempfile.TemporaryDirectory() as folder:
        for model in models:
            for kind in kinds:
                place = Path(folder) / f"{models.index(model)}-{kind}"
                count, batch_size, workers = numbers(model, kind, options, device)
                photographs = make_photographs(kind, count, options.photos, place, workers)
                config = _MODELS[model]
                state = {name: tensor.detach() for name, tensor in build(config).state_dict().items()}
                job = Job(photographs, Task(config, state, device, options.precision), batch_size, workers)
                about = (
                    f"{model}, {options.precision}, {count} photographs, {kind}, on average "
                    f"{photographs.mean_bytes / 1e3:,.0f} kB, batches of {batch_size}, decoding processes: {workers}"
                )
                of_job = {"model": model, "kind": kind, "precision": options.precision, "about": about}
                earlier = [row for row in done if row["about"] == about]
                others = [row for row in done if row["about"] != about]
                for rows in compare(job, options.rounds, earlier, ends):
                    done = [*others, *(of_job | row for row in rows)]
                    if options.json:  # after each round, so that a run which is cut short keeps its rows
                        save(options.json, document("pipeline", where, None, done))
                        save(options.json.with_suffix(".md"), markdown(done, where))
                shutil.rmtree(place)
    print(markdown(done, where))
    return 0


if __name__ == "__main__":
    sys.exit(main())
