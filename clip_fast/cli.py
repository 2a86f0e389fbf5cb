"""The command line: `clip-fast encode`, `clip-fast search`, `clip-fast demo`, `clip-fast models`."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing, contextmanager, nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

import PIL
import torch
from numpy.typing import NDArray
from PIL import Image, features
from tqdm import tqdm

from . import Clip, ImageEncoder, Preprocess, __version__, available_models, load, tokenize
from .decode import Decoder, start_fork_server
from .devices import Job, run_on_devices
from .embed import EmbeddingWriter, embed_files
from .encoder import default_device, default_dtype
from .errors import CheckpointError
from .files import new_file
from .kernels import ops
from .pipeline import Options, run, weights_digest
from .progress import Progress, TooManyErrors, check_errors
from .shards import OutputFolder, ParquetFile
from .sources import (
    IMAGE_COLUMN,
    PARQUET_SUFFIX,
    Failure,
    ImageFile,
    Inputs,
    Item,
    Unreadable,
    find_inputs,
    printable,
    pyarrow,
    read_list,
)

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

EXIT_OK = 0
EXIT_SOME_FAILED = 1
EXIT_NOTHING_DONE = 2
EXIT_TOO_MANY_ERRORS = 3
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells have it

DESCRIPTION = "Embeds images with CLIP, fast."

EPILOG = """\
examples:
  clip-fast demo                                         see that it works, without a download
  clip-fast models                                       the names that --model takes
  clip-fast encode photos --model ViT-B/32               embed a folder into embeddings.npy
  clip-fast encode --help                                all about it
  clip-fast search "a dog on a beach" --index embeddings/
"""

ENCODE_DESCRIPTION = """\
Embeds images with a CLIP image encoder.

A PATH is
  a file       taken whatever its suffix;
  a folder     all images below it, by the suffixes of the formats that Pillow reads, sorted by path;
  a .tar       a webdataset: the images in it; its samples' keys are kept;
  a .parquet   a table with a column of images: their bytes, or paths to them;
  a pattern    with * ? [...] and ** (any depth), where the shell has not expanded it: what it matches, sorted;
  braces       data/{0000..0099}.tar, {train,test}/*.jpg: each number, or word, in their place.
Rows follow the order of the arguments. A file reached twice is embedded once.

--output says what is written:

FILE.npy, for small jobs: beside each other, each whole or not at all
  embeddings.npy   float32 [images, embed_dim], not normalised
  paths.txt        UTF-8, line i is the path of row i, as reached from the arguments
  errors.txt       only if files failed: path, tab, reason

FOLDER/, for any number: shards as clip-retrieval and autofaiss read them, and a run that was stopped can --resume
  img_emb/img_emb_0000.npy           [shard size, embed_dim]; rows of images that failed are zero
  metadata/metadata_0000.parquet     key, image_path, width, height, status, error of each row
  errors.jsonl                       only if images failed: key, image_path, reason
  manifest.json                      the settings; once all is done, the totals

FILE.parquet: the columns of the metadata and `embedding`, a list of fixed size

A file that is no image is named in the errors, and the rest goes on. In paths.txt a path must fit a line (no line
break, UTF-8). Errors that end the run, and Ctrl-C, leave a single file of an earlier run as it was, and a folder ready
for --resume.
"""

ENCODE_EPILOG = """\
examples:
  clip-fast encode photos --model ViT-B/32
  clip-fast encode 'photos/**/*.jpg' extra.png --model ViT-L/14 --output out/embeddings.npy
  clip-fast encode photos --model open_clip_model.safetensors --activation gelu --device cuda:1 --dtype bfloat16
  clip-fast encode 'data/{0000..0999}.tar' --model ViT-L/14 --output out/ --devices cuda:0,cuda:1 --resume
  find photos -name '*.jpg' -print0 | clip-fast encode --files-from - --model ViT-B/32 --output out/

reading the result:
  rows = numpy.load("embeddings.npy")
  paths = open("paths.txt", encoding="utf-8").read().splitlines()
  rows /= numpy.linalg.norm(rows, axis=1, keepdims=True)   # cosine similarity is then rows @ rows.T

exit status:
  0    every image is embedded
  1    some files failed, the others are embedded; if all failed, a single .npy is not written, only errors.txt
  2    the run did not finish: wrong usage, no image found, output folder missing, model not loadable, disk full, ...
  3    more than --max-errors failed
  130  stopped by Ctrl-C
A FOLDER/ keeps its finished shards in any case.
"""


SEARCH_DESCRIPTION = """\
Finds the images whose embeddings have the highest cosine with a query's: exactly, all rows are compared.

