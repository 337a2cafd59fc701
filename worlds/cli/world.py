"""``diagd world``: record a world, import videos of one, and train a model of it."""

from __future__ import annotations

import argparse
import json
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from diagd.bundle.targets import folder_target
from diagd.cli import terminal
from diagd.cli.paths import path
from diagd.errors import UsageError
from diagd.progress import Progress as Bars

if TYPE_CHECKING:
    from worlds.progress import Progress

EPILOG = """examples:
  diagd world collect recordings
  diagd world collect walks --game doom --episodes 300 --steps 400
  diagd world import recordings --videos clips/ --actions noop,left,right --size 72x96
  diagd world train trained --data recordings --steps 1200
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


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the tasks and their options."""
    parser.epilog = EPILOG
    tasks = parser.add_subparsers(dest="task", metavar="TASK", required=True)
    collect = tasks.add_parser("collect", help="record episodes of a game")
    collect.add_argument("output", type=path, help="folder; episodes already there are kept")
    collect.add_argument("--game", default="crafter", help="crafter or doom (default %(default)s)")
    collect.add_argument("--episodes", type=int, default=720, help="default %(default)s")
    collect.add_argument("--steps", type=int, default=200, help="longest episode (default %(default)s)")
    collect.add_argument("--seed", type=int, default=0)
    collect.add_argument("--processes", type=int, default=2)
    videos = tasks.add_parser("import", help="turn videos with action lines into episodes")
    videos.add_argument("output", type=path)
    videos.add_argument("--videos", type=path, required=True, help="folder of run.mp4 beside run.jsonl")
    videos.add_argument("--actions", required=True, help="names in the order of their ids: noop,left,right")
    videos.add_argument("--size", required=True, help="HEIGHTxWIDTH that frames are resized to")
    train = tasks.add_parser("train", help="train tokenizer and transformer; resumes where it was stopped")
    train.add_argument("output", type=path, help="folder of the trained model")
    train.add_argument("--data", type=path, required=True, help="folder of episodes")
    train.add_argument("--size", default="3m", help="0.7m, 3m or 10m (default %(default)s)")
    train.add_argument("--mixture", default="mixture", help="ntp, diagonal or mixture (default %(default)s)")
    train.add_argument("--tokenizer", default="auto", help="auto, patches or learned (default %(default)s)")
    train.add_argument("--steps", type=int, default=1200, help="optimiser steps (default %(default)s)")
    train.add_argument("--batch", type=int, default=10, help="windows of a step (default %(default)s)")
    train.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default %(default)s)")
    train.add_argument("--processes", type=int, help="default: 2 on a CPU, one a GPU")
    train.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> int:
    """Run the chosen task."""
    marks, what = (TRAINED, "a trained world") if args.task == "train" else (RECORDED, "a recording")
    folder_target(args.output, marks, what, "OUTPUT")
    return {"collect": _collect, "import": _import, "train": _train}[args.task](args)


def _collect(args: argparse.Namespace) -> int:

    from worlds.collect import CollectOptions, collect

    options = CollectOptions(**_chosen(CollectOptions, args))
    written = 0
    with Bars(terminal.console()).count("episodes", args.episodes) as advance:
        for _ in collect(options):
            written += 1
            advance(1)
    terminal.console().print(f"{written} new episodes of {args.episodes} in {args.output}")
    return 0


def _import(args: argparse.Namespace) -> int:

    from worlds.collect import ImportOptions, import_videos

    height, _, width = args.size.partition("x")
    if not all(side.isascii() and side.isdigit() for side in (height, width)):
        raise UsageError(f"--size {args.size}: expected HEIGHTxWIDTH, such as 72x96")
    names = tuple(name.strip() for name in args.actions.split(","))
    options = ImportOptions(args.videos, args.output, names, (int(height), int(width)))
    with terminal.console().status("reading videos"):
        written = sum(1 for _ in import_videos(options))
    terminal.console().print(f"{written} new episodes in {args.output}")
    return 0


def _train(args: argparse.Namespace) -> int:
    from worlds.train import TrainOptions, train

    folder = train(TrainOptions(**_chosen(TrainOptions, args)), print_step)
    frames = json.loads((folder / "config.json").read_text())["training"]["reconstruction"]
    print(  # noqa: T201
        f"trained {args.size} in {args.steps} steps: {folder}\n"
        f"tokenizer: PSNR {frames['psnr']:.1f} dB, SSIM {frames['ssim']:.3f}, "
        f"{frames['used']} of {frames['codes']} ids in use"
    )
    return 0


def _chosen(options: type[Any], args: argparse.Namespace) -> dict[str, Any]:
    """The flags that are fields of an options class; the others keep their defaults."""
    names = {field.name for field in fields(options)}
    return {name: value for name, value in vars(args).items() if name in names}


def print_step(progress: Progress) -> None:
    """Report a training step on one line that is written over; runs in the first worker process."""
    rate = progress.seconds / max(1, progress.step - progress.first)
    left = (progress.steps - progress.step) * rate / 60
    loss = "" if progress.loss is None else f"  loss {progress.loss:.4f}"
    end = "\n" if progress.step == progress.steps else "\r"
    line = f"{progress.part} {progress.step}/{progress.steps}{loss}  about {left:.0f} min left  "
    with terminal.streams() as (out, _):
        out.write(line + end)
