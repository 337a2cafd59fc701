"""A world in a web page beside Python: frames a second in one run, and whether the tokens are the same.

    python -m benchmarks.web crafter-3m.diagd --precision fp32 --frames 96

Headless Chromium and the processor decode the same frames, one thread each, in turns of a few frames,
so that other work on the machine disturbs both alike; wall time, without pictures, behind frames that are
not counted (a browser compiles while it runs).
"""

from __future__ import annotations

import json
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from benchmarks import CONSOLE, parser
from diagd.bundle import Bundle
from diagd.bundle.actions import Slot
from diagd.engines.onnxruntime_session import CpuOptions
from diagd.progress import Progress
from diagd.runtime.load import open_session
from diagd.runtime.options import parse_decoder
from diagd.runtime.session import Session
from diagd.web.folder import WORLD, runtime_files, server, write_page
from tests.play.browser import Tab, browser

DECODERS = ("next token", "k=1 serial", "k=1 chained", "jacobi")
TURN, WARM = 8, 24  # frames
AHEAD = 8  # frames that may have begun when the last one is complete
SEED = 7
OPEN = """(async () => {
  const { World } = await import("./world.js");
  globalThis.world = await World.open(location.href);
  globalThis.begin = async (decoder, ids) => {
    const { spec, session } = world, prompt = spec.prompts[0];
    session.start(prompt, prompt.map(() => spec.rest));
    await session.follow((frame) => ids[frame - prompt.length], { ...spec.settings, seed: %d });
    globalThis.decode = world.strategy(decoder);
  };
  globalThis.turn = async (frames) => {
    const began = performance.now(), made = [], { session } = world;
    for (let n = 0; n < frames; n++) {
      await decode(session);
      made.push(session.frames[session.known - 1].tokens);
    }
    return [performance.now() - began, made.map((tokens) => [...tokens])];
  };
})()"""


@dataclass
class Count:
    tokens: list[list[int]] = field(default_factory=list)
    seconds: float = 0.0


def measure(tab: Tab, session: Session, told: dict[str, Any], decoder: str, frames: int) -> dict[str, Count]:
    manifest, counts = session.manifest, {"page": Count(), "Python": Count()}
    ids = random_actions(manifest.actions.slots if manifest.actions else (), frames + WARM + AHEAD)
    tab.evaluate(f"begin({decoder!r}, {ids.tolist()})")
    prompt = np.array(told["prompts"][0], np.int32).reshape(-1, manifest.layout.rows, manifest.layout.columns)
    session.start(prompt, np.tile(told["rest"], (len(prompt), 1)))
    made = session.frames(parse_decoder(decoder, manifest), iter(ids), seed=SEED)

    def in_page(count: int) -> tuple[float, list[list[int]]]:
        spent, tokens = tab.evaluate(f"turn({count})")
        return spent / 1e3, tokens

    def here(count: int) -> tuple[float, list[list[int]]]:
        began = time.perf_counter()
        tokens = [next(made).tokens for _ in range(count)]
        return time.perf_counter() - began, [one.reshape(-1).tolist() for one in tokens]

    sides: dict[str, Callable[[int], tuple[float, list[list[int]]]]] = {"page": in_page, "Python": here}
    for at in range(0, WARM + frames, TURN):
        for name, side in sides.items():
            seconds, tokens = side(TURN)
            counts[name].tokens += tokens
            counts[name].seconds += seconds if at >= WARM else 0.0
    return counts


def random_actions(slots: Sequence[Slot], count: int) -> NDArray[np.int32]:
    """Tokens [count, slots]."""
    random = np.random.default_rng(0)
    return np.stack([random.choice(slot.ids, count) for slot in slots], axis=1).astype(np.int32)


def rows(page: Path, bundle: Bundle, frames: int) -> Iterator[tuple[str, ...]]:
    told = json.loads((page / WORLD).read_text())
    served = server(page, 0)
    thread = threading.Thread(target=served.serve_forever)
    thread.start()
    try:
        with (
            tempfile.TemporaryDirectory() as folder,
            open_session(bundle, cpu=CpuOptions(1)) as session,
            browser(Path(folder)) as tab,
        ):
            tab.open(f"http://127.0.0.1:{served.server_port}/style.css")
            tab.until("document.body.textContent.includes('--ground')")
            tab.evaluate(OPEN % SEED)
            for decoder in DECODERS:
                counts = measure(tab, session, told, decoder, frames)
                page_rate, rate = (frames / counts[name].seconds for name in ("page", "Python"))
                same = [a == b for a, b in zip(counts["page"].tokens, counts["Python"].tokens, strict=True)]
                equal = f"{same.index(False) if False in same else len(same)} of {len(same)}"
                yield decoder, f"{page_rate:.1f}", f"{rate:.1f}", f"{page_rate / rate:.2f}", equal
    finally:
        served.shutdown()
        thread.join()
        served.server_close()


def main() -> None:
    options = parser(__doc__, "bundle")
    options.add_argument("--precision", help="of the step graph")
    options.add_argument("--runtime", type=Path, help="archive or folder of onnxruntime-web")
    options.add_argument("--frames", type=int, default=96)
    args = options.parse_args()
    bundle = Bundle.open(args.bundle)
    with tempfile.TemporaryDirectory() as work:
        made = write_page(
            bundle,
            Path(work) / "page",
            lambda: runtime_files(args.runtime, Progress(CONSOLE)),
            precision=args.precision,
        )
        bundle = bundle.at_precision(made.precision)
        heads = (
            "decoder",
            "page, frames/s",
            "Python, frames/s",
            "page / Python",
            "frames equal, from the first on",
        )
        table = Table(*heads)
        for row in rows(made.path, bundle, args.frames):
            table.add_row(*row)
        CONSOLE.print(f"{bundle.manifest.name} {made.precision}: {made.download / 1e6:.2f} MB to load", table)


if __name__ == "__main__":
    main()
