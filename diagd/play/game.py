"""A world that is played: a stream with its settings, its past to go back to, branches and a record."""

from __future__ import annotations

import io
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np

from diagd.bundle import Bundle
from diagd.engines.engine import Float, Int
from diagd.errors import UsageError
from diagd.play import record
from diagd.play.controls import Taken
from diagd.play.pictures import Pictures, View
from diagd.play.record import Ahead, Flying, Line, Played, PlaySettings, Record, Start, replay
from diagd.runtime.actions import encode
from diagd.runtime.clip import check_tokens
from diagd.runtime.comparison import audit
from diagd.runtime.session import Session
from diagd.runtime.step import Due, Frame, Run
from diagd.runtime.stream import Past
from diagd.runtime.video import VideoWriter

MAX_PAST: Final = 20_000
"""Frames that can be taken back at most; a few hundred bytes each."""

MAX_BRANCHES: Final = 64

MAX_KEPT: Final = 600
"""Frames that can be taken back of a world that went on elsewhere."""

Act = Callable[[], Taken | None]
"""Asked for the action of a frame."""


@dataclass(frozen=True)
class Mark:
    """A place in a world that can be gone back to.

    ``number`` 0 is the start; ``parent`` is the mark last passed on the way there, and ``past`` the last of
    the ``known`` frames up to there.
    """

    number: int
    parent: int | None
    known: int
    past: tuple[Past, ...]


@dataclass(frozen=True)
class Shown:
    """A frame as it is shown.

    ``pictures`` are uint8 [n, height, width, 3], more than one where the tokenizer compresses time. It took
    ``decode`` seconds until the tokens were known, and ``pixels`` from there to pictures.
    """

    frame: Frame
    taken: Taken
    pictures: Pictures
    decode: float
    pixels: float


