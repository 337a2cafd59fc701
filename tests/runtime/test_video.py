from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from diagd.errors import UsageError
from diagd.runtime import video
from diagd.runtime.video import VideoWriter, read_frames

SIZE = (48, 64)


def tiles(count: int, seed: int = 0) -> np.ndarray:
    """Frames of 16x16 tiles in few colours: what codecs must keep."""
    colours = np.random.default_rng(seed).integers(0, 8, (count, 3, 4, 3)) * 30 + 20
    return colours.astype(np.uint8).repeat(16, axis=1).repeat(16, axis=2)


def write_image(path: Path, image: np.ndarray) -> Path:
    with av.open(str(path), "w", format="image2") as container:
        stream = container.add_stream("png", rate=1)
        stream.height, stream.width = image.shape[:2]
        stream.pix_fmt = "rgb24"
        for packet in [*stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")), *stream.encode()]:
            container.mux(packet)
    return path


def write(path: Path, frames: np.ndarray, fps: float = 10) -> Path:
    with VideoWriter(path, fps, frames.shape[1:3]) as writer:
        for frame in frames:
            writer.write(frame)
    return path


def test_mp4_round_trip(tmp_path: Path) -> None:
    frames = tiles(7)
    path = write(tmp_path / "walk.mp4", frames, fps=6)
    seen = read_frames(path, SIZE)
    assert seen.dtype == np.uint8
    assert seen.shape == frames.shape
    inner = np.abs(seen.astype(int) - frames)[:, 4:12, 4:12]
    assert inner.mean() < 6
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.average_rate, stream.frames) == (6, 7)
        assert stream.codec_context.pix_fmt == "yuv420p"
        assert stream.codec_context.name in ("h264", "mpeg4")


def test_gif_keeps_every_colour(tmp_path: Path) -> None:
    frames = tiles(5)
    seen = read_frames(write(tmp_path / "walk.gif", frames), SIZE)
    assert seen.shape == frames.shape
    assert np.abs(seen.astype(int) - frames).mean() < 0.1


def test_grey_keeps_its_level(tmp_path: Path) -> None:
    for level in (0, 128, 255):
        frames = np.full((2, *SIZE, 3), level, np.uint8)
        seen = read_frames(write(tmp_path / "grey.mp4", frames))
        assert np.abs(seen.astype(int) - level).max() <= 2


def test_without_an_h264_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video, "_ENCODERS", (("no such encoder", {}), ("mpeg4", {})))
    frames = tiles(3)
    path = write(tmp_path / "walk.mp4", frames)
    assert read_frames(path).shape == frames.shape
    with av.open(str(path)) as container:
        assert container.streams.video[0].codec_context.name == "mpeg4"
    monkeypatch.setattr(video, "_ENCODERS", ())
    with pytest.raises(UsageError, match=r"no encoder for .mp4; write a .gif"):
        write(tmp_path / "other.mp4", frames)
    assert [file.name for file in tmp_path.iterdir()] == ["walk.mp4"]


def test_images_and_whole_arrays(tmp_path: Path) -> None:
    image = tiles(1)[0]
    path = write_image(tmp_path / "first.png", image)
    assert np.array_equal(read_frames(path, SIZE), image[None])
    with VideoWriter(tmp_path / "still.gif", 12.5, SIZE) as writer:
        writer.write(np.stack([image] * 4))
    assert len(read_frames(tmp_path / "still.gif")) == 4


def test_only_the_last_frames(tmp_path: Path) -> None:
    path = write(tmp_path / "walk.gif", tiles(9))
    whole = read_frames(path)
    assert np.array_equal(read_frames(path, frames=2), whole[-2:])
    assert np.array_equal(read_frames(path, frames=50), whole)


def test_frame_rates_need_not_be_whole(tmp_path: Path) -> None:
    path = write(tmp_path / "ntsc.mp4", tiles(3), fps=30000 / 1001)
    with av.open(str(path)) as container:
        assert container.streams.video[0].average_rate == Fraction(30000, 1001)


