"""Frames from a bundle, a prompt and actions, to a file."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass

from diagd.bundle import Bundle, Manifest
from diagd.bundle.manifest import SamplingRules
from diagd.engines.backend import find
from diagd.engines.engine import Float, Int
from diagd.engines.onnxruntime_session import CpuOptions
from diagd.errors import UsageError
from diagd.options import FLAG, OPTIONS, POSITIONAL, File
from diagd.progress import Progress
from diagd.runtime.actions import encode, read_actions
from diagd.runtime.decoders import ScheduledDecoder
from diagd.runtime.load import open_session
from diagd.runtime.output import check_output, write_tokens, write_video
from diagd.runtime.pixels import PixelCodec
from diagd.runtime.prompt import read_prompt, read_tokens
from diagd.runtime.sampling import SamplingSettings
from diagd.runtime.session import Session
from diagd.runtime.text import read_text
from diagd.schedule import Schedule

TextEncoder = Callable[[str, Path, int], Float]
"""Embeddings float32 [n, width] of words, by an encoder in a folder, at most so many."""


@dataclass(frozen=True, config=OPTIONS)
class SamplingOptions:
    """How tokens are drawn; what is not said is the bundle's."""

    temperature: float | None = Field(default=None, description="0 is greedy (default: the bundle's)")
    top_p: float | None = Field(default=None, description="nucleus mass, 1 for all (default: the bundle's)")
    top_k: int | None = Field(
        default=None, description="most probable ids, 0 for all (default: the bundle's)"
    )
    seed: int = Field(default=0, description="of the random numbers (default 0)")

    def settings(self, rules: SamplingRules) -> SamplingSettings:
        """With the defaults of a bundle.

        Raises:
            UsageError: a value is out of range.
        """
        return SamplingSettings(
            rules.temperature if self.temperature is None else self.temperature,
            rules.top_k if self.top_k is None else self.top_k,
            rules.top_p if self.top_p is None else self.top_p,
        )


@dataclass(frozen=True, config=OPTIONS)
class SessionOptions:
    """What decodes, and where."""

    precision: str | None = Field(default=None, description="of the step graph (default: the bundle's first)")
    backend: str = Field(default="cpu", description="cpu, cuda, tensorrt or tensorrt_rtx")
    window: int | None = Field(
        default=None, description="frames that a token may see (default: the model's context)"
    )
    compat: str | None = Field(default=None, description="'mineworld' reproduces the released code's cache")
    roll: int | None = Field(default=None, description="frames by which learned positions slide at once")
    cpu: CpuOptions = CpuOptions()

    def open(self, bundle: Bundle) -> Session:
        """A session over a bundle; see ``diagd.load``."""
        return open_session(
            bundle,
            window=self.window,
            cpu=self.cpu,
            compat=self.compat,
            roll=self.roll,
            precision=self.precision,
            backend=find(self.backend),
        )

    def pixels(self, bundle: Bundle) -> PixelCodec:
        """The bundle's tokenizer graphs, on the same backend."""
        return PixelCodec(bundle, self.cpu, find(self.backend))


@dataclass(frozen=True, config=OPTIONS)
class TextOptions:
    """What models that attend to text are told."""

    text: File | None = Field(default=None, description="text embeddings, .npy or .safetensors [n, width]")
    words: str | None = Field(default=None, description="text for the encoder t5, in place of embeddings")
    t5: File | None = Field(default=None, description="folder of a T5 encoder")

    def embeddings(self, manifest: Manifest, encode_text: TextEncoder | None) -> Float | None:
        """Float32 [n, width], from a file or from words and an encoder.

        Raises:
            UsageError: the file is none, or words come without an encoder or for a model without text.
        """
        if self.words is None:
            return read_text(self.text) if self.text else None
        if manifest.text is None or self.t5 is None or self.text or encode_text is None:
            raise UsageError("words need a model that attends to text, --set t5=FOLDER, and no --set text")
        return encode_text(self.words, self.t5, manifest.text.length)


