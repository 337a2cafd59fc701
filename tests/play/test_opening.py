"""The world that comes with the package is ready to be played, by what a device has installed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diagd.bundle import Bundle
from diagd.errors import UsageError
from diagd.play.opening import SHIPPED, GameOptions, new_record, open_game, open_replay
from diagd.runtime.load import Measurement, Measurements, keep_measured
from diagd.runtime.options import SessionOptions

PLAY = """
import sys
for name in ("torch", "onnx", "onnx_ir", "onnxscript", "safetensors", "worlds"):
    sys.modules[name] = None
from diagd.play.controls import Inputs, default_controls
from diagd.play.opening import SHIPPED, GameOptions, open_game

game = open_game(SHIPPED, GameOptions())
codec = game.bundle.manifest.actions
inputs = Inputs(default_controls(codec), codec)
game.reset(game.prompts[0])
first = game.session.stream.frame(0).copy()
for _ in range(4):
    inputs.update(["ArrowLeft"])
    game.advance(inputs.take)
print(len(game.prompts), (game.session.stream.frame(4) != first).any())
game.close()
"""


def test_the_shipped_world_is_small_and_plays_without_the_exporter() -> None:
    size = sum(file.stat().st_size for file in SHIPPED.rglob("*") if file.is_file())
    assert size <= 6_000_000
    done = subprocess.run([sys.executable, "-c", PLAY], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["12", "True"], done.stderr


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_without_a_cache_a_game_is_not_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, place: str
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("DIAGD_CACHE", str(tmp_path / place))
    assert new_record("world") is None
    assert "not recorded" in caplog.text
    monkeypatch.setenv("DIAGD_CACHE", str(tmp_path / "cache"))
    assert new_record("world").parent == tmp_path / "cache" / "played"  # type: ignore[union-attr]


def test_a_record_is_not_written_over(world: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.ndjson"
    mine.write_text("mine")
    with pytest.raises(UsageError, match="is there already"):
        open_game(world, GameOptions(record=mine))
    assert mine.read_text() == "mine"


def test_a_prompt_longer_than_the_window_is_refused_at_once(world: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(world)
    layout, window = bundle.manifest.layout, bundle.manifest.context.frames
    np.save(tmp_path / "long.npy", np.zeros((window, layout.rows, layout.columns), np.int32))
    options = GameOptions(prompts=(tmp_path / "long.npy",), record=tmp_path / "record")
    with pytest.raises(UsageError, match=f"has {window} frames but the window holds {window}"):
        open_game(world, options)
    assert not (tmp_path / "record").exists()


def test_a_world_begins_where_a_recorded_episode_does(world: Path, tmp_path: Path) -> None:
    tokenizer = Bundle.open(world).manifest.tokenizer
    assert tokenizer is not None
    frames = np.random.default_rng(0).integers(0, 256, (3, *tokenizer.size, 3), dtype=np.uint8)
    np.savez(tmp_path / "episode-000000.npz", frames=frames, actions=np.array([0, 1, 2], np.uint8))
    with open_game(world, GameOptions(prompts=(tmp_path / "episode-000000.npz",))) as game:
        np.testing.assert_array_equal(game.prompts, [game.view.codec.encode(frames[:1])])


def test_a_text_that_is_not_needed_is_told_at_once(world: Path) -> None:
    with pytest.raises(UsageError, match="attends to no text"):
        open_game(world, GameOptions(text=np.zeros((2, 10), np.float32)))


def test_a_world_is_played_by_what_was_fastest(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIAGD_CACHE", str(tmp_path))
    bundle, mine = Bundle.open(world), SessionOptions()
    assert mine.in_time(bundle, 1) == mine
    measured: dict[str, Any] = {"computed": "int8", "threads": 1, "passed": True}
    entries = (
        Measurement(backend="cpu", precision="fp32", seconds=0.2, **measured),
        Measurement(backend="cpu", precision="int8", seconds=0.1, **measured),
        Measurement(backend="openvino", precision="fp8", seconds=0.01, **measured),
    )
    keep_measured(bundle, Measurements(date="2026-01-01", order="k=1 serial", entries=entries))
    assert replace(mine, backend="cpu").in_time(bundle).precision == "int8"
    assert replace(mine, backend="openvino").in_time(bundle).precision == "fp8"
    assert replace(mine, precision="fp32").in_time(bundle).precision == "fp32"
    fastest, many = mine.in_time(bundle, 1), mine.in_time(bundle, 4)
    assert (fastest.backend, fastest.precision) == ("openvino", "fp8")
    assert (many.backend, many.precision) == ("cpu", "int8")  # which takes any number of streams
    assert replace(mine, compat="mineworld").in_time(bundle).precision is None  # released code as it is
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert mine.in_time(bundle, 1).precision == "int8"  # it was measured, and is gone


def test_a_record_is_replayed_on_its_backend_whatever_was_measured_since(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIAGD_CACHE", str(tmp_path / "cache"))
    record = tmp_path / "played.ndjson"
    with open_game(world, GameOptions(record=record)) as game:
        game.reset(game.prompts[0])
    fastest: dict[str, Any] = {"backend": "openvino", "precision": "fp32", "computed": "bf16", "threads": 1}
    entry = Measurement(**fastest, seconds=0.1, passed=True)
    keep_measured(Bundle.open(world), Measurements(date="2026-01-01", order="k=1 serial", entries=(entry,)))
    game, _ = open_replay(world, record, GameOptions())
    with game:
        assert game.view.codec.backend.name == "cpu"


def test_what_is_no_picture_among_the_prompts_is_left_out(world: Path, tmp_path: Path) -> None:
    """macOS puts files beside others, users put folders anywhere."""
    copy = shutil.copytree(world, tmp_path / "world.diagd")
    (copy / "prompts" / "._0.png").write_bytes(b"\0\5\x16\7")
    (copy / "prompts" / "more.png").mkdir()
    with open_game(copy, GameOptions()) as game:
        assert len(game.prompts) == 3


def test_options_of_other_types_are_named_and_paths_may_be_text(tmp_path: Path) -> None:
    given: dict[str, object] = {"prompts": "a.png", "session": None, "text": "a text", "record": 3}
    for name, value in given.items():
        with pytest.raises(UsageError, match=f"GameOptions: '{name}"):
            GameOptions(**{name: value})  # type: ignore[arg-type]
    record = tmp_path / "record.ndjson"
    tokens = tmp_path / "tokens.npy"
    np.save(tokens, np.zeros((1, 9, 12), np.int32))
    game = open_game(SHIPPED, GameOptions(prompts=[str(tokens)], record=str(record)))  # type: ignore[arg-type]
    game.reset(game.prompts[0])
    game.close()
    assert record.exists()
