"""What keys do: tables of models, taps, motion that is kept, files made by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from diagd.bundle.actions import ActionCodec, ChoiceSlot
from diagd.errors import UsageError
from diagd.export.families.mineworld import mineworld_actions
from diagd.export.families.wham import wham_actions
from diagd.play.controls import Inputs, bounded, default_controls, read_controls
from diagd.runtime.actions import encode, represented

CHOICES = ActionCodec(
    slots=(ChoiceSlot(field="action", names=("noop", "left", "right", "do", "place_stone"), first=100),)
)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def inputs(codec: ActionCodec | None) -> tuple[Inputs, Clock]:
    clock = Clock()
    return Inputs(default_controls(codec), codec, clock), clock


@pytest.mark.parametrize("codec", [CHOICES, mineworld_actions(), wham_actions()])
def test_every_input_of_a_model_has_a_key_and_every_key_can_be_encoded(codec: ActionCodec) -> None:
    controls = default_controls(codec)
    reached = set()
    for code in controls.keys:
        action = controls.action([code], (), (0, 0))
        encode(codec, bounded(codec, action))
        reached |= {value if isinstance(value, str) else name for name, value in action.items()}
    names = {name for choices in codec.choices.values() for name in choices[1:]}
    buttons = codec.buttons - set(codec.ignored)
    assert reached >= buttons | names | set(codec.fields)


def test_mineworld_has_the_keys_of_its_recordings() -> None:
    controls = default_controls(mineworld_actions())
    assert controls.keys["KeyW"] == {"forward": True}
    assert controls.keys["Mouse2"] == {"use": True}
    assert controls.keys["Digit3"] == {"hotbar.3": True}
    assert controls.keys["ArrowRight"]["camera"] == [0.0, 8.0]
    assert controls.keys["ArrowUp"]["camera"] == [-8.0, 0.0]
    assert controls.mouse is not None
    assert controls.mouse.scale == pytest.approx(0.15)


def test_a_world_that_is_walked_through_has_arrows_and_a_key_for_doors() -> None:
    names = ("stay", "forward", "back", "left", "right", "use")
    keys = default_controls(ActionCodec(slots=(ChoiceSlot(field="action", names=names, first=8),))).keys
    for code, name in zip(
        ("ArrowUp", "ArrowDown", "ArrowLeft", "ArrowRight", "KeyE"), names[1:], strict=True
    ):
        assert keys[code] == {"action": name}


def test_wham_has_twelve_buttons_and_four_sticks() -> None:
    controls = default_controls(wham_actions())
    assert {stick.axis for stick in controls.sticks} == {0, 1, 2, 3}
    pads = [code for code, part in controls.keys.items() if code.startswith("Pad") and "button" in str(part)]
    assert len(pads) == 12
    pushed = controls.action((), (0.0, -1.0, 0.5), (0, 0))
    assert bounded(wham_actions(), pushed)["sticks"] == [0.0, -1.0, 0.5, 0.0]
    both = controls.action(["KeyA", "KeyS"], (), (0, 0))
    assert both["sticks"] == [-1.0, 1.0, 0.0, 0.0]


def test_the_later_of_two_keys_counts_and_a_tap_counts_once() -> None:
    held, _ = inputs(CHOICES)
    held.update(["ArrowLeft", "ArrowRight"])
    assert held.take().action == {"action": "right"}
    held.update(["ArrowLeft"])
    assert held.take().action == {"action": "left"}
    held.update(["ArrowLeft", "Space"])
    held.update(["ArrowLeft"])
    assert held.take().action == {"action": "do"}
    assert held.take().action == {"action": "left"}
    held.update([])
    assert not held.is_active
    assert held.take().action == {}


def test_a_change_is_echoed_once_with_its_wait() -> None:
    held, clock = inputs(CHOICES)
    held.update(["ArrowLeft"], stamp=5.0)
    clock.now = 0.25
    held.update(["ArrowLeft"], stamp=6.0)
    taken = held.take()
    assert (taken.echo, taken.waited) == (5.0, 0.25)
    assert (held.take().echo, held.take().waited) == (None, 0.0)


def test_who_lets_go_waits_for_no_frame() -> None:
    """In a world that moves while a key is held, the next one may be seconds away."""
    held, clock = inputs(CHOICES)
    held.update(["ArrowLeft"], stamp=1.0)
    held.take()
    held.update([], stamp=2.0)
    held.update(["ArrowLeft"], stamp=3.0)
    clock.now = 0.5
    taken = held.take()
    assert (taken.echo, taken.waited) == (3.0, 0.5)


def test_what_was_done_in_a_pause_is_for_no_frame() -> None:
    held, _ = inputs(mineworld_actions())
    held.update(["KeyW", "Space"], (30.0, 0.0), stamp=1.0)
    held.update(["KeyW"])
    held.pause()
    assert held.is_active
    taken = held.take()
    assert (taken.action, taken.echo) == ({"forward": True}, None)


def test_the_model_plays_until_the_player_does_something() -> None:
    held, clock = inputs(CHOICES)
    held.update(["ArrowLeft"])
    held.autopilot = True
    assert held.take().ids is None
    held.update(["ArrowLeft"])
    held.update([])
    clock.now = 2.0  # silence is no key
    assert held.take().ids is None
    held.update(["ArrowRight"])
    assert held.take().action == {"action": "right"}
    assert not held.autopilot
    held.autopilot = True
    held.release()
    assert held.take().ids is not None


def test_a_key_that_comes_late_counts_for_the_frame_that_began_unless_a_tap_would_be_lost() -> None:
    held, _ = inputs(CHOICES)
    held.update(["ArrowLeft"])
    assert held.has_changed
    held.take()
    held.update(["ArrowLeft"])
    assert held.newer() is None
    held.update(["ArrowRight"])
    assert held.newer() is None  # the frame began with a tap of the other key
    assert held.take().action == {"action": "right"}
    assert held.take().action == {"action": "right"}
    held.update(["ArrowRight", "Space"], stamp=7.0)
    newer = held.newer()
    assert newer is not None
    assert (newer.action, newer.echo) == ({"action": "do"}, 7.0)
    assert held.newer() is None


def test_who_is_silent_lets_go() -> None:
    held, clock = inputs(CHOICES)
    held.update(["ArrowLeft"])
    clock.now = 0.9
    assert held.take().action == {"action": "left"}
    clock.now = 1.1
    assert held.take().action == {}
    held.update(["ArrowLeft"])
    held.release()
    assert held.take().action == {}


def test_slow_mouse_motion_is_not_lost() -> None:
    """What the bins leave is kept: over many frames the camera turns as far as the mouse moved."""
    codec = mineworld_actions()
    held, _ = inputs(codec)
    random, moved, told = np.random.default_rng(0), np.zeros(2), np.zeros(2)
    for _ in range(400):
        step = random.uniform(-3, 6, 2)
        held.update([], turn=(step[0], step[1]))
        moved += 0.15 * step
        taken = held.take()
        assert taken.ids is not None
        told += represented(codec, "camera", taken.ids)
    assert np.abs(moved - told).max() < 5
    assert np.abs(told).min() > 50


def test_a_jerk_of_the_mouse_does_not_turn_for_long() -> None:
    codec = mineworld_actions()
    held, _ = inputs(codec)
    held.update([], turn=(0.0, 1e5))
    first, second = held.take(), held.take()
    assert first.ids is not None and second.ids is not None
    assert represented(codec, "camera", first.ids)[1] == pytest.approx(90)
    assert represented(codec, "camera", second.ids)[1] == 0


def test_without_actions_there_is_nothing_to_press() -> None:
    held, _ = inputs(None)
    held.update(["ArrowLeft"])
    assert held.is_active
    assert held.take().ids is None


def test_a_file_beside_the_manifest_replaces_the_table(tmp_path: Path) -> None:
    (tmp_path / "controls.json").write_text(json.dumps({"keys": {"KeyJ": {"action": "left"}}}))
    assert read_controls(tmp_path, CHOICES).keys == {"KeyJ": {"action": "left"}}
    made = default_controls(wham_actions())
    (tmp_path / "controls.json").write_text(made.model_dump_json())
    assert read_controls(tmp_path, wham_actions()) == made


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"keys": {"KeyJ": {"action": "fly"}}}', "fly"),
        ('{"keys": {"Key J": {"action": "left"}}}', "pattern"),
        ('{"keys": {"KeyJ": {"jump": true}}}', "jump"),
        ('{"mouse": {"field": "camera", "scale": 1}}', "camera"),
        ('{"buttons": {}}', "buttons"),
        ("[" * 5000, "controls.json"),
        ("", "controls.json"),
    ],
)
def test_wrong_files_are_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "controls.json").write_text(content)
    with pytest.raises(UsageError, match=message):
        read_controls(tmp_path, CHOICES)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"mouse": {"field": "camera", "scale": 0}}, "turn nothing"),
        ({"mouse": {"field": "camera", "scale": float("nan")}}, "finite"),
        ({"sticks": [{"axis": 0, "field": "camera", "component": 2, "scale": 1}]}, "component 2 of 'camera'"),
        ({"sticks": [{"axis": 0, "field": "camera", "component": 10**12, "scale": 1}]}, "less than 64"),
        ({"sticks": [{"axis": 0, "field": "camera", "component": 0, "scale": 1e308}]}, "less than or equal"),
    ],
)
def test_amounts_that_turn_nothing_or_too_much_are_named(tmp_path: Path, table: object, message: str) -> None:
    (tmp_path / "controls.json").write_text(json.dumps(table), encoding="utf-8-sig")
    with pytest.raises(UsageError, match=message):
        read_controls(tmp_path, mineworld_actions())
