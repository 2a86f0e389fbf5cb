"""Where a job's shards go in tests that look at them."""

from __future__ import annotations

from clip_fast.bulk.tables import Shard


class Kept:
    """A sink that keeps what it gets."""

    def __init__(self) -> None:
        self.shards: list[Shard] = []

    def finished(self, index: int, items: object) -> None:
        return None

    def write(self, shard: Shard) -> None:
        self.shards.append(shard)
