"""Work on many items by several workers: this process, others of this machine, or actors of a Ray cluster.

Their results do not depend on how many there are. A cluster is joined with its token, and without its
statistics.
"""

from __future__ import annotations

import os
import secrets
import signal
import sys
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from multiprocessing.process import BaseProcess
from typing import Any, Final, Generic, TypeVar

from typing_extensions import Self, override

from diagd.errors import UsageError, require
from diagd.options import checked, flag, setting

Item = TypeVar("Item")
Result = TypeVar("Result")

Make = Callable[[], Callable[[Item], Result]]
"""Gets a worker ready, once, and gives what does an item, as a function of that item alone."""

MAX_DEATHS: Final = 3
"""Workers that may be killed one after the other without a result in between."""

_HAS_MASKS: Final = hasattr(signal, "pthread_sigmask")

_WAITS_FOR_THE_DEAD: Final = sys.version_info < (3, 11, 5) and sys.platform != "win32"
"""Whether a pool of dead workers waits for somebody to read what is written to them (CPython gh-94777)."""


class Workers(ABC, Generic[Item, Result]):
    """Does items, wherever; to be closed, as by ``with``."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @abstractmethod
    def map(self, items: Sequence[Item]) -> Iterator[tuple[int, Result]]:
        """Number and result of each item, as they come. A worker that is killed is replaced.

        Raises:
            DiagdError: of an item; or workers are killed again and again.
        """

    @abstractmethod
    def close(self) -> None:
        """End the workers."""


class Worker(Generic[Item, Result]):
    """One of them; an error in getting ready is that of its first item."""

    def __init__(self, make: Make[Item, Result]) -> None:
        self._make = make
        self._work: Callable[[Item], Result] | None = None

    def do(self, item: Item) -> Result:
        """One item."""
        if self._work is None:
            self._work = self._make()
        return self._work(item)


class Here(Workers[Item, Result]):
    """One worker: this process."""

    def __init__(self, make: Make[Item, Result]) -> None:
        self._worker = Worker(make)

    @override
    def map(self, items: Sequence[Item]) -> Iterator[tuple[int, Result]]:
        yield from enumerate(map(self._worker.do, items))

    def close(self) -> None:
        """Nothing is held."""


class Processes(Workers[Item, Result]):
    """Workers that are processes of this machine."""

    def __init__(self, make: Make[Item, Result], count: int) -> None:
        self._make, self._count = make, count
        self._executor = self._start()

    def _start(self) -> ProcessPoolExecutor:
        executor = ProcessPoolExecutor(self._count, get_context("spawn"), _begin, (self._make,))
        queue: Any = executor._call_queue  # type: ignore[attr-defined]
        self._unread = os.dup(queue._reader.fileno()) if _WAITS_FOR_THE_DEAD else None
        return executor

    @override
    def map(self, items: Sequence[Item]) -> Iterator[tuple[int, Result]]:
        missing, deaths = dict(enumerate(items)), 0
        while missing:
            try:
                for number, result in self._map(missing):
                    del missing[number]
                    deaths = 0
                    yield number, result
            except BrokenProcessPool as error:
                deaths += 1
                self._end_broken()
                if deaths == MAX_DEATHS:
                    raise too_many_deaths(self._count) from error
                self._executor = self._start()

    def _map(self, items: dict[int, Item]) -> Iterator[tuple[int, Result]]:
        with starting():
            running = {self._executor.submit(_do, item): number for number, item in items.items()}
        try:
            for future in as_completed(running):
                yield running[future], future.result()
        finally:
            for future in running:
                future.cancel()

    def _end_broken(self) -> None:
        while self._unread is not None and os.read(self._unread, 1 << 20):
            pass  # up to the end, which is there when all that was meant for the dead has been written
        self.close()

    @override
    def close(self) -> None:
        self._executor.shutdown(cancel_futures=True)
        if self._unread is not None:
            os.close(self._unread)
            self._unread = None


_own: Worker[Any, Any] | None = None
"""Of a process of `Processes`."""


def _begin(make: Make[Any, Any]) -> None:
    global _own  # noqa: PLW0603  # all that is left of one call in the next
    _own = Worker(make)
    end_with_owner()


@contextmanager
def starting() -> Iterator[None]:
    """Let Ctrl-C wait while processes of a pool start: they inherit that, until they `end_with_owner`."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT]) if _HAS_MASKS else set()
    try:
        yield
    finally:
        if _HAS_MASKS:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_owner() -> None:
    """Have this process of a pool end with whoever waits for its results, where it would wait for ever.

    Ctrl-C, which all of them get, is for the owner to tell of.
    """
    owner = parent_process()
    assert owner is not None
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as nohup has it
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if _HAS_MASKS:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    threading.Thread(target=_outlive, args=(owner,), daemon=True).start()


def _outlive(owner: BaseProcess) -> None:
    owner.join()
    os._exit(1)


def _do(item: Any) -> Any:
    assert _own is not None
    return _own.do(item)


def too_many_deaths(count: int) -> UsageError:
    """Workers do not live."""
    return UsageError(
        f"{MAX_DEATHS} workers were killed one after the other, mostly for want of memory; use fewer than "
        f"{count} --workers, or the same command again to go on"
    )


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


