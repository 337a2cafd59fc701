"""A Ray cluster of two nodes on this machine."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from typing import Any

import pytest

from diagd.cluster.connection import _SETTINGS

ROOT_VARIABLES = {**_SETTINGS, "RAY_AUTH_TOKEN": secrets.token_hex(32)}


@pytest.fixture(scope="package")
def nodes() -> Iterator[Any]:
    """The cluster; each node has two cores to give."""
    os.environ.update(ROOT_VARIABLES)
    ray = pytest.importorskip("ray", reason="pip install 'diagd[cluster]'")
    from ray.cluster_utils import Cluster

    cluster: Any = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    cluster.add_node(num_cpus=2)
    try:
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()
        for name in ROOT_VARIABLES:
            del os.environ[name]
