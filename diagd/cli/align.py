"""``diagd align``: fine-tune a model to the visibility and the seeds of decoding schedules."""

from __future__ import annotations

import argparse
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

from diagd.cli import terminal
from diagd.cli.paths import path
from diagd.cli.settings import add_set_option, parse_settings
from diagd.errors import UsageError, require
from diagd.progress import Progress
from diagd.schedule import RowSeed, Schedule

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from diagd.bundle import Bundle
    from diagd.bundle.transformer import TransformerConfig
    from diagd.export.families.family import Family
    from diagd.schedule import StreamLayout
    from diagd.tuning.align import AlignOptions, Report
    from diagd.tuning.recordings import FrameEncoder

EPILOG = """examples:
  diagd align crafter-3m.diagd --data recordings --k 1 2 --d chained serial --output aligned.diagd
  diagd align trained --data recordings --output aligned
  diagd align 300M_16f.ckpt --model mineworld-300m --data tokens.npy --output aligned.safetensors

SOURCE is a bundle, the folder of a trained world, or a checkpoint together with its --model.
--data is a folder of recordings made by `diagd world` (for worlds), or a .npy token stream of one video.
--output is of the same kind: a bundle, a world's folder, or a .safetensors for `diagd export --checkpoint`.
Several --k and --d name several schedules that share the windows; next-token prediction keeps raster of them.
"""


class AlignSettings(BaseModel):
    """Options behind ``--set``."""

    model_config = ConfigDict(extra="forbid")
    steps: int = Field(200, ge=1, description="optimiser steps")
    frames: int = Field(4, ge=2, description="frames of a window")
    raster: float = Field(0.4, ge=0, lt=1, description="share of next-token windows")
    rank: int = Field(0, ge=0, description="of low-rank updates; 0 trains all weights")
    seed_policy: RowSeed = Field(RowSeed.PREVIOUS_FRAME, description="row seed")
    text: Path | None = Field(None, description="text embeddings of --data, for models that read text")
    seed: int = Field(0, description="of windows, schedules and low-rank factors")


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    parser.epilog = EPILOG
    parser.add_argument("source", help="bundle, or weights: file, folder or hf://org/name[@revision]")
    parser.add_argument("--model", help="name of a checkpoint's model; bundles and folders say it")
    parser.add_argument("--data", type=path, required=True, help="recordings, or a .npy token stream")
    parser.add_argument("--output", type=path, required=True, help="bundle, folder or .safetensors to write")
    parser.add_argument("--k", type=int, nargs="+", default=[1], help="row lags (default 1)")
    parser.add_argument(
        "--d", nargs="+", default=["chained"], help="frame lags, one or one a row lag (default chained)"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="windows of a step (default %(default)s)")
    parser.add_argument("--rate", type=float, default=3e-4, help="peak learning rate (default %(default)s)")
    add_set_option(parser, AlignSettings)