Each line is the cosine, a tab, and where the image lies, from the folder where encode ran if its paths were relative.
Words need a model with OpenAI's text tower.
"""

SEARCH_EPILOG = """\
examples:
  clip-fast search "a dog on a beach" --index embeddings/
  clip-fast search --image query.jpg --index embeddings/ -k 100 --html found.html

exit status: 0 if the search was done, 2 if not
"""


def _whole(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"must be a whole number from {least}, got {text!r}")
        return int(text)

    return number


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"must be a positive number of seconds, got {text!r}")
    return seconds


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
        torch.empty(0, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used here: {reason}") from error
    return device


def _devices(text: str) -> list[torch.device]:
    return [_device(f"cuda:{name}" if name.isdecimal() else name) for name in text.split(",")]


def _parser() -> argparse.ArgumentParser:
    where = argparse.ArgumentParser(add_help=False)
    where.add_argument("--device", type=_device, help="cpu, cuda, cuda:1, ... (default: a GPU where there is one)")
    where.add_argument("--dtype", choices=DTYPES, help="precision (default: float16 on a GPU, float32 on a CPU)")

    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("clip-fast", description=DESCRIPTION, epilog=EPILOG, formatter_class=layout)
    parser.add_argument("--version", action="version", version=f"clip-fast {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    encode = commands.add_parser(
        "encode",
        parents=[where],
        help="embed photographs, folders and patterns into a .npy file",
        description=ENCODE_DESCRIPTION,
        epilog=ENCODE_EPILOG,
        formatter_class=layout,
    )
    encode.add_argument("paths", nargs="*", metavar="PATH", help="file, folder, tar, parquet, pattern or braces")
    encode.add_argument(
        "--model", required=True, metavar="NAME_OR_FILE", help="a name that `clip-fast models` lists, or a checkpoint"
    )
    encode.add_argument(
        "--output", default="embeddings.npy", metavar="FILE|FOLDER/", help="what to write (default: %(default)s)"
    )
    encode.add_argument(
        "--files-from", metavar="FILE", help="more PATHs, one a line or between zero bytes; - is standard input"
    )
    encode.add_argument(
        "--image-column", default=IMAGE_COLUMN, metavar="NAME", help="of .parquet inputs (default: %(default)s)"
    )
    encode.add_argument("--key-column", metavar="NAME", help="of .parquet inputs, for the rows' keys")
    encode.add_argument(
        "--batch-size", type=_whole(1), metavar="N", help="images per step (default: 32, for folders and parquet 256)"
    )
    encode.add_argument(
        "--activation",
        choices=("quick_gelu", "gelu"),
        help="of the MLPs, for a checkpoint that does not say: quick_gelu for OpenAI's, gelu for most others",
    )
    encode.add_argument("--max-errors", type=_whole(0), metavar="N", help="stop when more images fail")
    encode.add_argument("--quiet", action="store_true", help="print failures and errors only")
    encode.add_argument("--json", action="store_true", help="print a summary to stdout, as one line of JSON")

    large = encode.add_argument_group("for --output FOLDER/ and FILE.parquet")
    large.add_argument("--resume", action="store_true", help="go on with what is in FOLDER/, if anything")
    large.add_argument("--devices", type=_devices, metavar="0,1,...", help="a process each, shards divided (FOLDER/)")
    large.add_argument("--shard-size", type=_whole(1), metavar="N", help="images per shard (default: 10000)")
    large.add_argument(
        "--workers", type=_whole(0), metavar="N", help="decoding processes per device; 0: none, and no --time-limit"
    )
    large.add_argument("--embedding-dtype", choices=("float32", "float16"), help="as written (default: float32)")
    large.add_argument("--normalize", action="store_true", help="write embeddings of length 1")
    large.add_argument(
        "--fast-decode", action="store_true", help="decode JPEGs at reduced scale: faster, pixels differ a little"
    )
    large.add_argument("--time-limit", type=_seconds, metavar="SECONDS", help="for an image (default: 60)")
    large.add_argument(
        "--ray", metavar="ADDRESS", help="of a Ray cluster, whose workers encode; FOLDER/ then holds parquet files"
    )
    encode.set_defaults(run=_encode)

    search = commands.add_parser(
        "search",
        parents=[where],
        help="find images in a folder that encode wrote, by words or by an image",
        description=SEARCH_DESCRIPTION,
        epilog=SEARCH_EPILOG,
        formatter_class=layout,
    )
    search.add_argument("text", nargs="?", metavar="TEXT", help="what to look for, in words")
    search.add_argument("--image", metavar="FILE", help="what to look for, as an image")
    search.add_argument("--index", required=True, metavar="FOLDER", help="that clip-fast encode wrote")
    search.add_argument("--model", metavar="NAME_OR_FILE", help="which made the index (default: as it was named then)")
    search.add_argument("--activation", choices=("quick_gelu", "gelu"), help="as for encode (default: as it was then)")
    search.add_argument("-k", type=_whole(1), default=10, metavar="N", help="how many to find (default: %(default)s)")
    search.add_argument("--html", metavar="FILE", help="write a page with thumbnails, too")
    search.add_argument("--json", action="store_true", help="print one line of JSON for each")
    search.set_defaults(run=_search)

    demo = commands.add_parser(
        "demo",
        parents=[where],
        help="try the encoder on a tiny model that comes with the package",
        description="Runs the encoder on a tiny model that comes with the package: nothing is downloaded or written.",
        epilog="examples:\n  clip-fast demo\n  clip-fast demo --device cuda --dtype bfloat16\n\n"
        "exit status: 0 if the demo succeeded",
        formatter_class=layout,
    )
    demo.set_defaults(run=_demo)

    models = commands.add_parser(
        "models",
        help="list the names that --model takes",
        description="Lists the models known by name, one a line. `encode --model` takes a checkpoint's path as well.",
        epilog="example:\n  clip-fast models",
        formatter_class=layout,
    )
    models.set_defaults(run=_models)
    return parser


def _say(text: str) -> None:
    tqdm.write(f"clip-fast: {text}", file=sys.stderr)


def _report(failures: Iterable[Failure]) -> None:
    for failure in failures:
        _say(str(failure))


_LARGE = (  # options that a single .npy does not have
    "resume",
    "devices",
    "shard_size",
    "workers",
    "embedding_dtype",
    "normalize",
    "fast_decode",
    "time_limit",
)
_NOT_ON_RAY = ("resume", "device", "devices", "shard_size", "embedding_dtype", "time_limit", "max_errors")


def _refuse(arguments: argparse.Namespace, names: Iterable[str], why: str) -> None:
    values = [(name, getattr(arguments, name)) for name in names]
    given = [f"--{name.replace('_', '-')}" for name, value in values if value is not None and value is not False]
    if given:
        raise ValueError(f"{', '.join(given)}: {why}")


def _encode(arguments: argparse.Namespace) -> int:
    output: str = arguments.output
    if arguments.ray:
        return _encode_on_ray(arguments)
    if output.endswith((os.sep, "/")) or os.path.isdir(output):
        return _encode_to_folder(arguments)
    if output.endswith(PARQUET_SUFFIX):
        return _encode_to_parquet(arguments)
    _refuse(arguments, _LARGE, "for an --output that is a folder (ending in /) or .parquet")
    return _encode_to_npy(arguments)


def _paths(arguments: argparse.Namespace) -> list[str]:
    """Those of the command line and of --files-from."""
    if arguments.files_from is None:
        return arguments.paths
    with nullcontext(sys.stdin.buffer) if arguments.files_from == "-" else open(arguments.files_from, "rb") as file:
        return arguments.paths + read_list(file)


def _find(arguments: argparse.Namespace) -> Inputs:
    if not arguments.quiet:
        _say("listing the inputs")  # of millions of files, a minute or more
    inputs = find_inputs(_paths(arguments), image_column=arguments.image_column, key_column=arguments.key_column)
    if all(isinstance(item, Unreadable) for item in inputs):
        _report(Failure(item.location, item.reason) for item in inputs if isinstance(item, Unreadable))
        raise ValueError("no image found")
    return inputs


def _encode_on_ray(arguments: argparse.Namespace) -> int:
    from .ray import encode  # Ray takes seconds to import

    _refuse(arguments, _NOT_ON_RAY, "not with --ray, whose workers read, divide and repeat by themselves")
    if not arguments.output.endswith("/"):
        raise ValueError("with --ray the --output is a folder for parquet files: it must end in /")
    totals = encode(
        _paths(arguments),
        arguments.model,
        arguments.output,
        address=arguments.ray,
        workers=arguments.workers,
        batch_size=arguments.batch_size or 256,
        image_column=arguments.image_column,
        key_column=arguments.key_column,
        dtype=DTYPES.get(arguments.dtype),
        activation=arguments.activation,
        normalize=arguments.normalize,
        fast_decode=arguments.fast_decode,
    )
    if not arguments.quiet:
        _say(f"{printable(arguments.output)}: complete, {totals['images']} images, {totals['failed']} failed")
    if arguments.json:
        print(json.dumps({"output": arguments.output, "complete": True, **totals}))
    return EXIT_SOME_FAILED if totals["failed"] else EXIT_OK


def _encode_to_npy(arguments: argparse.Namespace) -> int:
    with EmbeddingWriter(arguments.output) as writer, warnings.catch_warnings():
        # Photographs of 90 to 179 megapixels are embedded without a remark, larger ones are failures.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        items: list[Item] = []
        failures: list[Failure] = []
        for item in _find(arguments):
            if isinstance(item, Unreadable):
                failures.append(Failure(item.location, item.reason))
            else:
                items.append(item)
        _report(failures)
        writer.fail(failures)
        check_errors(writer.failed, arguments.max_errors)

        dtype = DTYPES.get(arguments.dtype)
        model, preprocess = load(arguments.model, arguments.device, dtype, activation=arguments.activation)
        with (
            tqdm(total=len(items), unit=" images", disable=arguments.quiet) as progress,
            closing(embed_files(model, preprocess, items, arguments.batch_size or 32)) as batches,
        ):
            for batch in batches:
                writer.add(batch)
                _report(batch.failures)
                progress.update(len(batch.paths) + len(batch.failures))
                check_errors(writer.failed, arguments.max_errors)
        writer.commit()

    rows, columns = writer.shape
    if writer.failed:
        _say(f"{writer.failed} failed: see {printable(str(writer.errors_path))}")
    if not rows:
        _say("no image could be read, so no embeddings are written")
    elif not arguments.quiet:
        _say(f"{printable(arguments.output)}: float32 [{rows}, {columns}]")
    if arguments.json:
        counts = {"images": rows + writer.failed, "failed": writer.failed}
        print(json.dumps({"output": arguments.output, "complete": True, **counts}))
    return EXIT_SOME_FAILED if writer.failed else EXIT_OK


def _encode_to_folder(arguments: argparse.Namespace) -> int:
    devices = _chosen_devices(arguments)
    options = _options(arguments, devices)
    one = devices[0] if len(devices) == 1 else None  # of several, each process loads its own weights
    with OutputFolder(arguments.output, arguments.resume) as folder:
        if one and options.workers:
            start_fork_server()
        inputs = _find(arguments)
        dtype = DTYPES.get(arguments.dtype) or default_dtype(devices[0])
        model, preprocess = load(arguments.model, one or "cpu", dtype, activation=arguments.activation)
        folder.begin(_settings(arguments, options, model, preprocess, devices))
        with _progress(arguments, inputs) as progress:
            if one:
                run(model, Decoder(preprocess, arguments.fast_decode), inputs, folder, options, progress)
            else:
                job = Job(
                    model=arguments.model,
                    dtype=dtype,
                    activation=arguments.activation,
                    inputs=inputs,
                    folder=arguments.output,
                    options=options,
                    fast_decode=arguments.fast_decode,
                )
                run_on_devices(devices, job, progress)
            folder.finish(progress.done.shards)
    return EXIT_SOME_FAILED if progress.done.failed else EXIT_OK


def _encode_to_parquet(arguments: argparse.Namespace) -> int:
    if arguments.resume or arguments.devices:
        raise ValueError("--resume and --devices are for an --output that is a folder (ending in /)")
    devices = _chosen_devices(arguments)
    options = _options(arguments, devices)
    with ParquetFile(arguments.output) as file:
        if options.workers:
            start_fork_server()
        inputs = _find(arguments)
        dtype = DTYPES.get(arguments.dtype)
        model, preprocess = load(arguments.model, devices[0], dtype, activation=arguments.activation)
        with _progress(arguments, inputs) as progress:
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
    share = cpus if devices[0].type == "cuda" else cpus // 2  # a CPU that encodes has the other half to do
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
    """All that the bytes of the output follow from, for the manifest."""
    return {
        "inputs": arguments.paths,
        "image_column": arguments.image_column,
        "key_column": arguments.key_column,
        "model": arguments.model,
        "activation": arguments.activation,
        "weights": weights_digest(model),
        "squash": preprocess.squash,
        "dtype": str(model.dtype).removeprefix("torch."),
        "batch_size": options.batch_size,
        "shard_size": options.shard_size,
        "embedding_dtype": options.dtype,
        "normalize": options.normalize,
        "fast_decode": arguments.fast_decode,
        **_computer(devices),
    }


def _computer(devices: Sequence[torch.device]) -> dict[str, object]:
    """What shows in an embedding's last bits, or in the bytes of its file, beside the settings."""
    versions = {
        "clip_fast": __version__,
        "torch": torch.__version__,
        "pillow": PIL.__version__,
        "libjpeg_turbo": features.version("libjpeg_turbo"),
        "pyarrow": pyarrow()[0].__version__,
    }
    if devices[0].type != "cuda":
        capability = torch.backends.cpu.get_cpu_capability()
        return {"device": f"cpu, {capability}", "threads": torch.get_num_threads(), "versions": versions}
    if ops.triton_can_run(devices[0]):
        versions["triton"] = import_module("triton").__version__
    names = [torch.cuda.get_device_name(device) for device in devices]
    return {"device": names[0] if len(set(names)) == 1 else names, "versions": versions}


