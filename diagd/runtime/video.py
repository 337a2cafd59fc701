"""Frames from video and image files, and to them."""

from __future__ import annotations

import logging
import math
import re
import warnings
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from itertools import islice
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from diagd.bundle.files import atomic_file, instead
from diagd.bundle.manifest import MediaMark
from diagd.errors import UsageError
from diagd.runtime.stamp import Stamp, tag_gif

SUFFIXES: Final = (".mp4", ".gif")
"""Kinds of video that can be written."""

IMAGES: Final = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
"""Kinds of images that are looked for in a folder."""

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
_UNNAMED: Final = (0, 2)
"""Numbers of a matrix that is RGB's (none) or not named (ITU-T H.273)."""
_TALL: Final = 720
"""From this height on, videos that do not name their matrix are BT.709, others BT.601: so players take it."""

_MOST_PIXELS: Final = 1 << 27
"""Of a picture that is read: more than any camera takes, and half a gigabyte; a header may say anything."""
_IMAGES: Final = ("image2", "gif", "apng")
"""Containers whose pixels are taken to be square, whatever they say: so browsers show them."""

_MICROSECONDS: Final = 1_000_000
"""Of a second: FFmpeg counts the time of a file in them."""
_NOTICED: Final = 0.15
"""Seconds that a video may be shorter than its file says: lengths are rounded."""

_WITH_EXIF: Final = (b"\xff\xd8", b"\x89PNG", b"RIFF")
_ORIENTATION: Final = 0x0112
_TURNS: Final = {1: (0, False), 2: (0, True), 3: (2, False), 4: (2, True)} | {
    5: (3, True),
    6: (3, False),
    7: (1, True),
    8: (1, False),
}
"""Quarter turns against the clock, then whether left and right are exchanged (TIFF 6.0, "Orientation")."""

_LOG = logging.getLogger(__name__)


def read_frames(
    path: str | Path,
    size: tuple[int, int] | None = None,
    *,
    frames: int | None = None,
    start: int | None = None,
    resize: bool = False,
    cover: bool = False,
) -> NDArray[np.uint8]:
    """Read a video, or an image as a video of one frame, as players show it.

    Pictures are turned as their file says, and what is transparent is black. Pixels of a video that are not
    square count as wide as they are shown, unless the picture has the size already: it is taken as it is.
    Pictures are scaled while they are decoded: memory is that of the result.

    Args:
        path: any file FFmpeg can decode.
        size: (height, width) the frames must have; None takes any.
        frames: only so many; None reads all.
        start: from which frame on; None takes the last ones.
        resize: scale frames of another size (bilinear) instead of refusing them.
        cover: scale them evenly until they cover the size, and keep the centre; else they are stretched.

    Returns:
        uint8 [T, H, W, 3], RGB; T is smaller than ``frames`` where the video is shorter.

    Raises:
        UsageError: the file is missing, damaged or holds no picture, or its frames have another size.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"no such video or image: {path}; check the path")
    av = _load_av()
    remedy = f"it is damaged, incomplete, or no video or image of at most {_MOST_PIXELS >> 20} megapixels"
    if path.stat().st_size and (what := instead(path)):
        remedy = f"it {what}"
    with _reporting(av, f"cannot read {path}", remedy):
        exif = _orientation(path)
        reader = _Reader(path, size, resize, cover, exif)
        decoded = _decode(av, path)
        if start is not None:
            decoded = islice(decoded, start, None if frames is None else start + frames)
        kept = deque((reader.picture(*shown) for shown in decoded), maxlen=frames)
    if not kept:
        raise UsageError(f"{path} has no frame {start}; choose an earlier start")
    if reader.transparent:
        _LOG.warning("%s is transparent in places: they are black", path)
    return np.stack(kept)


def read_images(
    folder: Path,
    size: tuple[int, int],
    *,
    frames: int,
    start: int = 0,
    resize: bool = False,
    cover: bool = False,
) -> NDArray[np.uint8]:
    """Read the images of a folder, in the order of their names, as the frames of a video; see `read_frames`.

    Raises:
        UsageError: there is none from ``start`` on, or one cannot be read or has another size.
    """
    found = sorted(files_in(folder, IMAGES), key=_by_number)
    chosen = found[start : start + frames]
    if not chosen:
        raise UsageError(f"{folder} holds {len(found)} images ({', '.join(IMAGES)}), none from {start} on")
    return np.concatenate([read_frames(path, size, frames=1, resize=resize, cover=cover) for path in chosen])


def _by_number(path: Path) -> list[tuple[int, str]]:
    """Sorts frame2 ahead of frame10."""
    return [
        (int(part), "") if re.fullmatch("[0-9]+", part) else (0, part)
        for part in re.split("([0-9]+)", path.name)
    ]


def files_in(folder: Path, suffixes: Collection[str]) -> list[Path]:
    """Files of a folder with one of the suffixes, by name; hidden ones (macOS makes some) are left out."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in suffixes and path.is_file() and not path.name.startswith(".")
    )


