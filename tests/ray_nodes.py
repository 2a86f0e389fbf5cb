"""A small Ray cluster on this machine, for tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

# Ray starts a worker for every CPU ahead of need, and an actor that counts which features are used. Each is a process
# that takes seconds to import what it needs.
_SPARE = {
    "RAY_prestart_worker_first_driver": "0",
    "RAY_enable_worker_prestart": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}


@contextmanager
def small_cluster(nodes: int) -> Iterator[Any]:
    """A cluster of nodes of two CPUs each, which this process has not joined. Its tasks are few."""
    from ray.cluster_utils import Cluster
    from ray.data import DataContext

    small = {"num_cpus": 2, "num_gpus": 0, "object_store_memory": 100 * 2**20}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in _SPARE.items():
            patch.setenv(name, value)
        patch.setattr(DataContext.get_current(), "read_op_min_num_blocks", 1)
        patch.setattr(DataContext.get_current(), "enable_progress_bars", False)
        cluster = Cluster(initialize_head=True, head_node_args={**small, "include_dashboard": False})
        try:
            for _ in range(nodes - 1):
                cluster.add_node(**small)
            yield cluster
        finally:
            cluster.shutdown()