class Game(AbstractContextManager["Game", None]):
    """One world under the commands of a player; every method is for one thread.

    Worlds start from ``prompts``, token frames int32 [P, rows, columns]. The session is closed with the game;
    what is played is written to ``path``, where there is one.

    Attributes:
        marks: places to go back to, by number.
        here: number of the mark last passed.
        watch: is given all pictures that a player is shown, in the thread that shows them.
    """

    def __init__(
        self,
        bundle: Bundle,
        session: Session,
        view: View,
        prompts: Sequence[Int],
        path: Path | None = None,
        text: Float | None = None,
    ) -> None:
        self.bundle, self.session, self.view, self.prompts = bundle, session, view, list(prompts)
        self.settings = PlaySettings.of(bundle.manifest)
        self.marks: dict[int, Mark] = {}
        self.here = 0
        self.watch: Callable[[Pictures], None] = lambda pictures: None
        precision = bundle.manifest.precisions[0]
        backend = view.codec.backend.name
        self.record = Record(path, record.header(bundle, precision, session.window, backend))
        self._text = text
        self._past: list[Past] = []
        self._run: Run[Frame] | None = None
        self._led: dict[int, Taken] = {}
        self._act: Act = lambda: None
        self._newer: Act = lambda: None
        self._next_mark = 1
        self._chosen = 0  # frames up to there were decoded by other settings, or are not known to be by these

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the record and give the engine's memory back."""
        self.stop()
        self.record.close()
        self.session.close()
        self.view.codec.close()

    @property
    def known(self) -> int:
        """Frames up to now, the prompt's included."""
        return self.session.stream.known

    @property
    def tokens(self) -> Int:
        """Tokens int32 [rows, columns] of the last frame, the caller's own."""
        return self._past[-1].tokens.copy()

    @property
    def start(self) -> Int:
        """Tokens int32 [P, rows, columns] that this world began with, or the next one begins with."""
        return np.stack([past.tokens for past in self.marks[0].past]) if self.marks else self.prompts[0]

    def reset(self, prompt: Int, actions: Int | None = None) -> Pictures:
        """Begin a world anew from token frames; gives the pictures of the last one.

        Raises:
            UsageError: the frames do not fit the model.
        """
        check_tokens(prompt, self.bundle.manifest, "the prompt")
        codec = self.bundle.manifest.actions
        if actions is None and codec is not None:
            actions = np.tile(encode(codec, {}), (len(prompt), 1))
        self.stop()
        self.session.start(prompt, actions, self._text)
        listed = None if actions is None else actions.tolist()
        self.record.add(Start(start=prompt.tolist(), actions=listed))
        self.record.add(record.Settings(settings=self.settings))
        self._past = list(self.session.stream.past)
        self.marks, self.here, self._next_mark = {}, 0, 1
        self._chosen = self.known
        self._mark(0, None)
        return self.look()

    def choose(self, settings: PlaySettings) -> None:
        """Decode frames from the next one on by other settings.

        Raises:
            DiagdError: they cannot be decoded; the old ones stay.
        """
        decoder, sampling = settings.open(self.bundle.manifest), settings.sampling
        self.stop()
        stream = self.session.stream
        stream.follow(None)
        stream.settings = sampling
        decoder.check(stream)
        self.settings, self._chosen = settings, self.known
        self.record.add(record.Settings(settings=settings))

    def rewind(self, frames: int) -> Pictures:
        """Take back up to so many frames; gives the pictures of the one that is the last then."""
        frames = min(frames, self.session.stream.spare(len(self._past)))
        self.stop()
        if frames > 0:
            self._chosen = min(self._chosen, self.known - frames)
            self._past = self._past[: len(self._past) - frames]
            self.session.stream.return_to(self.known - frames, self._kept(self._past))
            self.record.add(record.Rewind(rewind=frames))
            while self.marks[self.here].known > self.known and self.here:
                self.here = self.marks[self.here].parent or 0
        return self.look()

    def branch(self) -> int:
        """Mark this place; returns its number.

        Raises:
            UsageError: there are too many marks.
        """
        if len(self.marks) > MAX_BRANCHES:
            raise UsageError(f"{MAX_BRANCHES} places are marked already; reset the world to begin anew")
        self.stop()
        number = self._next_mark
        self._next_mark += 1
        self._mark(number, self.here)
        self.record.add(record.Branch(branch=number))
        return number

    def visit(self, number: int) -> Pictures:
        """Go back to a marked place; gives its pictures.

        Raises:
            UsageError: there is no such mark.
        """
        if number not in self.marks:
            raise UsageError(f"no place has the number {number}; there are {sorted(self.marks)}")
        self.stop()
        mark = self.marks[number]
        stream = self.session.stream.branch()  # another one: the session's rows are of the place that is left
        stream.return_to(mark.known, self._kept(mark.past))
        self.session.stream = stream
        self._past, self.here = list(mark.past), number
        self._chosen = self.known
        self.record.add(record.Visit(visit=number))
        return self.look()

    def audit(self, frames: int) -> tuple[int, float]:
        """The share of the last frames' cells that next-token prediction draws, with the same seed.

        Returns:
            Frames that were asked about, at most ``frames``, and the share.

        Raises:
            UsageError: nothing was decoded by the settings that hold now.
        """
        count = min(frames, self.known - self._chosen)
        if count < 1:
            raise UsageError("no frame was decoded by these settings yet; play on and ask again")
        self.stop()
        here, past = self.session.stream, self._past[-count:]
        before = here.branch()
        before.return_to(self.known - count, self._kept(self._past[:-count]))
        self.session.stream = before
        try:
            shares = audit(
                self.session,
                np.stack([frame.tokens for frame in past]),
                np.stack([frame.actions for frame in past]) if self.bundle.manifest.actions else None,
                sampling=self.settings.sampling,
                seed=self.settings.seed,
            )
        finally:
            self.session.stream = here
        self.record.add(record.Audited(audit=count))
        return count, float(shares.mean())

    def advance(self, act: Act, newer: Act = lambda: None) -> Shown | None:
        """Decode one frame.

        ``act`` is asked for an action when a frame begins, None being none, and ``newer`` for another one
        while it is decoded.
        """
        return next(self.session.alone(self.play(act, newer)), None)

    def play(self, act: Act, newer: Act = lambda: None) -> Run[Shown]:
        """The same for whoever has its passes run, as a group does that many play in."""
        self._act, self._newer = act, newer
        began = time.perf_counter()
        run, self._run = self._run, None  # whoever is interrupted within a frame begins it anew
        if run is None:
            run = self.session.run(
                self.settings.open(self.bundle.manifest),
                self._pull,
                sampling=self.settings.sampling,
                seed=self.settings.seed,
                newer=self._renew,
            )
        for event in run:
            if not isinstance(event, Due):
                self._run = run
                yield self._shown(event, time.perf_counter() - began)
                return
            yield event

    def _shown(self, frame: Frame, decode: float) -> Shown:
        taken = self._led.pop(frame.index)
        decoded = time.perf_counter()
        self._past.append(self.session.stream.past[-1])
        del self._past[:-MAX_PAST]
        action = None if self.bundle.manifest.actions is None else frame.action.tolist()
        behind = [Flying(ahead=self._in_flight())] if self._led else []
        self.record.add(Played(frame=frame.index, action=action, tokens=record.digest(frame.tokens)), *behind)
        pictures = self.view.show(frame.tokens)
        return Shown(frame, taken, pictures, decode, time.perf_counter() - decoded)

    def _pull(self, frame: int) -> Int | None:
        """Ids of the frame that begins now."""
        taken = self._act()
        if taken is None:
            raise StopIteration  # the run ends
        self._led[frame] = taken
        return taken.ids

    def _renew(self, frame: int) -> Int | None:
        """Ids that the frame begins anew with, if it does."""
        taken = self._newer()
        if taken is None or taken.ids is None:
            return None
        self._led[frame] = taken
        return taken.ids

    def stop(self) -> None:
        """Give up frames in flight; what they were begun with is part of the record."""
        if self._led:
            self.record.add(Ahead(ahead=self._in_flight()))
        self._run = None
        self._led.clear()

    def _in_flight(self) -> list[list[int] | None]:
        return [None if taken.ids is None else taken.ids.tolist() for taken in self._led.values()]

    def _mark(self, number: int, parent: int | None) -> None:
        self.marks[number] = Mark(number, parent, self.known, tuple(self._past))
        self.here = number

    def _kept(self, past: Sequence[Past]) -> list[Past]:
        """As much of a past as the stream keeps."""
        return list(past[-(self.session.stream.past.maxlen or len(past)) :])

    def film(self, frames: int) -> bytes:
        """The last frames as .mp4, or as .gif where sides are odd; with the mark that a licence asks for."""
        spec, codec = self.view.codec.spec, self.view.codec
        suffix = ".gif" if spec.height % 2 or spec.width % 2 else ".mp4"
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"play{suffix}"
            with VideoWriter(path, self.bundle.manifest.frames_per_second, spec.size, codec.mark) as video:
                for pictures in codec.stream(past.tokens for past in self._past[-frames:]):
                    video.write(pictures)
            return path.read_bytes()

    def snapshot(self) -> bytes:
        """All that is needed to go on elsewhere; frames in flight are given up, here as there."""
        self.stop()
        stream = self.session.stream
        head = {
            "settings": self.settings.model_dump(mode="json"),
            "marks": [[mark.number, mark.parent] for mark in self.marks.values()],
            "here": self.here,
            "next": self._next_mark,
            "chosen": self._chosen,
        }
        places = [(self.known, self._past[-MAX_KEPT:])]
        places += [(mark.known, self._kept(mark.past)) for mark in self.marks.values()]
        parts = [json.dumps(head).encode()]
        for known, past in places:
            other = stream.branch(MAX_KEPT)
            other.return_to(known, past)
            parts.append(other.snapshot())
        target = io.BytesIO()
        np.savez(target, *(np.frombuffer(part, np.uint8) for part in parts))
        return target.getvalue()

    def restore(self, snapshot: bytes) -> None:
        """Become the game that a snapshot was taken of.

        Raises:
            UsageError: it is none, or of a game of another model.
        """
        self.stop()
        try:
            with np.load(io.BytesIO(snapshot), allow_pickle=False) as file:
                parts = [bytes(file[f"arr_{number}"]) for number in range(len(file.files))]
            head, (first, *_) = json.loads(parts[0]), (streams := parts[1:])
            settings = PlaySettings.model_validate(head["settings"])
            numbers = [(int(number), parent) for number, parent in head["marks"]]
            here, following, chosen = int(head["here"]), int(head["next"]), int(head["chosen"])
            if here not in dict(numbers) or len(numbers) != len(streams) - 1:
                raise ValueError("its marks are not those of its streams")
        except Exception as error:  # NumPy, zipfile, json and pydantic raise many types for other bytes
            raise UsageError(f"this is no snapshot of a game ({type(error).__name__})") from error
        own = self.session.stream
        (stream, *_), places = ([own.branch(history) for _ in streams] for history in (None, MAX_KEPT))
        for place, content in zip([stream, *places], [first, *streams], strict=True):
            place.restore(content)
        self.session.stream, self._past, self.settings = stream, list(places[0].past), settings
        self.here, self._next_mark, self._chosen = here, following, chosen
        self.marks = {
            number: Mark(number, parent, place.known, tuple(place.past))
            for (number, parent), place in zip(numbers, places[1:], strict=True)
        }

    def look(self) -> Pictures:
        """Pictures of the last frame."""
        return self.view.move([past.tokens for past in self._past[-self.view.codec.latents :]])


