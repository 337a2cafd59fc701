from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from diagd.errors import UsageError
from diagd.tuning.recordings import cached_tokens, episode_paths, episodes
from tests.worlds.recordings import COLUMNS, PATCH, ROWS, patch_encoder, record_stripes, striped_episode
from worlds.tokenizer import fit_codebook


def test_tokens_reproduce_frames_and_actions(tmp_path: Path) -> None:
    folder = record_stripes(tmp_path, episodes=3, frames=7)
    codebook, _ = fit_codebook((e.frames for e in episodes(folder)), codes=16, side=PATCH)
    encoded: list[int] = []
    dataset = cached_tokens(folder, patch_encoder(codebook), encoded.append)
    assert encoded == [1, 2, 3]
    assert dataset.starts.tolist() == [0, 7, 14, 21]
    episode = striped_episode(7, 1)
    stream = dataset.streams[7:14]
    np.testing.assert_array_equal(stream[:, 0] - 16, episode.actions)
    cells = codebook[stream[:, 1:].reshape(7, ROWS, COLUMNS)].transpose(0, 1, 3, 2, 4, 5)
    np.testing.assert_array_equal(cells.reshape(episode.frames.shape), episode.frames)


def test_windows_stay_inside_an_episode(tmp_path: Path) -> None:
    folder = record_stripes(tmp_path, episodes=2, frames=6)
    codebook, _ = fit_codebook((e.frames for e in episodes(folder)), codes=16, side=PATCH)
    dataset = cached_tokens(folder, patch_encoder(codebook))
    starts = dataset.window_starts(4)
    assert starts.tolist() == [0, 1, 2, 6, 7, 8]
    windows = dataset.windows(starts, 4)
    assert windows.shape == (6, 4 * (1 + ROWS * COLUMNS))
    np.testing.assert_array_equal(windows[4].reshape(4, -1), dataset.streams[7:11])
    with pytest.raises(UsageError, match="no episode has 7 frames"):
        dataset.window_starts(7)


def test_cache_follows_shards_and_codebook(tmp_path: Path) -> None:
    folder = record_stripes(tmp_path, episodes=1, frames=5)
    codebook, _ = fit_codebook((e.frames for e in episodes(folder)), codes=16, side=PATCH)
    assert cached_tokens(folder, patch_encoder(codebook)).frames == 5
    record_stripes(tmp_path, episodes=2, frames=5)
    assert cached_tokens(folder, patch_encoder(codebook)).frames == 10
    turned = np.ascontiguousarray(codebook[::-1])
    assert not np.array_equal(
        cached_tokens(folder, patch_encoder(turned)).streams,
        cached_tokens(folder, patch_encoder(codebook)).streams,
    )


def test_an_empty_folder_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="diagd world collect"):
        episode_paths(tmp_path)
    with pytest.raises(UsageError, match="is no folder of recordings"):
        episode_paths(tmp_path / "nothing.mp4")
