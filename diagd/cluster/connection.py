"""Joining a Ray cluster: with its token, without its statistics; and what can be told of one."""

from __future__ import annotations

import os
import secrets
from typing import Any, Final

from pydantic.dataclasses import dataclass

from diagd.errors import UsageError, require
from diagd.options import OPTIONS, flag, setting

HERE: Final = "local"
"""In place of an address: a cluster of this machine alone, which ends with this process."""

_SETTINGS: Final = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token"}
"""Before Ray is imported: an open port of Ray runs whatever it is sent (CVE-2023-48022), and token
authentication, which it has since 2.52, is off where nothing is said."""


_ALONE: Final = ("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
"""Ray's name for whether nodes are to reach each other. Where they need not, it listens on 127.0.0.1 alone;
otherwise on all addresses, the machine's own in place of that one (2.60)."""


def connect(address: str) -> Any:
    """Join the cluster at HOST:PORT, ``auto`` for the one that runs here, or `HERE`; gives Ray.

    Raises:
        DependencyError: Ray is not installed.
        UsageError: there is no such cluster, or it does not let us in.
    """
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    if address == HERE:
        os.environ.setdefault(*_ALONE)
        if os.environ["RAY_AUTH_MODE"] == "token":
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    ray = require("ray", extra="cluster", purpose="use several machines")
    if ray.is_initialized():
        return ray
    told = {"log_to_driver": False, "logging_level": "ERROR"}
    if address == HERE:
        told["include_dashboard"] = False
    try:
        ray.init(address, **told)
    except Exception as error:  # Ray raises ConnectionError, RuntimeError, ValueError and types of its own
        raise UsageError(
            f"cannot join a Ray cluster at {address}: {str(error).strip() or type(error).__name__}; start "
            "one with RAY_AUTH_MODE=token ray start --head --include-dashboard=false, and give each "
            "machine the token of `ray get-auth-token`"
        ) from error
    return ray


@dataclass(frozen=True, config=OPTIONS)
class ClusterOptions:
    """Who does the work.

    Attributes:
        gpus: of each worker on a cluster, or a share of one.
    """

    workers: int | None = flag(
        "processes of one thread; the result is that of any number", None, ge=1, le=1024
    )
    cluster: str | None = flag("Ray cluster whose nodes do the work: HOST:PORT, auto, or local", None)
    gpus: float = setting("of each worker on a cluster, or a share of one", 0, ge=0)

    @property
    def is_asked(self) -> bool:
        """Whether anything is said of who does the work."""
        return self.workers is not None or self.cluster is not None


@dataclass(frozen=True, config=OPTIONS)
class EngineOptions:
    """Where engines are that worlds are played on."""

    cluster: str | None = flag("Ray cluster whose nodes play: HOST:PORT, auto, or local", None)
    engines: int | None = setting(
        "of a cluster, of --sessions worlds each (default: one a node)", None, ge=1, le=1024
    )
    cores: float = setting("of each engine on a cluster", 1, gt=0)
    gpus: float = setting("of each engine on a cluster, or a share of one", 0, ge=0)
