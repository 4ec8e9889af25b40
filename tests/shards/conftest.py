"""A Ray cluster of three nodes on this machine, on the loopback interface, for the tests that need one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

GIVEN = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # listens on loopback only
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",
    "RAY_DISABLE_IMPORT_WARNING": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_failure_threshold": "3",
}


@pytest.fixture(scope="package")
def ray_nodes() -> Iterator[Any]:
    """The cluster, joined by this process; nodes may be removed, and are added again by `whole`."""
    pytest.importorskip("ray", reason="needs Ray: pip install 'obsdag[ray]'")
    before = dict(os.environ)
    os.environ.update(GIVEN)
    import ray
    from ray._private import ray_constants
    from ray.cluster_utils import Cluster

    ray_constants.ENABLE_RAY_CLUSTER = False
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, **SMALL})
    try:
        ray.init(address=cluster.address, configure_logging=False, log_to_driver=False)
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()
        os.environ.clear()
        os.environ.update(before)


SMALL = {"object_store_memory": 80 << 20}


@pytest.fixture
def nodes(ray_nodes: Any) -> Any:
    """The same, with its two nodes beside the head, which hold the shards: `shard` is a resource of theirs alone."""
    while len(ray_nodes.worker_nodes) < 2:
        ray_nodes.add_node(num_cpus=2, resources={"shard": 2}, **SMALL)
    ray_nodes.wait_for_nodes()
    return ray_nodes
