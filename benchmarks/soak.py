"""A stream that goes on for very long: do memory and the time of a frame stay flat?

One session decodes frames in blocks; each block's line holds the frames so far, the process's memory now and
at its most, and the time of its frames. The stream is kept beside the lines after every block, so that the
same command goes on where it was stopped; a summary follows. From the root:

    python -m benchmarks.soak crafter-3m.diagd --frames 100000 --seconds 800 --log soak.jsonl
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from benchmarks import CONSOLE, check_result, parser
from benchmarks.cpu import resident_bytes
from diagd.bundle import Bundle
from diagd.bundle.files import atomic_file
from diagd.engines.host import peak_memory
from diagd.profiling.measure import random_workload
from diagd.runtime.actions import encode
from diagd.runtime.decoders.scheduled import ScheduledDecoder
from diagd.runtime.load import open_session
from diagd.runtime.session import Session
from diagd.schedule import Schedule

BLOCK = 1000
"""Frames of a line of the log."""


def main() -> None:
    options = parser(__doc__, "bundle")
    options.add_argument("--frames", type=int, default=100_000)
    options.add_argument(
        "--seconds", type=float, default=float("inf"), help="stop after the block that is on"
    )
    options.add_argument("--precision", help="default: the bundle's first")
    options.add_argument("--log", type=Path, default=Path("soak.jsonl"))
    args = options.parse_args()
    check_result(options, args.log, b'{"frames"')
    ends = time.monotonic() + args.seconds
    with open_session(Bundle.open(args.bundle), precision=args.precision) as session:
        for line in soak(session, args.log, args.frames):
            with args.log.open("a") as log:
                log.write(json.dumps(line) + "\n")
            if time.monotonic() > ends:
                break
    CONSOLE.print(summary(lines_of(args.log)))


def soak(session: Session, log: Path, frames: int) -> Iterator[dict[str, Any]]:
    """Decode on from the stream beside ``log`` until ``frames`` are known, yielding a line a block."""
    kept = log.with_suffix(".stream")
    if kept.exists():
        session.stream.restore(kept.read_bytes())
    else:
        log.unlink(missing_ok=True)
        workload = random_workload(session, 1, 0)
        session.start(workload.prompt, _action(session, 0)[None])
    layout = session.layout
    decoder = ScheduledDecoder(Schedule.chained(layout, 1))
    run = session.frames(decoder, lambda frame: _action(session, frame), seed=1)
    while (known := session.stream.known) < frames:
        began = time.perf_counter()
        taken = [next(run).seconds for _ in range(min(BLOCK, frames - known))]
        line = {
            "frames": session.stream.known,
            "process": os.getpid(),
            "seconds": time.perf_counter() - began,
            "resident": resident_bytes(),
            "peak": peak_memory(),
            "milliseconds": [1e3 * float(np.percentile(taken, share)) for share in (50, 99, 100)],
        }
        with atomic_file(kept) as partial:
            partial.write_bytes(session.stream.snapshot())
        yield line


def _action(session: Session, frame: int) -> NDArray[np.int32]:
    """The action of a frame, as a function of its number: each name is held for eight frames."""
    codec = session.manifest.actions
    if codec is None:
        return np.zeros(session.layout.gap, np.int32)
    field, names = next(iter(codec.choices.items()), ("", ()))
    return encode(codec, {field: names[frame // 8 % len(names)]} if names else {})


def lines_of(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


def summary(lines: list[dict[str, Any]]) -> Table:
    """First, middle and last block of each process, and how much the memory of each grew."""
    table = Table("process", "frames", "MB in memory", "median ms", "p99 ms", "slowest ms", title="soak")
    for number, process in enumerate(dict.fromkeys(line["process"] for line in lines), start=1):
        of = [line for line in lines if line["process"] == process]
        for line in {line["frames"]: line for line in (of[0], of[len(of) // 2], of[-1])}.values():
            times = [f"{value:.2f}" for value in line["milliseconds"]]
            table.add_row(str(number), f"{line['frames']:,}", f"{line['resident'] / 1e6:.1f}", *times)
        grown = (of[-1]["resident"] - of[0]["resident"]) / 1e6
        table.add_row("", f"{len(of)} blocks", f"{grown:+.1f}", "", "", "")
    return table


if __name__ == "__main__":
    main()