def sized(
    pictures: NDArray[np.uint8], path: Path, size: tuple[int, int], *, resize: bool, cover: bool
) -> NDArray[np.uint8]:
    """Pictures uint8 [T, h, w, 3] of a file that holds arrays, in a size; see `read_frames`."""
    if not len(pictures):
        return np.zeros((0, *size, 3), np.uint8)
    av, reader = _load_av(), _Reader(path, size, resize, cover, 0)
    frames = (av.VideoFrame.from_ndarray(np.ascontiguousarray(one), format="rgb24") for one in pictures)
    return np.stack([reader.picture(frame, Fraction(1)) for frame in frames])


class _Reader:
    """Decoded frames to pictures of one size; see ``read_frames``."""

    def __init__(
        self, path: Path, size: tuple[int, int] | None, resize: bool, cover: bool, exif: int
    ) -> None:
        self.path, self.size, self.resize, self.cover, self.exif = path, size, resize, cover, exif
        self.transparent = False

    def picture(self, frame: Any, aspect: Fraction) -> NDArray[np.uint8]:
        """A decoded frame, whose pixels are ``aspect`` times as wide as high, as uint8 [height, width, 3]."""
        turn = _turn(frame, self.exif)
        stored = _across((frame.height, frame.width), turn[0])
        shown = _across((frame.height, max(1, round(frame.width * aspect))), turn[0])
        seen = stored if stored == self.size else shown
        height, width = self.size or seen
        if seen != (height, width) and not self.resize:
            raise UsageError(
                f"frames of {self.path} are {_shown_size(seen)}; expected {_shown_size((height, width))}; "
                "scale them with --set resize=true"
            )
        tall, wide = height, width
        if self.cover:
            scale = max(height / seen[0], width / seen[1])
            tall, wide = (math.ceil(side * scale - 1e-9) for side in seen)
        pixels = np.rot90(self._scaled(frame, *_across((tall, wide), turn[0])), turn[0])
        pixels = pixels[:, ::-1] if turn[1] else pixels
        top, left = (tall - height) // 2, (wide - width) // 2
        return np.ascontiguousarray(pixels[top : top + height, left : left + width])

    def _scaled(self, frame: Any, height: int, width: int) -> NDArray[np.uint8]:
        opaque = not any(part.is_alpha for part in frame.format.components) and not frame.format.has_palette
        named = frame.format.is_rgb or int(frame.colorspace) not in _UNNAMED
        pixels: NDArray[np.uint8] = frame.reformat(
            width,
            height,
            format="rgb24" if opaque else "rgba",
            src_colorspace=None if named else ("ITU709" if frame.height >= _TALL else "ITU601"),
            interpolation="BILINEAR",
        ).to_ndarray()
        if opaque:
            return pixels
        alpha = pixels[:, :, 3:].astype(np.uint16)
        self.transparent |= bool(alpha.min(initial=255) < 255)
        return ((pixels[:, :, :3] * alpha + 127) // 255).astype(np.uint8)


def _turn(frame: Any, exif: int) -> tuple[int, bool]:
    """Quarter turns against the clock that a decoded frame is shown after, and whether it is mirrored then.

    FFmpeg tells the angle of videos; of images it tells no mirroring, which the ``exif`` orientation does.
    """
    if exif in _TURNS:
        return _TURNS[exif]
    return round(getattr(frame, "rotation", 0) / 90) % 4, False


def _orientation(path: Path) -> int:
    """Orientation 1 to 8 in the EXIF data of a JPEG, PNG or WebP file; 0 where there is none."""
    from PIL import Image

    with path.open("rb") as file:
        if not file.read(4).startswith(_WITH_EXIF):
            return 0
    try:
        with warnings.catch_warnings(), Image.open(path, formats=("JPEG", "PNG", "WEBP")) as image:
            warnings.simplefilter("ignore")
            exif = Image.Exif()
            exif.load(image.info.get("exif", b""))
            return int(exif.get(_ORIENTATION, 0))
    except Exception:  # Pillow raises many types for bytes that are something else
        return 0


def _across(size: tuple[int, int], quarters: int) -> tuple[int, int]:
    """(height, width) after quarter turns."""
    return (size[1], size[0]) if quarters % 2 else size


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
            raise UsageError(f"frames are {_shown_size(size)}; .mp4 needs even sides, write a .gif instead")
        rate = Fraction(fps).limit_denominator(1001)
        self._rate = min(rate, Fraction(_GIF_RATE)) if self._paletted else rate
        self._share = self._rate / rate
        self._av = _load_av()
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
        return _reporting(self._av, f"cannot write {self.path}", "check the disk and the path")


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


def _decode(av: ModuleType, path: Path) -> Iterator[tuple[Any, Fraction]]:
    """Decoded frames, and how many times as wide as high their pixels are."""
    with av.open(f"file:{path}") as container:
        if not container.streams.video:
            raise UsageError(f"{path} holds no picture; expected a video or an image")
        last, (stream, *_) = None, container.streams.video
        stream.codec_context.options = {"max_pixels": str(_MOST_PIXELS)}
        name = container.format.name
        square = name in _IMAGES or name.endswith("_pipe")
        for number, frame in enumerate(container.decode(stream)):
            if frame.is_corrupt:
                raise UsageError(
                    f"picture {number} of {path} is damaged; take another copy, or only what is ahead"
                )
            last, aspect = frame, Fraction(1) if square else stream.sample_aspect_ratio or Fraction(1)
            yield frame, aspect
        if last is None:
            raise UsageError(f"{path} holds no frame; it is damaged or incomplete")
        if len(container.streams) == 1 and (missing := _missing(container, last)) > _NOTICED:
            _LOG.warning("%s ends %.1f s before the time it names; it may be incomplete", path, missing)


def _missing(container: Any, last: Any) -> float:
    """Seconds between the end of the last picture and the end that the file names, if it does."""
    if container.duration is None or last.time is None:
        return 0.0
    ends = (container.duration + (container.start_time or 0)) / _MICROSECONDS
    return float(ends - last.time - (last.duration or 0) * last.time_base)


def _load_av() -> ModuleType:
    """PyAV, which takes a while to load."""
    import av

    return av


@contextmanager
def _reporting(av: ModuleType, failure: str, remedy: str) -> Iterator[None]:
    """Turn an error of FFmpeg into one line."""
    try:
        yield
    except av.FFmpegError as error:
        raise UsageError(f"{failure}: {error.strerror or error}; {remedy}") from error


def _shown_size(size: tuple[int, int]) -> str:
    """As people say it."""
    return f"{size[1]}x{size[0]} pixels (width x height)"
