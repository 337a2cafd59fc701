"""More than one process: of this machine, or of several, by Ray."""

from diagd.cluster.workers import ClusterOptions, open_workers

__all__ = ["ClusterOptions", "open_workers"]
