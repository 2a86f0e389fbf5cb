"""A folder that `clip-fast encode` has written, with or without `--ray`: its shards, and whether they are unchanged."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import summary
from ..extras import pyarrow
from ..inputs.parquet import Parquet
from .manifest import MANIFEST_NAME, RAY_MANIFEST_NAME, read_manifest
from .shards import ERRORS_NAME, NORM, ShardFolder, check_embeddings, check_shard, read_footer


@dataclass(frozen=True)
class StoredShard:
    """A parquet file of records, and the .npy with their embeddings; None where these are in a column of the file.

    All methods raise ValueError, with the file's name, where a file is damaged.
    """

    records: Path
    embeddings: Path | None

    def shape(self) -> tuple[int, int]:
        """Rows and embed_dim, after a comparison of the files' sizes."""
        if self.embeddings is None:
            with _table(self.records) as file:
                return file.metadata.num_rows, file.schema_arrow.field("embedding").type.list_size
        footer = read_footer(self.records)
        check_embeddings(self.embeddings, footer, contents=False)
        rows, embed_dim = _mapped(self.embeddings).shape
        if rows != footer.images:
            raise ValueError(f"{self.embeddings} is damaged: it has {rows} rows of {footer.images}")
        return rows, embed_dim

    def blocks(self, rows: int) -> Iterator[NDArray[np.float32]]:
        """All embeddings in order, (≤ rows, embed_dim) at a time; no file stays open."""
        if self.embeddings is not None:
            mapped = _mapped(self.embeddings)
            for start in range(0, len(mapped), rows):
                yield np.asarray(mapped[start : start + rows], np.float32)
            return
        with _table(self.records) as file:
            for batch in file.iter_batches(rows, columns=["embedding"]):
                yield batch.column(0).flatten().to_numpy().reshape(len(batch), -1)

    def lengths(self) -> NDArray[np.float32] | None:
        """The rows' Euclidean lengths, (rows,), where they were written."""
        with _table(self.records) as file:
            if NORM not in file.schema_arrow.names:
                return None
            return file.read(columns=[NORM]).column(0).to_numpy().astype(np.float32)

    def names(self, rows: Sequence[int]) -> list[tuple[str, str]]:
        """Key and location of each of `rows`."""
        with _table(self.records) as file:
            columns = file.read(columns=["key", "image_path"]).take(rows)
            return list(zip(*(column.to_pylist() for column in columns.columns), strict=True))

    def check(self) -> tuple[int, bool]:
        """Reads all of it: its rows, and whether there was a checksum to compare the embeddings with."""
        rows, _ = self.shape()
        if self.embeddings is None:
            with _table(self.records) as file:
                for _ in file.iter_batches():
                    pass
            return rows, False
        return rows, check_shard(self.records, self.embeddings).sha256 is not None


class StoredFolder:
    """The shards of an output folder, and the settings of the run. Nothing but the manifest is read yet.

    Raises:
        FileNotFoundError, ValueError: the folder is none of `clip-fast encode`.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._shards = ShardFolder(folder)
        self.folder = self._shards.folder
        manifests = [self.folder / name for name in (MANIFEST_NAME, RAY_MANIFEST_NAME)]
        manifest = next((path for path in manifests if path.exists()), None)
        if manifest is None:
            raise FileNotFoundError(
                f"{self.folder} is no output folder of clip-fast encode, or Ray's is not finished: it has no "
                f"{MANIFEST_NAME} or {RAY_MANIFEST_NAME}"
            )
        self.manifest = manifest
        self.settings, self.done = read_manifest(manifest)
        self._numbered = manifest.name == MANIFEST_NAME
        if self._numbered:
            self.shards = [
                StoredShard(self._shards.metadata_path(index), self._shards.embeddings_path(index))
                for index in self._shards.finished_shards()
            ]
        else:
            self.shards = [StoredShard(path, None) for path in sorted(self.folder.glob("*" + Parquet.suffix))]

    @property
    def complete(self) -> bool:
        """Whether the run that writes it has come to its end."""
        return self.done is not None

    def check_shards(self) -> None:
        """Compares the shards of a complete run with its manifest, by their names.

        Raises:
            ValueError: one is missing, or one too many is there; the message names the file.
        """
        there = [shard.records for shard in self.shards]
        if self.done is not None and self._numbered:
            shards = self.done.shards
            expected = [self._shards.metadata_path(index) for index in range(shards)]
            found, counted = set(there), set(expected)
            if missing := [str(path) for path in expected if path not in found]:
                raise ValueError(f"{', '.join(missing)}: missing, though {self.manifest} counts {shards} shards")
            if others := [str(path) for path in there if path not in counted]:
                raise ValueError(f"{', '.join(others)}: too many, as {self.manifest} counts {shards} shards")

    def check_images(self, images: int) -> None:
        """Compares the number of rows in all shards with the manifest of a complete run.

        Raises:
            ValueError: they differ; the message names the manifest.
        """
        if self.done is not None and images != self.done.images:
            raise ValueError(f"{self.manifest} counts {self.done.images} images, the files beside it hold {images}")

    def check_errors(self) -> None:
        """Compares the list of failures of a complete run with its shards, none of which is damaged.

        Raises:
            ValueError: they differ; the message names the list.
        """
        if self.done is None or not self._numbered:
            return
        path = self.folder / ERRORS_NAME
        found = path.read_bytes() if path.exists() else b""
        if found != b"".join(self._shards.error_lines()):
            raise ValueError(f"{path} does not have the failures of the shards: encode --resume writes it again")


def _mapped(path: Path) -> NDArray[Any]:
    """A .npy of rows, memory-mapped."""
    try:
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # NumPy, too
        raise ValueError(f"{path} is damaged: {summary(error)}") from error
    if rows.ndim != 2:
        raise ValueError(f"{path} is damaged: it has {rows.ndim} dimensions, expected 2")
    return rows


@contextmanager
def _table(path: Path) -> Generator[Any, None, None]:
    """An open parquet file; errors in reading it name it."""
    _, parquet = pyarrow()
    try:
        with parquet.ParquetFile(path, page_checksum_verification=True) as file:
            yield file
    except Exception as error:  # pyarrow raises whatever its parsing stumbles on
        raise ValueError(f"{path} is damaged: {summary(error)}") from error
