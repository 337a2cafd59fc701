"""Files of frames: videos, with what a licence asks of them, and tokens; and from one to the other."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from fractions import Fraction
from itertools import chain
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from diagd.bundle import Bundle
from diagd.bundle.files import atomic_file
from diagd.bundle.manifest import MediaMark
from diagd.bundle.targets import check_apart, file_target
from diagd.engines.backend import CHOICES, find
from diagd.engines.engine import Int
from diagd.engines.onnxruntime_session import CpuOptions
from diagd.errors import UsageError
from diagd.options import File, checked, flag, positional, setting
from diagd.progress import Progress
from diagd.runtime.clip import read_tokens
from diagd.runtime.pictures import load_av, reporting, shown_size
from diagd.runtime.pictures import read_frames as read_frames  # noqa: PLC0414  # looked for beside `VideoWriter`
from diagd.runtime.pixels import PixelCodec, Pixels

SUFFIXES: Final = (".mp4", ".gif")
"""Kinds of video that can be written."""

TOKENS = ".npy"
OUTPUTS = (*SUFFIXES, TOKENS)
"""Kinds of files of frames."""


# By preference; which of them exist depends on how FFmpeg was built.
_ENCODERS: Final[tuple[tuple[str, dict[str, str]], ...]] = (
    ("libx264", {"crf": "17", "preset": "veryfast"}),
    ("libopenh264", {}),
    ("mpeg4", {}),
)
_BITS_PER_PIXEL: Final = 0.5  # of the encoders that have no constant quality
_GIF_RATE: Final = 50
"""Browsers show a picture of a .gif for 2/100 s at least; they take shorter delays for 1/10 s."""
_STUDIO_RANGE: Final = 1
_BT709: Final = 1
"""Number of the matrix, the primaries and the transfer function of BT.709 (ITU-T H.273)."""
_TAGGED: Final = {"movflags": "use_metadata_tags"}
"""Has FFmpeg write tags of any name into an .mp4."""
_HEIGHT = 12
"""Of the letters, in pixels, where the line fits the picture."""
_MARGIN = 10


class Stamp:
    """A line of white letters in the lower right corner.

    Letters shrink until the line fits ``size``, (height, width) of the pictures.
    """

    def __init__(self, text: str, size: tuple[int, int]) -> None:
        from PIL import Image, ImageDraw, ImageFont

        height, width = size
        margin = min(_MARGIN, height // 8, width // 8)
        long = ImageFont.load_default(_HEIGHT).getlength(text)
        letters = ImageFont.load_default(_HEIGHT * min(1.0, (width - 2 * margin) / long))
        image = Image.new("L", (width, height))
        ImageDraw.Draw(image).text((width - margin, height - margin), text, 255, letters, anchor="rs")
        self._cover: NDArray[np.uint16] = np.asarray(image, np.uint16)[:, :, None]

    def on(self, picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The picture uint8 [height, width, 3] with the line on it."""
        shown = picture + (255 - picture.astype(np.uint16)) * self._cover // 255
        return shown.astype(np.uint8)


def tag_gif(path: Path, text: str) -> None:
    """Add a comment to a .gif, which FFmpeg cannot: ahead of the byte that ends it."""
    comment = text.encode("ascii", "replace")[:255]
    with path.open("rb+") as file:
        file.seek(-1, 2)
        file.write(b"\x21\xfe" + bytes([len(comment)]) + comment + b"\x00\x3b")


