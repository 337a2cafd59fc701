"""Decoders side by side on the processor: time, passes and rows of a frame, and cells equal to NTP's.

Every decoder has a session of its own; their frames take turns in one process, so that other work on the
machine disturbs all alike. Times are process CPU time, decoding to pictures included, with one thread.

    python -m benchmarks.decoders crafter-3m.diagd --prompt examples/crafter.png --actions examples/walk.jsonl
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from diagd.bundle import Bundle
from diagd.engines.engine import Int
from diagd.engines.onnxruntime_session import CpuOptions
from diagd.profiling.measure import Workload
from diagd.progress import Progress
from diagd.runtime.actions import encode, read_actions
from diagd.runtime.decoders import Decoder, JacobiDecoder, ScheduledDecoder
from diagd.runtime.load import open_session
from diagd.runtime.pixels import PixelCodec
from diagd.runtime.prompt import read_prompt
from diagd.schedule import Schedule, StreamLayout

WINDOWS = (16, 24, 32, 48)
CPU = CpuOptions(threads=1)


@dataclass
class Count:
    """What the frames of one decoder took."""

    tokens: list[Int] = field(default_factory=list)
    seconds: float = 0.0
    passes: int = 0
    rows: int = 0


def decoders(layout: StreamLayout) -> dict[str, Decoder]:
    """NTP first, which the others are compared with."""
    schedules = Schedule.next_token(layout), Schedule.serial(layout, 1), Schedule.chained(layout, 1)
    found: dict[str, Decoder] = {order.name: ScheduledDecoder(order) for order in schedules}
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
    with open_session(bundle, cpu=CPU) as session:
        session.start(workload.prompt, workload.prompt_actions, workload.text)
        run = session.frames(decoder, workload.actions, count=frames, seed=seed)
        for _ in range(frames):
            before, began = session.timing.steps, time.process_time()
            frame = next(run)
            if codec is not None:
                list(codec.decode([frame.tokens]))
            count.tokens.append(frame.tokens)
            if len(count.tokens) > 1:
                count.seconds += time.process_time() - began
                taken = session.timing.steps - before
                count.passes += taken
                count.rows += sum(session.timing.recent[-1 - step].rows for step in range(taken))
            yield


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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--prompt", type=Path, required=True, help="a picture")
    parser.add_argument("--actions", type=Path, required=True, help="JSON lines, repeated as often as needed")
    parser.add_argument("--precision", help="of the step graph")
    parser.add_argument("--frames", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    bundle = Bundle.open(args.bundle).at_precision(args.precision)
    codec = bundle.manifest.actions
    assert codec is not None
    given = read_actions(args.actions, codec)
    workload = Workload(
        read_prompt(args.prompt, PixelCodec(bundle, CPU), 1, resize=False),
        np.asarray([encode(codec, {})], np.int32),
        np.resize(given, (args.frames, given.shape[1])),
        None,
    )
    console = Console(width=120)
    seeds = Progress(console).each(list(range(args.seeds)), "seeds")
    runs = [measure(bundle, workload, args.frames, seed, pixels=True) for seed in seeds]
    title = f"{bundle.manifest.name} {bundle.manifest.graphs[0].precision}"
    console.print(table(runs, f"{title}, {args.frames} frames x {args.seeds} seeds"))


if __name__ == "__main__":
    main()
