"""Video to tokens and back through the tokenizer of a bundle."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from pydantic.dataclasses import dataclass

from diagd.bundle import Bundle
from diagd.bundle.targets import check_apart, file_target
from diagd.engines.backend import CHOICES, find
from diagd.engines.onnxruntime_session import CpuOptions
from diagd.errors import UsageError
from diagd.options import OPTIONS, File, flag, positional, setting
from diagd.progress import Progress
from diagd.runtime.clip import read_tokens
from diagd.runtime.pictures import read_frames
from diagd.runtime.pixels import PixelCodec, Pixels
from diagd.runtime.video import SUFFIXES, psnr, squared_error, write_tokens, write_video


@dataclass(frozen=True, config=OPTIONS)
class TranscodeOptions:
    """By which tokenizer, and where it runs."""

    bundle: File = positional("whose tokenizer it is")
    resize: bool = setting("resize pictures of another size", False)
    backend: str = setting(CHOICES, "cpu")
    cpu: CpuOptions = CpuOptions()

    def codec(self) -> PixelCodec:
        """The tokenizer."""
        return PixelCodec(Bundle.open(self.bundle), self.cpu, find(self.backend))


@dataclass(frozen=True, config=OPTIONS)
class EncodeOptions(TranscodeOptions):
    """What becomes tokens."""

    video: File = positional("video or image")
    output: File = flag(".npy, int32 [frames, rows, columns]")
    start: int = flag("first picture (default 0)", 0, ge=0, le=1_000_000_000)
    frames: int | None = flag(
        "pictures at most (default: all that make whole token frames)", None, ge=1, le=1_000_000
    )


@dataclass(frozen=True, config=OPTIONS)
class DecodeOptions(TranscodeOptions):
    """What becomes a video."""

    tokens: File = positional(".npy, int [frames, rows, columns]")
    output: File = flag(".mp4 or .gif")
    against: File | None = flag("video to measure the PSNR to", None)
    fps: float | None = setting("of the video (default: the model's)", None, gt=0)


@dataclasses.dataclass(frozen=True)
class Transcoded:
    """Token frames and pictures that were read or written, and the PSNR of the pictures, dB."""

    frames: int
    pictures: int
    psnr: float | None


def encode(options: EncodeOptions, progress: Progress | None = None) -> Transcoded:
    """Write a video's tokens; the PSNR is that of the video they decode to.

    Raises:
        UsageError: the video cannot be read or has another size, or the bundle has no tokenizer.
    """
    file_target(options.output, (".npy",))
    check_apart(options.output, {"VIDEO": options.video})
    codec = options.codec()
    pictures = _pictures(codec, options.video, options.start, options.frames, options.resize)
    pictures = pictures[: len(pictures) - (len(pictures) - 1) % codec.spec.temporal_factor]
    with (progress or Progress()).task("encoding"):
        tokens = codec.encode(pictures)
    with (progress or Progress()).count("decoding", len(pictures)) as advance:
        errors = []
        for shown, true in zip(codec.decode(tokens), pictures, strict=True):
            errors.append(squared_error(shown, true))
            advance(1)
    write_tokens(options.output, tokens)
    return Transcoded(len(tokens), len(pictures), psnr(errors))


def decode(options: DecodeOptions, progress: Progress | None = None) -> Transcoded:
    """Write the video of tokens.

    Raises:
        UsageError: the tokens are not of the model, or what they are measured against is too short.
    """
    file_target(options.output, SUFFIXES)
    check_apart(options.output, {"TOKENS": options.tokens, "--against": options.against})
    bundle = Bundle.open(options.bundle)
    codec, layout = options.codec(), bundle.manifest.layout
    tokens = read_tokens(options.tokens, bundle.manifest)
    if tokens.shape[1:] != (layout.rows, layout.columns):
        raise UsageError(
            f"{options.tokens} has shape {list(tokens.shape)}; expected [frames, {layout.rows}, "
            f"{layout.columns}]"
        )
    count, truth = codec.pictures_of(len(tokens)), None
    if options.against is not None:
        truth = _pictures(codec, options.against, 0, count, options.resize)
        if len(truth) < count:
            raise UsageError(
                f"--against {options.against} has {len(truth)} pictures, the tokens have {count}"
            )
    with (progress or Progress()).count("decoding", count) as advance:

        def shown() -> Iterator[Pixels]:
            for picture in codec.decode(tokens):
                advance(1)
                yield picture

        fps = options.fps or bundle.manifest.frames_per_second
        return Transcoded(len(tokens), count, write_video(options.output, shown(), fps, codec.mark, truth))


def _pictures(codec: PixelCodec, path: File, start: int, frames: int | None, resize: bool) -> Pixels:
    spec = codec.spec
    return read_frames(
        path, (spec.height, spec.width), frames=frames, start=start, resize=resize, cover=spec.cover
    )
