"""Models of buttons, sticks and a mouse in the page of a real browser: small ones that nobody trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diagd.bundle import Bundle
from diagd.bundle.transformer import TransformerConfig, linear_rotary
from diagd.export.exporter import export, random_sources
from diagd.export.families import mineworld
from diagd.export.options import GraphOptions
from diagd.play.opening import GameOptions, open_replay
from diagd.play.record import Played, replay
from diagd.runtime.actions import describe
from diagd.schedule import StreamLayout
from tests.play.browser import CHROMIUM, Tab
from tests.play.conftest import Serve
from tests.play.test_page import CHANGE, KNOWN, PIXELS, enter

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium"
)
PLUGGED = (
    "window.pad = {mapping: 'standard', axes: [0, 0, 0, 0], "
    "buttons: Array.from({length: 17}, () => ({pressed: false}))}; "
    "navigator.getGamepads = () => [window.pad]; true"
)
SCREEN = "(({left, top}) => [left + 20, top + 20])(document.getElementById('screen').getBoundingClientRect())"


@pytest.fixture(scope="module")
def small_mineworld(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A MineWorld of pictures of 16 x 24 pixels, 4 x 6 tokens, that sees 4 frames."""
    config = TransformerConfig(
        layout=StreamLayout(4, 6, after=11),
        context_frames=4,
        vocabulary=mineworld.VOCABULARY,
        output_vocabulary=mineworld.VOCABULARY,
        hidden=16,
        feed_forward=24,
        layers=1,
        heads=2,
        kv_heads=1,
        head_size=8,
        rotary=linear_rotary(8, 10_000.0),
    )
    pixels = mineworld.MineworldVqgan(
        height=16,
        width=24,
        stem_channels=32,
        channels=(32, 32, 64),
        latent_channels=8,
        code_width=8,
        codes=mineworld.VISUAL_CODES,
    )
    family = replace(mineworld.family("small-mineworld", config), tokenizer=pixels)
    path = tmp_path_factory.mktemp("mineworld") / "mineworld.diagd"
    return Bundle.open(export(family, GraphOptions(), random_sources(family, 0), path).path)


def begin(tab: Tab, url: str) -> None:
    """Enter a world, and have what nobody trained draw anything."""
    enter(tab, url, "step")
    tab.evaluate(CHANGE.format("temperature", "50"))


def hold(tab: Tab, code: str, action: str) -> None:
    """Hold a key until a frame shows what it does, and pictures have changed."""
    before = tab.evaluate(PIXELS)
    tab.key(code, down=True)
    shown(tab, action)
    tab.key(code, down=False)
    tab.until("document.querySelector('kbd.held') === null")
    tab.until(f"{PIXELS} !== {before!r}")


def shown(tab: Tab, action: str) -> None:
    """Wait for a frame that an action led to."""
    known = tab.evaluate(KNOWN)
    tab.until(
        f"{KNOWN} > {known + 1} && document.getElementById('hud-action').textContent.includes('{action}')"
    )


def played(bundle: Bundle, record: Path) -> list[dict[str, Any]]:
    """What each frame of a record was led to by; the record plays again to the token."""
    game, lines = open_replay(bundle.path, record, GameOptions())
    with game:
        assert len(list(replay(game, lines))) == sum(isinstance(line, Played) for _, line in lines)
    codec, frames = bundle.manifest.actions, [line for _, line in lines if isinstance(line, Played)]
    assert codec is not None
    return [describe(codec, np.array(frame.action, np.int32)) for frame in frames]


def test_buttons_and_sticks_of_a_wham(tab: Tab, serve: Serve, small_wham: Bundle, tmp_path: Path) -> None:
    record = tmp_path / "wham.ndjson"
    with serve(GameOptions(record=record), bundle=small_wham.path) as (url, _):
        begin(tab, url)
        named = tab.evaluate("document.getElementById('keys').textContent")
        assert all(f"button {number}" in named for number in range(12))  # which nobody named
        for code, action in (("Digit1", "button 0"), ("KeyR", "button 11"), ("KeyD", "sticks 1, 0, 0, 0"),
                             ("ArrowUp", "sticks 0, 0, 0, -1")):  # fmt: skip
            hold(tab, code, action)
        tab.evaluate(PLUGGED)  # no browser has a gamepad without one
        tab.evaluate("pad.buttons[5].pressed = true")
        shown(tab, "button 5")
        tab.evaluate("pad.buttons[5].pressed = false; pad.axes[2] = -1")
        shown(tab, "sticks 0, 0, -1, 0")
        tab.evaluate("pad.axes[2] = 0.05; pad.buttons[6].pressed = true")
        shown(tab, "button 6")
        tab.evaluate("window.pad = null")  # unplugged, with a button held
        tab.until("document.querySelector('kbd.held') === null")
        tab.key("KeyE", down=True)  # frames go on, without the button
        tab.until("!document.getElementById('hud-action').textContent.includes('button 6')")
        tab.key("KeyE", down=False)
        assert not tab.messages
    actions = played(small_wham, record)
    assert {name for action in actions for name in action if name != "sticks"} >= {
        "button_0",
        "button_5",
        "button_6",
        "button_11",
    }
    sticks = np.array([action["sticks"] for action in actions])
    assert sticks.max(0)[0] > 0.9
    assert sticks.min(0)[2] < -0.9
    assert sticks.min(0)[3] < -0.9


def test_keys_and_mouse_of_a_mineworld(
    tab: Tab, serve: Serve, small_mineworld: Bundle, tmp_path: Path
) -> None:
    record = tmp_path / "mineworld.ndjson"
    with serve(GameOptions(record=record), bundle=small_mineworld.path) as (url, _):
        begin(tab, url)
        hold(tab, "KeyW", "forward")
        hold(tab, "ArrowLeft", "camera 0, -8")
        x, y = tab.evaluate(SCREEN)
        tab.mouse("mousePressed", x, y)
        tab.mouse("mouseReleased", x, y)
        tab.until("document.pointerLockElement?.id === 'screen'")
        known = tab.evaluate(KNOWN)
        for step in range(1, 9):
            tab.mouse("mouseMoved", x + 10 * step, y, held=False)
        tab.until(f"{KNOWN} > {known}")
        tab.evaluate("document.exitPointerLock()")
        assert not tab.messages
    actions = played(small_mineworld, record)
    assert any("forward" in action for action in actions)
    across = [action["camera"][1] for action in actions]
    assert min(across) < -5  # the key
    assert max(across) > 0.5  # the mouse, which went the other way
