from __future__ import annotations

import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from diagd.errors import UsageError
from diagd.runtime import video
from diagd.runtime.pictures import read_images
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
        assert (stream.average_rate, stream.frames) == (Fraction(6), 7)
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


def test_images_of_a_folder_come_by_number_and_what_is_none_is_left_out(tmp_path: Path) -> None:
    names = ("a9.png", "a10.png", "\u00b21.PNG")  # a superscript is a digit to some, and no number
    pictures = tiles(len(names))
    for name, picture in zip(names, pictures, strict=True):
        write_image(tmp_path / name, picture)
    (tmp_path / "._a9.png").write_bytes(b"\0\5\x16\7")
    (tmp_path / "more.png").mkdir()
    assert np.array_equal(read_images(tmp_path, SIZE, frames=9), pictures)


@pytest.mark.parametrize("name", ["shot%03d.png", "a%d.png", "shot[0-9]*.png"])
def test_a_name_is_no_pattern(name: str, tmp_path: Path) -> None:
    one, other = tiles(2)
    for number in ("shot000.png", "a1.png"):
        write_image(tmp_path / number, other)
    path = write_image(tmp_path / "one.png", one).rename(tmp_path / name)
    np.testing.assert_array_equal(read_frames(path), [one])


def test_of_several_videos_the_one_that_players_show(tmp_path: Path) -> None:
    frames = tiles(3)
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        streams = [container.add_stream("ffv1", rate=10) for _ in range(2)]
        for stream in streams:
            stream.height, stream.width, stream.pix_fmt = *SIZE, "bgr0"
        streams[1].disposition = av.stream.Disposition.default
        for stream, shown in zip(streams, (255 - frames, frames), strict=True):
            for picture in shown:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())
    np.testing.assert_array_equal(read_frames(tmp_path / "a.mkv", SIZE), frames)


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


def test_pictures_that_nobody_decodes(tmp_path: Path) -> None:
    path = tmp_path / "drawn.svg"
    path.write_text("<svg/>")
    with pytest.raises(UsageError, match=r"drawn.svg holds pictures of a kind that cannot be decoded"):
        read_frames(path)


def test_a_picture_damaged_in_the_middle_is_told(tmp_path: Path) -> None:
    path = write(tmp_path / "walk.mp4", tiles(60), 30)
    with av.open(str(path)) as container:
        damaged = next(packet for number, packet in enumerate(container.demux()) if number == 20)
        assert damaged.pos is not None
        first, last = damaged.pos + 10, damaged.pos + damaged.size
    data = bytearray(path.read_bytes())
    data[first:last] = np.random.default_rng(0).bytes(last - first)
    path.write_bytes(data)
    with pytest.raises(UsageError, match=r"picture [0-9]+ of .*walk.mp4 is damaged|it is damaged"):
        read_frames(path)
    assert len(read_frames(path, frames=10, start=0)) == 10


@pytest.mark.parametrize("share", [1.0, 0.6])
def test_a_video_that_ends_early_is_told(
    share: float, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole, path = write(tmp_path / "walk.mp4", tiles(60), 30), tmp_path / "walk.mkv"
    with av.open(str(whole)) as source, av.open(str(path), "w") as copy:
        stream = copy.add_stream_from_template(source.streams.video[0])
        for packet in source.demux():
            if packet.dts is not None:
                packet.stream = stream
                copy.mux(packet)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    pictures = read_frames(path)
    assert (len(pictures) == 60) is (share == 1)
    assert ("before the time it names; it may be incomplete" in caplog.text) is (share < 1)


def test_truncated_video(tmp_path: Path) -> None:
    path = write(tmp_path / "walk.mp4", tiles(20))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UsageError, match=r"walk.mp4.* damaged"):
        read_frames(path)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
def test_half_a_picture_is_no_picture(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"half{suffix}"
    Image.fromarray(tiles(1)[0]).save(path)
    assert read_frames(path).shape == (1, *SIZE, 3)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UsageError, match=r"cannot read .*half.* damaged"):
        read_frames(path)


def test_missing_files_and_folders(tmp_path: Path) -> None:
    for path in (tmp_path / "none.mp4", tmp_path):
        with pytest.raises(UsageError, match="no such video or image"):
            read_frames(path)


