"""More than one machine, by Ray."""

from diagd.cluster.workers import ClusterOptions, open_workers

__all__ = ["ClusterOptions", "open_workers"]
