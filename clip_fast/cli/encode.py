"""`clip-fast encode`: one way for each kind of output."""

from __future__ import annotations

import argparse
import json
import os
import signal
import threading
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..bulk import fork_server
from ..bulk.decoder import Decoder
from ..bulk.listings import with_listings
from ..bulk.manifest import computer, preprocessing, weights_digest
from ..bulk.npy import EmbeddingWriter, embed_files
from ..bulk.pipeline import Options, run
from ..bulk.processes import ProcessJob, run_on_devices, threads_each
from ..bulk.progress import Bar, Progress, check_errors
from ..bulk.shards import OutputFolder
from ..bulk.tables import ParquetWriter
from ..bulk.workers import FEW_WORKERS, TIME_LIMIT
from ..encoder import ImageEncoder
from ..errors import printable
from ..inputs.finder import read_list
from ..inputs.inputs import Files, Inputs, find_inputs
from ..inputs.items import Failure, Item, Unreadable
from ..inputs.parquet import Parquet
from ..loading import default_device, default_dtype, load
from ..preprocess import Preprocess
from .files import opened, refuse_to_replace
from .interrupt import is_command
from .messages import EXIT_OK, EXIT_SOME_FAILED, EXIT_TERMINATED, report, say, show
from .parser import dtype_of

_LARGE = (  # options for a folder or a parquet file, and not for a single .npy
    "resume",
    "devices",
    "shard_size",
    "embedding_dtype",
    "normalize",
    "fast_decode",
)
_NOT_ON_RAY = ("resume", "device", "devices", "shard_size", "embedding_dtype", "max_errors")


def _refuse(arguments: argparse.Namespace, names: Iterable[str], why: str) -> None:
    values = [(name, getattr(arguments, name)) for name in names]
    given = [f"--{name.replace('_', '-')}" for name, value in values if value is not None and value is not False]
    if given:
        raise ValueError(f"{', '.join(given)}: {why}")


def encode(arguments: argparse.Namespace) -> int:
    """Runs `clip-fast encode` and returns its exit status. With --json the summary is shown however the run ends."""
    summary: dict[str, Any] = {"output": arguments.output, "complete": False}
    try:
        if _decodes_in_workers(arguments):
            named = (device for device in (arguments.device, *(arguments.devices or ())) if device is not None)
            untouched = all(device.type == "cpu" for device in named)  # the command line was parsed by trying them
            fork_server.start(as_fork=untouched and is_command())
        with _sigterm_raised():
            return _encode(arguments, summary)
    except BaseException as error:
        summary["error"] = f"{type(error).__name__}: {error}"
        raise
    finally:
        if arguments.json:
            show(json.dumps(summary))


def _decodes_in_workers(arguments: argparse.Namespace) -> bool:
    """Whether decoders are this process's own. Each of several devices has its own, and Ray has them itself."""
    return arguments.workers != 0 and not arguments.ray and len(arguments.devices or ()) < 2


@contextmanager
def _sigterm_raised() -> Generator[None, None, None]:
    """SIGTERM, which schedulers send before they kill, ends the block by an exception, as Ctrl-C does."""

    def end(*_: object) -> None:
        raise SystemExit(EXIT_TERMINATED)

    if threading.current_thread() is not threading.main_thread():  # which alone may ask for signals
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _encode(arguments: argparse.Namespace, summary: dict[str, Any]) -> int:
    """Runs the way to encode that the output asks for, and puts what it did into `summary`."""
    output: str = arguments.output
    if arguments.ray:
        return _encode_on_ray(arguments, summary)
    if output.endswith((os.sep, "/")) or os.path.isdir(output):
        return _encode_to_folder(arguments, summary)
    suffix = os.path.splitext(output)[1].lower()
    if suffix == Parquet.suffix:
        return _encode_to_parquet(arguments, summary)
    if suffix != ".npy":
        raise ValueError(f"--output {printable(output)}: expected FILE.npy, FILE.parquet, or a folder, which ends in /")
    _refuse(arguments, _LARGE, "for an --output that is a folder (ending in /) or .parquet")
    return _encode_to_npy(arguments, summary)


def _paths(arguments: argparse.Namespace) -> list[str]:
    """The PATHs of the command line and of --files-from."""
    if arguments.files_from is None:
        return arguments.paths
    with opened(arguments.files_from, "--files-from") as file:
        return arguments.paths + read_list(file)


