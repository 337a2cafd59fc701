"""A stream: one world as it unfolds, its tokens, actions and what of it is known."""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import repeat, takewhile
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from diagd.engines.engine import Float, Int, SamplingState
from diagd.errors import UsageError, expect
from diagd.runtime.arrays import rows_in, whole
from diagd.runtime.sampling import ActionLaw, SamplingSettings
from diagd.runtime.slots import TokenPlaces
from diagd.runtime.snapshot import Head, read, shape
from diagd.schedule import Schedule, StreamLayout

Ids = NDArray[np.integer[Any]]
Actions = Ids | Iterable[Ids | None] | Callable[[int], Ids | None] | None
"""Ids of the known tokens that lead to each frame: [frames, n], one frame at a time, or asked for by the
index of the frame. The model decodes those that are None. A run ends with what is iterated over, or where a
callable raises StopIteration. None for models without actions."""


class RunOptions(TypedDict, total=False):
    """How a run goes.

    Attributes:
        count: most frames; without it the run ends with the actions, or never.
        sampling: default: the manifest's.
        seed: of the random numbers, default 0; with the same engine, the same seed gives the same tokens.
        newer: asked for another action while a frame is decoded; see ``Stream.newer``. For decoders that can
            begin a frame anew, as Jacobi's can: a key then counts for the picture that comes next.
    """

    count: int | None
    sampling: SamplingSettings | None
    seed: int
    newer: Callable[[int], Ids | None] | None


@dataclass(frozen=True, eq=False)
class Past:
    """A known frame, as far as it takes to build its K/V rows again.

    Attributes:
        tokens: int32 [rows, columns].
        actions: int32 [n], the known tokens that lead to it.
        order: schedule it was decoded by; None where its rows are those of raster order, as of a prompt.
        origin: first frame of the flight it was decoded in.
    """

    tokens: Int
    actions: Int
    order: Schedule | None
    origin: int

    @property
    def overlapped(self) -> bool:
        """Whether a later frame may have begun before it was complete."""
        return self.order is not None and self.order.overlaps

    def is_given(self, tokens: Ids, led: Ids | tuple[()]) -> bool:
        """Whether its rows are those of a frame of a prompt, with these tokens and ids leading to it."""
        ids = np.reshape(led, -1)
        ids = ids[len(ids) - len(self.actions) :]
        same = np.array_equal(self.tokens, tokens) and np.array_equal(self.actions, ids)
        return self.order is None and same


