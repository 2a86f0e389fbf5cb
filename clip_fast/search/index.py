"""Exact search in what `clip-fast encode --output FOLDER/` wrote, with or without `--ray`.

    index = Index("embeddings/")
    for hit in index.search(query, k=10): print(hit.score, hit.location)

Scores are cosines. Shards are gone through one after the other, memory-mapped and not copied, so an index may be larger
than memory and of any number of files; nothing is built beforehand. Rows of images that failed are never found.

The rows are multiplied in float32. Those that are among the best, or might be but for rounding, are compared again in
float64, each by itself. So a result depends neither on the other queries nor on the place of a row in its shard.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..bulk.shards import row_lengths
from ..bulk.stored import StoredFolder, StoredShard

_BLOCK_ROWS = 1 << 14
_ALONE = 1 << 18  # numbers in rows that one query is multiplied by at once: more go to threads, which wait for memory
_QUERIES = 256  # that are multiplied at once
_PAIRS = 1 << 12  # of a query and a row that are compared in float64 at once


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
    the file `manifest`. `complete` is false while that run is not finished. Shards that are finished later are not in
    it: open it again.

    Raises:
        FileNotFoundError, ValueError: the folder is none of `clip-fast encode`, or has no finished shard, or a file in
            it is missing or not what it was, by its size; the message names it.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        stored = StoredFolder(folder)
        self.settings, self.manifest, self.complete = stored.settings, stored.manifest, stored.complete
        self._shards = stored.shards
        stored.check_shards()
        if not self._shards:
            raise ValueError(f"{stored.folder} has no finished shard")
        shapes = [shard.shape() for shard in self._shards]
        dims = sorted({width for _, width in shapes})
        if len(dims) != 1:
            raise ValueError(f"the shards of {stored.folder} differ in their width: {dims}")
        (self.embed_dim,) = dims
        self._starts = np.cumsum([0, *(rows for rows, _ in shapes)])
        self._lengths: list[NDArray[np.float32] | None] = [None] * len(self._shards)  # known from the first search on
        stored.check_images(len(self))

    def __len__(self) -> int:
        return int(self._starts[-1])

    def search(self, query: NDArray[Any] | Tensor, k: int = 10) -> list[Hit]:
        """The `k` images with the highest cosine to `query`, best first. Of equals the earlier is first.

        Args:
            query: (embed_dim,) or (1, embed_dim), of any dtype; a tensor may be on any device.

        Raises:
            ValueError: for a query of another shape, or one that has no direction; for a `k` below 1; where a shard has
                changed since the index was opened, as the last one does when `encode --resume` extends the folder, or a
                row has not the length that was written beside it.
        """
        if query.ndim == 2 and len(query) != 1:
            raise ValueError(f"search takes one query, got {len(query)}: search_many takes several")
        return self.search_many(query[None] if query.ndim == 1 else query, k)[0]

    def search_many(self, queries: NDArray[Any] | Tensor, k: int = 10) -> list[list[Hit]]:
        """As `search`, for each of `queries` (Q, embed_dim), in one pass over the rows."""
        scores, rows = self.nearest(queries, k)
        names = self._names(np.unique(rows))
        return [
            [Hit(float(score), row, *names[row]) for score, row in zip(line, map(int, places), strict=True)]
            for line, places in zip(scores, rows, strict=True)
        ]

    def nearest(self, queries: NDArray[Any] | Tensor, k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Cosines and rows of the `k` best images for each of `queries` (Q, embed_dim): (Q, k) both, best first.

        Fewer columns where the index has fewer images.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        if queries.ndim != 2 or queries.shape[1] != self.embed_dim:
            raise ValueError(f"queries must be [Q, {self.embed_dim}], got {list(queries.shape)}")
        if isinstance(queries, Tensor):
            queries = queries.detach().cpu().double().numpy()
        exact = queries.astype(np.float64)
        lengths = np.linalg.norm(exact, axis=1, keepdims=True)
        if not np.isfinite(lengths).all() or not lengths.all():
            raise ValueError("a query has no direction: it is zero, or not finite")
        exact /= lengths
        parts = [_Best(exact[start : start + _QUERIES], k) for start in range(0, max(len(exact), 1), _QUERIES)]
        for start, block, norms in self._blocks():
            for part in parts:
                part.add(start, block, norms)
        scores, rows = (np.concatenate(each) for each in zip(*((p.scores, p.rows) for p in parts), strict=True))
        return scores.astype(np.float32), rows

    def _blocks(self) -> Iterator[tuple[int, NDArray[np.float32], NDArray[np.float32]]]:
        """The number of the first of some rows, the rows in float32, and their lengths."""
        for place, shard in enumerate(self._shards):
            rows = int(self._starts[place + 1] - self._starts[place])
            if not shard.records.exists():  # it goes while the shard is replaced
                raise _changed(shard)
            known = self._lengths[place]
            if known is None:
                known = shard.lengths()
            if known is not None and len(known) != rows:
                raise _changed(shard)
            start = 0
            lengths: list[NDArray[np.float32]] = []
            for block in shard.blocks(_BLOCK_ROWS):
                stop = start + len(block)
                if stop > rows:
                    raise _changed(shard)
                lengths.append(row_lengths(block) if known is None else known[start:stop])
                yield int(self._starts[place]) + start, block, lengths[-1]
                start = stop
            if start < rows:
                raise _changed(shard)
            self._lengths[place] = np.concatenate(lengths) if known is None else known

    def _names(self, rows: NDArray[np.int64]) -> dict[int, tuple[str, str]]:
        """Keys and locations of sorted rows."""
        names: dict[int, tuple[str, str]] = {}
        for place, shard in enumerate(self._shards):
            first, last = int(self._starts[place]), int(self._starts[place + 1])
            inside = rows[np.searchsorted(rows, first) : np.searchsorted(rows, last)]
            if len(inside):
                names |= zip(inside.tolist(), shard.names((inside - first).tolist()), strict=True)
        return names


def _changed(shard: StoredShard) -> ValueError:
    return ValueError(f"{shard.records} has other rows than when the index was opened: open it again")


class _Best:
    """The k best rows of those that were added, for each of some queries (Q, embed_dim) of length 1 in float64.

    `scores` (Q, ≤ k) are cosines in float64, best first, and `rows` their rows.
    """

    def __init__(self, queries: NDArray[np.float64], k: int) -> None:
        self.scores = np.empty((len(queries), 0))
        self.rows = np.empty((len(queries), 0), np.int64)
        self._queries = queries
        self._rounded = queries.astype(np.float32)
        self._k = k
        # Twice the bound of an error in float32 of a product and of a length (Higham, "Accuracy and Stability of
        # Numerical Algorithms", 2002, section 3.1), and more: eps is two units of rounding.
        self._margin = 2 * (queries.shape[1] + 8) * float(np.finfo(np.float32).eps)

    def add(self, start: int, block: NDArray[np.float32], lengths: NDArray[np.float32]) -> None:
        """Adds rows (n, embed_dim) of which the first has the number `start`."""
        there = (lengths > 0) & np.isfinite(lengths)  # not the rows of images that failed
        step = len(block) if len(self._rounded) > 1 else max(1, _ALONE // block.shape[1])
        cosines = np.empty((len(self._rounded), len(block)), np.float32)
        with np.errstate(all="ignore"):
            for i in range(0, len(block), step):
                cosines[:, i : i + step] = self._rounded @ block[i : i + step].T
            cosines /= lengths
        # The rest of the bound is for rows so short that products with them are lost below float32's range.
        most = 1 + self._margin + block.shape[1] * float(np.finfo(np.float32).tiny) / np.where(there, lengths, 1)
        damaged = there & ~(np.maximum(cosines.max(axis=0, initial=0), -cosines.min(axis=0, initial=0)) <= most)
        if damaged.any():
            raise ValueError(
                f"row {start + int(damaged.argmax())} of the index is damaged: it has not the length that was written "
                "beside it. `clip-fast verify` names the shard"
            )
        cosines[:, ~there] = -np.inf
        known = self.rows.shape[1]
        k = min(self._k, known + int(there.sum()))
        least = np.full(len(cosines), -2.0)  # less than any cosine
        if known == self._k:
            least = self.scores[:, -1] - self._margin
        elif self._k <= cosines.shape[1]:
            least = np.maximum(least, np.partition(cosines, -self._k, axis=1)[:, -self._k] - self._margin)
        wanted = cosines >= least.astype(np.float32)[:, None]
        queries, places = np.nonzero(wanted)
        if not len(queries):
            return
        found = self._cosines(queries, block, places)
        scores, rows = self.scores, self.rows
        if k > known:
            scores, rows = np.empty((len(wanted), k)), np.empty((len(wanted), k), np.int64)
        begin = 0
        for query, count in enumerate(np.bincount(queries, minlength=len(wanted)).tolist()):
            if not count:
                continue
            end = begin + count
            all_scores = np.concatenate([self.scores[query], found[begin:end]])
            all_rows = np.concatenate([self.rows[query], places[begin:end] + start])
            order = np.lexsort((all_rows, -all_scores))[:k]
            scores[query], rows[query] = all_scores[order], all_rows[order]
            begin = end
        self.scores, self.rows = scores, rows

    def _cosines(
        self, queries: NDArray[np.int64], block: NDArray[np.float32], places: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """The cosine of each of `queries` with the row at its place in the block: each by itself, in float64."""
        found = np.empty(len(queries))
        for i in range(0, len(queries), _PAIRS):
            rows = block[places[i : i + _PAIRS]].astype(np.float64)
            products = (rows * self._queries[queries[i : i + _PAIRS]]).sum(axis=1)
            found[i : i + _PAIRS] = products / np.sqrt((rows * rows).sum(axis=1))
        return found
