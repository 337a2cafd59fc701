"""Workers that are actors of a Ray cluster."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from typing_extensions import override

from diagd.cluster.connection import ClusterOptions, connect
from diagd.runtime.pool import (
    MAX_DEATHS,
    Here,
    Item,
    Make,
    Processes,
    Result,
    Worker,
    Workers,
    too_many_deaths,
)


def open_workers(make: Make[Item, Result], options: ClusterOptions) -> Workers[Item, Result]:
    """Workers of a cluster, else processes of this machine, else this process."""
    if options.cluster is not None:
        return RayWorkers(make, options.cluster, options.workers, options.gpus)
    if options.workers is None or options.workers == 1:
        return Here(make)
    return Processes(make, options.workers)


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
