"""Work on many items by several workers: this process, others of this machine, or actors of a Ray cluster.

Their results do not depend on how many there are.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import Pipe, get_context, parent_process
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from traceback import format_exc
from typing import Any, Final, Generic, TypeAlias, TypeVar, cast

from typing_extensions import Self, override

from diagd.cluster.connection import cannot_begin, check_place, connect
from diagd.errors import UsageError
from diagd.options import checked, flag, setting

Item = TypeVar("Item")
Result = TypeVar("Result")

Make = Callable[[], Callable[[Item], Result]]
"""Gets a worker ready, once, and gives what does an item, as a function of that item alone."""

MAX_DEATHS: Final = 3
"""Workers that may be killed at one item."""

_SLOW: Final = 30.0
"""Seconds until somebody is told that no worker of a cluster has begun."""

_LOG = logging.getLogger(__name__)

if sys.platform == "win32":
    from multiprocessing.connection import PipeConnection

    _End: TypeAlias = "PipeConnection[Any, Any]"
else:
    _End: TypeAlias = "Connection[Any, Any]"


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


class _KilledError(Exception):
    """A worker is gone."""


class _Pool(Workers[Item, Result]):
    """So many workers elsewhere, at most: each gets ready, is sent an item, answers, and is sent the next.

    A reply is where an answer is to come.
    """

    def __init__(self, count: int, tries: int = MAX_DEATHS) -> None:
        self._count, self._tries = count, tries
        self._idle: list[Any] = []
        self._starting: dict[Any, Any] = {}
        self._busy: dict[Any, Any] = {}

    @abstractmethod
    def _start(self) -> tuple[Any, Any]:
        """A new worker, and the reply that it is ready."""

    @abstractmethod
    def _send(self, worker: Any, item: Item) -> Any:
        """Have a worker do an item; gives the reply."""

    @abstractmethod
    def _wait(self, replies: Sequence[Any]) -> Any:
        """One of the replies that has come."""

    @abstractmethod
    def _read(self, reply: Any) -> Any:
        """What was answered: raises what was raised there, or `_KilledError`."""

    @override
    def map(self, items: Sequence[Item]) -> Generator[tuple[int, Result], None, None]:
        """One that is being started keeps no item waiting."""
        waiting, running, deaths = deque(range(len(items))), dict[Any, int](), Counter[int | None]()
        while waiting or running:
            while waiting and self._idle:
                worker, number = self._idle.pop(), waiting.popleft()
                reply = self._send(worker, items[number])
                self._busy[reply], running[reply] = worker, number
            self._add(len(waiting))
            reply = self._wait([*self._busy, *self._starting])
            doing = running.pop(reply, None)  # None: it is new, or ends what an earlier call left
            is_new = reply in self._starting
            worker = self._starting.pop(reply) if is_new else self._busy.pop(reply)
            try:
                result = self._read(reply)
            except _KilledError as error:
                deaths[doing] += 1
                if deaths[doing] == self._tries * (self._count if doing is None else 1):
                    raise too_many_deaths(self._count) from error
                if doing is not None:
                    waiting.appendleft(doing)
                continue
            except Exception:
                self._idle.append(worker)
                if is_new or doing is not None:
                    raise
                continue
            self._idle.append(worker)
            if is_new:
                deaths[None] = 0
            elif doing is not None:
                yield doing, result

    def _add(self, waiting: int) -> None:
        """Start workers for items that wait, wherever there is place, now or later."""
        there = len(self._starting) + len(self._busy)
        for _ in range(min(waiting - len(self._starting), self._count - there)):
            worker, reply = self._start()
            self._starting[reply] = worker


class Processes(_Pool[Item, Result]):
    """Workers that are processes of this machine.

    Each has a pipe of its own: one that is killed, at any time, leaves no lock and no queue to the others in
    which they wait for ever, as those of concurrent.futures do (CPython gh-94777, gh-109917).

    ``tries``: of an item whose worker is killed.
    """

    def __init__(self, make: Make[Item, Result], count: int, tries: int = MAX_DEATHS) -> None:
        super().__init__(count, tries)
        self._make = make
        self._processes: dict[_End, BaseProcess] = {}

    @override
    def _start(self) -> tuple[_End, _End]:
        here, there = Pipe()
        process = get_context("spawn").Process(target=_serve, args=(there, self._make))
        with starting(), there:
            process.start()
        self._processes[here] = process
        return here, here

    @override
    def _send(self, worker: _End, item: Item) -> _End:
        with suppress(OSError):  # it is gone, which is read from the reply
            worker.send(item)
        return worker

    @override
    def _wait(self, replies: Sequence[_End]) -> _End:
        """Ends of processes are waited for too: what one has started may hold its pipe."""
        ended = {self._processes[reply].sentinel: reply for reply in replies}
        found = wait([*replies, *ended])[0]
        return ended[found] if isinstance(found, int) else cast("_End", found)

    @override
    def _read(self, reply: _End) -> Any:
        try:
            answer = reply.recv() if reply.poll() else None
        except (EOFError, OSError):
            answer = None
        if answer is None:
            self._processes.pop(reply).join()
            reply.close()
            raise _KilledError
        result, error, where = answer
        if error is not None:
            raise error from RuntimeError(where)
        return result

    @override
    def __exit__(self, *error: object) -> None:
        if error[0] is not None:  # whatever they do, and may do for long, is for nobody
            for process in self._processes.values():
                process.kill()
        self.close()

    @override
    def close(self) -> None:
        """End those that wait, and those that are busy when they are not any more."""
        for end in self._processes:
            end.close()
        for process in self._processes.values():
            process.join()


def _serve(end: _End, make: Make[Any, Any]) -> None:
    """Be a process of `Processes`, until its end of the pipe is closed."""
    end_with_owner()
    worker = Worker(make)
    with suppress(EOFError, OSError):
        end.send((None, None, ""))
        while True:
            end.send(_answer(worker, end.recv()))


def _answer(worker: Worker[Any, Any], item: Any) -> tuple[Any, Exception | None, str]:
    try:
        return worker.do(item), None, ""
    except Exception as error:  # whatever it is, it is the owner's
        return None, error, f"in a worker:\n{format_exc()}"


@contextmanager
def starting() -> Iterator[None]:
    """Let Ctrl-C wait while processes of a pool start: they inherit that, until they `end_with_owner`."""
    if sys.platform == "win32":
        yield
        return
    from multiprocessing import resource_tracker

    resource_tracker.ensure_running()  # which lets it through, where the first process starts this one too
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_owner() -> None:
    """Have this process of a pool end with whoever waits for its results, where it would wait for ever.

    Ctrl-C, which all of them get, is for the owner to tell of.
    """
    owner = parent_process()
    assert owner is not None
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as nohup has it
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if sys.platform != "win32":
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    threading.Thread(target=_outlive, args=(owner,), daemon=True).start()


def _outlive(owner: BaseProcess) -> None:
    owner.join()
    os._exit(1)


class WorkersKilledError(UsageError):
    """Workers do not live."""


def too_many_deaths(count: int) -> WorkersKilledError:
    """What is said where workers of so many do not live."""
    return WorkersKilledError(
        f"{MAX_DEATHS} workers were killed one after the other, mostly for want of memory; use fewer than "
        f"{count} --workers, or the same command again to go on"
    )


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


class RayWorkers(_Pool[Item, Result]):
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
        super().__init__(count or max(1, int(has.get("GPU", 0) / gpus if gpus else has.get("CPU", 1))))
        self._kind = ray.remote(num_cpus=1, num_gpus=gpus, scheduling_strategy="SPREAD")(_Actor)
        self._make = ray.put(make)
        self._actors: list[Any] = []
        self._is_told = False

    @override
    def _start(self) -> tuple[Any, Any]:
        actor = self._kind.remote(self._make)  # it gets what was shared
        self._actors.append(actor)
        return actor, actor.ready.remote()

    @override
    def _send(self, worker: Any, item: Item) -> Any:
        return worker.do.remote(item)

    @override
    def _wait(self, replies: Sequence[Any]) -> Any:
        come, _ = self._ray.wait(replies, timeout=None if self._busy or self._is_told else _SLOW)
        if not come:
            self._is_told = True
            waits = "no worker has begun after %g seconds: they wait until a node has cores and GPUs to spare"
            _LOG.warning(waits, _SLOW)
            return self._wait(replies)
        return come[0]

    @override
    def _read(self, reply: Any) -> Any:
        from ray.exceptions import RayActorError, RayTaskError

        try:
            return self._ray.get(reply)
        except RayActorError as error:
            if error.actor_init_failed:
                raise UsageError(cannot_begin(error)) from error
            raise _KilledError from error
        except RayTaskError as error:
            raise error.cause from None

    @override
    def close(self) -> None:
        """End the actors; the connection stays."""
        for actor in self._actors:
            self._ray.kill(actor)
