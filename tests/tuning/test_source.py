"""Clips of a released family as streams: where each token of an episode stands."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from diagd.bundle import Bundle
from diagd.calibration.options import CalibrationOptions
from diagd.cli.calibrate import CalibrateOptions
from diagd.cli.main import main
from diagd.engines.engine import Int
from diagd.engines.onnxruntime_session import CpuOptions
from diagd.errors import UsageError
from diagd.runtime.clip import encode_vectors
from diagd.runtime.pixels import PixelCodec
from diagd.tuning.recordings import Episode
from diagd.tuning.source import read_clips
from worlds.recordings import save_episode, shard_path


@pytest.fixture
def episodes(tmp_path: Path) -> Path:
    folder, random = tmp_path / "episodes", np.random.default_rng(0)
    folder.mkdir()
    for name, length in (("a", 6), ("b", 5), ("short", 2)):
        images = random.integers(0, 256, (length, 3, 18, 30), dtype=np.uint8)
        actions = np.concatenate(
            [random.integers(0, 2, (length, 12)), random.integers(2, 11, (length, 4))], 1
        )
        np.savez(folder / f"{name}.npz", images=images, actions=actions)
    return folder


def test_windows_have_each_action_behind_the_picture_it_was_done_at(
    small_wham: Bundle, episodes: Path
) -> None:
    codec, layout = PixelCodec(small_wham, CpuOptions(1, prepack=False)), small_wham.manifest.layout
    windows = read_clips(episodes, small_wham.manifest, codec, 4)
    assert windows.shape == (2 + 1, 4 * layout.frame_length)  # half a window apart, none of the short one
    assert small_wham.manifest.actions is not None
    with np.load(episodes / "a.npz") as file:
        tokens = codec.encode(np.moveaxis(file["images"], 1, -1))
        actions = encode_vectors(small_wham.manifest.actions, file["actions"])
    for first, window in ((0, windows[0]), (2, windows[1])):
        frames = window.reshape(4, layout.frame_length)
        np.testing.assert_array_equal(frames[:, : layout.cells], tokens[first : first + 4].reshape(4, -1))
        np.testing.assert_array_equal(frames[:-1, layout.cells :], actions[first : first + 3])
    with pytest.raises(UsageError, match="no clip of 7 frames"):
        read_clips(episodes, small_wham.manifest, codec, 7)
    with pytest.raises(UsageError, match=r"a\.npz is no folder; expected one with files that end in .*\.mp4"):
        read_clips(episodes / "a.npz", small_wham.manifest, codec, 4)


def test_a_bundle_is_calibrated_on_an_episode_or_on_all_of_a_folder(
    small_wham: Bundle, episodes: Path, world: Path, tmp_path: Path
) -> None:
    def tokens(bundle: Bundle, data: Path) -> Int:
        options = CalibrateOptions(CalibrationOptions("int8", threads=1), bundle.path, data=data)
        found = options.tokens(bundle)
        assert found is not None
        return found

    codec, found = PixelCodec(small_wham, CpuOptions(1, prepack=False)), []
    for name in ("a", "b", "short"):
        with np.load(episodes / f"{name}.npz") as file:
            found.append(codec.encode(np.moveaxis(file["images"], 1, -1)))
    np.testing.assert_array_equal(tokens(small_wham, episodes / "a.npz"), found[0])
    np.testing.assert_array_equal(tokens(small_wham, episodes), np.concatenate(found))
    bundle, frames = Bundle.open(world), np.random.default_rng(0).integers(0, 256, (5, 16, 24, 3), np.uint8)
    save_episode(shard_path(tmp_path, 0), Episode(frames, np.zeros(5, np.uint8)))
    expected = PixelCodec(bundle, CpuOptions(1, prepack=False)).encode(frames)
    np.testing.assert_array_equal(tokens(bundle, tmp_path), expected)


def test_a_bundle_is_tuned_on_episodes(
    small_wham: Bundle, episodes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On next tokens alone, with what is held out told."""
    tuned = tmp_path / "tuned.diagd"
    command = ["align", str(small_wham.path), "--data", str(episodes), "--output", str(tuned)]
    settings = ["frames=3", "steps=2", "raster=1", f"valid={episodes}", f"resume={tmp_path / 'kept'}"]
    assert main([*command, "--batch", "2", *(f"--set={setting}" for setting in settings)]) == 0
    told = capsys.readouterr().out
    assert "next token: " in told
    assert "nats a token of what was held out" in told
    assert Bundle.open(tuned).manifest.order == "next token"
    assert not (tmp_path / "kept").exists()


def test_pictures_need_a_bundle_that_encodes_them(
    tmp_path: Path, episodes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = str(tmp_path / "a.safetensors")
    command = ["align", "none.ckpt", "--model", "mineworld-300m", "--data", str(episodes), "--output", output]
    assert main(command) == 2
    assert "--set encoder=" in capsys.readouterr().err
