"""``diagd world``: record a world, import videos of one, and train a model of it."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from typing import TYPE_CHECKING

from diagd.bundle.lock import turn
from diagd.bundle.targets import folder_target
from diagd.cli import terminal
from diagd.cli.options import Verb
from diagd.progress import EVERY, is_first
from diagd.progress import Progress as Bars
from worlds.options import CollectOptions, ImportOptions, TrainOptions

if TYPE_CHECKING:
    from worlds.progress import Progress

EXAMPLES = """examples:
  diagd world collect recordings
  diagd world collect walks --game doom --episodes 300 --steps 400
  diagd world collect recordings --episodes 5000 --cluster 10.0.0.1:6379
  diagd world import recordings --videos clips/ --actions noop,left,right --size 72x96
  diagd world train trained --data recordings --steps 1200
  torchrun --nproc-per-node 4 -m diagd world train trained --data recordings --device cuda
  diagd-export --model world --checkpoint trained --output world.diagd
"""

RECORDED = {"recording.json": b'"actions"'}
TRAINED = {
    "config.json": b'"patch"',
    "codebook.npz": b"codebook",
    "log.jsonl": b'"step"',
    "tokenizer.jsonl": b'"step"',
}
"""Files that folders of the two kinds have, and what stands in each."""


def run_collect(options: CollectOptions) -> None:
    """Record episodes."""
    folder_target(options.output, RECORDED, "a recording", "OUTPUT")
    from worlds.collect import collect

    written = 0
    with Bars(terminal.console()).count("episodes", options.episodes) as advance:
        for _ in collect(options):
            written += 1
            advance(1)
    terminal.console().print(f"{written} new episodes of {options.episodes} in {options.output}")


def run_import(options: ImportOptions) -> None:
    """Turn videos into episodes."""
    folder_target(options.output, RECORDED, "a recording", "OUTPUT")
    from worlds.collect import import_videos

    with terminal.console().status("reading videos"):
        written = sum(1 for _ in import_videos(options))
    terminal.console().print(f"{written} new episodes in {options.output}")


def run_train(options: TrainOptions) -> None:
    """Train a model."""
    place = folder_target(options.output, TRAINED, "a trained world", "OUTPUT")
    from worlds.train import train

    with turn(place) if is_first() else nullcontext():
        folder = train(options, print_step)
    if not is_first():
        return
    frames = json.loads((folder / "config.json").read_text("utf-8"))["training"]["reconstruction"]
    print(  # noqa: T201
        f"trained {options.size} in {options.steps} steps: {folder}\n"
        f"tokenizer: PSNR {frames['psnr']:.1f} dB, SSIM {frames['ssim']:.3f}, "
        f"{frames['used']} of {frames['codes']} ids in use"
    )


def print_step(progress: Progress) -> None:
    """Report a training step; runs in the first worker process.

    A terminal has one line that is written over, a file one now and then.
    """
    rate = progress.seconds / max(1, progress.step - progress.first)
    ends, shown = progress.step == progress.steps, sys.stdout.isatty()
    if not (ends or shown or progress.seconds // EVERY > (progress.seconds - rate) // EVERY):
        return
    loss = "" if progress.loss is None else f"  loss {progress.loss:.4f}"
    seconds = (progress.steps - progress.step) * rate
    time = f"{seconds / 60:.0f} min" if seconds > 60 else f"{seconds:.0f} s"
    left = "" if ends else f"  about {time} left"
    line = f"{progress.part} {progress.step}/{progress.steps}{loss}{left}"
    with terminal.streams() as (out, _):
        out.write((line.ljust(70) if shown else line) + ("\r" if shown and not ends else "\n"))


VERB = {
    "collect": Verb(CollectOptions, run_collect, EXAMPLES, "record episodes of a game"),
    "import": Verb(ImportOptions, run_import, EXAMPLES, "turn videos with action lines into episodes"),
    "train": Verb(
        TrainOptions, run_train, EXAMPLES, "train tokenizer and transformer; resumes where it was stopped"
    ),
}
