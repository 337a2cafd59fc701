"""The world that comes with the package is ready to be played, by what a device has installed."""

from __future__ import annotations

import subprocess
import sys

from diagd.play.opening import SHIPPED

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