@contextmanager
def _progress(arguments: argparse.Namespace, inputs: Inputs) -> Generator[Progress, None, None]:
    """A bar, and however the run ends, a summary."""
    complete = False
    progress = Progress(inputs.expected(), quiet=arguments.quiet, max_errors=arguments.max_errors)
    try:
        with progress:
            yield progress
        complete = True
    finally:
        summary = progress.summary()
        if not arguments.quiet:
            _say(
                f"{printable(arguments.output)}: {'complete' if complete else 'incomplete'}, "
                f"{summary['images']} images, {summary['failed']} failed, {summary['resumed']} by earlier runs; "
                f"{summary['images_per_second']} images/s, {summary['bound']}-bound"
            )
        if arguments.json:
            print(json.dumps({"output": arguments.output, "complete": complete, **summary}))


def _search(arguments: argparse.Namespace) -> int:
    from .search import Index  # as the demo: not part of the work that the other commands do

    if (arguments.text is None) == (arguments.image is None):
        raise ValueError("give either a TEXT or an --image to look for")
    index = Index(arguments.index)
    name, dtype = arguments.model or index.settings["model"], index.settings["dtype"]
    activation = arguments.activation or index.settings.get("activation")
    model, preprocess = load(name, arguments.device, DTYPES[dtype], activation=activation)
    if weights_digest(model) != index.settings["weights"]:
        raise ValueError(f"{arguments.index} was made with other weights than those of {name}: name its --model")
    if arguments.dtype not in (None, dtype):  # weights rounded otherwise could not have been compared
        model, _ = load(name, arguments.device, DTYPES[arguments.dtype], activation=activation)
    hits = index.search(_query(arguments, model, preprocess), arguments.k)
    for hit in hits:
        if arguments.json:
            print(json.dumps({"score": hit.score, "row": hit.row, "key": hit.key, "image_path": hit.location}))
        else:
            print(f"{hit.score:.4f}\t{printable(hit.location)}")
    if arguments.html:
        from .gallery import page

        column = index.settings.get("image_column") or IMAGE_COLUMN
        title = arguments.text if arguments.text is not None else os.path.basename(arguments.image)
        with new_file(Path(arguments.html)) as file:
            file.write(page(title, hits, query=arguments.image, image_column=column).encode("utf-8", "replace"))
    return EXIT_OK


