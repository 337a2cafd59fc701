"""How a world feels: a scripted page plays over the socket and measures from key to picture.

    python -m benchmarks.play BUNDLE [--fps 60] [--seconds 20]
    python -m benchmarks.play BUNDLE --soak 30 --output soak.json   # memory and latency by the minute
    python -m benchmarks.play BUNDLE --players 1 2 4 8 --fps 5      # of `diagd serve`, at once

The server is `diagd-play` in a process of its own, as a player would start it; keys change when they change,
not when a picture comes. A line: frames a second; milliseconds from a key's message to its first picture
(p50, p95, of how many), and of a frame's work at the server (decode, pixels, encode); how many frames the
slowest key in twenty takes; passes of a frame, and of one that a key changed; late ticks; its memory.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
from websockets import Origin
from websockets.sync.client import ClientConnection, connect

from benchmarks import check_result, parser
from diagd.bundle.files import atomic_file

KEYS = ("ArrowLeft", "ArrowUp", "ArrowRight", "ArrowDown")
CHANGE_SECONDS = 0.37
"""Between two keys: no multiple of a frame."""

REPEATS = 3
"""Messages of a key that is held."""

SETTLING_SECONDS = 6.0
"""For what one more player takes to show, and for one who waits to be let in."""

WARM_SECONDS = 2.0
"""That nothing is told of."""


class Page:
    """A page without a picture."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket

    def say(self, **message: Any) -> None:
        self.socket.send(json.dumps(message))

    def is_seated(self, seconds: float) -> bool:
        """Whether a picture comes before so long."""
        try:
            self.hear(seconds)
        except TimeoutError:
            return False
        return True

    def hear(self, seconds: float = 60.0) -> dict[str, Any]:
        """The next update's header; texts are passed over."""
        end = time.monotonic() + seconds
        while True:
            data = self.socket.recv(timeout=max(0.0, end - time.monotonic()))
            if isinstance(data, str):
                continue
            length = int.from_bytes(data[:4], "big")
            header: dict[str, Any] = json.loads(data[4 : 4 + length])
            if header["kind"] == "frame":
                self.say(type="ack", id=header["id"])
                return header


@contextmanager
def opened(url: str) -> Iterator[Page]:
    """A page at the address that the server printed."""
    address, _, token = url.partition("/#")
    where = address.replace("http", "ws") + "/socket"
    with connect(where, origin=Origin(address), compression=None, max_size=None) as socket:
        page = Page(socket)
        page.say(type="hello", version=1, token=token)
        yield page


@dataclass(frozen=True)
class Report:
    """What was measured in a while; milliseconds p50 and p95, but for what is counted."""

    frames_per_second: float
    keys: int
    key: tuple[float, float]
    frame: tuple[float, float]
    passes: float
    changed_passes: float
    late: int
    megabytes: float

    def __str__(self) -> str:
        key, frame = (f"{p50:6.1f} / {p95:6.1f} ms" for p50, p95 in (self.key, self.frame))
        return (
            f"{self.frames_per_second:6.1f} frames/s   key to picture {key} ({self.keys})   frame {frame}   "
            f"p95 of keys {self.key[1] / self.frame[0]:5.2f} x a frame   passes {self.passes:.2f}, "
            f"{self.changed_passes:.2f} for a key   late {self.late}   {self.megabytes:.0f} MB"
        )


class Figures:
    """What was measured since a moment."""

    def __init__(self) -> None:
        self.latency: list[float] = []
        self.work: list[float] = []
        self.passes: list[int] = []
        self.changed: list[int] = []
        self.began, self.frames, self.late = time.perf_counter(), 0, 0

    def add(self, header: dict[str, Any], now: float) -> None:
        ms = header["ms"]
        self.frames += 1
        self.late = header["late"]
        self.work.append(ms["decode"] + ms["pixels"] + ms["encode"])
        self.passes.append(header["passes"])
        if header["echo"] is not None:
            self.latency.append(now - header["echo"])
            self.changed.append(header["passes"])

    def report(self, process: int) -> Report:
        key, work = (np.percentile(values or [np.nan], (50, 95)) for values in (self.latency, self.work))
        status = Path(f"/proc/{process}/status")
        memory = re.search(r"VmRSS:\s+(\d+)", status.read_text()) if status.exists() else None
        return Report(
            self.frames / (time.perf_counter() - self.began),
            len(self.latency),
            (float(key[0]), float(key[1])),
            (float(work[0]), float(work[1])),
            float(np.mean(self.passes or np.nan)),
            float(np.mean(self.changed or np.nan)),
            self.late,
            int(memory[1]) / 1024 if memory else float("nan"),
        )


def main() -> None:
    options = parser(__doc__)
    options.add_argument("bundle")
    options.add_argument("--fps", type=float, default=60.0)
    options.add_argument("--seconds", type=float, default=20.0)
    options.add_argument("--soak", type=float, metavar="MINUTES", help="play so long, a line a minute")
    options.add_argument("--output", type=Path, help="JSON of all lines")
    options.add_argument("--decoder", help="of the world, as the page chooses it")
    options.add_argument("--precision", help="of the step graph")
    options.add_argument("--threads", type=int, default=0, help="of the step graph; 0: the default")
    options.add_argument("--cluster", help="where they are played, as `diagd serve` takes it")
    options.add_argument("--players", type=int, nargs="+", help="how many play at once, as 1 2 4 8")
    args = options.parse_args()
    check_result(options, args.output, b'[{"frames_per_second"')
    for players in args.players or ():
        many(players, args)
    if args.players:
        return
    began = time.perf_counter()
    with server("play", args) as (process, url), opened(url) as page:
        page.hear()
        print(f"command to first picture {time.perf_counter() - began:.2f} s")
        play(page, process, args)


