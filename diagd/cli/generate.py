"""``diagd generate``: frames from a bundle, a prompt and actions."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

from diagd.cli import terminal
from diagd.cli.paths import path
from diagd.cli.schedule_options import add_schedule_options, parse_schedule
from diagd.cli.settings import add_set_option, parse_settings
from diagd.errors import UsageError, require
from diagd.progress import Progress

if TYPE_CHECKING:
    from rich.console import Console

    from diagd.bundle import Manifest
    from diagd.engines.engine import Float, Int
    from diagd.runtime.pixels import PixelCodec
    from diagd.runtime.sampling import SamplingSettings
    from diagd.runtime.session import Session

EPILOG = """examples:
  diagd-generate crafter-3m.diagd --prompt first.png --actions walk.jsonl --output walk.mp4
  diagd-generate crafter-3m.diagd --prompt first.png --actions walk.jsonl --output walk.gif --k 2 --d chained
  diagd-generate mineworld.diagd --prompt tokens.npy --actions play.jsonl --output out.npy --temperature 0

An action file holds one JSON object a line: the action that leads to each frame to be made.
--d is the number of steps between the starts of two frames: 'serial' (a frame is finished before the next
starts), 'chained' (the next frame follows row by row: fewest passes), or a number between the two.
"""


class GenerateSettings(BaseModel):
    """Options behind ``--set``."""

    model_config = ConfigDict(extra="forbid")
    window: int | None = Field(None, description="frames that a token may see (default: the model's context)")
    threads: int = Field(0, ge=0, description="CPU threads, 0 for one a core")
    refeed: bool = Field(True, description="feed the true token where a row seed stood in")
    precision: str | None = Field(None, description="of the step graph (default: the bundle's first)")
    backend: str = Field("cpu", description="cpu, cuda, tensorrt or tensorrt_rtx")
    compat: str | None = Field(None, description="'mineworld' reproduces the released code's cache")
    roll: int | None = Field(None, description="frames by which learned positions slide at once")
    text: Path | None = Field(None, description="text embeddings, .npy or .safetensors [n, width]")
    words: str | None = Field(None, description="text for the encoder t5, in place of embeddings")
    t5: Path | None = Field(None, description="folder of a T5 encoder")
    resize: bool = Field(False, description="resize a prompt of another size")
    prompt_frames: int = Field(
        1, ge=1, le=1_000_000, description="frames taken from a prompt video, its last ones"
    )
    fps: float | None = Field(None, gt=0, description="of the video written (default: the model's)")
    prepack: bool = Field(True, description="cache packed weights on this machine")


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    parser.epilog = EPILOG
    parser.add_argument("bundle", type=path)
    parser.add_argument("--prompt", type=path, required=True, help="image, video or .npy tokens [P, h, w]")
    parser.add_argument("--actions", type=path, help="JSON lines, one action for each frame to make")
    parser.add_argument("--frames", type=int, help="how many (default: one for each action)")
    parser.add_argument("--output", type=path, required=True, help=".mp4, .gif, or .npy for tokens")
    add_schedule_options(parser)
    parser.add_argument("--temperature", type=float, help="0 is greedy (default: the bundle's)")
    parser.add_argument("--top-p", type=float, help="nucleus mass, 1 for all (default: the bundle's)")
    parser.add_argument("--top-k", type=int, help="most probable ids, 0 for all (default: the bundle's)")
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers (default %(default)s)")
    add_set_option(parser, GenerateSettings)


def run(args: argparse.Namespace) -> int:
    """Generate and write the frames; nothing is written on failure."""
    from diagd.bundle import Bundle
    from diagd.bundle.targets import check_apart
    from diagd.engines import backend
    from diagd.engines.onnxruntime_session import CpuOptions
    from diagd.runtime.load import open_session
    from diagd.runtime.output import check_output
    from diagd.runtime.pixels import PixelCodec

    settings = parse_settings(GenerateSettings, args.settings)
    check_output(args.output)
    read = {"--prompt": args.prompt, "--actions": args.actions, "--set text": settings.text}
    check_apart(args.output, read)
    bundle = Bundle.open(args.bundle)
    compat = settings.compat is not None
    schedule = parse_schedule(args, bundle.manifest, refeed=settings.refeed and not compat, keep_seeds=compat)
    sampling = _sampling(args, bundle.manifest)
    actions, frames = _actions(args, bundle.manifest)
    cpu = CpuOptions(settings.threads, settings.prepack)
    only_tokens = args.prompt.suffix.lower() == args.output.suffix.lower() == ".npy"
    opener = backend.find(settings.backend)
    pixels = None if only_tokens else PixelCodec(bundle, cpu, opener)
    prompt = _prompt(args, settings, bundle.manifest, pixels)
    session = open_session(
        bundle,
        window=settings.window,
        cpu=cpu,
        compat=settings.compat,
        roll=settings.roll,
        precision=settings.precision,
        backend=opener,
    )
    session.start(prompt, _idle(bundle.manifest, len(prompt)), _text(settings, bundle.manifest))
    console, began, decoding = terminal.console(), time.perf_counter(), 0.0
    with Progress(console).count(f"{args.bundle.name} k={schedule.k} d={schedule.d}", frames) as advance:

        def decoded() -> Iterator[Int]:
            nonlocal decoding
            for frame in session.generate(
                frames, actions, schedule=schedule, sampling=sampling, seed=args.seed
            ):
                advance(1)
                decoding += frame.seconds
                yield frame.tokens

        _write(args.output, prompt, decoded(), pixels, settings.fps or bundle.manifest.frames_per_second)
    _report(console, session, frames, (time.perf_counter() - began, decoding), args.output)
    return 0


def _sampling(args: argparse.Namespace, manifest: Manifest) -> SamplingSettings:
    from diagd.runtime.sampling import SamplingSettings

    rules = manifest.sampling
    return SamplingSettings(
        rules.temperature if args.temperature is None else args.temperature,
        rules.top_k if args.top_k is None else args.top_k,
        rules.top_p if args.top_p is None else args.top_p,
    )


def _actions(args: argparse.Namespace, manifest: Manifest) -> tuple[Int | None, int]:
    """Action ids [frames, n] and the number of frames."""
    from diagd.runtime.actions import read_actions

    if manifest.actions is None:
        if args.frames is None:
            raise UsageError(f"{manifest.name} takes no actions: say how many frames with --frames N")
        return None, args.frames
    if args.actions is None:
        raise UsageError(f"{manifest.name} is driven by actions: give --actions FILE, one JSON object a line")
    actions = read_actions(args.actions, manifest.actions)
    frames = len(actions) if args.frames is None else args.frames
    if not 1 <= frames <= len(actions):
        raise UsageError(
            f"--frames {frames}: {args.actions} has actions for 1..{len(actions)}; add lines, or hold the "
            'last action with "repeat": N'
        )
    return actions[:frames], frames


def _idle(manifest: Manifest, frames: int) -> Int | None:
    """No-op actions for the prompt's frames."""
    import numpy as np

    from diagd.runtime.actions import encode

    codec = manifest.actions
    return None if codec is None else np.tile(encode(codec, {}), (frames, 1))


