"""`clip-fast search`: finds images by words or by an image."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from ..bulk.atomic import check_target, new_file
from ..bulk.decoder import Decoder
from ..bulk.manifest import preprocessed_as, weights_digest
from ..bulk.workers import memory_limited
from ..encoder import ImageEncoder
from ..errors import NotServed, printable
from ..inputs.containers import IMAGE_COLUMN
from ..inputs.items import ImageFile
from ..loading import load
from ..preprocess import Preprocess
from ..search.gallery import page
from ..search.index import Hit, Index
from ..towers.config import Activation
from .files import opened, refuse_to_replace
from .messages import EXIT_OK, say, show
from .parser import DTYPES, dtype_of

_TEXTS = 256  # that are embedded at once


def search(arguments: argparse.Namespace) -> int:
    """Runs `clip-fast search` and returns its exit status."""
    if [arguments.text, arguments.image, arguments.queries].count(None) != 2:
        raise ValueError("give either a TEXT, an --image or --queries to look for")
    if arguments.queries is not None and arguments.html:
        raise ValueError("--html shows what one query finds, not those of --queries")
    if arguments.html:
        check_target(Path(arguments.html))
        refuse_to_replace([arguments.image], [], [Path(arguments.html)])
    texts = _texts(arguments)
    index = Index(arguments.index)
    if not index.complete:
        say(f"{printable(arguments.index)}: encode has not finished it; searching the {len(index)} images in it")
    name, dtype = arguments.model or _setting(index, "model"), _setting(index, "dtype", DTYPES)
    weights = _setting(index, "weights")
    activation = arguments.activation or _setting(index, "activation", (None, *get_args(Activation)))
    column = _setting(index, "image_column", optional=True) or IMAGE_COLUMN
    model, preprocess = load(name, arguments.device, dtype_of(dtype), activation=activation)
    if weights_digest(model) != weights:
        raise ValueError(f"{arguments.index} was made with other weights than those of {name}: name its --model")
    if arguments.dtype not in (None, dtype):  # after the comparison, which needs the index's dtype
        model, _ = load(name, arguments.device, dtype_of(arguments.dtype), activation=activation)
    as_indexed = preprocessed_as(preprocess, index.settings)
    found = index.search_many(_queries(texts, arguments.image, model, as_indexed), arguments.k)
    for text, hits in zip(texts or [None], found, strict=True):
        for hit in hits:
            _show(hit, arguments, text if arguments.queries is not None else None)
    if arguments.html:
        hits = found[0]
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


def _show(hit: Hit, arguments: argparse.Namespace, query: str | None) -> None:
    """Prints a hit, behind the `query` that it is one of, if there are several."""
    if arguments.json:
        named = {} if query is None else {"query": query}
        show(json.dumps({**named, "score": hit.score, "row": hit.row, "key": hit.key, "image_path": hit.location}))
    else:
        named = "" if query is None else f"{printable(query)}\t"
        show(f"{named}{hit.score:.4f}\t{printable(hit.location)}")


def _texts(arguments: argparse.Namespace) -> list[str]:
    """The words to look for: none where an image is looked for.

    Raises:
        ValueError: --queries names a file without a line, or words are not in UTF-8.
    """
    if arguments.text is not None:
        try:
            arguments.text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{printable(arguments.text)}: not in UTF-8: {error}") from error
        return [arguments.text]
    if arguments.queries is None:
        return []
    with opened(arguments.queries, "--queries") as file:
        data = file.read()
    try:
        lines = data.decode("utf-8-sig").replace("\r\n", "\n").split("\n")
        texts = [line for line in lines if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{printable(arguments.queries)}: not in UTF-8: {error}") from error
    if not texts:
        raise ValueError(f"{printable(arguments.queries)}: no line to look for")
    return texts


def _queries(texts: list[str], image: str | None, model: ImageEncoder, preprocess: Preprocess) -> NDArray[Any]:
    """The embeddings (Q, embed_dim) of the words, or of the image, to look for."""
    with torch.no_grad():
        if image is not None:
            decoder = Decoder(preprocess)
            pixels = decoder.black(1)
            with memory_limited():
                _, error = decoder.into(pixels[0], ImageFile(image, image))
            if error is not None:
                raise ValueError(f"{printable(image)}: {printable(error)}")
            return model.encode_image(pixels).float().cpu().numpy()
        parts = [texts[start : start + _TEXTS] for start in range(0, len(texts), _TEXTS)]
        try:
            rows = [model.encode_text(model.tokenize(part, truncate=True)).float().cpu().numpy() for part in parts]
        except NotServed as error:
            raise ValueError(f"{error}: look for an --image instead") from error
        return np.concatenate(rows)
