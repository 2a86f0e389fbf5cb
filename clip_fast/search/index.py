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
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import extras
from ..bulk.manifest import MANIFEST_NAME, RAY_MANIFEST_NAME, read_settings
from ..bulk.shards import ShardFolder
from ..extras import pyarrow
from ..inputs.parquet import Parquet

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


@dataclass(frozen=True)
class _Shard:
    """A parquet file of records, and the .npy with their embeddings; None where these are in a column of the file."""

    records: Path
    embeddings: Path | None

    def shape(self) -> tuple[int, int]:
        if self.embeddings is not None:
            return self._mapped(self.embeddings).shape
        _, parquet = pyarrow()
        with parquet.ParquetFile(self.records) as file:
            return file.metadata.num_rows, file.schema_arrow.field("embedding").type.list_size

    def blocks(self) -> Iterator[NDArray[np.float32]]:
        """All rows, in order; no file stays open."""
        if self.embeddings is not None:
            rows = self._mapped(self.embeddings)
            for start in range(0, len(rows), _BLOCK_ROWS):
                yield rows[start : start + _BLOCK_ROWS].astype(_FLOAT_32)
            return
        _, parquet = pyarrow()
        with parquet.ParquetFile(self.records) as file:
            for batch in file.iter_batches(_BLOCK_ROWS, columns=["embedding"]):
                yield batch.column(0).flatten().to_numpy().reshape(len(batch), -1)

    def names(self) -> tuple[list[str], list[str]]:
        """Keys and locations of the rows."""
        _, parquet = pyarrow()
        columns = parquet.read_table(self.records, columns=["key", "image_path"]).to_pydict()
        return columns["key"], columns["image_path"]

    @staticmethod
    def _mapped(path: Path) -> NDArray[Any]:
        return np.load(path, mmap_mode="r", allow_pickle=False)


class Index:
    """The finished shards of an output folder.

    `settings` are those of the run that wrote it: "model", "weights", "dtype", "image_column" and more.

    Raises:
        FileNotFoundError, ValueError: the folder is none of `clip-fast encode`, or has no finished shard, or a file in
            it is not what it was.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        shards = ShardFolder(folder)
        manifests = [shards.folder / name for name in (MANIFEST_NAME, RAY_MANIFEST_NAME)]
        manifest = next((path for path in manifests if path.exists()), None)
        if manifest is None:
            raise FileNotFoundError(
                f"{shards.folder} is no output folder of clip-fast encode, or Ray's is not finished: it has no "
                f"{MANIFEST_NAME} or {RAY_MANIFEST_NAME}"
            )
        self.settings = read_settings(manifest)
        if manifest.name == MANIFEST_NAME:
            numbered = [(int(path.stem.rpartition("_")[2]), path) for path in shards.all_metadata()]
            self._shards = [_Shard(path, shards.embeddings_path(number)) for number, path in numbered]
        else:
            self._shards = [_Shard(path, None) for path in sorted(shards.folder.glob("*" + Parquet.suffix))]
        if not self._shards:
            raise ValueError(f"{shards.folder} has no finished shard")
        shapes = [shard.shape() for shard in self._shards]
        dims = sorted({width for _, width in shapes})
        if len(dims) != 1:
            raise ValueError(f"the shards of {shards.folder} differ in their width: {dims}")
        (self.embed_dim,) = dims
        self._starts = np.cumsum([0, *(rows for rows, _ in shapes)])

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
            norms = np.linalg.norm(block, axis=1)
            there = np.flatnonzero((norms > 0) & np.isfinite(norms))
            if not len(there):
                continue
            rows = block[there] / norms[there, None]
            if faiss is not None:
                scores, found = faiss.knn(unit, rows, min(k, len(rows)), metric=faiss.METRIC_INNER_PRODUCT)
                found = there[found] + start
            else:
                scores = unit @ rows.T
                found = np.broadcast_to(there + start, scores.shape)
            best_scores, best_rows = _best(
                np.concatenate([best_scores, scores], axis=1), np.concatenate([best_rows, found], axis=1), k
            )
        return best_scores, best_rows

    def _blocks(self) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Rows in float32, with the number of the first."""
        for start, shard in zip(self._starts, self._shards, strict=False):
            for block in shard.blocks():
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