def _prompt(
    args: argparse.Namespace, settings: GenerateSettings, manifest: Manifest, pixels: PixelCodec | None
) -> Int:
    from diagd.runtime.prompt import read_prompt, read_tokens

    if args.prompt.suffix.lower() == ".npy" or pixels is None:
        return read_tokens(args.prompt, manifest)
    return read_prompt(args.prompt, pixels, settings.prompt_frames, settings.resize)


def _text(settings: GenerateSettings, manifest: Manifest) -> Float | None:
    """Text embeddings, from a file or from words and an encoder."""
    from diagd.runtime.text import read_text

    if settings.words is None:
        return read_text(settings.text) if settings.text else None
    if manifest.text is None or settings.t5 is None or settings.text:
        raise UsageError("words need a model that attends to text, --set t5=FOLDER, and no --set text")
    require("torch", extra="text", purpose="encode text with T5")
    from diagd.export.text_encoder import encode_text

    return encode_text(settings.words, settings.t5, manifest.text.length)


def _write(output: Path, prompt: Int, frames: Iterator[Int], pixels: PixelCodec | None, fps: float) -> None:
    from diagd.runtime.output import write_tokens, write_video

    if output.suffix.lower() == ".npy" or pixels is None:
        write_tokens(output, frames)
    else:
        write_video(output, prompt, frames, pixels, fps)


def _report(
    console: Console, session: Session, frames: int, seconds: tuple[float, float], output: Path
) -> None:
    """Say what it took: ``seconds`` in all, and of the frames' tokens alone."""
    timing, (wall, decoding) = session.timing, seconds
    engine, host, both = (
        f"{1e3 * taken / timing.steps:.2f} ms" for taken in (timing.engine, timing.host, decoding)
    )
    # What the host saw of an engine that it runs ahead of is how long queueing took.
    passes = f"of {both}" if session.engine.ahead else f"of {engine}, host {host} a pass"
    console.print(
        f"{frames} frames in {wall:.2f} s, {frames / wall:.2f} frames/s: "
        f"{timing.steps} passes {passes}: {output}"
    )
    if timing.refill_steps:
        console.print(
            f"the sliding window was fed again in {timing.refill_steps} further passes, "
            f"{timing.refill_seconds:.2f} s of the total; a larger --set roll slides less often"
        )
