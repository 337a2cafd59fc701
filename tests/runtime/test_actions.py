from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from diagd.bundle.actions import ActionCodec, Button, ChoiceSlot, ConstantSlot, EdgesSlot, OnlyPressedSlot
from diagd.errors import UsageError
from diagd.export.families.mineworld import mineworld_actions
from diagd.export.families.wham import wham_actions
from diagd.runtime.actions import encode, read_actions, write_actions

MINEWORLD = mineworld_actions()
WHAM = wham_actions()
WORLD = ActionCodec(
    slots=(
        ChoiceSlot(
            field="action",
            names=("noop", "left", "right", "up", "down", "do", "place_stone", "place_table"),
            first=512,
        ),
    )
)

# MineWorld's ids, spelled out: visual codes end at 8191, then buttons, hotbar keys, camera bins, specials.
IDS = {
    name: 8192 + index
    for index, name in enumerate(
        [
            *("use", "attack", "forward", "back", "left", "right", "jump", "sneak", "sprint", "drop"),
            *("swapHands", "pickItem", "inventory", "ESC"),
            *(f"hotbar.{number}" for number in range(1, 10)),
        ]
    )
}
PITCH, YAW, BEGIN, NONE, END = 8215, 8236, 8257, 8258, 8259
STILL = [BEGIN, PITCH + 10, YAW + 10, *[NONE] * 7, END]


def mineworld(**slots: int) -> list[int]:
    """The tokens of no action with some slots replaced, by number."""
    tokens = list(STILL)
    for slot, token in slots.items():
        tokens[int(slot.removeprefix("s"))] = token
    return tokens


def write(folder: Path, *lines: str | dict[str, Any]) -> Path:
    path = folder / "actions.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


@pytest.mark.parametrize(
    ("action", "expected"),
    [
        ({}, STILL),
        ({"forward": 1}, mineworld(s4=IDS["forward"])),
        ({"forward": True, "back": 1}, STILL),
        ({"forward": 1, "back": 0}, mineworld(s4=IDS["forward"])),
        ({"right": 1, "sneak": 1, "attack": 1}, mineworld(s5=8197, s6=8199, s7=8193)),
        ({"sprint": 1, "use": 1, "pickItem": 1}, mineworld(s6=8200, s7=8192, s9=8203)),
        ({"jump": 1, "drop": 1}, mineworld(s8=8198, s9=8201)),
        ({"jump": 1, "sneak": 1}, mineworld(s6=8199, s8=8198)),
        ({"hotbar.7": 1, "hotbar.3": 1}, mineworld(s3=8208)),
        ({"swapHands": 1, "inventory": 1, "ESC": 1}, STILL),
        ({"camera": [-90, 90]}, mineworld(s1=PITCH, s2=YAW + 20)),
        ({"camera": [-500.0, 1e9]}, mineworld(s1=PITCH, s2=YAW + 20)),
    ],
)
def test_mineworld_tokens(action: dict[str, object], expected: list[int]) -> None:
    tokens = encode(MINEWORLD, action)
    assert tokens.dtype == np.int32
    assert tokens.tolist() == expected


def test_camera_bins_are_centred_on_the_published_degrees() -> None:
    centres = [-90, -68.17, -51.21, -38.04, -27.80, -19.85, -13.67, -8.87, -5.15, -2.25, 0]
    centres += [-centre for centre in centres[-2::-1]]
    for index, centre in enumerate(centres):
        tokens = encode(MINEWORLD, {"camera": [centre, -centre]})
        assert tokens[1:3].tolist() == [PITCH + index, YAW + 20 - index]


@given(st.floats(-1000, 1000))
def test_camera_quantiser_against_numpy(degrees: float) -> None:
    share = np.clip(degrees, -90, 90) / 90
    level = np.sign(share) * np.log(1 + 11.4887 * np.abs(share)) / np.log(1 + 11.4887)
    expected = np.round((level * 90 + 90) / 9)
    assert encode(MINEWORLD, {"camera": [0, degrees]})[2] == YAW + expected


def test_wham_tokens() -> None:
    still = [16384 + 2 * index for index in range(12)] + [16408 + 11 * index + 5 for index in range(4)]
    assert encode(WHAM, {}).tolist() == still
    tokens = encode(WHAM, {"button_0": 1, "button_11": True, "sticks": [-1, 1, 0.05, -0.051]})
    assert tokens[[0, 11]].tolist() == [16385, 16407]
    assert (tokens[12:] - [16408 + 11 * index for index in range(4)]).tolist() == [0, 10, 6, 4]
    assert encode(WHAM, {"sticks": [1, 1, 1, 1]}).max() == 16384 + 68 - 1
    assert encode(wham_actions(4096), {})[0] == 4096


