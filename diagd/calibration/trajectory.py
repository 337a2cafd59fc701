"""Decoding along real schedules while an engine is watched.

Ranges along a diagonal differ from those in raster order, so statistics come from the passes that users run:
several lags, next-token prediction, overlapping frames, and a window that has slid.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
from numpy.typing import DTypeLike

from diagd.bundle import Bundle, Form, Manifest
from diagd.bundle.manifest import AbsoluteContext, StepGraph
from diagd.bundle.precision import FLOATING
from diagd.engines import host
from diagd.engines.backend import find
from diagd.engines.engine import Engine, Int
from diagd.engines.onnxruntime_session import CpuOptions
from diagd.errors import UsageError
from diagd.runtime.actions import encode
from diagd.runtime.decoders import ForcedDecoder, ScheduledDecoder
from diagd.runtime.decoders.draft import own_likelihoods
from diagd.runtime.load import session_over, step_options
from diagd.runtime.step import Result
from diagd.schedule import Schedule, Step, slots_needed

WINDOW = 4
"""Frames of the sessions: enough for overlapping frames, few enough to slide soon."""

MINIMUM_STEPS = 64


def find_reference(bundle: Bundle, forms: Iterable[Form]) -> tuple[StepGraph, ...]:
    """The graphs of a form in floating point, earlier ``forms`` preferred; UsageError where there is none.

    The prefix form is the quickest on the CPU, and the only one in float32 throughout.
    """
    for form in forms:
        found = tuple(g for g in bundle.manifest.graphs if g.form is form and g.precision in FLOATING)
        if found:
            return found
    raise UsageError(
        f"{bundle.path} has no graph in floating point to calibrate with; export it again with --form prefix"
    )


def session_window(manifest: Manifest, graphs: Sequence[StepGraph], most: int = WINDOW) -> int:
    """Frames of the sessions: ``most``, or as many as graphs have slots for; UsageError: not two."""
    wanted, graph = min(manifest.context.frames, most), graphs[0]
    if graph.capacity is None:
        return wanted
    layout, widest = manifest.layout, widest_step(graphs) or 0
    for window in range(wanted, 1, -1):
        if slots_needed(layout, window, widest) <= graph.capacity:
            return window
    raise UsageError(
        f"{graph.file} has {graph.capacity} slots, too few for 2 frames; export it again with a larger "
        "--set window"
    )


def widest_step(graphs: Sequence[StepGraph]) -> int | None:
    """Rows of the widest step that the graphs take; None where their width is free."""
    widths = [graph.width for graph in graphs if graph.width]
    return max(widths) if widths else None


def check_memory(bundle: Bundle, graph: StepGraph, engines: int, available: int | None) -> None:
    """Refuse (UsageError) engines without memory: each has its weights in float32, as the CPU computes."""
    itemsize = 2 if graph.precision == "fp16" else 4
    needed = engines * graph.weights.bytes * 4 // itemsize
    host.check_memory(
        needed,
        available,
        f"decoding with {graph.file} on this machine",
        "calibrate on a larger machine, or give --budget none, which judges nothing and needs no run for "
        "weight-only schemes",
    )


def open_graphs(
    bundle: Bundle,
    graphs: Sequence[StepGraph],
    window: int,
    options: CpuOptions,
    watch: Mapping[str, tuple[int, DTypeLike] | None] | None = None,
) -> Engine:
    """An engine of graphs of one form on the processor; those of a bundle's other graphs are left alone."""
    only = Bundle(bundle.path, bundle.manifest.model_copy(update={"graphs": tuple(graphs)}))
    opening = step_options(bundle.manifest, window, cpu=options, form=graphs[0].form)
    return find("cpu").open_steps(only, replace(opening, watch=watch))


@dataclass(frozen=True)
class Trajectory:
    """A piece of decoding: the first ``steps`` passes for ``frames`` frames behind ``prompt`` known ones."""

    name: str
    schedule: Schedule
    prompt: int
    frames: int
    steps: int


