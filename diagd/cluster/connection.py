"""The connection to a Ray cluster, which is joined with its token, and without its statistics."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Final

from diagd.errors import UsageError, require

HERE: Final = "local"
"""In place of an address: a cluster of this machine alone, which ends with this process."""

_SETTINGS: Final = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token"}
"""Before Ray is imported: an open port of Ray runs whatever it is sent (CVE-2023-48022), and token
authentication, which it has since 2.52, is off where nothing is said."""


_PATIENCE: Final = 10.0
"""Seconds within which a node has to answer that is to be joined."""

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
        host, _, port = address.rpartition(":")
        if port.isdecimal() and "//" not in host:  # Ray may wait for ever for what is not there
            socket.create_connection((host.strip("[]"), int(port)), _PATIENCE).close()
        with _signals_wait() if address == HERE else nullcontext():
            ray.init(address, **told)
    except Exception as error:  # Ray raises ConnectionError, RuntimeError, ValueError and types of its own
        raise UsageError(
            f"cannot join a Ray cluster at {address}: {str(error).strip() or type(error).__name__}; start "
            "one with RAY_AUTH_MODE=token ray start --head --include-dashboard=false, and give each "
            "machine the token of `ray get-auth-token`"
        ) from error
    return ray


@contextmanager
def _signals_wait() -> Iterator[None]:
    """Let signals wait that end this process: a cluster that they hit as it starts stays, or crashes it."""
    came: list[int] = []
    names = ("SIGINT", "SIGTERM", "SIGHUP") if threading.current_thread() is threading.main_thread() else ()
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    before = {number: was for number in numbers if callable(was := signal.getsignal(number))}
    for number in before:
        signal.signal(number, lambda number, _: came.append(number))
    try:
        yield
    finally:
        for number, was in before.items():
            signal.signal(number, was)
        for number in came[:1]:
            signal.raise_signal(number)


def check_place(ray: Any, cores: float, gpus: float) -> None:
    """Refuse (UsageError) to wait for what no node has."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(one.get("CPU", 0) >= cores and one.get("GPU", 0) >= gpus for one in nodes):
        raise UsageError(
            f"no node of the cluster has {cores:g} cores and {gpus:g} GPUs; ask for less by --set, or add one"
        )


def cannot_begin(error: Exception) -> str:
    """What is said of an actor that a node could not make."""
    reason = str(error).strip().splitlines()[-1]
    return f"a node cannot start what works there ({reason}); each needs the same Python, Ray and diagd"
