"""Marks on media, in the files themselves."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from PIL.GifImagePlugin import GifImageFile

from diagd.bundle.manifest import MediaMark
from diagd.runtime.pictures import read_frames
from diagd.runtime.video import Stamp, VideoWriter

MARK = MediaMark(text="Made by a model", program="Made by a model (of a test)")


def written(path: Path, size: tuple[int, int], mark: MediaMark | None) -> np.ndarray:
    with VideoWriter(path, 10, size, mark) as video:
        video.write(np.full((3, *size, 3), 60, np.uint8))
    return read_frames(path)


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
def test_a_mark_is_on_every_picture_and_in_the_file(suffix: str, tmp_path: Path) -> None:
    shown = written(tmp_path / f"a{suffix}", (90, 160), MARK)
    light = shown.min(axis=-1) > 150
    assert light.any(axis=(1, 2)).all()
    rows, columns = light.any(axis=(0, 2)).nonzero()[0], light.any(axis=(0, 1)).nonzero()[0]
    assert (rows[0], columns[0]) > (60, 30)
    assert max(abs(rows[-1] - 80), abs(columns[-1] - 150)) <= 4
    plain = written(tmp_path / f"b{suffix}", (90, 160), None)
    np.testing.assert_allclose(plain, 60, atol=3)
    with av.open(str(tmp_path / f"a{suffix}")) as file:
        assert file.metadata["comment"] == MARK.program
        assert suffix == ".gif" or file.metadata["ProgramName"] == MARK.program
    with av.open(str(tmp_path / f"b{suffix}")) as file:
        assert not {"comment", "ProgramName"} & file.metadata.keys()


def test_a_marked_gif_is_one_that_others_read(tmp_path: Path) -> None:
    written(tmp_path / "a.gif", (90, 160), MARK)
    with Image.open(tmp_path / "a.gif") as image:
        assert isinstance(image, GifImageFile)
        assert image.n_frames == 3
        image.seek(2)
        image.load()


@pytest.mark.parametrize("size", [(54, 90), (180, 300), (64, 720)])
def test_a_line_fits_whatever_the_size(size: tuple[int, int]) -> None:
    marked = Stamp(MARK.text, size).on(np.zeros((*size, 3), np.uint8)).max(axis=-1)
    assert marked.any()
    assert not marked[0].any()
    assert not marked[:, 0].any()
    assert not marked[-1].any()
    assert not marked[:, -1].any()