def trajectories(
    manifest: Manifest, window: int, steps: int, max_width: int | None = None
) -> list[Trajectory]:
    """The default schedule, twice its row lag, next-token prediction, chained frames and a slid window.

    They share ``steps`` passes evenly, in sessions of ``window`` frames. Schedules with steps of more rows
    than ``max_width`` are left out.

    Raises:
        UsageError: fewer than ``MINIMUM_STEPS``, or every schedule has wider steps.
    """
    if steps < MINIMUM_STEPS:
        raise UsageError(f"{steps} calibration steps; expected at least {MINIMUM_STEPS}: raise --set steps")
    named = _schedules(manifest, window, max_width)
    share = -(-steps // (len(named) + 1))
    found, sliding = [], []
    for name, schedule in named.items():
        # an absolute context does not slide while frames overlap
        whole = not schedule.overlaps or not isinstance(manifest.context, AbsoluteContext)
        sliding += [schedule] * whole
        frames = min(-(-share // schedule.d), 64 if whole else window - 1)
        found.append(Trajectory(name, schedule, 1, frames, share))
    first = sliding[0]
    slid = first.steps_per_frame + share
    frames = -(-slid // first.d) + 1
    return [*found, Trajectory("slid window", first, window - 1, frames, slid)]


def _schedules(manifest: Manifest, window: int, max_width: int | None) -> dict[str, Schedule]:
    """Orders of decoding by what a report calls them."""
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
    return named


@dataclass(frozen=True)
class CalibrationSet:
    """What is decoded, to find ranges or to judge.

    Attributes:
        trajectories: their passes are those of one round.
        window: frames of the session.
        seed: of prompts, actions and sampling.
        known: int32 [P, rows, columns], frames that follow each other, which prompts are cut from; None draws
            tokens at random.
    """

    trajectories: Sequence[Trajectory]
    window: int
    seed: int
    known: Int | None


class Rollouts:
    """Decodes trajectories over one engine."""

    def __init__(self, bundle: Bundle, engine: Engine, samples: CalibrationSet) -> None:
        self.session = session_over(bundle, engine, samples.window, CpuOptions(prepack=False))
        self._manifest, self._samples = bundle.manifest, samples

    def steps(
        self, trajectory: Trajectory, number: int, *, follow: bool = False
    ) -> Iterator[tuple[Step, Result]]:
        """The passes of a trajectory, behind the prompt and actions of a number.

        With ``follow`` predictions are not kept: the caller writes another session's tokens into the stream.
        """
        actions = self._begin(number, trajectory.prompt, trajectory.frames)
        decoder = ForcedDecoder(trajectory.schedule) if follow else ScheduledDecoder(trajectory.schedule)
        steps = self.session.steps(
            decoder, actions, count=trajectory.frames, seed=self._samples.seed + number
        )
        return islice(steps, trajectory.steps)

    def own_likelihoods(self, prompts: int, frames: int) -> list[float]:
        """Of frames of the model's own, so many behind each of some prompts that fill the window."""
        return [
            found
            for number in range(prompts)
            for actions in [self._begin(number, self.session.window - 1, frames)]
            for found in own_likelihoods(self.session, actions, frames, self._samples.seed + number)
        ]

    def _begin(self, number: int, prompt: int, frames: int) -> Int | None:
        """Start afresh at the prompt of a number; returns the actions of frames behind it."""
        random = np.random.default_rng((self._samples.seed, number))
        known, shape, text = self._frames(prompt, random), self._manifest.text, None
        if shape:
            text = random.standard_normal((shape.length, shape.width), dtype=np.float32)
        self.session.stream.forget()
        self.session.start(known, self._actions(prompt, random), text)
        return self._actions(frames, random)

    def _frames(self, count: int, random: np.random.Generator) -> Int:
        """Frames int32 [count, rows, columns] that follow each other."""
        if (known := self._samples.known) is None:
            low, high = np.moveaxis(self._manifest.cell_ranges, -1, 0)
            return random.integers(low, high, (count, *low.shape), dtype=np.int32)
        first = int(random.integers(max(1, len(known) - count + 1)))
        picked = known[first : first + count]
        return np.concatenate([picked, np.repeat(picked[-1:], count - len(picked), axis=0)])

    def _actions(self, count: int, random: np.random.Generator) -> Int | None:
        """Action tokens int32 [count, n] at random; None for models without."""
        layout = self._manifest.layout
        if not layout.gap:
            return None
        codec = self._manifest.actions
        if codec is None:
            return np.zeros((count, layout.gap), np.int32)
        found = []
        for _ in range(count):
            chosen: dict[str, object] = {name: bool(random.random() < 0.2) for name in sorted(codec.buttons)}
            for name, choices in codec.choices.items():
                chosen[name] = choices[int(random.integers(len(choices)))]
            found.append(encode(codec, chosen))
        return np.stack(found)