@dataclass(frozen=True, config=OPTIONS)
class GenerateOptions:
    """What is generated, from what, and how."""

    bundle: Annotated[File, POSITIONAL] = Field(description="made by diagd-export")
    prompt: Annotated[File, FLAG] = Field(description="image, video or .npy tokens [P, h, w]")
    output: Annotated[File, FLAG] = Field(description=".mp4, .gif, or .npy for tokens")
    actions: Annotated[File | None, FLAG] = Field(
        default=None, description="JSON lines, one action for each frame to make"
    )
    frames: Annotated[int | None, FLAG] = Field(
        default=None, description="how many (default: one for each action)"
    )
    decoder: Annotated[str | None, FLAG] = Field(
        default=None,
        description="order of decoding, see below: k=1,chained or 'next token' (default: the bundle's)",
    )
    prompt_frames: int = Field(default=1, ge=1, description="frames taken from a prompt video, its last ones")
    resize: bool = Field(default=False, description="resize a prompt of another size")
    fps: float | None = Field(default=None, gt=0, description="of the video written (default: the model's)")
    sampling: SamplingOptions = SamplingOptions()
    session: SessionOptions = SessionOptions()
    condition: TextOptions = TextOptions()

    def schedule(self, manifest: Manifest) -> Schedule:
        """The order of decoding; released caches keep the rows of seeds."""
        order = manifest.schedule
        if self.decoder is not None:
            order = Schedule.parse(self.decoder, manifest.layout, order)
        return replace(order, refeed=False, keep_seeds=True) if self.session.compat else order

    def action_ids(self, manifest: Manifest) -> tuple[Int | None, int]:
        """Action ids [frames, n] and the number of frames.

        Raises:
            UsageError: the model needs what is not given.
        """
        if manifest.actions is None:
            if self.frames is None:
                raise UsageError(f"{manifest.name} takes no actions: say how many frames with --frames N")
            return None, self.frames
        if self.actions is None:
            raise UsageError(
                f"{manifest.name} is driven by actions: give --actions FILE, one JSON object a line"
            )
        actions = read_actions(self.actions, manifest.actions)
        frames = len(actions) if self.frames is None else self.frames
        if not 1 <= frames <= len(actions):
            raise UsageError(
                f"--frames {frames}: {self.actions} has actions for 1..{len(actions)}; add lines, or hold "
                'the last action with "repeat": N'
            )
        return actions[:frames], frames

    def prompt_tokens(self, manifest: Manifest, pixels: PixelCodec | None) -> Int:
        """Tokens int32 [P, rows, columns] of the prompt."""
        if self.prompt.suffix.lower() == ".npy" or pixels is None:
            return read_tokens(self.prompt, manifest)
        return read_prompt(self.prompt, pixels, self.prompt_frames, self.resize)


@dataclass(frozen=True)
class Made:
    """What was generated: ``seconds`` it took, ``decoding`` of them for tokens, over ``frames`` frames."""

    frames: int
    seconds: float
    decoding: float
    passes: int
    engine: float
    host: float
    ahead: bool
    refill_steps: int
    refill_seconds: float


def generate(
    options: GenerateOptions, progress: Progress | None = None, encode_text: TextEncoder | None = None
) -> Made:
    """Generate and write the frames; nothing is written on failure.

    Raises:
        DiagdError: an input or option is wrong, or the engine refuses.
    """
    check_output(options.output)
    bundle = Bundle.open(options.bundle)
    manifest = bundle.manifest
    schedule, settings = options.schedule(manifest), options.sampling.settings(manifest.sampling)
    actions, frames = options.action_ids(manifest)
    only_tokens = options.prompt.suffix.lower() == options.output.suffix.lower() == ".npy"
    pixels = None if only_tokens else options.session.pixels(bundle)
    prompt = options.prompt_tokens(manifest, pixels)
    with options.session.open(bundle) as session:
        session.start(
            prompt, _idle(manifest, len(prompt)), options.condition.embeddings(manifest, encode_text)
        )
        began, decoding = time.perf_counter(), 0.0
        title = f"{options.bundle.name} {schedule.name}"
        with (progress or Progress()).count(title, frames) as advance:

            def decoded() -> Iterator[Int]:
                nonlocal decoding
                made = session.frames(
                    ScheduledDecoder(schedule),
                    actions,
                    count=frames,
                    sampling=settings,
                    seed=options.sampling.seed,
                )
                for frame in made:
                    advance(1)
                    decoding += frame.seconds
                    yield frame.tokens

            _write(options.output, prompt, decoded(), pixels, options.fps or manifest.frames_per_second)
        timing = session.timing
        return Made(
            frames,
            time.perf_counter() - began,
            decoding,
            timing.steps,
            timing.engine,
            timing.host,
            session.engine.ahead,
            timing.refill_steps,
            timing.refill_seconds,
        )


def _idle(manifest: Manifest, frames: int) -> Int | None:
    """No-op actions for the prompt's frames."""
    codec = manifest.actions
    return None if codec is None else np.tile(encode(codec, {}), (frames, 1))


def _write(output: Path, prompt: Int, frames: Iterator[Int], pixels: PixelCodec | None, fps: float) -> None:
    if output.suffix.lower() == ".npy" or pixels is None:
        write_tokens(output, frames)
    else:
        write_video(output, prompt, frames, pixels, fps)