@contextmanager
def server(verb: str, args: argparse.Namespace, *further: str) -> Iterator[tuple[int, str]]:
    """A server in a process of its own: its number, and the address of the page."""
    options = ["--set", f"threads={args.threads}"]
    options += ["--set", f"precision={args.precision}"] if args.precision else []
    command = [sys.executable, "-m", "diagd", verb, args.bundle, "--port", "0", "--fps", str(args.fps)]
    process = subprocess.Popen([*command, *options, *further], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield (
            process.pid,
            next(found[0] for line in process.stdout if (found := re.search(r"http://\S+", line))),
        )
    finally:
        process.terminate()
        process.wait(60)


def many(players: int, args: argparse.Namespace) -> None:
    """So many scripted players of `diagd serve` at once: frames a second of all, and what the slowest had.

    They come one after the other, each when those before play; who is not let in, to keep the rate, waits, as
    who is and has to give the seat back.
    """
    further = ["--sessions", str(players)] + (["--cluster", args.cluster] if args.cluster else [])
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(players))
        _, url = stack.enter_context(server("serve", args, *further))
        pages: list[Page] = []
        for _ in range(players):
            page = stack.enter_context(opened(url))
            if not page.is_seated(SETTLING_SECONDS if pages else 60.0):
                break
            pages.append(page)
            held = list(pool.map(lambda page: held_keys(page, SETTLING_SECONDS), pages))
            pages = [page for page, figures in zip(pages, held, strict=True) if figures]
        found = [
            figures for figures in pool.map(lambda page: held_keys(page, args.seconds), pages) if figures
        ]
        told = urlopen(url.partition("/#")[0] + "/metrics").read().decode()
    rates = [figures.frames / args.seconds for figures in found]
    keys, work = (
        max(float(np.percentile(values, 95)) for values in parts)
        for parts in zip(*((figures.latency, figures.work) for figures in found), strict=True)
    )
    server_p95 = float(re.findall(r"^diagd_frame_p95_seconds (\S+)", told, re.MULTILINE)[0])
    print(
        f"{players} players, {len(found)} let in: {sum(rates):6.1f} frames/s in all, {min(rates):5.1f} at "
        f"least; p95 of the slowest: key to picture {keys:6.1f} ms, frame {work:6.1f} ms; "
        f"of all passes {1e3 * server_p95:6.1f} of {1e3 / args.fps:.1f} ms",
        flush=True,
    )


def held_keys(page: Page, seconds: float) -> Figures | None:
    """What was measured; None where the seat was taken back meanwhile."""
    try:
        return hold_keys(page, seconds, SETTLING_SECONDS)
    except TimeoutError:
        return None


def hold_keys(page: Page, seconds: float, patience: float = 60.0) -> Figures:
    figures, ended = Figures(), threading.Event()
    typist = threading.Thread(target=_type, args=(page, ended))
    typist.start()
    try:
        while time.perf_counter() - figures.began < seconds:
            header = page.hear(patience)
            if "ms" in header:
                figures.add(header, 1e3 * time.perf_counter())
    finally:
        ended.set()
        typist.join()
    return figures


def _type(page: Page, ended: threading.Event) -> None:
    key = 0
    while not ended.is_set():
        key += 1
        for _ in range(REPEATS):
            page.say(type="input", t=1e3 * time.perf_counter(), keys=[KEYS[key % len(KEYS)]])
            ended.wait(CHANGE_SECONDS / REPEATS)


def play(page: Page, process: int, args: argparse.Namespace) -> None:
    """Hold one key after the other, and say what was measured now and then."""
    if args.decoder:
        settings = {"decoder": args.decoder, "temperature": 1.0, "top_k": 0, "top_p": 0.95, "seed": 0}
        page.say(type="choose", settings=settings)
    hold_keys(page, WARM_SECONDS)
    reports: list[Report] = []
    for _ in range(round(args.soak or 1)):
        reports.append(hold_keys(page, 60 if args.soak else args.seconds).report(process))
        print(reports[-1], flush=True)
        if args.output:
            with atomic_file(args.output) as partial:
                partial.write_text(json.dumps([asdict(report) for report in reports]))
    if args.soak:
        print(drift(reports))


def drift(reports: list[Report]) -> str:
    """What changed from the first third of a soak to the last."""
    third = -(-len(reports) // 3)
    rows = np.array([(one.megabytes, one.key[1], one.frame[0]) for one in reports])
    names = ("memory MB", "key to picture p95 ms", "frame p50 ms")
    pairs = zip(names, rows[:third].mean(0), rows[-third:].mean(0), strict=True)
    changes = ", ".join(f"{name} {before:.1f} -> {after:.1f}" for name, before, after in pairs)
    return f"{len(reports)} minutes, first third to last: {changes}"


if __name__ == "__main__":
    main()