def _query(arguments: argparse.Namespace, model: ImageEncoder, preprocess: Preprocess) -> NDArray[Any]:
    """The embedding of what is looked for."""
    with torch.no_grad():
        if arguments.image is not None:
            decoder = Decoder(preprocess)
            pixels = decoder.black(1)
            _, error = decoder.into(pixels[0], ImageFile(arguments.image, arguments.image))
            if error is not None:
                raise ValueError(f"{printable(arguments.image)}: {printable(error)}")
            return model.encode_image(pixels)[0].float().cpu().numpy()
        if not isinstance(model, Clip):
            raise ValueError("this checkpoint has no text tower that clip_fast reads: look for an --image instead")
        return model.encode_text(tokenize(arguments.text, truncate=True))[0].float().cpu().numpy()


def _demo(arguments: argparse.Namespace) -> int:
    from . import demo  # not part of the work that the other commands do

    return demo.run(arguments.device, DTYPES.get(arguments.dtype))


def _models(arguments: argparse.Namespace) -> int:
    print("\n".join(available_models()))
    return EXIT_OK


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv`, by default the process's own, and returns its exit status.

    Raises:
        SystemExit: for `--help`, `--version` and a command line that does not parse (status 2), as argparse does.
    """
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except (CheckpointError, ImportError, OSError, RuntimeError, ValueError) as error:
        _say(f"error: {error}")
        return EXIT_NOTHING_DONE
    except TooManyErrors as error:
        _say(f"stopped: {error}")
        return EXIT_TOO_MANY_ERRORS
    except KeyboardInterrupt:
        _say("interrupted")
        return EXIT_INTERRUPTED
    except Exception:  # left to Python it would end with the status that means "some failed, the others are embedded"
        traceback.print_exc()
        return EXIT_NOTHING_DONE
