"""Episodes in the format of the release of WHAM: real small files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diagd.bundle.actions import ActionCodec, ChoiceSlot
from diagd.errors import UsageError
from diagd.export.families.mineworld import mineworld_actions
from diagd.export.families.wham import wham_actions
from diagd.runtime.actions import encode
from diagd.runtime.clip import encode_vectors, read_episode

CODEC = wham_actions(64)
EDGES = [-1.05, -0.95, -0.75, -0.5, -0.25, -0.05, 0.05, 0.25, 0.5, 0.75, 0.95, 1.05]


def write(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def vectors(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Buttons and stick positions of five steps."""
    random = np.random.default_rng(seed)
    return random.integers(0, 2, (5, 12)), random.uniform(-1, 1, (5, 4))


def test_sticks_as_bins_and_as_positions_are_told_apart() -> None:
    buttons, sticks = vectors()
    bins = np.digitize(sticks, EDGES) - 1
    by_position = encode_vectors(CODEC, np.concatenate([buttons, sticks], axis=1))
    by_bin = encode_vectors(CODEC, np.concatenate([buttons, bins], axis=1))
    np.testing.assert_array_equal(by_position, by_bin)
    np.testing.assert_array_equal(
        by_bin, encode_vectors(CODEC, np.concatenate([buttons, bins], 1).astype(float))
    )
    for ids, pressed, values in zip(by_position, buttons, sticks, strict=True):
        action = {f"button_{n}": int(b) for n, b in enumerate(pressed)} | {"sticks": values.tolist()}
        np.testing.assert_array_equal(ids, encode(CODEC, action))


def test_whole_positions_are_positions() -> None:
    still = np.zeros((1, 16))
    np.testing.assert_array_equal(encode_vectors(CODEC, still)[0], encode(CODEC, {}))
    full = still.copy()
    full[0, 12:] = (1, -1, 0, 1)
    np.testing.assert_array_equal(encode_vectors(CODEC, full)[0], encode(CODEC, {"sticks": [1, -1, 0, 1]}))


def test_an_episode_is_read(tmp_path: Path) -> None:
    images = np.random.default_rng(1).integers(0, 256, (5, 3, 18, 30), dtype=np.uint8)
    actions = np.concatenate(vectors(), axis=1)
    frames, ids = read_episode(write(tmp_path / "e.npz", images=images, actions=actions), CODEC, "wham")
    np.testing.assert_array_equal(frames, np.moveaxis(images, 1, -1))
    assert ids.shape == (5, 16)
    assert ids.dtype == np.int32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": np.zeros((5, 18, 30, 3), np.uint8)}, r"uint8 \[T, 3, height, width\]"),
        ({"images": np.zeros((5, 3, 18, 30))}, "float64"),
        ({"actions": np.zeros((4, 16))}, r"\[5, 16\]"),
        ({"actions": np.zeros((5, 16), object)}, "no episode"),
        ({"actions": np.full((5, 16), 0.5)}, "number 0 of action 0 is 0.5; expected 0 or 1"),
        ({"actions": np.eye(5, 16, 12) * 11}, "number 12 of action 0 is 11; expected a bin 0..10"),
        ({"actions": np.eye(5, 16, 12) * 1.5}, "expected a position from -1 to 1"),
        ({"actions": np.full((5, 16), np.nan)}, "is nan"),
    ],
)
def test_what_is_no_episode(tmp_path: Path, change: dict[str, object], message: str) -> None:
    arrays = {"images": np.zeros((5, 3, 18, 30), np.uint8), "actions": np.zeros((5, 16))} | change
    with pytest.raises(UsageError, match=message):
        read_episode(write(tmp_path / "e.npz", **arrays), CODEC, "wham")


def test_files_and_models_that_do_not_fit(tmp_path: Path) -> None:
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(UsageError, match="no episode"):
        read_episode(tmp_path / "cut.npz", CODEC, "wham")
    with pytest.raises(UsageError, match="no episode"):
        read_episode(write(tmp_path / "other.npz", frames=np.zeros(3)), CODEC, "wham")
    arrays = {"images": np.zeros((5, 3, 18, 30), np.uint8), "actions": np.zeros((5, 16))}
    with pytest.raises(UsageError, match="takes no vectors"):
        read_episode(write(tmp_path / "e.npz", **arrays), mineworld_actions(), "mineworld")


STEPS = ActionCodec(slots=(ChoiceSlot(field="action", names=("stay", "left", "right"), first=70),))


def test_an_episode_of_a_recorded_world_is_read(tmp_path: Path) -> None:
    images = np.random.default_rng(1).integers(0, 256, (3, 18, 30, 3), dtype=np.uint8)
    recorded = {"frames": images, "actions": np.array([0, 2, 1], np.uint8), "source": np.array("")}
    frames, ids = read_episode(write(tmp_path / "episode-000000.npz", **recorded), STEPS, "steps")
    np.testing.assert_array_equal(frames, images)
    np.testing.assert_array_equal(ids, np.array([[70], [72], [71]], np.int32))


@pytest.mark.parametrize(
    ("change", "codec", "message"),
    [
        ({}, CODEC, "no numbers of choices"),
        ({}, None, "no numbers of choices"),
        ({"frames": np.zeros((3, 3, 18, 30), np.uint8)}, STEPS, r"expected uint8 \[T, height, width, 3\]"),
        ({"frames": np.zeros((3, 18, 30, 3))}, STEPS, "frames are float64"),
        ({"actions": np.array([0, 3, 1])}, STEPS, r"\[3\] numbers of stay, left, right, from 0 on"),
        ({"actions": np.zeros((3, 2), int)}, STEPS, r"actions are int64 \[3, 2\]"),
        ({"actions": np.full(3, 0.5)}, STEPS, "actions are float64"),
    ],
)
def test_what_is_no_episode_of_a_recorded_world(
    tmp_path: Path, change: dict[str, object], codec: ActionCodec | None, message: str
) -> None:
    arrays = {"frames": np.zeros((3, 18, 30, 3), np.uint8), "actions": np.zeros(3, np.uint8)} | change
    with pytest.raises(UsageError, match=message):
        read_episode(write(tmp_path / "e.npz", **arrays), codec, "steps")