class VideoWriter:
    """Writes frames to .mp4 or .gif; use as a context manager.

    The file appears when the block ends without an error, and not otherwise. The .mp4 is H.264 where FFmpeg
    has an encoder for it, else MPEG-4, in yuv420p of BT.709 and tagged so; the .gif has its own 256 colours
    in each frame, and leaves out frames of rates above the 50 a second that browsers show. Where the licence
    of a model asks for a mark, it is on every picture and in the tags of the file.
    """

    def __init__(
        self, path: str | Path, fps: float, size: tuple[int, int], mark: MediaMark | None = None
    ) -> None:
        """``size`` is (height, width).

        Raises:
            UsageError: an unknown suffix, rate or size.
        """
        self.path, self.size = Path(path), size
        if self.path.suffix.lower() not in SUFFIXES:
            raise UsageError(f"cannot write {path}: expected a name ending in {' or '.join(SUFFIXES)}")
        if not 0.01 <= fps <= 1000:
            raise UsageError(f"frame rate is {fps}; expected 0.01 to 1000 frames a second")
        if not self._paletted and (size[0] % 2 or size[1] % 2):
            raise UsageError(f"frames are {shown_size(size)}; .mp4 needs even sides, write a .gif instead")
        rate = Fraction(fps).limit_denominator(1001)
        self._rate = min(rate, Fraction(_GIF_RATE)) if self._paletted else rate
        self._share = self._rate / rate
        self._av = load_av()
        self._stack = ExitStack()
        self._written = 0
        self._mark, self._stamp = mark, Stamp(mark.text, size) if mark else None

    def __enter__(self) -> VideoWriter:
        partial = self._stack.enter_context(atomic_file(self.path))
        with self._reporting(), self._stack:
            # Registered after the temporary file, hence closed before it is renamed or removed.
            if self._mark and self._paletted:
                self._stack.callback(tag_gif, partial, self._mark.program)
            self._container = self._stack.enter_context(
                self._av.open(f"file:{partial}", "w", container_options=_TAGGED if self._mark else {})
            )
            if self._mark and not self._paletted:
                self._container.metadata.update(ProgramName=self._mark.program, comment=self._mark.program)
            self._stream = self._add_stream()
            self._palette = _Palette(self._av, self.size, self._rate) if self._paletted else None
            self._stack = self._stack.pop_all()
        return self

    def write(self, frames: NDArray[np.uint8]) -> None:
        """Append uint8 [H, W, 3] or [T, H, W, 3], RGB.

        Raises:
            UsageError: the frames have another size, or cannot be encoded.
        """
        if frames.dtype != np.uint8 or frames.ndim not in (3, 4) or frames.shape[-3:] != (*self.size, 3):
            raise UsageError(
                f"frames are {frames.dtype} {list(frames.shape)}; expected uint8 [T, {self.size[0]},"
                f" {self.size[1]}, 3]"
            )
        for pixels in frames.reshape(-1, *self.size, 3):
            shown = np.ascontiguousarray(pixels) if self._stamp is None else self._stamp.on(pixels)
            frame = self._av.VideoFrame.from_ndarray(shown, format="rgb24")
            number = math.floor(self._written * self._share)
            is_left_out = number == math.floor((self._written - 1) * self._share)
            self._written += 1
            if is_left_out:
                continue
            frame.pts, frame.time_base = number, 1 / self._rate
            with self._reporting():
                self._encode(self._palette.apply(frame) if self._palette else [_in_bt709(frame)])

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._stack.__exit__(kind, error, trace)
            return
        with self._reporting(), self._stack:
            if not self._written:
                raise UsageError(f"no frame was written to {self.path}; ask for at least one")
            self._encode([None])

    @property
    def _paletted(self) -> bool:
        return self.path.suffix.lower() == ".gif"

    def _add_stream(self) -> Any:
        name, options = ("gif", {}) if self._paletted else _encoder(self._av)
        stream = self._container.add_stream(name, rate=self._rate, options=options)
        stream.height, stream.width = self.size
        stream.pix_fmt = "pal8" if self._paletted else "yuv420p"
        if not self._paletted:
            context = stream.codec_context
            context.colorspace = context.color_primaries = context.color_trc = _BT709
            context.color_range = _STUDIO_RANGE
        if not (options or self._paletted):
            stream.bit_rate = math.ceil(self._rate * self.size[0] * self.size[1] * _BITS_PER_PIXEL)
        return stream

    def _encode(self, frames: Iterable[Any]) -> None:
        for frame in frames:
            for packet in self._stream.encode(frame):
                self._container.mux(packet)

    def _reporting(self) -> Any:
        return reporting(self._av, f"cannot write {self.path}", "check the disk and the path")


