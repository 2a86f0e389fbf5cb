"""Exact search in what `clip-fast encode --output FOLDER/` wrote, with or without `--ray`.

    index = Index("embeddings/")
    for hit in index.search(query, k=10): print(hit.score, hit.location)

Scores are cosines. Shards are gone through one after the other, memory-mapped, so an index may be larger than memory
and of any number of files; nothing is built beforehand. Rows of images that failed are never found.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import extras
from ..bulk.stored import StoredFolder

_BLOCK_ROWS = 1 << 16
_LARGE = 1_000_000  # rows from which FAISS, where it is installed, multiplies faster than NumPy
_FLOAT_32 = np.float32


@dataclass(frozen=True)
class Hit:
    """An image that was found: its cosine with the query, its row in the index, its key and where it lies."""

    score: float
    row: int
    key: str
    location: str


class Index:
    """The finished shards of an output folder.

    `settings` are those of the run that wrote it: "model", "weights", "dtype", "image_column" and more; they stand in
    the file `manifest`. `complete` is false while that run is not finished.

    Raises:
        FileNotFoundError, ValueError: the folder is none of `clip-fast encode`, or has no finished shard, or a file in
            it is missing or not what it was, by its size; the message names it.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        stored = StoredFolder(folder)
        self.settings, self.manifest, self.complete = stored.settings, stored.manifest, stored.complete
        self._shards = stored.shards
        stored.check_shards()
        shapes = [shard.shape() for shard in self._shards]
        dims = sorted({width for _, width in shapes})
        if len(dims) != 1:
            raise ValueError(f"the shards of {stored.folder} differ in their width: {dims}")
        (self.embed_dim,) = dims
        self._starts = np.cumsum([0, *(rows for rows, _ in shapes)])
        stored.check_images(len(self))

    def __len__(self) -> int:
        return int(self._starts[-1])

    def search(self, query: NDArray[Any], k: int = 10) -> list[Hit]:
        """The `k` images with the highest cosine to `query` (embed_dim,), best first.

        Of equals the earlier row is first; where FAISS multiplies, the last of them may be any.

        Raises:
            ValueError: for a query of another width, or one that has no direction.
        """
        scores, rows = self.nearest(query[None] if query.ndim == 1 else query, k)
        return self._hits(scores[0], rows[0])

    def nearest(self, queries: NDArray[Any], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Cosines and rows of the `k` best images for each of `queries` (Q, embed_dim): (Q, k) both, best first.

        Fewer columns where the index has fewer images.
        """
        if queries.ndim != 2 or queries.shape[1] != self.embed_dim:
            raise ValueError(f"queries must be [Q, {self.embed_dim}], got {list(queries.shape)}")
        lengths = np.linalg.norm(queries.astype(_FLOAT_32), axis=1, keepdims=True)
        if not np.isfinite(lengths).all() or not lengths.all():
            raise ValueError("a query has no direction: it is zero, or not finite")
        unit = queries.astype(_FLOAT_32) / lengths
        best_scores = np.empty((len(unit), 0), _FLOAT_32)
        best_rows = np.empty((len(unit), 0), np.int64)
        faiss = extras.faiss() if len(self) >= _LARGE else None
        for start, block in self._blocks():
            norms = np.sqrt(np.einsum("ij,ij->i", block, block))
            there = np.flatnonzero((norms > 0) & np.isfinite(norms))
            if not len(there):
                continue
            if len(there) < len(block):
                block, norms = block[there], norms[there]
            if faiss is not None:
                rows = block / norms[:, None]
                scores, found = faiss.knn(unit, rows, min(k, len(rows)), metric=faiss.METRIC_INNER_PRODUCT)
                found = there[found] + start
            else:
                scores = unit @ block.T / norms
                found = np.broadcast_to(there + start, scores.shape)
            best_scores, best_rows = _best(
                np.concatenate([best_scores, scores], axis=1), np.concatenate([best_rows, found], axis=1), k
            )
        return best_scores, best_rows

    def _blocks(self) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Rows in float32, with the number of the first."""
        for start, shard in zip(self._starts, self._shards, strict=False):
            for block in shard.blocks(_BLOCK_ROWS):
                yield int(start), block
                start += len(block)

    def _hits(self, scores: NDArray[np.float32], rows: NDArray[np.int64]) -> list[Hit]:
        hits: list[Hit] = []
        names: dict[int, tuple[list[str], list[str]]] = {}
        for score, row in zip(scores, map(int, rows), strict=True):
            place = int(np.searchsorted(self._starts, row, side="right")) - 1
            if place not in names:
                names[place] = self._shards[place].names()
            keys, locations = names[place]
            i = row - int(self._starts[place])
            hits.append(Hit(float(score), row, keys[i], locations[i]))
        return hits


def _best(
    scores: NDArray[np.float32], rows: NDArray[np.int64], k: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The k best of each line, best first; of equals the lower row."""
    k = min(k, scores.shape[1])
    chosen_scores, chosen_rows = np.empty((len(scores), k), _FLOAT_32), np.empty((len(scores), k), np.int64)
    for i, (line, names) in enumerate(zip(scores, rows, strict=True)):
        least = np.partition(line, len(line) - k)[len(line) - k] if k else np.inf
        candidates = np.flatnonzero(line >= least)
        order = candidates[np.lexsort((names[candidates], -line[candidates]))][:k]
        chosen_scores[i], chosen_rows[i] = line[order], names[order]
    return chosen_scores, chosen_rows
