"""Published checkpoints, downloaded once and verified."""

from __future__ import annotations

import hashlib
import http.client
import os
import time
import urllib.request
import uuid
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from ..errors import CheckpointError, summary


@dataclass(frozen=True)
class Pretrained:
    """Where a published checkpoint comes from: its address and the SHA-256 of the whole file, in hexadecimal."""

    url: str
    sha256: str

    @property
    def filename(self) -> str:
        return self.url.rsplit("/", 1)[-1]


TIMEOUT = 30.0  # seconds without a byte

_ABANDONED = 3600.0  # seconds since a byte, after which nobody downloads to a file any more
_CHUNK = 1 << 20  # bytes at a time


def download(source: Pretrained, folder: Path) -> Path:
    """A published checkpoint in `folder`, verified; downloaded unless it is there already.

    The file appears under its name only when it is whole and verified, so that processes may do this at the same time.
    """
    target = folder / source.filename
    if target.is_file():
        with target.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() == source.sha256:
                return target
        warnings.warn(f"{target}: its SHA-256 is not that of {source.url}; downloading it again", stacklevel=3)
    partial = folder / f"{source.filename}.{uuid.uuid4().hex}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(f"{source.filename}.*.part"):  # of downloads that were killed
            with suppress(OSError):  # one that is going on and ends now, or somebody else's
                if time.time() - leftover.stat().st_mtime > _ABANDONED:
                    leftover.unlink()
        received = _fetch(source, partial)
        if received != source.sha256:
            raise CheckpointError(
                target,
                f"the download from {source.url} is not whole or not genuine: its {partial.stat().st_size} bytes have "
                f"SHA-256 {received}, wanted {source.sha256}",
            )
        os.replace(partial, target)
    except (OSError, http.client.HTTPException) as error:
        raise CheckpointError(
            target,
            f"cannot be downloaded from {source.url} ({summary(error)}); "
            f"without a network, get it elsewhere and place it as {source.filename} in {folder}",
        ) from error
    finally:  # interrupted or not, nothing half-written stays
        with suppress(OSError):  # it is gone, or cannot have been made
            partial.unlink()
    return target


def _fetch(source: Pretrained, partial: Path) -> str:
    """Downloads to a new file and returns its SHA-256 in hexadecimal."""
    digest = hashlib.sha256()
    with (
        urllib.request.urlopen(source.url, timeout=TIMEOUT) as response,
        partial.open("xb") as file,
        tqdm(
            total=int(response.headers.get("Content-Length", 0)) or None,
            desc=source.filename,
            unit="B",
            unit_scale=True,
            unit_divisor=1024,
        ) as progress,
    ):
        while chunk := response.read(_CHUNK):
            file.write(chunk)
            digest.update(chunk)
            progress.update(len(chunk))
    return digest.hexdigest()
