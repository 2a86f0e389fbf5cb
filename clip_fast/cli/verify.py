"""`clip-fast verify`: compares a folder with what `clip-fast encode` wrote into it."""

from __future__ import annotations

import argparse

from ..bulk.stored import StoredFolder
from ..errors import printable
from .messages import EXIT_DAMAGED, EXIT_OK, say, show


def verify(arguments: argparse.Namespace) -> int:
    """Runs `clip-fast verify` and returns its exit status."""
    stored = StoredFolder(arguments.folder)
    images = without = 0
    problems: list[str] = []
    try:
        stored.check_shards()
    except ValueError as error:
        problems.append(str(error))
    for shard in stored.shards:
        try:
            rows, had_checksum = shard.check()
            without += not had_checksum
            images += rows
        except ValueError as error:
            problems.append(str(error))
    if not problems:
        try:
            stored.check_images(images)
            stored.check_errors()
        except ValueError as error:
            problems.append(str(error))
    for problem in problems:
        say(printable(problem))
    words = [f"{len(stored.shards)} shards", f"{images} images"]
    if not stored.complete:
        words.append("not finished")
    if without:
        words.append(f"{without} shards have no checksum: of these only sizes and names were compared")
    words.append(f"{len(problems)} problems" if problems else "no damage found")
    show(f"{printable(arguments.folder)}: {', '.join(words)}")
    return EXIT_DAMAGED if problems else EXIT_OK