@given(st.floats(-1, 1))
def test_wham_sticks_against_numpy(value: float) -> None:
    edges = [-1.05, -0.95, -0.75, -0.5, -0.25, -0.05, 0.05, 0.25, 0.5, 0.75, 0.95, 1.05]
    expected = 16408 + 33 + np.digitize(value, edges) - 1
    assert encode(WHAM, {"sticks": [0, 0, 0, value]})[-1] == expected


def test_choice_tokens() -> None:
    assert encode(WORLD, {}).tolist() == [512]
    assert encode(WORLD, {"action": "place_table"}).tolist() == [519]


@pytest.mark.parametrize("codec", [MINEWORLD, WHAM, WORLD])
def test_a_codec_survives_its_json(codec: ActionCodec) -> None:
    assert ActionCodec.model_validate_json(codec.model_dump_json()) == codec


def test_file_of_actions(tmp_path: Path) -> None:
    path = write(tmp_path, {"action": "left", "repeat": 3}, "", {}, {"action": "do"})
    tokens = read_actions(path, WORLD)
    assert tokens.dtype == np.int32
    assert tokens.tolist() == [[513], [513], [513], [512], [517]]


def test_released_lines_are_read_as_json_is(tmp_path: Path) -> None:
    """The form that validation clips of MineWorld have: every button, and the camera as an array."""
    released = tmp_path / "released.jsonl"
    buttons = ("ESC", "back", "drop", "forward", "hotbar.3", "inventory", "jump", "pickItem", "swapHands")
    pressed = {name: int(name in ("forward", "hotbar.3", "jump", "ESC")) for name in buttons}
    released.write_text(f"{pressed}\n"[:-2] + ", 'camera': array([-3, 10])}\n")
    same = write(tmp_path, {"forward": 1, "jump": 1, "hotbar.3": 1, "camera": [-3, 10]})
    np.testing.assert_array_equal(read_actions(released, MINEWORLD), read_actions(same, MINEWORLD))


def events(keys: list[str], dx: float = 0, dy: float = 0, buttons: tuple[int, ...] = ()) -> dict[str, Any]:
    mouse = {"x": 640.0, "dx": dx, "dy": dy, "buttons": list(buttons), "newButtons": []}
    keyboard = {"keys": [f"key.keyboard.{key}" for key in keys], "newKeys": [], "chars": ""}
    return {"mouse": mouse, "keyboard": keyboard, "tick": 7, "isGuiOpen": False, "hotbar": 2}


def test_raw_recordings(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        events(["w", "left.control", "2", "f3"], dx=23.848, dy=-23.848, buttons=(0,)),
        events(["w", "s", "a"], buttons=(2,)),
        events(["space", "left.shift", "d"], dx=6.0),
        events(["left.shift", "left.control"], dx=26.7, buttons=(0, 1)),
        events(["space", "left.shift", "left.control"]),
        {"keyboard": {"keys": ["key.keyboard.q"]}},
    )
    whole = mineworld(s3=8207, s4=8194, s6=8200, s7=8193)
    whole[1:3] = [PITCH + 9, YAW + 11]  # 23.848 pixels: 3 degrees
    assert read_actions(path, MINEWORLD).tolist() == [
        whole,
        mineworld(s5=8196, s9=8203),
        mineworld(s5=8197),
        mineworld(s2=YAW + 12),
        mineworld(s6=8200),
        mineworld(s9=8201),
    ]


