"""How long a profile will take, worked out from a short probe, and what to cut so that it ends in time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from diagd.engines.ceilings import Ceilings
from diagd.planning.cost import step_operations
from diagd.planning.model import StoredModel
from diagd.profiling.measure import DECODE, measure, random_workload
from diagd.runtime.pixels import PixelCodec
from diagd.runtime.session import Session, StepTime
from diagd.schedule import Schedule

NEXT_TOKEN_FRAMES: Final = 2
"""Frames measured of next-token prediction: each has as many steps as cells."""

LEAST_FRAMES: Final = 2
PROBE_PROMPT: Final = 2
PROMPTS: Final = 16
"""Lengths of the prompt that are tried, from the whole one down to one frame."""

QUICK_PROBE: Final = 2.0
"""Seconds up to which a probe is worth repeating."""


@dataclass(frozen=True)
class Extent:
    """How much is measured.

    Attributes:
        prompt: known frames ahead.
        frames: of each order.
        cold: run each order for one frame beforehand.
    """

    prompt: int
    frames: int
    cold: bool = True

    def runs_of(self, schedule: Schedule) -> tuple[int, ...]:
        """Frames of each run of an order."""
        return (1, self.frames_of(schedule)) if self.cold else (self.frames_of(schedule),)

    def frames_of(self, schedule: Schedule) -> int:
        """Frames of one order."""
        next_token = schedule.k == schedule.layout.columns
        return min(self.frames, NEXT_TOKEN_FRAMES) if next_token else self.frames

    def smaller(self) -> Iterator[Extent]:
        """Itself, then fewer frames, then no cold runs and a shorter prompt as well."""
        frames = self.frames
        while frames > LEAST_FRAMES:
            yield Extent(self.prompt, frames)
            frames = max(LEAST_FRAMES, frames // 2)
        yield Extent(self.prompt, frames)
        for prompt in np.unique(np.linspace(1, self.prompt, PROMPTS).astype(int))[::-1]:
            yield Extent(int(prompt), frames, cold=False)


@dataclass(frozen=True)
class Pace:
    """What work takes here.

    Attributes:
        session: what runs.
        model, ceilings: its roofline.
        narrow: measured seconds of a frontier's step, a factor for what memory takes at its limit and one for
            arithmetic; engines are not equally far from both.
        wide: one factor for a chunk of prompt.
        picture: seconds of decoding a frame's pixels.
    """

    session: Session
    model: StoredModel
    ceilings: Ceilings
    narrow: tuple[float, float] = (1.0, 1.0)
    wide: float = 1.0
    picture: float = 0.0

    def seconds(self, orders: Sequence[Schedule], extent: Extent) -> float:
        """Seconds of all orders, each with its first run of one frame."""
        return sum(
            self.run(order, extent.prompt, frames) for order in orders for frames in extent.runs_of(order)
        )

    def slower(self, done: Sequence[Schedule], extent: Extent, spent: float) -> float:
        """What the orders that are done took over what was expected of them; 1 where none is."""
        expected = self.seconds(done, extent)
        return spent / expected if expected else 1.0

    def run(self, schedule: Schedule, prompt: int, frames: int) -> float:
        """Seconds of one run: prompt, frames, what a context that slides feeds again, and pictures."""
        width, window = self.session.engine.max_width, self.session.window
        table = schedule.table(prompt, frames, 0, width)
        reached = np.maximum.accumulate(np.maximum.reduceat(table.positions, table.offsets[:-1])) + 1
        full = self.session.layout.frame_start(window)
        limits = self.limits(table.widths, np.minimum(reached, full))
        fed = 1 + table.steps - schedule.total_steps(frames)
        again = self.model.size.refed * max(0, prompt + frames - window) / width
        prefill = limits[:fed].sum() + again * self.limits(np.array([width]), np.array([full])).sum()
        steps = limits[fed:].sum(axis=0) @ self.narrow
        return float(self.wide * prefill + steps + self.picture * frames)

    def limits(self, rows: NDArray[np.integer], live: NDArray[np.integer]) -> NDArray[np.float64]:
        """Least seconds [n, 2] of memory and of arithmetic in steps, by rows and live slots."""
        model = self.model
        read = np.array([model.step_bytes(slots) for slots in live.tolist()])
        operations = np.array(
            [step_operations(model.size, *step) for step in zip(rows.tolist(), live.tolist(), strict=True)]
        )
        return np.stack([read / self.ceilings.bandwidth, operations / self.ceilings.peak], axis=1)


def find_pace(
    session: Session, model: StoredModel, ceilings: Ceilings, pixels: PixelCodec | None = None
) -> Pace:
    """Measure one serial frame behind a short prompt; again where that is quick, for the first is cold."""
    schedule = Schedule.serial(session.layout, 1, session.manifest.schedule.row_seed)
    workload = random_workload(session, min(PROBE_PROMPT, session.window - 1), 1)
    run = measure(session, schedule, workload, 1, pixels)
    if run.ended - run.began < QUICK_PROBE:
        run = measure(session, schedule, workload, 1, pixels)
    ideal, fed = Pace(session, model, ceilings), run.chunks + 1
    pictures = run.timeline.seconds().get(DECODE, [0.0])
    wide, chunks = _limits_and_times(ideal, run.steps[:fed])
    return Pace(
        session,
        model,
        ceilings,
        narrow=factors(*_limits_and_times(ideal, run.steps[fed:])),
        wide=float(chunks.sum() / wide.sum()),  # a short chunk says little of the long ones
        picture=sum(pictures),
    )


def _limits_and_times(
    ideal: Pace, steps: Sequence[StepTime]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Least and measured seconds of steps, the median of each width."""
    rows, live = (np.array([getattr(step, name) for step in steps]) for name in ("rows", "live"))
    taken = np.array([step.engine + step.sampling + step.host for step in steps])
    widths = np.unique(rows)
    usual = [np.median(taken[rows == width]) for width in widths]
    return ideal.limits(widths, np.array([int(live[rows == width].mean()) for width in widths])), np.array(
        usual
    )


