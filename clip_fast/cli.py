"""The command line: `clip-fast encode`, `clip-fast demo`, `clip-fast models`."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterable, Sequence
from contextlib import closing

import torch
from PIL import Image
from tqdm import tqdm

from . import __version__, available_models, load
from .checkpoint import CheckpointError
from .embed import EmbeddingWriter, Failure, embed_files, find_images, printable

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

EXIT_OK = 0
EXIT_SOME_FAILED = 1
EXIT_NOTHING_DONE = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells have it

DESCRIPTION = "Embeds images with CLIP, fast."

EPILOG = """\
examples:
  clip-fast demo                                         see that it works, without a download
  clip-fast models                                       the names that --model takes
  clip-fast encode photos --model ViT-B/32               embed a folder into embeddings.npy
  clip-fast encode --help                                all about it
"""

ENCODE_DESCRIPTION = """\
Embeds images with a CLIP image encoder.

A PATH is
  a file       taken whatever its suffix;
  a folder     all images below it, by the suffixes of the formats that Pillow reads, sorted by path;
  a pattern    with * ? [...] and ** (any depth), where the shell has not expanded it: what it matches, sorted.
Rows follow the order of the arguments. A file reached twice is embedded once.

Written beside each other, each whole or not at all:
  embeddings.npy   float32 [images, embed_dim], not normalised (the name is --output's)
  paths.txt        UTF-8, line i is the path of row i, as reached from the arguments
  errors.txt       only if files failed: path, tab, reason

A file that is no image, or whose path does not fit a line of paths.txt (a line break in it, or bytes that are not
UTF-8), is named on stderr and in errors.txt, with backslash escapes where needed, and the rest goes on. Errors that end
the run, and Ctrl-C, leave the files of an earlier run as they were.
"""

ENCODE_EPILOG = """\
examples:
  clip-fast encode photos --model ViT-B/32
  clip-fast encode 'photos/**/*.jpg' extra.png --model ViT-L/14 --output out/embeddings.npy
  clip-fast encode photos --model open_clip_model.safetensors --activation gelu --device cuda:1 --dtype bfloat16

reading the result:
  rows = numpy.load("embeddings.npy")
  paths = open("paths.txt", encoding="utf-8").read().splitlines()
  rows /= numpy.linalg.norm(rows, axis=1, keepdims=True)   # cosine similarity is then rows @ rows.T

exit status:
  0    every image is embedded
  1    some files failed, the others are embedded; if all failed, only errors.txt is written
  2    nothing was written: wrong usage, no image found, output folder missing, model not loadable, out of memory, ...
  130  stopped by Ctrl-C, nothing was written
"""


def _batch_size(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1, got {text!r}")
    return int(text)


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
        torch.empty(0, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used here: {reason}") from error
    return device


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
    encode.add_argument("paths", nargs="+", metavar="PATH", help="file, folder or pattern")
    encode.add_argument(
        "--model", required=True, metavar="NAME_OR_FILE", help="a name that `clip-fast models` lists, or a checkpoint"
    )
    encode.add_argument("--output", default="embeddings.npy", metavar="FILE", help="default: %(default)s")
    encode.add_argument(
        "--batch-size", type=_batch_size, default=32, metavar="N", help="images per step (default: %(default)s)"
    )
    encode.add_argument(
        "--activation",
        choices=("quick_gelu", "gelu"),
        help="of the MLPs, for a checkpoint that does not say: quick_gelu for OpenAI's, gelu for most others",
    )
    encode.add_argument("--quiet", action="store_true", help="print failures and errors only")
    encode.set_defaults(run=_encode)

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


def _encode(arguments: argparse.Namespace) -> int:
    with EmbeddingWriter(arguments.output) as writer, warnings.catch_warnings():
        # Photographs of 90 to 179 megapixels are embedded without a remark, larger ones are failures.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        paths, failures = find_images(arguments.paths)
        _report(failures)
        if not paths:
            raise ValueError("no image found")
        writer.fail(failures)

        dtype = DTYPES.get(arguments.dtype)
        model, preprocess = load(arguments.model, arguments.device, dtype, activation=arguments.activation)
        with (
            tqdm(total=len(paths), unit=" images", disable=arguments.quiet) as progress,
            closing(embed_files(model, preprocess, paths, arguments.batch_size)) as batches,
        ):
            for batch in batches:
                writer.add(batch)
                _report(batch.failures)
                progress.update(len(batch.paths) + len(batch.failures))
        writer.commit()

    rows, columns = writer.shape
    if writer.failed:
        _say(f"{writer.failed} failed: see {printable(str(writer.errors_path))}")
    if not rows:
        _say("no image could be read, so no embeddings are written")
    elif not arguments.quiet:
        _say(f"{printable(arguments.output)}: float32 [{rows}, {columns}]")
    return EXIT_SOME_FAILED if writer.failed else EXIT_OK


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
    except (CheckpointError, OSError, RuntimeError, ValueError) as error:
        _say(f"error: {error}")
        return EXIT_NOTHING_DONE
    except KeyboardInterrupt:
        _say("interrupted")
        return EXIT_INTERRUPTED