def test_a_pipe_is_no_file_that_is_missing(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "walk.mp4")
    with pytest.raises(UsageError, match=r"walk.mp4 is a pipe .*; write it to a file first"):
        read_frames(tmp_path / "walk.mp4")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("plain.gif", {}),  # without delays, as Pillow writes it where none are given
        ("slow.gif", {"duration": 100, "disposal": 2}),
        ("walk.webp", {"lossless": True, "minimize_size": True}),
    ],
)
def test_every_picture_of_an_animation_is_read(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    path, frames = tmp_path / name, tiles(9)
    first, *others = map(Image.fromarray, frames)
    first.save(path, save_all=True, append_images=others, **options)
    seen = read_frames(path, SIZE)
    assert seen.shape == frames.shape
    assert np.abs(seen.astype(int) - frames).max() <= 4
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UsageError, match=r"cannot read .* damaged"):
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


SATURATED = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255), (255, 0, 255), (0, 200, 40)]


@pytest.mark.parametrize("height", [64, 720])
def test_colours_are_right_as_a_player_decodes_them(height: int, tmp_path: Path) -> None:
    """BT.709 of limited range (ITU-R BT.709, 3.2 to 3.5), because the file says so."""
    picture = np.zeros((height, 64 * len(SATURATED), 3), np.uint8)
    for column, colour in enumerate(SATURATED):
        picture[:, 64 * column : 64 * column + 64] = colour
    path = write(tmp_path / "a.mp4", np.stack([picture] * 3))
    with av.open(str(path)) as container:
        context = container.streams.video[0].codec_context
        assert (context.colorspace, context.color_primaries, context.color_trc, context.color_range) == (
            1,
            1,
            1,
            1,
        )
        frame = list(container.decode(video=0))[-1]
    planes = [
        np.frombuffer(bytes(plane), np.uint8).reshape(plane.height, plane.line_size).astype(float)
        for plane in frame.planes
    ]
    luma = (planes[0][height // 2, 32 : picture.shape[1] : 64] - 16) / 219
    blue, red = ((plane[height // 4, 16 : picture.shape[1] // 2 : 32] - 128) / 224 for plane in planes[1:])
    r, b = luma + 1.5748 * red, luma + 1.8556 * blue
    g = (luma - 0.2126 * r - 0.0722 * b) / 0.7152
    shown = 255 * np.clip(np.stack([r, g, b], axis=1), 0, 1)
    assert np.abs(shown - SATURATED).max() <= 3
    assert np.abs(read_frames(path)[1, height // 2, 32::64].astype(int) - SATURATED).max() <= 3


TURNED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.transpose(1, 0, 2),
    6: lambda p: np.rot90(p, -1),
    7: lambda p: p[::-1, ::-1].transpose(1, 0, 2),
    8: np.rot90,
}


MATRICES = {
    1: (1, 0, 0, 1),
    2: (-1, 0, 0, 1),
    3: (-1, 0, 0, -1),
    4: (1, 0, 0, -1),
    5: (0, 1, 1, 0),
    6: (0, 1, -1, 0),
    7: (0, -1, -1, 0),
    8: (0, -1, 1, 0),
}
"""Where a container of each orientation says that a step to the right goes, and a step down: across, down."""


@pytest.mark.parametrize("orientation", TURNED)
def test_a_turned_video_is_read_as_it_is_shown(orientation: int, tmp_path: Path) -> None:
    picture = np.zeros((2, 72, 96, 3), np.uint8)
    picture[:, :36, :80] = 255
    data = bytearray(write(tmp_path / "a.mp4", picture).read_bytes())
    at, (a, b, c, d) = data.find(b"tkhd") + 44, (number << 16 for number in MATRICES[orientation])
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    (tmp_path / "turned.mp4").write_bytes(data)
    shown = TURNED[orientation](picture[0])
    seen = read_frames(tmp_path / "turned.mp4", shown.shape[:2])[0].astype(int)
    assert np.abs(seen - shown).mean() < 5


@pytest.mark.parametrize("orientation", TURNED)
@pytest.mark.parametrize("order", ["II", "MM"])
def test_the_orientation_of_an_image_is_applied(orientation: int, order: str, tmp_path: Path) -> None:
    picture = tiles(1)[0]
    content = write_image(tmp_path / "a.png", picture).read_bytes()
    way = "<" if order == "II" else ">"
    tiff = order.encode() + struct.pack(way + "HIHHHIHHI", 42, 8, 1, 0x0112, 3, 1, orientation, 0, 0)
    chunk = struct.pack(">I", len(tiff)) + b"eXIf" + tiff + struct.pack(">I", zlib.crc32(b"eXIf" + tiff))
    (tmp_path / "turned.png").write_bytes(content[:33] + chunk + content[33:])
    np.testing.assert_array_equal(read_frames(tmp_path / "turned.png")[0], TURNED[orientation](picture))


def test_what_is_transparent_is_black_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    picture = np.full((*SIZE, 4), 200, np.uint8)
    picture[:, :, 3] = np.linspace(0, 255, SIZE[1]).astype(np.uint8)
    with av.open(str(tmp_path / "a.png"), "w", format="image2") as container:
        stream = container.add_stream("png", rate=1)
        stream.height, stream.width, stream.pix_fmt = *SIZE, "rgba"
        frame = av.VideoFrame.from_ndarray(picture, format="rgba")
        for packet in [*stream.encode(frame), *stream.encode()]:
            container.mux(packet)
    seen = read_frames(tmp_path / "a.png", SIZE)[0]
    assert np.abs(seen.astype(float) - picture[:, :, :3] / 255 * picture[:, :, 3:]).max() <= 1
    assert "transparent" in caplog.text


READ = """
import gc, re, sys
from pathlib import Path
from diagd.runtime.pictures import read_frames
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
gc.disable()
read_frames(sys.argv[1], (36, 64), frames=1, resize=True)
before = peak()
print(read_frames(sys.argv[1], (36, 64), resize=True).shape[0])
print((peak() - before) // 1024)
"""


def test_videos_are_scaled_while_they_are_decoded(tmp_path: Path) -> None:
    """60 frames of 2.8 MB as they are, 7 kB as they are asked for."""
    path = write(tmp_path / "a.mp4", np.zeros((1, 720, 1280, 3), np.uint8).repeat(60, axis=0))
    done = subprocess.run([sys.executable, "-c", READ, str(path)], capture_output=True, text=True, check=True)
    count, megabytes = map(int, done.stdout.split())
    assert count == 60
    assert megabytes < 40


@pytest.mark.parametrize(("fps", "delays"), [(10, {10}), (30, {3, 4}), (60, {2}), (200, {2})])
def test_delays_of_a_gif_are_those_that_browsers_honour(fps: int, delays: set[int], tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (24, 16, 16, 3), dtype=np.uint8)
    content = write(tmp_path / "a.gif", frames, fps).read_bytes()
    parts = content.split(b"\x21\xf9\x04")[1:]
    found = [struct.unpack_from("<H", part, 1)[0] for part in parts]
    assert set(found) <= delays
    assert abs(sum(found) - 100 * len(frames) / fps) <= 4


def test_suffixes_of_any_case(tmp_path: Path) -> None:
    frames = tiles(2)
    for name in ("a.MP4", "a.Gif"):
        assert read_frames(write(tmp_path / name, frames), SIZE).shape == frames.shape


def wide(path: Path, aspect: Fraction) -> Path:
    """A video of a white square on black as a player shows it, stored with pixels that are not square."""
    picture = np.zeros((48, 48, 3), np.uint8)
    picture[16:32, 16:32] = 255
    squeezed = picture[:, :: aspect.numerator] if aspect > 1 else picture.repeat(aspect.denominator, axis=1)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.height, stream.width = squeezed.shape[:2]
        stream.pix_fmt, stream.codec_context.sample_aspect_ratio = "yuv420p", aspect
        stream.sample_aspect_ratio = aspect
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(squeezed), format="rgb24")
        for packet in [*stream.encode(frame), *stream.encode()]:
            container.mux(packet)
    return path


@pytest.mark.parametrize("aspect", [Fraction(2), Fraction(1, 2)])
def test_pixels_that_are_not_square_count_as_they_are_shown(aspect: Fraction, tmp_path: Path) -> None:
    path = wide(tmp_path / "a.mp4", aspect)
    assert read_frames(path).shape == (1, 48, 48, 3)
    for frame in (
        read_frames(path, (48, 48))[0],
        read_frames(path, (96, 96), resize=True, cover=True)[0][::2, ::2],
        read_frames(path, (24, 24), resize=True)[0].repeat(2, axis=0).repeat(2, axis=1),
    ):
        white = np.argwhere(frame[:, :, 0] > 128)
        middle, sides = white.mean(axis=0), np.ptp(white, axis=0) + 1
        assert np.abs(middle - 23.5).max() < 2
        assert np.abs(sides - (16, 16)).max() < 12
    stored = (48, 24) if aspect > 1 else (48, 96)
    assert read_frames(path, stored).shape == (1, *stored, 3)
    with pytest.raises(UsageError, match="are 48x48 pixels"):
        read_frames(path, (48, 64))


def test_a_header_that_lies_takes_no_memory(tmp_path: Path) -> None:
    """A few hundred bytes that announce a picture of 2.7 GB."""
    data = bytearray(write_image(tmp_path / "a.png", tiles(1)[0]).read_bytes())
    data[16:24] = struct.pack(">II", 30_000, 30_000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(UsageError, match="at most 128 megapixels"):
        read_frames(tmp_path / "a.png", (36, 48), resize=True)
