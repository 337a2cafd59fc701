"""More than one machine, by Ray."""

from diagd.cluster.connection import ClusterOptions
from diagd.cluster.workers import open_workers

__all__ = ["ClusterOptions", "open_workers"]
