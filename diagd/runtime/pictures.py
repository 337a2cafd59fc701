"""Pictures from video and image files, as players show them."""

from __future__ import annotations

import logging
import math
import re
import warnings
from collections import deque
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from fractions import Fraction
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from diagd.bundle.files import instead
from diagd.errors import UsageError

IMAGES: Final = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
"""Kinds of images that are looked for in a folder."""

_UNNAMED: Final = (0, 2)
"""Numbers of a matrix that is RGB's (none) or not named (ITU-T H.273)."""
_TALL: Final = 720
"""From this height on, videos that do not name their matrix are BT.709, others BT.601: so players take it."""

_MOST_PIXELS: Final = 1 << 27
"""Of a picture that is read: more than any camera takes, and half a gigabyte; a header may say anything."""
_ANIMATED: Final = 2
"""Bit of the flags of a WebP file (RFC 9649, 2.7.1)."""
_IMAGES: Final = ("image2", "apng")
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
    if not path.exists() or path.is_dir():
        raise UsageError(f"no such video or image: {path}; check the path")
    if not path.is_file():
        raise UsageError(f"{path} is a pipe or device, and is read more than once; write it to a file first")
    av = load_av()
    remedy = f"it is damaged, incomplete, or no video or image of at most {_MOST_PIXELS >> 20} megapixels"
    if path.stat().st_size and (what := instead(path)):
        remedy = f"it {what}"
    with reporting(av, f"cannot read {path}", remedy):
        exif = _orientation(path)
        reader = _Reader(path, size, resize, cover, exif)
        decoded = _animation(av, path) if _is_animation(path) else _decode(av, path)
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
    """Files of a folder with one of the suffixes, by name; hidden ones (macOS makes some) are left out.

    Raises:
        UsageError: it is no folder.
    """
    if not folder.is_dir():
        kinds = ", ".join(sorted(suffixes))
        raise UsageError(f"{folder} is no folder; expected one with files that end in {kinds}")
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
    av, reader = load_av(), _Reader(path, size, resize, cover, 0)
    frames = (av.VideoFrame.from_ndarray(np.ascontiguousarray(one), format="rgb24") for one in pictures)
    return np.stack([reader.picture(frame, Fraction(1)) for frame in frames])


class _Reader:
    """Decoded frames to pictures of one size; see ``read_frames``."""

    def __init__(
        self, path: Path, size: tuple[int, int] | None, resize: bool, cover: bool, exif: int
    ) -> None:
        self.path, self.size, self.resize, self.cover, self.exif = path, size, resize, cover, exif
        self.transparent = False
        self._turns = dict[int, tuple[int, bool]]()  # by angle: whose side data is read is kept in memory

    def picture(self, frame: Any, aspect: Fraction) -> NDArray[np.uint8]:
        """A decoded frame, whose pixels are ``aspect`` times as wide as high, as uint8 [height, width, 3]."""
        angle = getattr(frame, "rotation", 0)
        if angle not in self._turns:
            self._turns[angle] = _turn(frame, angle, self.exif)
        turn = self._turns[angle]
        stored = _across((frame.height, frame.width), turn[0])
        shown = _across((frame.height, max(1, round(frame.width * aspect))), turn[0])
        seen = stored if stored == self.size else shown
        height, width = self.size or seen
        if seen != (height, width) and not self.resize:
            raise UsageError(
                f"frames of {self.path} are {shown_size(seen)}; expected {shown_size((height, width))}; "
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


def _turn(frame: Any, angle: int, exif: int) -> tuple[int, bool]:
    """Quarter turns against the clock that a decoded frame is shown after; whether it is mirrored then."""
    if exif in _TURNS:
        return _TURNS[exif]
    quarters = round(angle / 90) % 4
    try:
        matrix = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # PyAV names no EXIF data, which were read already
        matrix = None
    across, down, _, over, along = np.frombuffer(matrix, np.int32)[:5] if matrix else (1, 0, 0, 0, 1)
    if float(across) * along >= float(down) * over:
        return quarters, False
    return (2 - quarters) % 4, True  # the angle is that of the first column, which the mirror turned as well


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


def _is_animation(path: Path) -> bool:
    """Whether FFmpeg may not see all: it reads one picture of a GIF without delays, and no animated WebP."""
    with path.open("rb") as file:
        head = file.read(21)
    webp = head[:4] == b"RIFF" and head[8:16] == b"WEBPVP8X"
    return head[:4] == b"GIF8" or (webp and bool(head[20:] and head[20] & _ANIMATED))


def _animation(av: ModuleType, path: Path) -> Iterator[tuple[Any, Fraction]]:
    """The same of a GIF, and of a WebP that is animated."""
    from PIL import Image

    try:
        with Image.open(path, formats=("GIF", "WEBP")) as image:
            if image.width * image.height > _MOST_PIXELS:
                raise OSError("the pictures are too large")
            for number in range(getattr(image, "n_frames", 1)):
                image.seek(number)
                yield (
                    av.VideoFrame.from_ndarray(np.asarray(image.convert("RGBA")), format="rgba"),
                    Fraction(1),
                )
    except OSError:
        raise
    except Exception as error:  # Pillow raises many types for bytes that are something else
        raise OSError(f"its bytes are those of no such file ({type(error).__name__})") from error


def _decode(av: ModuleType, path: Path) -> Iterator[tuple[Any, Fraction]]:
    """Decoded frames, and how many times as wide as high their pixels are."""
    # of an image, FFmpeg would take '%d' in the name for the numbers of others
    with av.open(f"file:{path}", options={"pattern_type": "none"}) as container:
        last, stream = None, container.streams.best("video")
        if stream is None:
            raise UsageError(f"{path} holds no picture; expected a video or an image")
        if stream.codec_context is None:  # FFmpeg knows the container, but no decoder
            raise UsageError(
                f"{path} holds pictures of a kind that cannot be decoded; save it as .png or .mp4"
            )
        name = container.format.name
        square = name in _IMAGES or name.endswith("_pipe")
        # FFmpeg takes half a .jpg for a whole one that is grey from there on.
        strict = {"err_detect": "explode"} if stream.codec_context.name == "mjpeg" else {}
        stream.codec_context.options = {"max_pixels": str(_MOST_PIXELS), **strict}
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


def load_av() -> ModuleType:
    """PyAV, which takes a while to load."""
    import av

    return av


@contextmanager
def reporting(av: ModuleType, failure: str, remedy: str) -> Iterator[None]:
    """Turn an error of FFmpeg, or of a disk, into one line."""
    try:
        yield
    except (av.FFmpegError, OSError) as error:
        raise UsageError(f"{failure}: {error.strerror or error}; {remedy}") from error


def shown_size(size: tuple[int, int]) -> str:
    """As people say it."""
    return f"{size[1]}x{size[0]} pixels (width x height)"
