"""Output folders as earlier releases wrote them."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq


def as_earlier(folder: Path) -> None:
    """Makes the shards those of a release without checksums."""
    for path in folder.glob("metadata/*.parquet"):
        table = pq.read_table(path)
        footer = json.loads(table.schema.metadata[b"clip_fast"])
        del footer["sha256"]
        pq.write_table(table.replace_schema_metadata({b"clip_fast": json.dumps(footer)}), path)