def _inputs(arguments: argparse.Namespace, targets: Sequence[Path] = ()) -> Inputs:
    """The inputs that the command line names, none of which is among the `targets` of a run."""
    inputs = _find(
        _paths(arguments),
        image_column=arguments.image_column,
        key_column=arguments.key_column,
        quiet=arguments.quiet,
    )
    refuse_to_replace([arguments.files_from], _files(inputs), targets)
    return inputs


def _files(inputs: Inputs) -> Iterator[str]:
    for part in inputs.parts:
        if isinstance(part, Files):
            yield from (place if isinstance(place, str) else place.location for place in part.places)
        else:
            yield part.path


def _find(paths: Sequence[str], *, image_column: str, key_column: str | None, quiet: bool) -> Inputs:
    if not quiet:
        say("listing the inputs")  # takes a minute or more for millions of files
    inputs = find_inputs(paths, image_column=image_column, key_column=key_column)
    if inputs.passed_over and not quiet:
        counts = sorted(inputs.passed_over.items(), key=lambda each: (-each[1], each[0]))
        kinds = ", ".join(f"{count} {printable(suffix) or 'without a suffix'}" for suffix, count in counts)
        say(f"passed over in folders, by suffix: {kinds}")
    if all(isinstance(item, Unreadable) for item in inputs):
        report(Failure(item.location, item.reason) for item in inputs if isinstance(item, Unreadable))
        raise ValueError("no image found")
    return inputs


def _encode_on_ray(arguments: argparse.Namespace, summary: dict[str, Any]) -> int:
    from ..bulk import ray_job  # imported here, since Ray takes seconds to import

    _refuse(arguments, _NOT_ON_RAY, "not with --ray, whose workers read, divide and repeat by themselves")
    if arguments.workers == 0:
        raise ValueError("--workers 0: not with --ray, whose actors decode in processes beside them")
    if not arguments.output.endswith("/"):
        raise ValueError("with --ray the --output is a folder for parquet files: it must end in /")
    totals = ray_job.encode(
        _paths(arguments),
        arguments.model,
        arguments.output,
        address=arguments.ray,
        workers=arguments.workers,
        batch_size=arguments.batch_size or 256,
        image_column=arguments.image_column,
        key_column=arguments.key_column,
        dtype=dtype_of(arguments.dtype),
        activation=arguments.activation,
        normalize=arguments.normalize,
        fast_decode=arguments.fast_decode,
        time_limit=arguments.time_limit or TIME_LIMIT,
        find=partial(_find, quiet=arguments.quiet),
    )
    if not arguments.quiet:
        say(f"{printable(arguments.output)}: complete, {totals['images']} images, {totals['failed']} failed")
    summary.update(complete=True, **totals)
    return EXIT_SOME_FAILED if totals["failed"] else EXIT_OK


def _encode_to_npy(arguments: argparse.Namespace, summary: dict[str, Any]) -> int:
    (device,) = _chosen_devices(arguments)
    options = _options(arguments, [device])
    workers = options.workers if arguments.workers is not None else min(FEW_WORKERS, options.workers)
    with EmbeddingWriter(arguments.output) as writer:
        items: list[Item] = []
        failures: list[Failure] = []
        for item in _inputs(arguments, writer.targets):
            if isinstance(item, Unreadable):
                failures.append(Failure(item.location, item.reason))
            else:
                items.append(item)
        report(failures)
        writer.fail(failures)
        check_errors(writer.failed, arguments.max_errors)

        dtype = dtype_of(arguments.dtype)
        model, preprocess = load(arguments.model, device, dtype, activation=arguments.activation)
        embedding = embed_files(
            model,
            preprocess,
            items,
            arguments.batch_size or 32,
            workers=workers,
            time_limit=options.time_limit,
        )
        with Bar(len(items), quiet=arguments.quiet) as progress, closing(embedding) as batches:
            for batch in batches:
                writer.add(batch)
                report(batch.failures)
                progress.update(len(batch.paths) + len(batch.failures))
                check_errors(writer.failed, arguments.max_errors)
        writer.commit()

    rows, columns = writer.shape
    if writer.failed:
        say(f"{writer.failed} failed: see {printable(str(writer.errors_path))}")
    if not rows:
        say("no image could be read, so no embeddings are written")
    elif not arguments.quiet:
        say(f"{printable(arguments.output)}: float32 [{rows}, {columns}]")
    summary.update(complete=True, images=rows + writer.failed, failed=writer.failed)
    return EXIT_SOME_FAILED if writer.failed else EXIT_OK


