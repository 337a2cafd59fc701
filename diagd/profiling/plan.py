"""Whether a model fits a device, how fast it can be there at best, and in which orders it can be decoded."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Final

import numpy as np

from diagd.bundle.precision import KV_CACHES, PRECISIONS, Precision
from diagd.engines.tensorrt.builder import build_bytes
from diagd.errors import UsageError, unknown
from diagd.options import Numbers, checked, flag, setting
from diagd.profiling import cost
from diagd.profiling.cost import Device, ModelSize
from diagd.profiling.measure import Workload
from diagd.profiling.report import Skipped
from diagd.runtime.decoders import ScheduledDecoder
from diagd.runtime.session import Session
from diagd.schedule import RowSeed, Schedule, StreamLayout, default_widths, fixed_slots

RUNTIME_BYTES: Final = 0.5 * cost.GB
"""Of a GPU context with TensorRT, whatever the model; published figures are 0.3 to 1 GB."""

GRAPH_BYTES: Final = 64e6
"""Memory pool of one captured CUDA graph."""

REACHED: Final = 2 / 3
"""Of a ceiling, by a good engine."""

PREFILL: Final = 256
"""Rows of a pass that feeds known tokens."""


@dataclass(frozen=True)
class Memory:
    """Bytes by use: while it runs, and the peak while an engine is built."""

    weights: float
    cache: float
    workspace: float
    runtime: float
    graphs: float
    tokenizer: float
    build_peak: float

    @property
    def running(self) -> float:
        """Everything that is there at once while frames are made."""
        return self.weights + self.cache + self.workspace + self.runtime + self.graphs + self.tokenizer


@dataclass(frozen=True)
class Ceiling:
    """Least time of an order: ``bytes`` a pass, ``passes`` a frame of tokens, shown ``frames_per_second``.

    ``bound`` says which limit it is, ``memory`` or ``arithmetic``.
    """

    precision: str
    order: str
    bytes: float
    passes: float
    frames_per_second: float
    bound: str


@dataclass(frozen=True)
class Plan:
    """The answer for one precision, ceilings for all sizes of a weight, and what to change.

    ``sessions`` share the passes of one engine; ceilings are of each.
    """

    model: ModelSize
    device: Device
    precision: str
    window: int
    memory: Memory
    ceilings: tuple[Ceiling, ...]
    advice: tuple[str, ...]
    kv_cache: str | None = None
    sessions: int = 1

    @property
    def fits(self) -> bool:
        """Whether it runs on the device."""
        return self.memory.running <= self.device.usable

    @property
    def builds(self) -> bool:
        """Whether its engine can be built on the device."""
        return self.memory.build_peak <= self.device.usable


@checked
class Planned:
    """What a model is planned for, in frames and sessions.

    Raises:
        UsageError: there is no such precision or K/V cache.
    """

    precision: str = flag(f"{', '.join(PRECISIONS)} (default fp16)", "fp16")
    kv_cache: str | None = flag(f"{', '.join(KV_CACHES)} (default: floating point)", None)
    window: int | None = setting("frames kept in the cache (default: the context)", None, ge=2)
    sessions: int = setting("that share the passes of one engine; frames a second are of each", 1, ge=1)
    k: Numbers = setting("row lags, such as 1,2,4", (1, 2))
    clip: int = setting("frames made at the end of one context; 1 for a sliding window", 1, ge=1)

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise unknown("precision", self.precision, PRECISIONS)
        if self.kv_cache is not None and self.kv_cache not in KV_CACHES:
            raise unknown("K/V cache", self.kv_cache, KV_CACHES)

    def check(self, model: ModelSize) -> None:
        """Refuse what the model has not; UsageError: a row lag, a window, sessions or a clip beyond it."""
        columns, frames = model.layout.columns, model.context_frames
        if wrong := [k for k in self.k if not 1 <= k <= columns]:
            raise UsageError(f"--set k={wrong[0]}: {model.name} takes row lags 1..{columns}")
        if self.window is not None and self.window > frames:
            raise UsageError(f"--set window={self.window}: {model.name} sees at most {frames} frames")
        if self.sessions > model.most_sessions:
            why = ", for an engine holds one text" if model.reads_text else ""
            raise UsageError(
                f"--set sessions={self.sessions}: one engine of {model.name} decodes at most "
                f"{model.most_sessions}{why}"
            )
        if self.clip >= frames:
            raise UsageError(f"--set clip={self.clip}: a context has {frames} frames with those given")


def make_plan(model: ModelSize, device: Device, how: Planned | None = None) -> Plan:
    """Plan a model on a device; UsageError: it is planned for what the model has not."""
    how = how or Planned()
    how.check(model)
    window, precision = how.window or model.context_frames, how.precision
    table = cost.precisions(how.kv_cache)
    memory = memory_of(model, table[precision], window, how.sessions)
    # Of precisions that store as many bytes one is shown: the planned one, else the first.
    by_bytes = {entry.weight: entry for entry in (*reversed(table.values()), table[precision])}
    shown = [entry for entry in table.values() if entry in by_bytes.values()]
    rows = (ceilings_of(model, device, entry, how.k, how.clip, how.sessions) for entry in shown)
    ceilings = tuple(chain.from_iterable(rows))
    plan = Plan(model, device, precision, window, memory, ceilings, (), how.kv_cache, how.sessions)
    return replace(plan, advice=tuple(_advice(plan)))


def memory_of(model: ModelSize, precision: Precision, window: int, sessions: int = 1) -> Memory:
    """Bytes by use for a window of frames of so many sessions."""
    widths = default_widths(model.layout)
    widest = widths[-1]
    slots = fixed_slots(model.layout, window, widest, sessions)
    weights = model.streamed * precision.weight + model.looked_up * min(precision.activation, 2.0)
    scores = widest * model.query_width / model.head_size * slots * precision.activation
    states = widest * (4.0 * model.output_vocabulary + 12.0 * model.query_width * precision.activation)
    return Memory(
        weights=weights,
        cache=sessions * cost.cache_bytes(model, precision, slots),
        workspace=sessions * (scores + states),
        runtime=RUNTIME_BYTES,
        graphs=GRAPH_BYTES * len(widths),
        tokenizer=model.tokenizer * 2.0,
        build_peak=build_bytes(weights),
    )


def ceilings_of(
    model: ModelSize, device: Device, precision: Precision, ks: tuple[int, ...], clip: int, sessions: int = 1
) -> list[Ceiling]:
    """Upper bounds of each session's frames a second by decoding order; pixel decoding is not in them.

    A pass reads the weights once, whoever shares it, and the K/V rows of each session.
    """
    live = cost.live_tokens(model, clip)
    read = cost.step_bytes(model, precision, sessions * live)
    again = sessions * _refeeding(model, device, cost.step_bytes(model, precision, live))
    rows = []
    for order in orders_of(model.layout, ks):
        passes = order.total_steps(clip) / clip if clip > 1 else float(order.d)
        operations = sessions * cost.step_operations(model, model.layout.cells / passes, live)
        seconds = cost.step_seconds(read, operations, device.bandwidth, device.peak)
        bound = "memory" if seconds * device.bandwidth <= read * (1 + 1e-9) else "arithmetic"
        rate = model.pixel_frames / (passes * seconds + again)
        rows.append(Ceiling(precision.name, order.name, read, passes, rate, bound))
    return rows


def most_sessions(plan: Plan, rate: float) -> int:
    """Sessions of the planned precision that one engine plays at a rate each, frame by frame; 0: not one."""
    precision = cost.precisions(plan.kv_cache)[plan.precision]

    def holds(sessions: int) -> bool:
        if memory_of(plan.model, precision, plan.window, sessions).running > plan.device.usable:
            return False
        rows = ceilings_of(plan.model, plan.device, precision, (1,), 1, sessions)
        quickest = max(row.frames_per_second for row in rows if "chained" not in row.order)
        return REACHED * quickest >= rate

    return bisect_left(range(1, plan.model.most_sessions + 1), True, key=lambda sessions: not holds(sessions))


def _refeeding(model: ModelSize, device: Device, read: float) -> float:
    """Seconds a frame for feeding a sliding context again, in passes of ``PREFILL`` rows."""
    operations = cost.step_operations(model, PREFILL, cost.live_tokens(model) / 2)
    return model.refed / PREFILL * cost.step_seconds(read, operations, device.bandwidth, device.peak)


@dataclass(frozen=True)
class Drafting:
    """Least seconds of a frame on one device: its draft, the target's pass over it, and the target alone.

    ``passes`` is what the target alone takes of them, by Jacobi decoding.
    """

    drafter: str
    draft: float
    verify: float
    target: float
    passes: float

    @property
    def least_kept(self) -> float:
        """Share of frames that must be kept for drafting to pay; above 1 it cannot."""
        return (self.draft + self.verify) / self.target

    @property
    def verdict(self) -> str:
        """For people."""
        times = (
            f"a draft of {self.drafter} takes {1e3 * self.draft:.3g} ms at least, the pass over it "
            f"{1e3 * self.verify:.3g}, the target alone {1e3 * self.target:.3g} by Jacobi decoding in about "
            f"{self.passes:.2g} passes"
        )
        if self.least_kept >= 1:
            return f"drafting cannot pay: {times}"
        return f"drafting pays where more than {self.least_kept:.0%} of its frames are kept: {times}"


def drafting(
    target: ModelSize, drafter: ModelSize, device: Device, precision: Precision, guess: float
) -> Drafting:
    """What drafting takes against what it saves; scores are not in it.

    The target decodes what is not kept by Jacobi decoding, the best that is exact, the drafter in its
    quickest order. ``guess`` is the chance that a guess comes out right; a pass over L cells then decides (1
    - guess^L) / (1 - guess) of them in the mean.

    Raises:
        UsageError: their frames differ.
    """
    mine, other = drafter.layout, target.layout
    if (mine.rows, mine.columns) != (other.rows, other.columns):
        raise UsageError(
            f"{drafter.name} has frames of {mine.rows} x {mine.columns} tokens, {target.name} of "
            f"{other.rows} x {other.columns}; draft with a model of the same layout and tokens"
        )
    cells, live = other.cells, cost.live_tokens(target)
    read = cost.step_bytes(target, precision, live)
    rows = np.arange(1, cells + 1)
    passes = cells * (1 - guess) / (1 - guess**rows)
    operations = [cost.step_operations(target, width, live) for width in rows.tolist()]
    seconds = [cost.step_seconds(read, needed, device.bandwidth, device.peak) for needed in operations]
    frame = passes * seconds
    best = int(frame.argmin())
    quickest = max(row.frames_per_second for row in ceilings_of(drafter, device, precision, (1,), 1))
    draft = drafter.pixel_frames / quickest
    return Drafting(drafter.name, draft, seconds[-1], float(frame[best]), float(passes[best]))


def _advice(plan: Plan) -> list[str]:
    """What would make it fit, cheapest first; empty where nothing needs to change."""
    lines, table = list[str](), cost.precisions(plan.kv_cache)
    own = table[plan.precision]

    def fits(precision: Precision, window: int = plan.window) -> bool:
        return memory_of(plan.model, precision, window, plan.sessions).running <= plan.device.usable

    if not plan.fits:
        smaller = [name for name, entry in table.items() if entry.weight < own.weight and fits(entry)]
        lines += [f"store the weights in {name}: --precision {name}" for name in smaller[:1]]
        caches = [name for name in KV_CACHES if plan.kv_cache is None]
        caches = [name for name in caches if fits(cost.precisions(name)[plan.precision])]
        lines += [f"store keys and values in {name}: --kv-cache {name}" for name in caches]
        if windows := [window for window in range(2, plan.window) if fits(own, window)]:
            lines.append(f"keep {windows[-1]} frames instead of {plan.window}: --set window={windows[-1]}")
        if not lines:
            need = plan.memory.running / cost.GB
            lines.append(f"no precision or window fits: take a smaller model, or a device with {need:.0f} GB")
    if plan.fits and not plan.builds:
        need = plan.memory.build_peak / cost.GB
        lines.append(f"build the engine on a machine with {need:.0f} GB and the same GPU architecture")
    return [*lines, _budget(plan)] if plan.sessions > 1 else lines


def _budget(plan: Plan) -> str:
    """How many rows a pass has before arithmetic bounds it, which sessions and wide steps divide."""
    live, device = cost.live_tokens(plan.model), plan.device
    read = cost.step_bytes(plan.model, cost.precisions(plan.kv_cache)[plan.precision], plan.sessions * live)
    rows = device.peak * read / device.bandwidth / cost.step_operations(plan.model, 1.0, live)
    return (
        f"{plan.sessions} sessions share a pass: about {rows:.0f} rows are read in the time of one, "
        f"{rows / plan.sessions:.0f} for each session, whether of a diagonal step or of a window of guesses"
    )


def orders_of(
    layout: StreamLayout, ks: tuple[int, ...], seed: RowSeed = RowSeed.PREVIOUS_FRAME
) -> list[Schedule]:
    """Next-token prediction, then serial and chained frames for each row lag, each order once.

    Raises:
        ScheduleError: a lag cannot be decoded.
    """
    orders = [Schedule.next_token(layout)]
    for k in ks:
        orders += [make(layout, k, seed) for make in (Schedule.serial, Schedule.chained)]
    return list({(order.k, order.d): order for order in orders}.values())


def split_orders(
    orders: Sequence[Schedule], session: Session, workload: Workload, frames: int
) -> tuple[list[Schedule], list[Skipped]]:
    """Orders in which a session can decode so many frames of a workload, and the others with the reason."""
    possible, skipped = [], []
    for order in orders:
        actions = workload.start(session, frames)
        try:
            session.run(ScheduledDecoder(order), actions, count=frames)
        except UsageError as error:
            skipped.append(Skipped(order=order.name, reason=str(error)))
        else:
            possible.append(order)
    return possible, skipped
