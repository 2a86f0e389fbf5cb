"""Search results as one HTML page that needs nothing beside it: thumbnails are in it, and there is no script."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from PIL import ImageOps

from ..bulk.decoder import UNREMARKED
from ..bulk.listings import listed
from ..bulk.workers import memory_limited
from ..inputs.inputs import items_at
from ..inputs.items import Item
from ..inputs.parquet import IMAGE_COLUMN
from .index import Hit

_SIDE = 320  # pixels of a thumbnail at most

_PAGE = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
  :root {{ color-scheme: light dark; }}
  body {{ font: 15px/1.4 system-ui, sans-serif; margin: 2rem auto; max-width: 90rem; padding: 0 1rem; }}
  header {{ align-items: center; display: flex; gap: 1rem; margin-bottom: 1.5rem; }}
  header img {{ max-height: 8rem; }}
  main {{ display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); }}
  figure {{ border: 1px solid #8886; border-radius: .5rem; margin: 0; overflow: hidden; }}
  figure img, figure .missing {{ aspect-ratio: 4 / 3; object-fit: contain; width: 100%; }}
  figure .missing {{ background: #8882; color: #888; display: grid; place-items: center; }}
  figcaption {{ overflow-wrap: anywhere; padding: .5rem .75rem; }}
</style>
<header>{query}<h1>{title}</h1></header>
<main>
{figures}
</main>
</html>
"""


def page(
    title: str,
    hits: Sequence[Hit],
    *,
    query: str | None = None,
    image_column: str = IMAGE_COLUMN,
    index: Path | None = None,
) -> str:
    """The page.

    Args:
        title: what was looked for.
        query: path of the image that was looked for, to be shown beside the title.
        image_column: of parquet files among the places.
        index: the folder that was searched, which has listings of tars.
    """
    locations = [*(hit.location for hit in hits), *([query] if query else [])]
    items = items_at(locations, image_column, partial(listed, folder=index) if index else iter)
    # In the items' own order: a step back in a table would read all rows before it again.
    thumbnails = {location: _thumbnail(item) for location, item in items.items()}
    shown = thumbnails.get(query, _missing(FileNotFoundError())) if query else ""
    figures = "\n".join(
        f"<figure>{thumbnails.get(hit.location, _missing(FileNotFoundError()))}"
        f"<figcaption><b>{hit.score:.4f}</b> {html.escape(hit.location)}</figcaption></figure>"
        for hit in hits
    )
    return _PAGE.format(title=html.escape(title), query=shown, figures=figures)


def _thumbnail(item: Item) -> str:
    """An image as an element; a note in its place where it cannot be read any more."""
    try:
        with UNREMARKED, memory_limited(), item.open() as image:
            image.draft("RGB", (_SIDE, _SIDE))
            small = image.convert("RGB")
            small.thumbnail((_SIDE, _SIDE))
            with suppress(Exception):  # damaged Exif has no orientation
                small = ImageOps.exif_transpose(small)
            file = io.BytesIO()
            small.save(file, "JPEG", quality=80)
    except Exception as error:  # decoders fed with broken files raise whatever their parsing stumbles on
        return _missing(error)
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="{html.escape(item.location)}" src="data:image/jpeg;base64,{data}">'


def _missing(error: Exception) -> str:
    return f'<div class="missing">{html.escape(type(error).__name__)}</div>'
