"""How a world feels: a scripted page plays over the socket and measures from key to picture.

    python -m benchmarks.play BUNDLE [--fps 60] [--seconds 20]
    python -m benchmarks.play BUNDLE --seconds 1800 --report 60     # soak: memory and latency by the minute
    python -m benchmarks.play BUNDLE --players 1 2 4 8              # of `diagd serve`, at once

The server is `diagd-play` in a process of its own, as a player would start it. A line a report: frames a
second; milliseconds from a key's message to its first picture (p50, p95), and of a frame's work at the server
(decode, pixels, encode); how many frames the slowest key in twenty takes; late ticks; memory of the server.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from websockets.sync.client import ClientConnection, connect

KEYS = ("ArrowLeft", "ArrowUp", "ArrowRight", "ArrowDown")
CHANGE_SECONDS = 0.37
"""Between two keys: no multiple of a frame."""


class Page:
    """A page without a picture."""

    def __init__(self, url: str) -> None:
        address, _, token = url.partition("/#")
        self.socket: ClientConnection = connect(
            address.replace("http", "ws") + "/socket",
            origin=address,  # type: ignore[arg-type]
            compression=None,
            max_size=None,
        )
        self.say(type="hello", version=1, token=token)

    def say(self, **message: Any) -> None:
        self.socket.send(json.dumps(message))

    def hear(self) -> dict[str, Any]:
        """The next update's header; texts are passed over."""
        while True:
            data = self.socket.recv(timeout=60)
            if isinstance(data, str):
                continue
            length = int.from_bytes(data[:4], "big")
            header: dict[str, Any] = json.loads(data[4 : 4 + length])
            if header["kind"] == "frame":
                self.say(type="ack", id=header["id"])
                return header


class Figures:
    """What was measured since the last report."""

    def __init__(self) -> None:
        self.latency: list[float] = []
        self.work: list[float] = []
        self.began, self.frames, self.late = time.perf_counter(), 0, 0

    def add(self, header: dict[str, Any], now: float) -> None:
        ms = header["ms"]
        self.frames += 1
        self.late = header["late"]
        self.work.append(ms["decode"] + ms["pixels"] + ms["encode"])
        if header["echo"] is not None:
            self.latency.append(now - header["echo"])

    def line(self, process: int) -> str:
        wall = time.perf_counter() - self.began
        key, work = (np.percentile(values or [np.nan], (50, 95)) for values in (self.latency, self.work))
        status = Path(f"/proc/{process}/status")
        memory = re.search(r"VmRSS:\s+(\d+)", status.read_text()) if status.exists() else None
        return (
            f"{self.frames / wall:6.1f} frames/s   key to picture {key[0]:6.1f} / {key[1]:6.1f} ms   "
            f"frame {work[0]:6.1f} / {work[1]:6.1f} ms   p95 of keys {key[1] / work[0]:5.2f} x a frame   "
            f"late {self.late}   {int(memory[1]) / 1024 if memory else float('nan'):.0f} MB"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle")
    parser.add_argument("--fps", type=float, default=60.0)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--report", type=float, default=20.0, help="seconds between two lines")
    parser.add_argument("--decoder", help="of the world, as the page chooses it")
    parser.add_argument("--precision", help="of the step graph")
    parser.add_argument("--players", type=int, nargs="+", help="how many play at once, as 1 2 4 8")
    args = parser.parse_args()
    for players in args.players or ():
        many(players, args)
    if args.players:
        return
    began = time.perf_counter()
    with server("play", args) as (process, url):
        page = Page(url)
        page.hear()
        print(f"command to first picture {time.perf_counter() - began:.2f} s")
        play(page, process, args)


@contextmanager
def server(verb: str, args: argparse.Namespace, *further: str) -> Iterator[tuple[int, str]]:
    """A server in a process of its own: its number, and the address of the page."""
    options = ["--set", f"precision={args.precision}"] if args.precision else []
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
    """So many scripted players of `diagd serve` at once: frames a second of all, and what the slowest had."""
    with server("serve", args, "--sessions", str(players)) as (_, url), ThreadPoolExecutor(players) as pool:
        pages = [Page(url) for _ in range(players)]
        for page in pages:
            page.hear()
        found = list(pool.map(lambda page: hold_keys(page, args.seconds), pages))
    rates = [figures.frames / args.seconds for figures in found]
    keys, work = (
        max(float(np.percentile(values, 95)) for values in parts)
        for parts in zip(*((figures.latency, figures.work) for figures in found), strict=True)
    )
    print(
        f"{players} players: {sum(rates):6.1f} frames/s in all, {min(rates):5.1f} at least; "
        f"p95 of the slowest: key to picture {keys:6.1f} ms, frame {work:6.1f} ms",
        flush=True,
    )


def hold_keys(page: Page, seconds: float) -> Figures:
    """Hold one key after the other."""
    figures, end = Figures(), time.perf_counter() + seconds
    changed, sent, key = 0.0, 0.0, 0
    while (now := time.perf_counter()) < end:
        if now - changed > CHANGE_SECONDS:
            key, changed, sent = key + 1, now, 0.0
        if now - sent > 0.15:
            page.say(type="input", t=1e3 * time.perf_counter(), keys=[KEYS[key % len(KEYS)]])
            sent = now
        header = page.hear()
        if "ms" in header:
            figures.add(header, 1e3 * time.perf_counter())
    return figures


def play(page: Page, process: int, args: argparse.Namespace) -> None:
    """Hold one key after the other, and say what was measured now and then."""
    if args.decoder:
        settings = {"decoder": args.decoder, "temperature": 1.0, "top_k": 0, "top_p": 0.95, "seed": 0}
        page.say(type="choose", settings=settings)
    end = time.perf_counter() + args.seconds
    while (left := end - time.perf_counter()) > 0:
        figures = hold_keys(page, min(left, args.report))
        if figures.frames > 10:
            print(figures.line(process), flush=True)


if __name__ == "__main__":
    main()