class Stream:
    """What decoders see of a world, and all that is kept of it; K/V rows are the session's.

    Args:
        layout: of the token stream.
        window: frames a query may see.
        padded: int32 [widest step + 1], the rows that a step of so many is run as.
        history: known frames that are kept, to go back to and to build K/V rows from.
        needed: frames that K/V rows are built from at most.
        vocabulary: ids that can be fed.

    Attributes:
        tokens: int32, by place of ``places``.
        prompt: frames that were given; later ones are decoded.
        rows: stands for its K/V rows in the session that fed them last; None: there are none.
        run: stands for the run that decodes it, until it is moved or another run begins.
        known: frames that are complete.
        begun: frames that have begun; those between ``known`` and ``begun`` are in flight.
        origin: first frame of the flight: the last one that began with none under way.
        fed: positions below are in the cache, as far as the window reaches.
        exact: the frame completed last is what next-token prediction draws behind those before it.
        rejected: position from which on rows hold wrong guesses: they are given back ahead of the next step.
        seed: of the random numbers.
        settings: of the sampler.
        law: of actions that the model decodes; None where it cannot.
        acting: the model decodes the action that leads to the next frame.
        action: ids int32 [n] that lead to the frame that begins next, once they were asked for; None: the
            model's turn.
        newer: asked between the passes of a frame, by its index, for another action than it began with; None
            is given where there is none.
        limit: frames of the stream at which the run ends; None: it is not known to end.
        horizon: last frame that overlapping frames may reach; None: any.
        refills: how often its context was fed again.
        text: embeddings float32 [n, width] that the model attends to.
    """

    def __init__(
        self,
        layout: StreamLayout,
        window: int,
        padded: Int,
        history: int,
        needed: int = 1,
        vocabulary: int = 1 << 31,
    ) -> None:
        expect(Stream.__init__, locals())
        self.layout, self.window, self.padded = layout, window, padded
        self.needed, self.vocabulary = needed, vocabulary
        self.places = TokenPlaces(layout, window)
        self.tokens: Int = np.zeros(self.places.size, np.int32)
        self.past: deque[Past] = deque(maxlen=history)
        self.known = self.begun = self.origin = self.fed = self.prompt = 0
        self.exact, self.acting = True, False
        self.rejected: int | None = None
        self.seed, self.settings = 0, SamplingSettings()
        self.law: ActionLaw | None = None
        self.action: Int | None = None
        self.newer: Callable[[int], Ids | None] | None = None
        self._renewed: int | None = None
        self.horizon: int | None = None
        self.refills = 0
        self.text: Float | None = None
        self.unsent: list[tuple[Int, Int]] = []
        self._actions: Iterator[Ids | None] | Callable[[int], Ids | None] = iter(())
        self._led: dict[int, Int] = {}
        self.limit: int | None = None
        self._asked: int | None = None  # the frame that ``action`` leads to
        self.forget()

    def start(self, frames: Ids, actions: Ids | None = None, text: Float | None = None) -> None:
        """Take a prompt and forget all else; it goes back to what it began with of it, whose rows stay.

        What is refused changes nothing.

        Args:
            frames: int32 [P, rows, columns], P at least 1 and below the window.
            actions: int32 [P, n], ids of the known tokens leading to each prompt frame; row 0 only matters
                where known tokens precede the first frame. Not needed for models without actions.
            text: embeddings [n, width] for models that attend to one.

        Raises:
            UsageError: shape, length or an id does not fit the model.
        """
        self.check_prompt(frames)
        frames = whole(frames)
        if actions is not None and (given := rows_in(actions)) < len(frames):
            raise UsageError(f"the prompt has {len(frames)} frames and {given} actions; give one a frame")
        led = [self._leading(n, None if actions is None else actions[n]) for n in range(len(frames))]
        is_read = np.array_equal(np.asarray(text), np.asarray(self.text))
        if alike := self._alike(frames, actions) if is_read else 0:
            self.return_to(alike, list(self.past)[:alike])
        else:
            self.forget()
        self.text = None if text is None else np.array(text, np.float32)
        fed, self.origin = self.fed, 0
        self.write(0, np.asarray(self.layout.prefix_tokens))
        for index in range(alike, len(frames)):
            self._lead(index, led[index])
            self.write(self.layout.first_cell(index), np.reshape(frames[index], -1))
            self.begun += 1
            self.complete(None)
            self.fed = fed
        self.prompt = len(frames)

    def _alike(self, frames: Ids, actions: Ids | None) -> int:
        """How many frames of a prompt it began with, their rows those of raster order."""
        if self.known > len(self.past):
            return 0
        given = zip(self.past, frames, repeat(()) if actions is None else actions, strict=False)
        return sum(1 for _ in takewhile(lambda frame: frame[0].is_given(*frame[1:]), given))

    def check_prompt(self, frames: Ids) -> None:
        """Refuse (UsageError) token frames that the stream cannot start from."""
        grid, shape = (self.layout.rows, self.layout.columns), whole(frames).shape
        if len(shape) != 3 or shape[1:] != grid or not shape[0]:
            raise UsageError(f"the prompt has shape {shape}, this model takes [frames, {grid[0]}, {grid[1]}]")
        if len(frames) >= self.window:
            raise UsageError(
                f"the prompt has {len(frames)} frames but the window holds {self.window} with the one to "
                f"decode; give at most {self.window - 1} frames or load with a larger window"
            )
        self._check("the prompt", frames)

    def forget(self) -> None:
        """Be as when it was new: a prompt that it had before is fed again."""
        self.rows: object = None
        self.run = object()
        self.known = self.begun = self.origin = self.fed = self.prompt = 0
        self.tokens[:] = 0
        self.past.clear()
        self._led.clear()

    def follow(self, actions: Actions, frames: int | None = None) -> None:
        """Take the actions of a run and how many frames it has at most; frames in flight are given up.

        Raises:
            UsageError: so many frames cannot be.
        """
        if frames is not None and not (isinstance(frames, int | np.integer) and frames >= 0):
            raise UsageError(f"count is {frames!r}; expected 0 frames or more, or None for all actions")
        if not (actions is None or callable(actions) or np.iterable(actions)):
            raise UsageError(f"actions are {actions!r}; expected ids int32 [frames, n]; see Session.frames")
        self.run = object()
        self.begun, self.rejected, self.acting, self._asked = self.known, None, False, None
        self.newer = self._renewed = None
        self._led = {frame: ids for frame, ids in self._led.items() if frame < self.known}
        counts = frames, len(actions) if isinstance(actions, np.ndarray) else None
        self.limit = min((self.known + count for count in counts if count is not None), default=None)
        self._actions = actions if callable(actions) else repeat(None) if actions is None else iter(actions)

    @property
    def max_width(self) -> int:
        """Rows of the widest step."""
        return len(self.padded) - 1

    @property
    def sampling(self) -> SamplingState:
        """What the sampler follows."""
        settings = self.settings
        return SamplingState(settings.temperature, settings.top_k, settings.top_p, self.seed)

    def ask(self) -> bool:
        """Ask for the next frame's ``action``, once; False where the run has no more frames."""
        frame = self.begun
        if self.limit is not None and frame >= self.limit:
            return False
        if self._asked != frame:
            try:
                ids = self._actions(frame) if callable(self._actions) else next(self._actions)
            except StopIteration:
                self.limit = frame
                return False
            self._asked, self.action = frame, None if ids is None else whole(ids)
        return True

    def begin(self) -> bool:
        """Begin the next frame under its action, and have it in flight; False where the run has no more.

        Raises:
            UsageError: it is the model's turn, and it has not acted, as it cannot at an unfinished frame.
        """
        frame = self.begun
        if not self.ask():
            return False
        if self.action is None and self.layout.gap:
            raise UsageError(
                f"frame {frame} has no action, and this order of decoding begins it before the frame that "
                "the model would act at is complete; give its action, or decode frames serially"
            )
        self._lead(frame, self._leading(frame, self.action))
        if frame == self.known:
            self.origin = frame
        self.begun += 1
        return True

    def renewed(self) -> bool:
        """Whether a newer action is there for the frame that began last; its rows are given back then.

        Once a frame, so that actions which never rest do not keep one from ending.
        """
        frame = self.begun - 1
        if self.newer is None or self._renewed == frame or (ids := self.newer(frame)) is None:
            return False
        self._renewed, self.action = frame, whole(ids)
        self._lead(frame, self._leading(frame, self.action))
        self.rejected = self.fed
        return True

    def led(self, frame: int) -> Int | None:
        """Ids of the known tokens that lead to a frame in flight; None where it has none."""
        return self._led.get(frame)

    def complete(self, order: Schedule | None, *, exact: bool = True) -> None:
        """Count the oldest frame in flight as known; its tokens have been committed or written.

        ``order``: schedule that its rows were fed by; None: each saw all that precedes it in raster order.
        """
        frame, layout = self.known, self.layout
        self.known = frame + 1
        self.fed = layout.first_cell(frame) + layout.cells - 1
        led = self._led.pop(frame, np.zeros(0, np.int32))
        self.past.append(Past(self.frame(frame), led, order, self.origin))
        self.exact = exact

    def settle(self, frame: int, tokens: Int) -> None:
        """Take the tokens int32 [cells] that an engine committed for a frame that was just completed."""
        self.tokens[self.places.cells(frame)] = tokens
        self.past[frame - self.known].tokens[:] = tokens.reshape(self.layout.rows, -1)

    def frame(self, frame: int) -> Int:
        """Tokens int32 [rows, columns] of a frame of the window; UsageError where they are not there."""
        if frame not in range(max(0, self.begun - self.places.frames), max(1, self.begun)):
            raise UsageError(f"frame {frame!r} is not there; {self.known} are known, the last few are kept")
        return self.tokens[self.places.cells(frame)].reshape(self.layout.rows, -1).copy()

    def give(self, frame: int, tokens: Ids | None) -> None:
        """Set the tokens of a frame; UsageError where they are no such of the model, or not enough."""
        cells = whole(np.zeros(0, np.int32) if tokens is None else tokens).reshape(-1)
        if len(cells) != self.layout.cells:
            raise UsageError(f"frame {frame} has {len(cells)} tokens; give {self.layout.cells} a frame")
        self._check(f"frame {frame}", cells)
        self.write(self.layout.first_cell(frame), cells)

    def write(self, position: int | Ids, ids: Ids) -> None:
        """Set tokens, neighbours from a position on or at given ones; steps run from now on read them."""
        values = whole(ids).reshape(-1)
        if not isinstance(position, np.ndarray):
            position = np.arange(position, position + len(values))
        places = self.places.of(position)
        self.tokens[places] = values
        self.unsent.append((places, values))

    def rewind(self, frames: int) -> None:
        """Go back by some frames, giving up what is in flight; UsageError where too few are kept for it."""
        most = self.spare(len(self.past))
        if frames not in range(most + 1):
            raise UsageError(
                f"cannot go back by {frames} frames: {len(self.past)} of {self.known} are kept, and K/V rows "
                f"are built again from {len(self.past) - most} of them; expected 0..{most}"
            )
        self.return_to(self.known - int(frames), list(self.past)[: len(self.past) - int(frames)])

    def check_alike(self, stream: Stream) -> None:
        """Refuse (UsageError) what is no stream, or one of another layout, window or vocabulary."""
        expect(Stream.check_alike, locals())
        its, own = (f"{one.window} frames, {one.vocabulary} ids and {one.layout}" for one in (stream, self))
        if its != own:
            raise UsageError(f"the stream has a window of {its}; this session's has {own}")

    def spare(self, kept: int) -> int:
        """How many of the last ``kept`` frames may go, so that the world goes on from there to the token."""
        return max(0, kept - (1 if kept == self.known else self.needed))

    def return_to(self, known: int, past: list[Past]) -> None:
        """Be as when so many frames were known, the last of them ``past``."""
        self.run = object()
        self.past.clear()
        self.past.extend(past)
        self.known = self.begun = known
        self.rejected, self.acting = None, False
        self.prompt = min(self.prompt, known)
        last = self.layout.first_cell(known - 1) + self.layout.cells - 1
        self.fed = min(self.fed, last)
        self._led.clear()
        self._write_past()

    def _write_past(self) -> None:
        """Set the tokens of the kept frames, as far as there is place for them."""
        kept = self.known - len(self.past)
        for frame in range(max(kept, self.known - self.places.frames + 1), self.known):
            past = self.past[frame - kept]
            self._put_actions(frame, past.actions)
            self.write(self.layout.first_cell(frame), past.tokens.reshape(-1))

    def branch(self, history: int | None = None) -> Stream:
        """A copy that goes its own way; give it to a session to decode it. ``history``: that it keeps."""
        expect(Stream.branch, locals())
        history = int(history or self.past.maxlen or 0)
        other = Stream(self.layout, self.window, self.padded, history, self.needed, self.vocabulary)
        other.restore(self.snapshot())
        return other

    def snapshot(self) -> bytes:
        """All that is needed to go on elsewhere, in kilobytes; K/V rows are built again from the tokens."""
        orders = {past.order for past in self.past}
        names = {order: index for index, order in enumerate(orders)}
        head = Head(
            layout=shape(self.layout),
            known=self.known,
            prompt=self.prompt,
            seed=self.seed,
            settings=(self.settings.temperature, self.settings.top_k, self.settings.top_p),
            orders=[None if order is None else order.name for order in orders],
        )
        gap, target = self.layout.gap, io.BytesIO()
        actions = [np.pad(past.actions, (gap - len(past.actions), 0)) for past in self.past]
        np.savez_compressed(
            target,
            head=np.frombuffer(head.model_dump_json().encode(), np.uint8),
            first=self.tokens[self.places.of(np.arange(self.layout.frame_start(1)))],
            tokens=np.array([past.tokens for past in self.past], np.int32),
            actions=np.array(actions, np.int32).reshape(len(actions), gap),
            counts=np.array([len(past.actions) for past in self.past], np.int32),
            order=np.array([names[past.order] for past in self.past], np.int32),
            origin=np.array([past.origin for past in self.past], np.int64),
            text=np.zeros((0, 0), np.float32) if self.text is None else self.text,
        )
        return target.getvalue()

    def restore(self, snapshot: bytes) -> None:
        """Become the stream of a snapshot; UsageError where it is none, or of a model with other tokens."""
        head, arrays = read(snapshot, self.layout)
        for name in ("first", "tokens", "actions"):
            self._check("the snapshot", arrays[name])
        orders = [None if order is None else Schedule.parse(order, self.layout) for order in head.orders]
        settings = SamplingSettings(*head.settings)
        self.forget()
        columns = (arrays[name] for name in ("tokens", "actions", "counts", "order", "origin"))
        for tokens, actions, count, order, origin in zip(*columns, strict=True):
            led = whole(actions[len(actions) - count :])
            self.past.append(Past(whole(tokens), led, orders[order], int(origin)))
        self.known, self.prompt, self.begun = head.known, head.prompt, head.known
        self.seed, self.settings = head.seed, settings
        self.text = arrays["text"] if arrays["text"].size else None
        self.write(0, arrays["first"])
        self._write_past()

    def _leading(self, frame: int, ids: Ids | None) -> Int:
        """Those of ids that stand between a frame's cells and those of the frame before, known to be such."""
        count = self.layout.before if frame == 0 else self.layout.gap
        if not count:
            return np.zeros(0, np.int32)
        size = 0 if ids is None else np.asarray(ids).size  # NumPy's function takes PyTorch's method for it
        if ids is None or not count <= size <= self.layout.gap:
            raise UsageError(f"frame {frame} needs {count} action tokens, got {size}")
        self._check(f"the action of frame {frame}", ids)
        return whole(ids).reshape(-1)[-count:].copy()

    def _lead(self, frame: int, ids: Int) -> None:
        """Put the known tokens that lead to a frame, where there are any."""
        if ids.size:
            self._led[frame] = ids
            self._put_actions(frame, ids)

    def _check(self, what: str, ids: Ids) -> None:
        if (ids := np.asarray(ids)).dtype.kind not in "biuf":
            whole(ids)
        if np.size(ids) and not 0 <= np.min(ids) <= np.max(ids) < self.vocabulary:
            span = f"{np.min(ids)}..{np.max(ids)}"
            raise UsageError(f"{what} has ids {span}; the model knows 0..{self.vocabulary - 1}")

    def _put_actions(self, frame: int, ids: Int) -> None:
        if len(ids):
            self.write(self.layout.first_cell(frame) - len(ids), ids)