def run(args: argparse.Namespace) -> int:
    """Align and write the new weights."""
    require("torch", extra="export", purpose="fine-tune a model")

    settings = parse_settings(AlignSettings, args.settings)
    losses: list[float] = []
    with Progress(terminal.console()).count("aligning", settings.steps) as advance:

        def report(step: int, loss: float) -> None:
            del step
            losses.append(loss)
            advance(1)

        output = _align(args, settings, report)
    span = max(1, len(losses) // 10)
    first, last = sum(losses[:span]) / span, sum(losses[-span:]) / span
    terminal.console().print(f"{settings.steps} steps, loss {first:.4f} -> {last:.4f} nats a token: {output}")
    return 0


@dataclass(frozen=True)
class _Source:
    """What is aligned: a bundle, or the checkpoint of a family."""

    bundle: Bundle | None = None
    family: Family | None = None

    @property
    def config(self) -> TransformerConfig:
        """Of the transformer."""
        if self.bundle is not None:
            return self.bundle.manifest.transformer
        assert self.family is not None
        return self.family.transformer

    def encoder(self) -> FrameEncoder | None:
        """What recordings are tokenised with; None where the source is no world."""
        from diagd.engines.onnxruntime_session import CpuOptions
        from diagd.export.families.world import load_tokenizer
        from diagd.tuning.recordings import FrameEncoder

        if self.bundle is not None:
            world = self.bundle.manifest.family == "world"
            return FrameEncoder.of_bundle(self.bundle, CpuOptions()) if world else None
        assert self.family is not None
        tokenizer = self.family.default_tokenizer if self.family.family == "world" else None
        return FrameEncoder.of_graphs(*load_tokenizer(Path(tokenizer).parent)) if tokenizer else None


def _align(args: argparse.Namespace, settings: AlignSettings, report: Report) -> Path:
    from diagd.export.exporter import open_sources
    from diagd.export.families.world import DESCRIPTION, WEIGHTS
    from diagd.runtime.text import read_text
    from diagd.tuning.align_bundle import align_bundle
    from diagd.tuning.align_checkpoint import align_checkpoint

    source, output = _open(args), Path(args.output)
    _check_output(args, source, settings.text)
    options = _options(args, settings, source.config.layout)
    text = read_text(settings.text) if settings.text else None
    if source.bundle is not None:
        streams = _streams(args, settings, source)
        return align_bundle(source.bundle, streams, options, output, report, text=text)
    family = source.family
    assert family is not None
    checkpoint = open_sources(family, args.source, None, pixels=False).transformer
    streams = _streams(args, settings, source)
    if family.default_tokenizer is None or output.suffix:
        return align_checkpoint(family, checkpoint, streams, options, output, report, text=text)
    align_checkpoint(family, checkpoint, streams, options, output / WEIGHTS, report)
    tokenizer = Path(family.default_tokenizer)
    for part in (tokenizer, tokenizer.with_name(DESCRIPTION)):
        shutil.copy(part, output / part.name)
    return output


def _check_output(args: argparse.Namespace, source: _Source, text: Path | None) -> None:
    """Refuse an output that would take something away, the weights that are read included."""
    from diagd.bundle.targets import bundle_target, check_apart, file_target, folder_target

    if source.bundle is not None:
        place = bundle_target(args.output)
    elif source.family is None or source.family.default_tokenizer is None or args.output.suffix:
        place = file_target(args.output, (".safetensors",))
    else:
        place = folder_target(args.output, {"config.json": b'"patch"'}, "a trained world")
    if str(place) == str(Path(args.source).resolve()):
        raise UsageError(f"--output {args.output} is what is read; give another place")
    check_apart(place, {"--data": args.data, "--set text": text})


def _open(args: argparse.Namespace) -> _Source:
    from diagd.bundle import Bundle
    from diagd.bundle.manifest import MANIFEST_NAME
    from diagd.export.families.registry import find
    from diagd.export.families.world import DESCRIPTION

    path = Path(args.source)
    if (path / MANIFEST_NAME).exists():
        if args.model:
            raise UsageError(f"--model {args.model}: a bundle says itself what it holds; leave --model out")
        return _Source(bundle=Bundle.open(path))
    if not args.model and not (path / DESCRIPTION).exists():
        raise UsageError(
            f"{args.source} is neither a bundle nor the folder of a world; name the --model of a checkpoint: "
            "`diagd models` lists them"
        )
    return _Source(family=find(args.model or "world", args.source))


def _options(args: argparse.Namespace, settings: AlignSettings, layout: StreamLayout) -> AlignOptions:
    from diagd.tuning.align import AlignOptions

    lags = args.d * len(args.k) if len(args.d) == 1 else args.d
    if len(lags) != len(args.k):
        raise UsageError(
            f"{len(args.k)} row lags but {len(lags)} frame lags: give one --d, or one for each --k"
        )
    schedules = [_schedule(layout, k, d, settings.seed_policy) for k, d in zip(args.k, lags, strict=True)]
    shares = [(settings.raster, Schedule.next_token(layout))] if settings.raster else []
    shares += [((1 - settings.raster) / len(schedules), schedule) for schedule in schedules]
    return AlignOptions(
        tuple(shares),
        settings.steps,
        args.batch,
        args.rate,
        rank=settings.rank,
        seed=settings.seed,
        device=args.device,
    )


def _schedule(layout: StreamLayout, k: int, d: str, seed: RowSeed) -> Schedule:
    named = {"serial": Schedule.serial, "chained": Schedule.chained}
    if d in named:
        return named[d](layout, k, seed)
    if not (d.isascii() and d.isdigit()):
        raise UsageError(f"--d {d}: expected serial, chained or a number of steps")
    return Schedule(layout, k, int(d), seed)


def _streams(args: argparse.Namespace, settings: AlignSettings, source: _Source) -> NDArray[np.int64]:
    from diagd.tuning.align_checkpoint import read_windows
    from diagd.tuning.recordings import cached_tokens

    frames = settings.frames
    if args.data.suffix == ".npy":
        return read_windows(args.data, source.config, frames)
    encoder = source.encoder()
    if encoder is None:
        raise UsageError(f"--data {args.data}: {args.source} is no world; give a .npy token stream")
    recording = cached_tokens(args.data, encoder)
    starts = recording.window_starts(frames)[:: max(1, frames // 2)]
    return recording.windows(starts, frames)
