"""``diagd decode``: tokens to a video."""

from __future__ import annotations

from diagd.cli import terminal
from diagd.cli.options import Verb
from diagd.progress import Progress
from diagd.runtime.video import DecodeOptions, decode

EXAMPLES = """examples:
  diagd decode crafter-3m.diagd walk.npy --output walk.mp4
  diagd decode crafter-3m.diagd walk.npy --output walk.mp4 --against original.mp4
"""


def run(options: DecodeOptions) -> None:
    """Decode, and say how near the video is to another."""
    console = terminal.console()
    done = decode(options, Progress(console))
    near = "" if done.psnr is None else f", PSNR {done.psnr:.2f} dB to {options.against}"
    console.print(f"{done.frames} token frames to {done.pictures} pictures{near}: {options.output}")


VERB = Verb(DecodeOptions, run, EXAMPLES)
