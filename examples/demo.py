"""Plays a scripted walk through a bundle, frame by frame, by next-token, diagonal and Jacobi decoding.

Usage: python examples/demo.py BUNDLE OUTPUT.mp4
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

import diagd
from diagd.bundle import Bundle
from diagd.bundle.targets import file_target
from diagd.engines.onnxruntime_session import CpuOptions
from diagd.progress import Progress
from diagd.runtime.actions import encode
from diagd.runtime.clip import read_prompt
from diagd.runtime.decoders import Decoder, JacobiDecoder, ScheduledDecoder
from diagd.runtime.pixels import PixelCodec
from diagd.runtime.video import VideoWriter
from diagd.schedule import Schedule

PROMPT = Path(__file__).parent / "crafter.png"
WALK = [("right", 10), ("down", 8), ("left", 14), ("up", 8), ("right", 8)]
WARM_UP = 3


def main(bundle_path: Path, output: Path) -> None:
    """Decode the walk with each decoder, print the table, and write the last one as a video."""
    output.parent.mkdir(parents=True, exist_ok=True)
    file_target(output, (".mp4",), "OUTPUT")
    bundle = Bundle.open(bundle_path)
    manifest, layout = bundle.manifest, bundle.manifest.layout
    assert manifest.actions is not None
    pixels, console = PixelCodec(bundle, CpuOptions()), Console()
    prompt = read_prompt(PROMPT, pixels, frames=1, resize=False)
    walk = [name for name, count in WALK for _ in range(count)]
    actions = np.stack([encode(manifest.actions, {"action": name}) for name in walk])
    decoders: dict[str, Decoder] = {
        "next-token": ScheduledDecoder(Schedule.next_token(layout)),
        "diagonal k=2": ScheduledDecoder(Schedule.serial(layout, 2)),
        "diagonal k=1": ScheduledDecoder(Schedule.serial(layout, 1)),
        "diagonal k=1 chained": ScheduledDecoder(Schedule.chained(layout, 1)),
        "jacobi, exact": JacobiDecoder(),
    }
    table = Table("decoding", "passes", "ms a pass", "ms a frame", "frames/s", "gain", title=manifest.name)
    slowest = 0.0
    for name, decoder in decoders.items():
        size = (pixels.spec.height, pixels.spec.width)
        with (
            diagd.load(bundle_path) as session,
            Progress(console).count(name, len(actions)) as advance,
            VideoWriter(output, manifest.frames_per_second, size) as video,
        ):
            idle = np.tile(encode(manifest.actions, {}), (1, 1))
            session.start(prompt, idle)
            for _ in session.frames(decoder, actions[:WARM_UP]):
                pass
            session.start(prompt, idle)
            for image in pixels.decode(iter(prompt)):
                video.write(image)
            passes, seconds = play(session, decoder, actions, pixels, video, advance)
        slowest = slowest or seconds
        figures = 1e3 * seconds / passes, 1e3 * seconds / len(actions), len(actions) / seconds
        shown = (f"{figure:.{digits}f}" for figure, digits in zip(figures, (2, 1, 1), strict=True))
        table.add_row(name, str(passes), *shown, f"{slowest / seconds:.1f}x")
    console.print(table)
    console.print(f"{len(actions)} frames, pixels and video included; the last walk is in {output}")


def play(
    session: diagd.Session,
    decoder: Decoder,
    actions: NDArray[np.int32],
    pixels: PixelCodec,
    video: VideoWriter,
    advance: Callable[[int], None],
) -> tuple[int, float]:
    """Decode a frame for each action into a video; the passes and the seconds that took."""
    before, began = session.timing.steps, time.perf_counter()
    for frame in session.frames(decoder, actions):
        video.write(next(pixels.decode(iter([frame.tokens]))))
        advance(1)
    return session.timing.steps - before, time.perf_counter() - began


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
