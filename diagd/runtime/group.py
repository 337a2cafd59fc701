"""Sessions in lock step: each with its own stream, all in the same passes of one engine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeAlias, TypeVar

import numpy as np

from diagd.engines.engine import Engine
from diagd.errors import UsageError, expect
from diagd.runtime.decoders.decoder import Decoder
from diagd.runtime.sampling import SamplingSettings
from diagd.runtime.session import Session
from diagd.runtime.step import Frame, Run, lock_step
from diagd.runtime.stream import Actions, Ids

T = TypeVar("T")

Each: TypeAlias = Mapping[int, T] | Sequence[T]
"""One for each session that takes part, by its number, or for all of them in turn."""


class Group:
    """Sessions over one engine, whose weights a pass reads once for all of them.

    Every session is used as one that stands alone, which then has passes of its own; ``frames`` and ``step``
    run several in the same passes. A session's tokens are those of a run alone with the same seed. One that
    is started, moved or left between two calls takes part in the next one as it then is. They are by lane of
    the engine, which is closed with the group.
    """

    def __init__(self, engine: Engine, sessions: Sequence[Session]) -> None:
        self.sessions, self.engine = tuple(sessions), engine
        self.passes = self.sessions[0].passes

    def __enter__(self) -> Group:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the engine's memory back; all sessions are dead then."""
        for session in self.sessions:
            session.close()
        self.passes.close()

    def forget(self) -> None:
        """Have prompts fed that sessions hold the rows of: what they come to is then that of new ones."""
        for session in self.sessions:
            session.stream.forget()

    def frames(
        self,
        actions: Each[Actions],
        decoder: Decoder | None = None,
        *,
        count: int | None = None,
        sampling: SamplingSettings | None = None,
        seeds: Each[int] | Ids | None = None,
    ) -> Iterator[tuple[int, Frame]]:
        """Decode frames of several sessions, yielding each, with the session's number, when it is complete.

        See ``Session.frames``; ``seeds`` default to the numbers of the sessions.

        Raises:
            UsageError: as ``Session.frames``, or there is no such session.
        """
        chosen = dict(_each(() if seeds is None else seeds))
        decoder = self.sessions[0].decoder if decoder is None else decoder
        runs = {
            lane: self._session(lane).run(
                decoder, one, count=count, sampling=sampling, seed=chosen.get(lane, lane)
            )
            for lane, one in _each(actions)
        }
        return self.together(runs, in_phase=not getattr(decoder, "ragged", True))

    def step(
        self,
        actions: Each[Ids | None],
        decoder: Decoder | None = None,
        *,
        sampling: SamplingSettings | None = None,
    ) -> dict[int, Frame]:
        """One frame of each session that takes part, under its action int32 [n], with the seed it has."""
        led = {lane: None if ids is None else [ids] for lane, ids in _each(actions)}
        seeds = {lane: self._session(lane).stream.seed for lane in led}
        return dict(self.frames(led, decoder, count=1, sampling=sampling, seeds=seeds))

    def together(self, runs: Mapping[int, Run[T]], *, in_phase: bool = True) -> Iterator[tuple[int, T]]:
        """Run what ``Session.run`` or ``watch`` gave, by number of the session; see ``lock_step``."""
        expect(Group.together, locals())
        return lock_step(self.passes, runs, in_phase=in_phase)

    def _session(self, lane: int) -> Session:
        if lane not in range(len(self.sessions)):
            raise UsageError(f"no session has the number {lane}; this group has {len(self.sessions)}, from 0")
        return self.sessions[lane]


def _each(values: Mapping[int, T] | Iterable[T]) -> Iterator[tuple[int, T]]:
    if not np.iterable(values):
        raise UsageError(f"{values!r} is one for no session; expected one for each, by number or in turn")
    return iter(values.items()) if isinstance(values, Mapping) else iter(enumerate(values))