def factors(limits: NDArray[np.float64], times: NDArray[np.float64]) -> tuple[float, float]:
    """Two factors that make ``limits`` [n, 2] the times [n], least squares of relative errors.

    Where one would be negative they are the same, the median.
    """
    scaled = limits / times[:, None]
    memory, arithmetic = np.linalg.lstsq(scaled, np.ones(len(times)), rcond=None)[0]
    if memory < 0 or arithmetic < 0 or len(times) < 2:
        both = float(np.median(1 / scaled.sum(axis=1)))
        return both, both
    return float(memory), float(arithmetic)


def fit(
    pace: Pace,
    orders: Sequence[Schedule],
    wanted: Extent,
    budget: float,
    *,
    keep_prompt: bool = False,
) -> Extent:
    """The largest extent that takes at most ``budget`` seconds, or the least that there is."""
    extent = wanted
    for extent in wanted.smaller():
        if keep_prompt and extent.prompt != wanted.prompt:
            return Extent(wanted.prompt, extent.frames, extent.cold)
        if pace.seconds(orders, extent) <= budget:
            return extent
    return extent


def cuts(wanted: Extent, chosen: Extent, window: int) -> tuple[str, ...]:
    """What a smaller extent leaves out, in words."""
    said = []
    if chosen.frames < wanted.frames:
        said.append(f"{chosen.frames} frames of each order instead of {wanted.frames}")
    if wanted.cold and not chosen.cold:
        said.append("no cold frame of each order")
    if chosen.prompt < wanted.prompt:
        said.append(
            f"a prompt of {chosen.prompt} frames instead of {wanted.prompt}: steps cost less than with the "
            f"window of {window} full"
        )
    return tuple(said)
