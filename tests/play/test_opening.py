"""The world that comes with the package is ready to be played, by what a device has installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from diagd.errors import UsageError
from diagd.play.opening import SHIPPED, GameOptions, new_record, open_game

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