class _Palette:
    """A filter that gives every frame the palette that suits it best."""

    def __init__(self, av: ModuleType, size: tuple[int, int], rate: Fraction) -> None:
        self._again = av.BlockingIOError
        self._graph = graph = av.filter.Graph()
        self._source = graph.add_buffer(
            width=size[1], height=size[0], format=av.VideoFormat("rgb24"), time_base=1 / rate
        )
        split, generate = graph.add("split"), graph.add("palettegen", "stats_mode=single")
        use, self._sink = graph.add("paletteuse", "new=1"), graph.add("buffersink")
        self._source.link_to(split)
        split.link_to(generate, 0, 0)
        split.link_to(use, 1, 0)
        generate.link_to(use, 0, 1)
        use.link_to(self._sink)
        graph.configure()

    def apply(self, frame: Any) -> Iterator[Any]:
        self._source.push(frame)
        try:
            while True:
                yield self._sink.pull()
        except self._again:
            return


def _in_bt709(frame: Any) -> Any:
    """An RGB frame as yuv420p, with the time it had."""
    converted = frame.reformat(
        format="yuv420p", dst_colorspace="ITU709", src_color_range="JPEG", dst_color_range="MPEG"
    )
    converted.pts, converted.time_base = frame.pts, frame.time_base
    return converted


def _encoder(av: ModuleType) -> tuple[str, dict[str, str]]:
    """The best available encoder of .mp4, and its options."""
    for name, options in _ENCODERS:
        try:
            av.codec.Codec(name, "w")
        except av.codec.codec.UnknownCodecError:
            continue
        return name, dict(options)
    raise UsageError("this FFmpeg has no encoder for .mp4; write a .gif, or: pip install --upgrade av")


def write_tokens(path: Path, frames: Iterable[Int]) -> None:
    """Write int32 [T, rows, columns] as .npy; nothing is left of a failed run."""
    with atomic_file(path) as partial, partial.open("wb") as file:
        np.save(file, np.stack(list(frames)))


def write_video(
    path: Path,
    pictures: Iterable[Pixels],
    fps: float,
    mark: MediaMark | None,
    truth: Pixels | None = None,
    behind: int = 0,
) -> float | None:
    """Write pictures uint8 [height, width, 3] as .mp4 or .gif; nothing is left of a failed run.

    ``truth`` uint8 [T, height, width, 3] is what pictures should be from number ``behind`` on.

    Returns:
        PSNR of the pictures to the truth, dB; None without truth.
    """
    errors, images = [], iter(pictures)
    first = next(images)
    with VideoWriter(path, fps, (first.shape[0], first.shape[1]), mark) as writer:
        for number, image in enumerate(chain([first], images)):
            writer.write(image)
            if truth is not None and behind <= number < behind + len(truth):
                errors.append(squared_error(image, truth[number - behind]))
    return psnr(errors)


def squared_error(image: Pixels, true: Pixels) -> float:
    """Mean squared difference of two pictures."""
    return float(np.mean(np.square(image.astype(np.float32) - true.astype(np.float32))))


def psnr(errors: list[float]) -> float | None:
    """Peak signal to noise, dB, of mean squared errors of 8-bit pictures; None of none."""
    if not errors:
        return None
    mean = sum(errors) / len(errors)
    return math.inf if mean == 0 else 10 * math.log10(255**2 / mean)


@checked
class TranscodeOptions:
    """By which tokenizer, and where it runs."""

    bundle: File = positional("whose tokenizer it is")
    resize: bool = setting("resize pictures of another size", False)
    backend: str = setting(CHOICES, "cpu")
    cpu: CpuOptions = CpuOptions()

    def codec(self) -> PixelCodec:
        """The tokenizer."""
        return PixelCodec(Bundle.open(self.bundle), self.cpu, find(self.backend))


@checked
class EncodeOptions(TranscodeOptions):
    """What becomes tokens."""

    video: File = positional("video or image")
    output: File = flag(".npy, int32 [frames, rows, columns]")
    start: int = flag("first picture (default 0)", 0, ge=0, le=1_000_000_000)
    frames: int | None = flag(
        "pictures at most (default: all that make whole token frames)", None, ge=1, le=1_000_000
    )


@checked
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
    pictures = codec.read(options.video, start=options.start, frames=options.frames, resize=options.resize)
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
    codec, tokens = options.codec(), read_tokens(options.tokens, bundle.manifest)
    count, truth = codec.pictures_of(len(tokens)), None
    if options.against is not None:
        truth = codec.read(options.against, start=0, frames=count, resize=options.resize)
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