@checked
class ClusterOptions:
    """Who does the work."""

    workers: int | None = flag(
        "processes of one thread; the result is that of any number", None, ge=1, le=1024
    )
    cluster: str | None = flag("Ray cluster whose nodes do the work: HOST:PORT, auto, or local", None)
    gpus: float = setting("of each worker on a cluster, or a share of one", 0, ge=0)

    def __post_init__(self) -> None:
        _need_cluster(self.cluster, gpus=self.gpus)

    @property
    def is_asked(self) -> bool:
        """Whether anything is said of who does the work."""
        return self.workers is not None or self.cluster is not None


@checked
class EngineOptions:
    """Where engines are that worlds are played on."""

    cluster: str | None = flag("Ray cluster whose nodes play: HOST:PORT, auto, or local", None)
    engines: int | None = setting(
        "of a cluster, of --sessions worlds each (default: one a node)", None, ge=1, le=1024
    )
    cores: float = setting("of each engine on a cluster", 1, gt=0)
    gpus: float = setting("of each engine on a cluster, or a share of one", 0, ge=0)

    def __post_init__(self) -> None:
        _need_cluster(self.cluster, gpus=self.gpus, engines=self.engines, cores=self.cores != 1)


def _need_cluster(cluster: str | None, **told: float | None) -> None:
    """Refuse (UsageError) what would have no effect on this machine alone."""
    if cluster is None and (names := [name for name, value in told.items() if value]):
        raise UsageError(
            f"--set {names[0]}= is of a cluster; give its address with --cluster, or leave it out"
        )
    if (gpus := told["gpus"]) and gpus > 1 and gpus % 1:
        raise UsageError(f"--set gpus={gpus:g} is no share of one and no whole number")


def check_place(ray: Any, cores: float, gpus: float) -> None:
    """Refuse (UsageError) to wait for what no node has."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(one.get("CPU", 0) >= cores and one.get("GPU", 0) >= gpus for one in nodes):
        raise UsageError(
            f"no node of the cluster has {cores:g} cores and {gpus:g} GPUs; ask for less by --set, or add one"
        )


def open_workers(make: Make[Item, Result], options: ClusterOptions) -> Workers[Item, Result]:
    """Workers of a cluster, else processes of this machine, else this process."""
    if options.cluster is not None:
        return RayWorkers(make, options.cluster, options.workers, options.gpus)
    if options.workers is None or options.workers == 1:
        return Here(make)
    return Processes(make, options.workers)


def cannot_begin(error: Exception) -> str:
    """What is said of an actor that a node could not make."""
    reason = str(error).strip().splitlines()[-1]
    return f"a node cannot start what works there ({reason}); each needs the same Python, Ray and diagd"


class _Actor(Worker[Any, Any]):
    """What an actor of Ray is made of."""

    def ready(self) -> None:
        """Have been started."""


class RayWorkers(Workers[Item, Result]):
    """Workers that are actors of a Ray cluster, each with a core; see `Workers`.

    What ``make`` reads has to be in the same place on every node. ``count`` None: one for each core of the
    cluster, or for each share of a GPU.
    """

    def __init__(
        self, make: Make[Item, Result], address: str, count: int | None = None, gpus: float = 0
    ) -> None:
        self._ray = ray = connect(address)
        check_place(ray, 1, gpus)
        has = ray.cluster_resources()
        self._count = count or max(1, int(has.get("GPU", 0) / gpus if gpus else has.get("CPU", 1)))
        kind = ray.remote(num_cpus=1, num_gpus=gpus, scheduling_strategy="SPREAD")(_Actor)
        shared = ray.put(make)
        self._start: Callable[[], Any] = lambda: kind.remote(shared)  # the actor gets what was shared
        self._actors: list[Any] = []
        self._idle: list[Any] = []
        self._starting: dict[Any, Any] = {}
        for _ in range(self._count):
            self._begin()

    @override
    def map(self, items: Sequence[Item]) -> Iterator[tuple[int, Result]]:
        """One that is being started elsewhere keeps no item waiting."""
        from ray.exceptions import RayActorError, RayTaskError

        waiting, running, deaths = deque(range(len(items))), dict[Any, tuple[Any, int]](), 0
        while waiting or running:
            while waiting and self._idle:
                actor, number = self._idle.pop(), waiting.popleft()
                running[actor.do.remote(items[number])] = actor, number
            (done,), _ = self._ray.wait([*running, *self._starting])
            try:
                result = self._ray.get(done)
            except RayActorError as error:
                if error.actor_init_failed:
                    raise UsageError(cannot_begin(error)) from error
                deaths += 1
                if deaths == MAX_DEATHS * self._count:
                    raise too_many_deaths(self._count) from error
                if self._starting.pop(done, None) is None:
                    waiting.appendleft(running.pop(done)[1])
                self._begin()
                continue
            except RayTaskError as error:
                raise error.cause from None
            if done in self._starting:
                self._idle.append(self._starting.pop(done))
                continue
            actor, number = running.pop(done)
            deaths = 0
            self._idle.append(actor)
            yield number, result

    def _begin(self) -> None:
        """Start one more, wherever there is place, now or later."""
        actor = self._start()
        self._actors.append(actor)
        self._starting[actor.ready.remote()] = actor

    @override
    def close(self) -> None:
        """End the actors; the connection stays."""
        for actor in self._actors:
            self._ray.kill(actor)