@dataclass
class SavedGame:
    """A snapshot of a game, and what of its record came since.

    Attributes:
        snapshot: None: the lines begin with the game.
        flying: what was in flight behind the last frame, which orders that overlap frames decode it among.
    """

    snapshot: bytes | None = None
    lines: list[Line] = field(default_factory=list)
    flying: Flying | None = None

    def add(self, line: Line, *behind: Flying) -> None:
        """One more; a world that began anew needs nothing of what was before."""
        if isinstance(line, Start):
            self.snapshot, self.lines = None, []
        self.lines.append(line)
        self.flying = behind[0] if behind else None

    def take(self, snapshot: bytes) -> None:
        """The game as it is now."""
        self.snapshot, self.lines, self.flying = snapshot, [], None

    def stop(self) -> None:
        """What was in flight is given up for good, as where the game goes on."""
        if self.flying is not None:
            self.lines.append(self.flying)
            self.flying = None

    def restore(self, game: Game) -> None:
        """Have a game go on from there, to the token.

        Raises:
            QualityError: its engine draws other tokens.
            UsageError: it is a game of another model.
        """
        self.stop()
        heard, game.record.heard = game.record.heard, lambda *lines: None  # it was told when it happened
        try:
            if self.snapshot is not None:
                game.restore(self.snapshot)
            for _ in replay(game, list(enumerate(self.lines, start=1))):
                pass
        finally:
            game.record.heard = heard
