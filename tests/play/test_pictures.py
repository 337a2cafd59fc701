"""Pictures come out as they went in, also behind a view that was moved."""

from __future__ import annotations

import io
from pathlib import Path

import av
import numpy as np
import pytest

from diagd.bundle import Bundle
from diagd.engines.onnxruntime_session import CpuOptions
from diagd.play.controls import Inputs, read_controls
from diagd.play.opening import GameOptions, open_game
from diagd.play.pictures import View, picture_encoder, png
from diagd.runtime.pixels import PixelCodec


def decoded(data: bytes) -> np.ndarray:
    with av.open(io.BytesIO(data), "r") as file:
        return next(file.decode(video=0)).to_ndarray(format="rgb24")


@pytest.mark.parametrize("size", [(72, 96), (1, 1), (33, 7)])
def test_png_is_lossless(size: tuple[int, int]) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    assert np.array_equal(decoded(png(picture)), picture)


def test_large_pictures_are_jpeg_and_near() -> None:
    rows, columns = np.mgrid[0:224, 0:384]
    picture = np.stack([rows, columns / 2, 255 - rows], axis=-1).astype(np.uint8)
    kind, encode = picture_encoder(224, 384)
    assert kind == "image/jpeg"
    assert np.abs(decoded(encode(picture)).astype(int) - picture).mean() < 2
    assert picture_encoder(72, 96)[0] == "image/png"


def test_a_moved_view_shows_what_it_would_have_shown(temporal: Path) -> None:
    """A frame is drawn from the last five; the very first is one picture, others are eight."""
    codec = PixelCodec(Bundle.open(temporal), CpuOptions(1, prepack=False))
    frames = list(np.random.default_rng(0).integers(0, 64000, (7, 2, 4), dtype=np.int32))
    view = View(codec)
    straight = [view.show(frame) for frame in frames]
    assert [len(pictures) for pictures in straight] == [1, 8, 8, 8, 8, 8, 8]
    for known in (1, 4, 5, 6, 7):
        assert np.array_equal(view.move(frames[:known]), straight[known - 1])
        if known < len(frames):
            assert np.array_equal(view.show(frames[known]), straight[known])


def test_a_world_without_actions_goes_on_by_itself(temporal: Path) -> None:
    game = open_game(temporal, GameOptions())
    inputs = Inputs(read_controls(temporal, None), None)
    assert game.reset(game.prompts[0]).shape == (1, 16, 32, 3)
    shown = [game.advance(inputs.take) for _ in range(3)]
    assert [one.pictures.shape for one in shown if one] == [(8, 16, 32, 3)] * 3
    assert shown[0] is not None
    assert np.array_equal(game.rewind(2), shown[0].pictures)
    game.close()