def _encode_to_folder(arguments: argparse.Namespace, summary: dict[str, Any]) -> int:
    devices = _chosen_devices(arguments)
    options = _options(arguments, devices)
    one = devices[0] if len(devices) == 1 else None  # with several devices, each process loads its own weights
    with OutputFolder(arguments.output, arguments.resume) as folder:
        inputs = _inputs(arguments)
        dtype = dtype_of(arguments.dtype) or default_dtype(devices[0])
        model, preprocess = load(arguments.model, one or "cpu", dtype, activation=arguments.activation)
        folder.begin(_settings(arguments, options, model, preprocess, devices))
        inputs = with_listings(inputs, folder.folder)
        with _progress(arguments, inputs, summary) as progress:
            if one:
                run(model, Decoder(preprocess, arguments.fast_decode), inputs, folder, options, progress)
            else:
                job = ProcessJob(
                    model=arguments.model,
                    dtype=dtype,
                    activation=arguments.activation,
                    inputs=inputs,
                    folder=arguments.output,
                    options=options,
                    fast_decode=arguments.fast_decode,
                    threads=threads_each(devices),
                )
                run_on_devices(devices, job, progress)
            folder.finish(progress.done.shards)
    return EXIT_SOME_FAILED if progress.done.failed else EXIT_OK


def _encode_to_parquet(arguments: argparse.Namespace, summary: dict[str, Any]) -> int:
    if arguments.resume or arguments.devices:
        raise ValueError("--resume and --devices are for an --output that is a folder (ending in /)")
    devices = _chosen_devices(arguments)
    options = _options(arguments, devices)
    with ParquetWriter(arguments.output) as file:
        inputs = _inputs(arguments, [Path(arguments.output)])
        dtype = dtype_of(arguments.dtype)
        model, preprocess = load(arguments.model, devices[0], dtype, activation=arguments.activation)
        with _progress(arguments, inputs, summary) as progress:
            run(model, Decoder(preprocess, arguments.fast_decode), inputs, file, options, progress)
            file.commit()
    return EXIT_SOME_FAILED if progress.done.failed else EXIT_OK


def _chosen_devices(arguments: argparse.Namespace) -> list[torch.device]:
    if arguments.devices and arguments.device:
        raise ValueError("--device and --devices exclude each other")
    if arguments.devices:
        if len({device.type for device in arguments.devices}) > 1:
            raise ValueError("--devices must be of one kind, or embeddings would depend on which made them")
        return arguments.devices
    return [arguments.device or default_device()]


def _options(arguments: argparse.Namespace, devices: Sequence[torch.device]) -> Options:
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = cpus if devices[0].type == "cuda" else cpus // 2  # a CPU needs its other half to encode
    given: dict[str, Any] = {
        "batch_size": arguments.batch_size,
        "shard_size": arguments.shard_size,
        "workers": arguments.workers if arguments.workers is not None else max(1, share // len(devices)),
        "time_limit": arguments.time_limit,
        "dtype": arguments.embedding_dtype,
        "normalize": arguments.normalize,
    }
    return Options(**{name: value for name, value in given.items() if value is not None})


def _settings(
    arguments: argparse.Namespace,
    options: Options,
    model: ImageEncoder,
    preprocess: Preprocess,
    devices: Sequence[torch.device],
) -> dict[str, object]:
    """All that the bytes of the output depend on, for the manifest."""
    return {
        "inputs": arguments.paths,
        "image_column": arguments.image_column,
        "key_column": arguments.key_column,
        "model": arguments.model,
        "activation": arguments.activation,
        "weights": weights_digest(model),
        **preprocessing(preprocess),
        "dtype": str(model.dtype).removeprefix("torch."),
        "batch_size": options.batch_size,
        "shard_size": options.shard_size,
        "embedding_dtype": options.dtype,
        "normalize": options.normalize,
        "fast_decode": arguments.fast_decode,
        **computer(devices, threads_each(devices)),
    }


@contextmanager
def _progress(
    arguments: argparse.Namespace, inputs: Inputs, summary: dict[str, Any]
) -> Generator[Progress, None, None]:
    """A progress bar, and what was done in `summary` and in words, however the run ends."""
    progress = Progress(inputs.expected(), quiet=arguments.quiet, max_errors=arguments.max_errors)
    try:
        with progress:
            yield progress
        summary["complete"] = True
    finally:
        summary |= progress.summary()
        if not arguments.quiet:
            say(
                f"{printable(arguments.output)}: {'complete' if summary['complete'] else 'incomplete'}, "
                f"{summary['images']} images, {summary['failed']} failed, {summary['resumed']} by earlier runs; "
                f"{summary['images_per_second']} images/s, {summary['bound']}-bound"
            )