def test_another_size_is_refused_or_stretched(tmp_path: Path) -> None:
    frames = tiles(2)
    path = write(tmp_path / "walk.gif", frames)
    with pytest.raises(
        UsageError, match=r"are 64x48 pixels \(width x height\); expected 32x24 pixels .*--set resize=true"
    ):
        read_frames(path, (24, 32))
    seen = read_frames(path, (24, 32), resize=True)
    assert seen.shape == (2, 24, 32, 3)
    # The middle of each tile, 8x8 now, has its colour still.
    centres = frames[:, 8::16, 8::16].astype(int)
    assert np.abs(seen[:, 4::8, 4::8] - centres).max() <= 4


@pytest.mark.parametrize("content", [b"", b"no video at all\n" * 50])
def test_files_that_are_no_video(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.mp4"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"cannot read .*broken.mp4: .*damaged, incomplete, or no video"):
        read_frames(path)


def test_truncated_video(tmp_path: Path) -> None:
    path = write(tmp_path / "walk.mp4", tiles(20))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UsageError, match=r"walk.mp4.* damaged"):
        read_frames(path)


def test_missing_files_and_folders(tmp_path: Path) -> None:
    for path in (tmp_path / "none.mp4", tmp_path):
        with pytest.raises(UsageError, match="no such video or image"):
            read_frames(path)


def test_a_failure_leaves_nothing_and_keeps_what_was_there(tmp_path: Path) -> None:
    path = write(tmp_path / "walk.mp4", tiles(2))
    before = path.read_bytes()
    writer = VideoWriter(path, 10, SIZE)
    with pytest.raises(ZeroDivisionError), writer:
        writer.write(tiles(1))
        raise ZeroDivisionError
    with pytest.raises(UsageError, match="no frame was written"), VideoWriter(path, 10, SIZE):
        pass
    with (
        pytest.raises(UsageError, match=r"expected uint8 \[T, 48, 64, 3\]"),
        VideoWriter(path, 10, SIZE) as writer,
    ):
        writer.write(np.zeros((24, 32, 3), np.uint8))
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["walk.mp4"]


@pytest.mark.parametrize(
    ("name", "fps", "size", "message"),
    [
        ("walk.avi", 10, SIZE, r"expected a name ending in .mp4 or .gif"),
        ("walk.mp4", 0, SIZE, "frame rate is 0"),
        ("walk.mp4", float("nan"), SIZE, "frame rate is nan"),
        ("walk.mp4", 10, (47, 64), r"64x47 pixels .* needs even sides, write a .gif"),
    ],
)
def test_what_cannot_be_written(
    tmp_path: Path, name: str, fps: float, size: tuple[int, int], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        VideoWriter(tmp_path / name, fps, size)


def test_odd_sizes_fit_a_gif(tmp_path: Path) -> None:
    frames = tiles(2)[:, :47, :63]
    assert read_frames(write(tmp_path / "odd.gif", frames)).shape == frames.shape


@pytest.mark.parametrize(("seen", "kept"), [((40, 120), (slice(0, 40), slice(20, 100))), ((120, 80), None)])
def test_covering_keeps_the_centre_and_the_shape(
    tmp_path: Path, seen: tuple[int, int], kept: tuple[slice, slice] | None
) -> None:
    """A wide picture loses its sides and a tall one its top and bottom; nothing is squeezed."""
    picture = np.zeros((*seen, 3), np.uint8)
    rows, columns = kept or (slice(40, 80), slice(0, 80))
    picture[rows, columns] = 255
    path = tmp_path / "picture.gif"
    with VideoWriter(path, 10, seen) as video:
        video.write(picture)
    covered = read_frames(path, (40, 80), resize=True, cover=True)
    assert covered.shape == (1, 40, 80, 3)
    assert covered.min() == 255
    stretched = read_frames(path, (40, 80), resize=True)
    assert stretched.shape == (1, 40, 80, 3)
    assert stretched.min() == 0


def test_covering_scales_evenly(tmp_path: Path) -> None:
    path = tmp_path / "picture.gif"
    with VideoWriter(path, 10, (30, 90)) as video:
        video.write(np.full((30, 90, 3), 9, np.uint8))
    assert read_frames(path, (64, 100), resize=True, cover=True).shape == (1, 64, 100, 3)
