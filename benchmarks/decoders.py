"""Decoders side by side on the processor: time, passes and rows of a frame, and cells equal to NTP's.

Every decoder has a session of its own; their frames take turns in one process, so that other work on the
machine disturbs all alike. Times are process CPU time with one thread; decoding to pictures and writing them
to a video are part of a frame.

    python -m benchmarks.decoders crafter-3m.diagd --prompt examples/crafter.png --actions examples/walk.jsonl
    python -m benchmarks.decoders mineworld-300m.diagd --precision int8 --costs 0.926 --costs 0.953

The second is for models whose weights are not at hand: what a frame costs by Jacobi decoding in windows of
each size, beside the orders, if a guess comes out right with these chances.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from rich.table import Table

from benchmarks import CONSOLE, parser
from diagd.bundle import Bundle
from diagd.engines.engine import Int
from diagd.engines.onnxruntime_session import CpuOptions
from diagd.profiling.measure import Workload, random_workload
from diagd.progress import Progress
from diagd.runtime.actions import encode, read_actions
from diagd.runtime.clip import read_prompt
from diagd.runtime.comparison import redrawn
from diagd.runtime.decoders import Decoder, JacobiDecoder, RasterDecoder, ScheduledDecoder
from diagd.runtime.load import open_session
from diagd.runtime.pixels import PixelCodec
from diagd.runtime.session import Session
from diagd.runtime.video import VideoWriter
from diagd.schedule import NO_SINK, Schedule, StreamLayout

WINDOWS = (24, 32, 48)
LENGTHS = (1, 8, 16, 24, 32, 48, 64, 96, 128)
FORCED = 20
"""Frames that are drawn again, a pass for every cell."""

CPU = CpuOptions(threads=1)


@dataclass
class Count:
    """What the frames of one decoder took."""

    tokens: list[Int] = field(default_factory=list)
    seconds: float = 0.0
    passes: int = 0
    rows: int = 0


def orders(layout: StreamLayout) -> dict[str, Decoder]:
    """NTP first, which the others are compared with."""
    schedules = Schedule.next_token(layout), Schedule.serial(layout, 1), Schedule.chained(layout, 1)
    return {order.name: ScheduledDecoder(order) for order in schedules}


def decoders(layout: StreamLayout) -> dict[str, Decoder]:
    found = orders(layout)
    found |= {f"jacobi {rows}": JacobiDecoder(rows) for rows in (*WINDOWS, layout.cells)}
    return found | {"jacobi": JacobiDecoder()}


def measure(bundle: Bundle, workload: Workload, frames: int, seed: int, pixels: bool) -> dict[str, Count]:
    """Decode so many frames by every decoder in turns."""
    counts = {name: Count() for name in decoders(bundle.manifest.layout)}
    runs = [
        _run(bundle, workload, decoder, frames, seed, pixels, counts[name])
        for name, decoder in decoders(bundle.manifest.layout).items()
    ]
    for _ in range(frames):
        for run in runs:
            next(run)
    for run in runs:
        run.close()  # type: ignore[attr-defined]
    return counts


def _run(
    bundle: Bundle, workload: Workload, decoder: Decoder, frames: int, seed: int, pixels: bool, count: Count
) -> Iterator[None]:
    """A frame each time; the first, which feeds the prompt, is not counted."""
    codec = PixelCodec(bundle, CPU) if pixels else None
    with ExitStack() as opened:
        session = opened.enter_context(open_session(bundle, cpu=CPU))
        show = opened.enter_context(_shown(codec)) if codec else lambda tokens: None
        session.start(workload.prompt, workload.prompt_actions, workload.text)
        run = session.frames(decoder, workload.actions, count=frames, seed=seed)
        for _ in range(frames):
            before, began = session.timing.steps, time.process_time()
            frame = next(run)
            show(frame.tokens)
            count.tokens.append(frame.tokens)
            if len(count.tokens) > 1:
                count.seconds += time.process_time() - began
                taken = session.timing.steps - before
                count.passes += taken
                count.rows += sum(session.timing.recent[-1 - step].rows for step in range(taken))
            yield


@contextmanager
def _shown(codec: PixelCodec) -> Iterator[Callable[[Int], None]]:
    """What decodes a frame and writes its pictures."""
    size = codec.spec.size
    with TemporaryDirectory() as folder, VideoWriter(Path(folder) / "frames.mp4", 10.0, size) as writer:

        def show(tokens: Int) -> None:
            for image in codec.decode([tokens]):
                writer.write(image)

        yield show


def flips(bundle: Bundle, workload: Workload, tokens: list[Int], seed: int) -> tuple[int, int]:
    """Cells of NTP's own frames: how many the widest pass draws otherwise than a pass each, and all of them.

    Teacher-forced: both are behind the same tokens, so that a flip has no others behind it.
    """
    frames, drawn = np.stack(tokens[:FORCED]), []
    actions = None if workload.actions is None else workload.actions[: len(frames)]
    with open_session(bundle, cpu=CPU) as session:
        for rows in (1, None):
            session.start(workload.prompt, workload.prompt_actions, workload.text)
            drawn.append(redrawn(session, frames, actions, rows=rows, seed=seed))
    return int((drawn[0] != drawn[1]).sum()), drawn[0].size


def pass_seconds(session: Session, workload: Workload, rows: int) -> float:
    """CPU time of a pass that verifies so many cells: the quickest third of those of two known frames."""
    layout = session.layout
    session.start(workload.prompt, workload.prompt_actions, workload.text)
    truth = np.repeat(workload.prompt[-1:], 2, axis=0).reshape(2, layout.rows, layout.columns)
    spent, began = [], time.process_time()
    actions = None if workload.actions is None else workload.actions[:2]
    for step, _ in session.steps(RasterDecoder(truth, rows), actions, count=2):
        now = time.process_time()
        if (step.sinks != NO_SINK).sum() == rows:
            spent.append(now - began)
        began = time.process_time()
    return float(np.mean(sorted(spent)[: -(-len(spent) // 3)]))


def costs(session: Session, workload: Workload, chances: list[float]) -> Table:
    """Milliseconds of a pass by rows, and of a frame if each guess comes out right with a chance.

    Where every guess is right with chance a, a pass over L cells decides (1 - a^L) / (1 - a) in the mean.
    """
    cells, heads = session.layout.cells, (f"frame, {chance:g}" for chance in chances)
    shown = Table("decoder", "ms a pass", *heads, title=f"{session.manifest.name}, ms of CPU time")
    for name, decoder in orders(session.layout).items():
        session.start(workload.prompt, workload.prompt_actions, workload.text)
        began = time.process_time()
        frames = list(session.frames(decoder, workload.actions, count=2))
        seconds, steps = (time.process_time() - began) / 2, sum(frame.steps for frame in frames) / 2
        shown.add_row(name, f"{1e3 * seconds / steps:.1f}", *[f"{1e3 * seconds:.0f}"] * len(chances))
    for rows in sorted({rows for rows in LENGTHS if rows < cells} | {min(cells, session.engine.max_width)}):
        seconds = pass_seconds(session, workload, rows)
        passes = [cells * (1 - chance) / (1 - chance**rows) for chance in chances]
        figures = (f"{1e3 * seconds * count:.0f} ({count:.1f})" for count in passes)
        shown.add_row(f"jacobi {rows}", f"{1e3 * seconds:.1f}", *figures)
    return shown


def table(runs: list[dict[str, Count]], title: str) -> Table:
    """Sums over seeds; the first decoder is what the others are equal to, or not."""
    shown = Table(
        *("decoder", "ms a frame", "frames/s", "passes", "rows", "x NTP", "x serial", "cells of NTP"),
        title=title,
    )
    plain, serial = list(runs[0])[:2]
    per_frame = {
        name: sum(run[name].seconds for run in runs) / sum(len(run[name].tokens) - 1 for run in runs)
        for name in runs[0]
    }
    for name, seconds in per_frame.items():
        frames = sum(len(run[name].tokens) - 1 for run in runs)
        same = [np.stack(run[name].tokens) == np.stack(run[plain].tokens) for run in runs]
        shown.add_row(
            name,
            f"{1e3 * seconds:.2f}",
            f"{1 / seconds:.1f}",
            *(f"{sum(getattr(run[name], what) for run in runs) / frames:.2f}" for what in ("passes", "rows")),
            f"{per_frame[plain] / seconds:.2f}",
            f"{per_frame[serial] / seconds:.2f}",
            f"{100 * np.mean(same):.2f} %",
        )
    return shown


def main() -> None:
    options = parser(__doc__, "bundle")
    options.add_argument("--prompt", type=Path, help="a picture")
    options.add_argument("--actions", type=Path, help="JSON lines, repeated as often as needed")
    options.add_argument("--precision", action="append", help="of the step graph; may be repeated")
    options.add_argument("--frames", type=int, default=200)
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--costs", type=float, action="append", help="chance that a guess comes out right")
    args = options.parse_args()
    for precision in args.precision or [None]:
        bundle = Bundle.open(args.bundle).at_precision(precision)
        if args.costs:
            with open_session(bundle, cpu=CPU) as session:
                CONSOLE.print(costs(session, random_workload(session, 2, 2), args.costs))
        else:
            compare(bundle, workload_of(bundle, args.prompt, args.actions, args.frames), args.seeds)


def workload_of(bundle: Bundle, prompt: Path, actions: Path, frames: int) -> Workload:
    codec = bundle.manifest.actions
    assert codec is not None
    given = read_actions(actions, codec)
    return Workload(
        read_prompt(prompt, PixelCodec(bundle, CPU), 1, resize=False),
        np.asarray([encode(codec, {})], np.int32),
        np.resize(given, (frames, given.shape[1])),
        None,
    )


def compare(bundle: Bundle, workload: Workload, seeds: int) -> None:
    assert workload.actions is not None
    frames = len(workload.actions)
    shown = Progress(CONSOLE).each(list(range(seeds)), "seeds")
    runs = [measure(bundle, workload, frames, seed, pixels=True) for seed in shown]
    title = f"{bundle.manifest.name} {bundle.manifest.precisions[0]}"
    CONSOLE.print(table(runs, f"{title}, {frames} frames x {seeds} seeds"))
    found = [flips(bundle, workload, run["next token"].tokens, seed) for seed, run in enumerate(runs)]
    flipped, drawn = (sum(counts) for counts in zip(*found, strict=True))
    CONSOLE.print(f"teacher-forced, W=1 against the widest pass: {flipped} of {drawn} draws differ")


if __name__ == "__main__":
    main()
