"""`clip-fast search`: finds images by words or by an image."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from numpy.typing import NDArray

from ..bulk.atomic import new_file
from ..bulk.decoder import Decoder
from ..bulk.manifest import weights_digest
from ..encoder import ImageEncoder
from ..errors import printable
from ..inputs.containers import IMAGE_COLUMN
from ..inputs.items import ImageFile
from ..loading import load
from ..model import Clip
from ..preprocess import Preprocess
from ..search.gallery import page
from ..search.index import Index
from ..simple_tokenizer import tokenize
from ..towers.config import Activation
from .messages import EXIT_OK, say, show
from .parser import DTYPES


def search(arguments: argparse.Namespace) -> int:
    """Runs `clip-fast search` and returns its exit status."""
    if (arguments.text is None) == (arguments.image is None):
        raise ValueError("give either a TEXT or an --image to look for")
    index = Index(arguments.index)
    if not index.complete:
        say(f"{printable(arguments.index)}: encode has not finished it; searching the {len(index)} images in it")
    name, dtype = arguments.model or _setting(index, "model"), _setting(index, "dtype", tuple(DTYPES))
    weights = _setting(index, "weights")
    activation = arguments.activation or _setting(index, "activation", (None, *get_args(Activation)))
    column = _setting(index, "image_column", optional=True) or IMAGE_COLUMN
    model, preprocess = load(name, arguments.device, DTYPES[dtype], activation=activation)
    if weights_digest(model) != weights:
        raise ValueError(f"{arguments.index} was made with other weights than those of {name}: name its --model")
    if arguments.dtype not in (None, dtype):  # after the comparison, which needs the index's dtype
        model, _ = load(name, arguments.device, DTYPES[arguments.dtype], activation=activation)
    hits = index.search(_query(arguments, model, preprocess), arguments.k)
    for hit in hits:
        if arguments.json:
            show(json.dumps({"score": hit.score, "row": hit.row, "key": hit.key, "image_path": hit.location}))
        else:
            show(f"{hit.score:.4f}\t{printable(hit.location)}")
    if arguments.html:
        title = arguments.text if arguments.text is not None else os.path.basename(arguments.image)
        with new_file(Path(arguments.html)) as file:
            html = page(title, hits, query=arguments.image, image_column=column, index=Path(arguments.index))
            file.write(html.encode("utf-8", "replace"))
    return EXIT_OK


def _setting(index: Index, name: str, choices: Sequence[str | None] | None = None, *, optional: bool = False) -> Any:
    """One of the settings of the run that wrote the index: one of `choices`, by default any text.

    Raises:
        ValueError: it is something else; the message names the manifest.
    """
    value = index.settings.get(name)
    valid = isinstance(value, str) or (optional and value is None) if choices is None else value in choices
    if not valid:
        expected = "text" if choices is None else f"one of {list(choices)}"
        raise ValueError(f"{index.manifest} is damaged: its setting {name!r} is {value!r}, expected {expected}")
    return value


def _query(arguments: argparse.Namespace, model: ImageEncoder, preprocess: Preprocess) -> NDArray[Any]:
    """The embedding of the words or the image to look for."""
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
