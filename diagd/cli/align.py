"""``diagd align``: fine-tune a checkpoint to the visibility and the seeds of decoding schedules."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from diagd.errors import UsageError, require
from diagd.progress import Progress

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from diagd.calibration.align import Report
    from diagd.export.families.family import Family
    from diagd.schedule import Schedule, StreamLayout

EPILOG = """examples:
  diagd align --model world --checkpoint trained --data recordings --lags 1:chained --output aligned
  diagd align --model mineworld-300m --checkpoint 300M_16f.ckpt --data tokens.npy --output aligned.safetensors

--data is a folder of recordings made by `diagd world` (for worlds), or a .npy token stream of one video.
--output is a checkpoint for `diagd export`; for worlds it may be a folder like that of the training.
--lags K:D may be given several times; next-token prediction keeps the share --raster.
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    parser.epilog = EPILOG
    parser.add_argument("--model", required=True, help="name of the model; `diagd models` lists them")
    parser.add_argument("--checkpoint", help="its weights: file, folder or hf://org/name[@revision]")
    parser.add_argument("--data", type=Path, required=True, help="recordings, or a .npy token stream")
    parser.add_argument("--output", type=Path, required=True, help="folder or .safetensors to write")
    parser.add_argument("--lags", action="append", help="K:D of a schedule to align to (default 1:chained)")
    parser.add_argument("--raster", type=float, default=0.4, help="share of next-token windows (%(default)s)")
    parser.add_argument("--steps", type=int, default=200, help="optimiser steps (default %(default)s)")
    parser.add_argument("--frames", type=int, default=4, help="frames of a window (default %(default)s)")
    parser.add_argument("--rank", type=int, default=0, help="of low-rank updates, 0 for all weights")
    parser.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> int:
    """Align and write the new weights."""
    require("torch", extra="export", purpose="fine-tune a model")
    from rich.console import Console

    losses: list[float] = []
    with Progress(Console()).count("aligning", args.steps) as advance:

        def report(step: int, loss: float) -> None:
            del step
            losses.append(loss)
            advance(1)

        output = _align(args, report)
    span = max(1, len(losses) // 10)
    first, last = sum(losses[:span]) / span, sum(losses[-span:]) / span
    Console().print(f"{args.steps} steps, loss {first:.4f} -> {last:.4f} nats a token: {output}")
    return 0


def _align(args: argparse.Namespace, report: Report) -> Path:
    from diagd.calibration.align import AlignOptions
    from diagd.calibration.align_checkpoint import align_checkpoint
    from diagd.export.exporter import open_sources
    from diagd.export.families.registry import find
    from diagd.schedule import Schedule

    family = find(args.model, args.checkpoint)
    layout = family.transformer.layout
    schedules = _schedules(args, layout)
    shares = [(args.raster, Schedule.next_token(layout))] if args.raster else []
    shares += [((1 - args.raster) / len(schedules), schedule) for schedule in schedules]
    options = AlignOptions(tuple(shares), args.steps, rank=args.rank, seed=args.seed)
    source = open_sources(family, args.checkpoint, None).transformer
    streams = _streams(args, family)
    output: Path = args.output
    if family.default_tokenizer and not output.suffix:
        output = _copy_world(Path(family.default_tokenizer).parent, output)
    return align_checkpoint(family, source, streams, options, output, report)


def _copy_world(folder: Path, output: Path) -> Path:
    """Copy what a world's folder holds besides its weights; returns the weights' place in the copy."""
    from diagd.world.model import CODEBOOK, DESCRIPTION, WEIGHTS

    output.mkdir(parents=True, exist_ok=True)
    for name in (CODEBOOK, DESCRIPTION):
        shutil.copy(folder / name, output / name)
    return output / WEIGHTS


def _streams(args: argparse.Namespace, family: Family) -> NDArray[np.int64]:
    from diagd.calibration.align_checkpoint import read_windows

    if args.data.suffix == ".npy":
        return read_windows(args.data, family, args.frames)
    if family.default_tokenizer is None:
        raise UsageError(f"--data {args.data}: {family.name} is aligned on a .npy token stream")
    from diagd.world.dataset import cached_tokens
    from diagd.world.model import load_codebook

    recording = cached_tokens(args.data, load_codebook(Path(family.default_tokenizer).parent))
    starts = recording.window_starts(args.frames)[:: max(1, args.frames // 2)]
    return recording.windows(starts, args.frames)


def _schedules(args: argparse.Namespace, layout: StreamLayout) -> list[Schedule]:
    if not 0 <= args.raster < 1:
        raise UsageError(f"--raster {args.raster}: expected a share from 0 up to, but not including, 1")
    return [_schedule(layout, given) for given in args.lags or ["1:chained"]]


def _schedule(layout: StreamLayout, given: str) -> Schedule:
    from diagd.schedule import Schedule

    k, _, d = given.partition(":")
    if not k.isdigit() or not (d.isdigit() or d in ("serial", "chained")):
        raise UsageError(f"--lags {given}: expected K:D, D a number, serial or chained")
    if d.isdigit():
        return Schedule(layout, int(k), int(d))
    return Schedule.serial(layout, int(k)) if d == "serial" else Schedule.chained(layout, int(k))