def test_whole_degrees_are_truncated_toward_zero(tmp_path: Path) -> None:
    # 7.3 pixels are 1.095 degrees, in bin 11; truncated to 1 degree they fall in bin 10, on either side of 0.
    assert encode(MINEWORLD, {"camera": [0, 1.095]})[2] == YAW + 11
    path = write(tmp_path, events([], dx=7.3, dy=-7.3))
    assert read_actions(path, MINEWORLD)[0, 1:3].tolist() == [PITCH + 10, YAW + 10]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"forwrd": 1}, "line 2: unknown action 'forwrd'; did you mean 'forward'. .known: ESC, attack"),
        ({"forward": 2}, "'forward' is 2; expected true or false"),
        ({"forward": "yes"}, "expected true or false"),
        ({"camera": [1]}, "'camera' is .1.; expected 2 finite numbers"),
        ({"camera": [1, True]}, "expected 2 finite numbers"),
        ({"camera": "up"}, "expected 2 finite numbers"),
        ('{"camera": [0, NaN]}', "expected a finite number, got NaN"),
        ('{"camera": [0, 1e999]}', "expected 2 finite numbers"),
        ('{"camera": [0, 1' + "0" * 400 + "]}", "expected 2 finite numbers"),
        ({"repeat": 0}, "'repeat' is 0; expected a whole number"),
        ({"repeat": True}, "'repeat' is True"),
        ({"repeat": 10**9}, "from 1 to 100000"),
        ("[1, 2]", "expected one JSON object a line"),
        ('{"forward": 1', "not JSON"),
        ("{'forward': 1, 'camera': array(range(2))}", r"not an action \('array\(range\(2\)\)' is neither"),
        ("{'forward': 1, 'forward': 0}", "'forward' is given twice"),
        ('{"forward": 1, "back": 0, "forward": 0}', "'forward' is given twice"),
        ('{"mouse": {"dx": 1, "dx": 2}}', "'dx' is given twice"),
        ('\x00{"forward": 1}', "not JSON"),
        ({"keyboard": {"keys": "wasd"}}, "raw events are damaged"),
        ({"mouse": {"buttons": {"0": 1}}}, "raw events are damaged"),
        ({"keyboard": {"keys": 3}}, "raw events are damaged"),
        ({"keyboard": [], "mouse": {}}, "raw events are damaged"),
        ({"mouse": {"dx": "a"}}, "raw events are damaged"),
    ],
)
def test_bad_lines_name_their_number_and_the_fix(tmp_path: Path, line: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        read_actions(write(tmp_path, {}, line), MINEWORLD)
    assert "actions.jsonl, line 2: " in str(caught.value)


def test_other_codecs_name_what_they_take(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"unknown action 'lft'; did you mean 'left'"):
        encode(WORLD, {"action": "lft"})
    with pytest.raises(UsageError, match=r"component 1 of 'sticks' is 1.2; expected -1.05 <= value < 1.05"):
        encode(WHAM, {"sticks": [0, 1.2, 0, 0]})
    with pytest.raises(UsageError, match="takes no raw keyboard and mouse events; use action"):
        read_actions(write(tmp_path, events(["w"])), WORLD)


def test_files_that_hold_no_actions(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no action"):
        read_actions(write(tmp_path, "", "  "), WORLD)
    with pytest.raises(UsageError, match=r"cannot read actions from .*nothing.jsonl: No such file"):
        read_actions(tmp_path / "nothing.jsonl", WORLD)
    with pytest.raises(UsageError, match="cannot read actions"):
        read_actions(tmp_path, WORLD)
    video = tmp_path / "video.mp4"
    video.write_bytes(bytes(range(256)))
    with pytest.raises(UsageError, match="not UTF-8"):
        read_actions(video, WORLD)


def test_codecs_that_contradict_themselves() -> None:
    jump = OnlyPressedSlot(buttons=(Button(name="jump", token=1),), none=0)
    raw = {
        "keys": {},
        "mouse_buttons": ["fire"],
        "camera": "camera",
        "degrees_per_pixel": 1,
        "whole_degrees": False,
        "cancelling": [],
    }
    wrong: dict[str, Any]
    for wrong in (
        {"slots": []},
        {"slots": [jump, ChoiceSlot(field="jump", names=("no", "yes"), first=3)]},
        {"slots": [ChoiceSlot(field="repeat", names=("no",), first=3)]},
        {"slots": [ConstantSlot(token=0)], "raw": raw},
        {"slots": [{"kind": "constant", "token": -1}]},
        {"slots": [{"kind": "constant", "token": 1, "colour": "red"}]},
        {"slots": [{"kind": "sometimes", "token": 1}]},
    ):
        with pytest.raises(ValidationError):
            ActionCodec.model_validate(wrong)
    for edges in ((0.0, -1.0), (0.5, 1.0), (-1.0, 0.0)):
        with pytest.raises(ValidationError):
            EdgesSlot(field="stick", edges=edges, first=0)


def test_lines_end_where_json_lines_do(tmp_path: Path) -> None:
    """Other characters that end a line of text may stand in JSON; Windows leaves its mark and line ends."""
    codec = ActionCodec(slots=(ChoiceSlot(field="action", names=("noop", "a\u2028b\x85"), first=7),))
    (tmp_path / "a.jsonl").write_bytes('\ufeff{"action": "a\u2028b\x85"}\r\n\r\n{}\r\n'.encode())
    assert read_actions(tmp_path / "a.jsonl", codec).tolist() == [[8], [7]]


def test_a_file_of_more_frames_than_memory_is_refused(tmp_path: Path) -> None:
    lines = [{"repeat": 100_000}] * 101
    with pytest.raises(UsageError, match="line 101: the file holds more than 10,000,000 frames"):
        read_actions(write(tmp_path, *lines), WORLD)


@pytest.mark.parametrize("codec", [MINEWORLD, WHAM, WORLD])
def test_actions_are_written_as_they_are_read(codec: ActionCodec, tmp_path: Path) -> None:
    """Whatever ids slots may have, those of each at least once."""
    random = np.random.default_rng(0)
    ids = np.stack([random.choice(slot.ids, 200) for slot in codec.slots], axis=1).astype(np.int32)
    write_actions(tmp_path / "a.jsonl", codec, ids)
    np.testing.assert_array_equal(read_actions(tmp_path / "a.jsonl", codec), ids)
