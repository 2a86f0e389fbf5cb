"""The command line's options and help texts. PyTorch is imported for a device or a dtype that is given, not before."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, get_args

from ..inputs.containers import IMAGE_COLUMN
from ..towers.config import Activation
from ..version import __version__

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "float16", "bfloat16")
_ACTIVATIONS = get_args(Activation)
_MOST_SECONDS = 10**9  # an alarm clock holds nine times as many

DESCRIPTION = "Embeds images with CLIP, fast."

EPILOG = """\
examples:
  clip-fast demo                                         see that it works, without a download
  clip-fast models                                       the names that --model takes
  clip-fast warm --model ViT-B/32                        compile its kernels for the GPU ahead
  clip-fast encode photos --model ViT-B/32               embed a folder into embeddings.npy
  clip-fast encode --help                                all about it
  clip-fast search "a dog on a beach" --index embeddings/
  clip-fast verify embeddings/                           whether its files are what encode wrote
"""

ENCODE_DESCRIPTION = """\
Embeds images with a CLIP image encoder.

A PATH is
  a file       taken whatever its suffix;
  a folder     all images below it, by the suffixes of the formats that Pillow reads, sorted by path;
  a .tar       a webdataset, not compressed: the images in it; its samples' keys are kept;
  a .parquet   a table with a column of images: their bytes, base64, or paths to them;
  a pattern    with * ? [...] and ** (any depth), where the shell has not expanded it: what it matches, sorted;
  braces       data/{0000..0099}.tar, {train,test}/*.jpg: each number, or word, in their place.
Rows follow the order of the arguments. A file reached twice is embedded once.

--output says what is written:

FILE.npy, for small jobs: beside each other, each whole or not at all
  FILE.npy         float32 [images, embed_dim], not normalised
  FILE.paths.txt   UTF-8, line i is the path of row i, as reached from the arguments
  FILE.errors.txt  only if files failed: path, tab, reason
  (beside embeddings.npy they are paths.txt and errors.txt)

FOLDER/, for any number: shards as clip-retrieval and autofaiss read them, and a run that was stopped can --resume
  img_emb/img_emb_0000.npy           [shard size, embed_dim]; rows of images that failed are zero
  metadata/metadata_0000.parquet     key, image_path, width, height, status, error, norm of each row
  errors.jsonl                       only if images failed: key, image_path, reason
  manifest.json                      the settings; once all is done, the totals
  listings/                          what is in each tar, so that no tar is listed twice

FILE.parquet: the columns of the metadata but `norm`, and `embedding`, a list of fixed size

A file that is no image is named in the errors, and the rest goes on. In the list of a FILE.npy a path must fit a line
(no line break, UTF-8). Errors that end the run, and Ctrl-C, leave a single file of an earlier run as it was, and a
folder ready for --resume.
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
  1    some files failed, the others are embedded; if all failed, a single .npy is not written, only its errors
  2    the run did not finish: wrong usage, no image found, output folder missing, model not loadable, disk full, ...
  3    more than --max-errors failed
  130  stopped by Ctrl-C
  143  stopped by SIGTERM
  141  the program that read the output has gone, as head does
A FOLDER/ keeps its finished shards in any case.
"""


SEARCH_DESCRIPTION = """\
Finds the images whose embeddings have the highest cosine with a query's: exactly, all rows are compared.

Each line is the cosine, a tab, and where the image lies, from the folder where encode ran if its paths were relative.
With --queries the query and a tab stand before them.
Words need a model whose text tower is served; else the error says why it is not.
"""

SEARCH_EPILOG = """\
examples:
  clip-fast search "a dog on a beach" --index embeddings/
  clip-fast search --image query.jpg --index embeddings/ -k 100 --html found.html
  clip-fast search --queries queries.txt --index embeddings/ --json

exit status: 0 if the search was done, 2 if not
"""


VERIFY_DESCRIPTION = """\
Compares a folder with what encode wrote into it: reads every byte, and needs no model.

Names each file that is missing, cut or changed; encode --resume makes its shard again. The checksums stand in the
metadata of each shard. Folders of earlier releases and of encode --ray have none: there sizes, names and totals are
compared, and the last line says so.
"""

VERIFY_EPILOG = """\
example:
  clip-fast verify embeddings/

exit status: 0 if no damage was found, 1 if some was, 2 if the folder could not be checked
"""


MODELS_DESCRIPTION = """\
Lists the models known by name, each with where it comes from, below a line for each image tower, which has its size and
the sizes of images and embeddings.

--model takes any other CLIP or SigLIP on the Hugging Face hub, too, as owner/name or hf-hub:owner/name, and the path of
a checkpoint. @revision behind a name of the hub is a branch, a tag or a commit. A file or folder of that name wins,
unless hf-hub: stands before it.
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
    if seconds > _MOST_SECONDS:
        raise argparse.ArgumentTypeError(f"must be at most {_MOST_SECONDS} seconds, got {text!r}")
    return seconds


def _name(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def dtype_of(name: str | None) -> torch.dtype | None:
    """The dtype that one of `DTYPES` names; None where none is named."""
    import torch

    return None if name is None else getattr(torch, name)


def _device(text: str) -> torch.device:
    import torch

    try:
        device = torch.device(text)
        torch.empty(0, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used here: {reason}") from error
    return device


def _devices(text: str) -> list[torch.device]:
    if text == "all":
        from ..bulk.processes import all_devices

        return all_devices()
    return [_device(f"cuda:{name}" if name.isdecimal() else name) for name in text.split(",")]


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; `command` names the command that was given."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show where an error came from, as a traceback")
    where = argparse.ArgumentParser(add_help=False, parents=[common])
    where.add_argument("--device", type=_device, help="cpu, cuda, cuda:1, ... (default: a GPU where there is one)")
    where.add_argument("--dtype", choices=DTYPES, help="precision (default: float16 on a GPU, float32 on a CPU)")

    layout = argparse.RawDescriptionHelpFormatter
    whole = argparse.ArgumentParser("clip-fast", description=DESCRIPTION, epilog=EPILOG, formatter_class=layout)
    whole.add_argument("--version", action="version", version=f"clip-fast {__version__}")
    commands = whole.add_subparsers(dest="command", metavar="COMMAND", required=True)

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
        "--model",
        type=_name,
        required=True,
        metavar="NAME_OR_FILE",
        help="a name, see `clip-fast models`, or a checkpoint",
    )
    encode.add_argument(
        "--output",
        type=_name,
        default="embeddings.npy",
        metavar="FILE.npy|FILE.parquet|FOLDER/",
        help="what to write (default: %(default)s)",
    )
    encode.add_argument(
        "--files-from",
        metavar="FILE",
        help="more PATHs, one a line, or between zero bytes, where they are no patterns; - is standard input",
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
        choices=_ACTIVATIONS,
        help="of the MLPs, for a checkpoint that does not say: quick_gelu for OpenAI's, gelu for most others",
    )
    encode.add_argument(
        "--workers",
        type=_whole(0),
        metavar="N",
        help="decoding processes per device, with --ray encoding ones; 0: images are decoded in the encoding process, "
        "where nothing ends one that hangs or kills it",
    )
    encode.add_argument("--time-limit", type=_seconds, metavar="SECONDS", help="for an image (default: 60)")
    encode.add_argument("--max-errors", type=_whole(0), metavar="N", help="stop when more images fail")
    encode.add_argument("--quiet", action="store_true", help="print failures and errors only")
    encode.add_argument("--json", action="store_true", help="print a summary to stdout, as one line of JSON")

    large = encode.add_argument_group("for --output FOLDER/ and FILE.parquet")
    large.add_argument("--resume", action="store_true", help="go on with what is in FOLDER/, if anything")
    large.add_argument(
        "--devices",
        type=_devices,
        metavar="0,1,...|all",
        help="a process each, shards divided (FOLDER/); all: each GPU, or processes of 4 threads on a CPU without one",
    )
    large.add_argument("--shard-size", type=_whole(1), metavar="N", help="images per shard (default: 10000)")
    large.add_argument("--embedding-dtype", choices=("float32", "float16"), help="as written (default: float32)")
    large.add_argument("--normalize", action="store_true", help="write embeddings of length 1")
    large.add_argument(
        "--fast-decode", action="store_true", help="decode JPEGs at reduced scale: faster, pixels differ a little"
    )
    large.add_argument(
        "--ray", metavar="ADDRESS", help="of a Ray cluster, whose workers encode; FOLDER/ then holds parquet files"
    )

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
    search.add_argument("--queries", metavar="FILE", help="a TEXT on each line, all looked for in one pass; - is stdin")
    search.add_argument("--index", required=True, metavar="FOLDER", help="that clip-fast encode wrote")
    search.add_argument(
        "--model", type=_name, metavar="NAME_OR_FILE", help="which made the index (default: as it was named then)"
    )
    search.add_argument("--activation", choices=_ACTIVATIONS, help="as for encode (default: as it was then)")
    search.add_argument("-k", type=_whole(1), default=10, metavar="N", help="how many to find (default: %(default)s)")
    search.add_argument("--html", type=_name, metavar="FILE", help="write a page with thumbnails, too")
    search.add_argument("--json", action="store_true", help="print one line of JSON for each")

    verify = commands.add_parser(
        "verify",
        parents=[common],
        help="compare a folder with what encode wrote into it",
        description=VERIFY_DESCRIPTION,
        epilog=VERIFY_EPILOG,
        formatter_class=layout,
    )
    verify.add_argument("folder", metavar="FOLDER", help="that clip-fast encode wrote")

    commands.add_parser(
        "demo",
        parents=[where],
        help="try the encoder on a tiny model that comes with the package",
        description="Runs the encoder on a tiny model that comes with the package: nothing is downloaded or written.",
        epilog="examples:\n  clip-fast demo\n  clip-fast demo --device cuda --dtype bfloat16\n\n"
        "exit status: 0 if the demo succeeded",
        formatter_class=layout,
    )

    warm = commands.add_parser(
        "warm",
        parents=[where],
        help="compile a model's kernels ahead of the first batch",
        description="Compiles a model's kernels for a GPU, which its first batch would otherwise wait for. Triton "
        "keeps them in the folder TRITON_CACHE_DIR, by default ~/.triton/cache; a container may keep that folder. "
        "Needs the GPU.",
        epilog="example:\n  clip-fast warm --model ViT-L/14 --dtype bfloat16\n\n"
        "exit status: 0 if the kernels are compiled, or there are none to compile",
        formatter_class=layout,
    )
    warm.add_argument("--model", type=_name, required=True, metavar="NAME_OR_FILE", help="as for encode")
    warm.add_argument("--activation", choices=_ACTIVATIONS, help="as for encode")

    commands.add_parser(
        "models",
        parents=[common],
        help="list the names that --model takes",
        description=MODELS_DESCRIPTION,
        epilog="example:\n  clip-fast models",
        formatter_class=layout,
    )
    return whole
