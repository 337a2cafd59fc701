"""Decoding along real schedules while an engine is watched.

Ranges along a diagonal differ from those in raster order, so statistics come from the passes that users run:
several lags, next-token prediction, overlapping frames, and a window that has slid.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from diagd.bundle import Bundle, Manifest
from diagd.bundle.actions import ActionCodec
from diagd.bundle.manifest import AbsoluteContext
from diagd.engines.engine import Engine, Int
from diagd.engines.onnxruntime_session import CpuOptions
from diagd.errors import UsageError
from diagd.runtime.actions import encode
from diagd.runtime.decoders import ForcedDecoder, ScheduledDecoder
from diagd.runtime.load import session_over
from diagd.runtime.step import Result
from diagd.schedule import Schedule, Step

MINIMUM_STEPS = 64


@dataclass(frozen=True)
class Trajectory:
    """One piece of decoding.

    Attributes:
        name: for the report.
        schedule: decoding order.
        prompt: frames known at the start.
        frames: frames to decode, of which ``steps`` passes are run.
        steps: passes.
    """

    name: str
    schedule: Schedule
    prompt: int
    frames: int
    steps: int


def trajectories(
    manifest: Manifest, window: int, steps: int, max_width: int | None = None
) -> list[Trajectory]:
    """The default schedule, twice its row lag, next-token prediction, chained frames and a slid window.

    Args:
        manifest: of the bundle.
        window: frames of the session.
        steps: passes in all, shared evenly.
        max_width: rows that the graphs take; schedules with wider steps are left out. None: any number.

    Raises:
        UsageError: fewer than ``MINIMUM_STEPS``, or every schedule has wider steps.
    """
    if steps < MINIMUM_STEPS:
        raise UsageError(f"{steps} calibration steps; expected at least {MINIMUM_STEPS}: raise --set steps")
    layout = manifest.layout
    default = manifest.schedule
    lag = min(2 * default.k, layout.columns)
    named = {
        f"k={default.k}": default,
        f"k={lag}": Schedule.serial(layout, lag, default.row_seed),
        "next token": Schedule.next_token(layout),
    }
    chained = Schedule.chained(layout, default.k, default.row_seed)
    if chained.frames_in_flight <= window:
        named[f"k={default.k} chained"] = chained
    if max_width is not None:
        narrowest = min(schedule.widest_step for schedule in named.values())
        named = {name: schedule for name, schedule in named.items() if schedule.widest_step <= max_width}
        if not named:
            raise UsageError(
                f"steps feed {narrowest} tokens or more, the graphs of {manifest.name} take {max_width}; "
                "export it again without --set widths"
            )
    share = -(-steps // (len(named) + 1))
    found = [
        Trajectory(
            name, schedule, 1, min(-(-share // schedule.d), _longest(manifest, schedule, window)), share
        )
        for name, schedule in named.items()
    ]
    sliding = next(iter(named.values()))
    slid = sliding.steps_per_frame + share
    frames = -(-slid // sliding.d) + 1
    return [*found, Trajectory("slid window", sliding, window - 1, frames, slid)]


def _longest(manifest: Manifest, schedule: Schedule, window: int) -> int:
    """Most frames behind one prompt frame: an absolute context does not slide while frames overlap."""
    overlapping = schedule.d < schedule.steps_per_frame
    return window - 1 if overlapping and isinstance(manifest.context, AbsoluteContext) else 64


class Prompts:
    """Prompt frames and actions of trajectories, drawn by seed.

    Args:
        manifest: of the bundle.
        frames: int32 [P, rows, columns], known frames; None draws tokens at random.
    """

    def __init__(self, manifest: Manifest, frames: Int | None) -> None:
        layout = manifest.layout
        self._manifest, self._layout, self._frames = manifest, layout, frames

    def frames(self, count: int, random: np.random.Generator) -> Int:
        """Frames int32 [count, rows, columns] that follow each other."""
        if self._frames is None:
            table = self._manifest.sampling.range_table(self._layout)[self._layout.before :]
            low, high = table[: self._layout.cells].T
            cells = random.integers(low, high, (count, self._layout.cells), dtype=np.int32)
            return cells.reshape(count, self._layout.rows, self._layout.columns)
        first = int(random.integers(max(1, len(self._frames) - count + 1)))
        picked = self._frames[first : first + count]
        return np.concatenate([picked, np.repeat(picked[-1:], count - len(picked), axis=0)])

    def actions(self, count: int, random: np.random.Generator) -> Int | None:
        """Action tokens int32 [count, n] at random; None for models without."""
        if not self._layout.gap:
            return None
        codec = self._manifest.actions
        if codec is None:
            return np.zeros((count, self._layout.gap), np.int32)
        return np.stack([_random_action(codec, random) for _ in range(count)])


def _random_action(codec: ActionCodec, random: np.random.Generator) -> NDArray[np.int32]:
    chosen: dict[str, object] = {name: bool(random.random() < 0.2) for name in sorted(codec.buttons)}
    for name, choices in codec.choices.items():
        chosen[name] = choices[int(random.integers(len(choices)))]
    return encode(codec, chosen)


@dataclass(frozen=True)
class CalibrationSet:
    """What is decoded, to find ranges or to judge.

    Attributes:
        trajectories: their passes are those of one round.
        window: frames of the session.
        prompts: where prompts and actions come from.
        seed: of prompts, actions and sampling.
    """

    trajectories: Sequence[Trajectory]
    window: int
    prompts: Prompts
    seed: int


class Rollouts:
    """Decodes trajectories over one engine.

    Args:
        bundle: that the engine is of.
        engine: on the processor, of the session's capacity.
        samples: window, prompts and seed.
    """

    def __init__(self, bundle: Bundle, engine: Engine, samples: CalibrationSet) -> None:
        text = bundle.manifest.text
        self._text_width = (text.length, text.width) if text else None
        self.session = session_over(bundle, engine, samples.window, CpuOptions(prepack=False))
        self._prompts, self._seed = samples.prompts, samples.seed

    def steps(
        self, trajectory: Trajectory, number: int, *, follow: bool = False
    ) -> Iterator[tuple[Step, Result]]:
        """The passes of a trajectory, behind the prompt and actions of a number.

        With ``follow`` predictions are not kept: the caller writes another session's tokens into the stream.
        """
        random = np.random.default_rng((self._seed, number))
        frames = self._prompts.frames(trajectory.prompt, random)
        text = None
        if self._text_width:
            text = random.standard_normal(self._text_width, dtype=np.float32)
        self.session.start(frames, self._prompts.actions(trajectory.prompt, random), text)
        decoder = ForcedDecoder(trajectory.schedule) if follow else ScheduledDecoder(trajectory.schedule)
        steps = self.session.steps(
            decoder,
            self._prompts.actions(trajectory.frames, random),
            count=trajectory.frames,
            seed=self._seed + number,
        )
        return islice(steps, trajectory.steps)
