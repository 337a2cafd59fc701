"""The 11 action tokens of a MineWorld frame: ids, camera quantiser and raw VPT input of the released code."""

from __future__ import annotations

from typing import Final

from diagd.bundle.actions import (
    ActionCodec,
    Button,
    ConstantSlot,
    FirstPressedSlot,
    MuLawSlot,
    OnlyPressedSlot,
    RawInput,
    Slot,
)

_CODES: Final = 8192
_BUTTONS: Final = (
    *("use", "attack", "forward", "back", "left", "right", "jump", "sneak", "sprint", "drop"),
    *("swapHands", "pickItem", "inventory", "ESC"),
)
_HOTBAR: Final = tuple(f"hotbar.{number}" for number in range(1, 10))
_TOKENS: Final = {name: _CODES + index for index, name in enumerate((*_BUTTONS, *_HOTBAR))}
_CAMERA_BINS: Final = 21
_CAMERA: Final = _CODES + len(_TOKENS)
_BEGIN, _NONE, _END = (_CAMERA + 2 * _CAMERA_BINS + index for index in range(3))

_KEYS: Final = {
    "w": "forward",
    "s": "back",
    "a": "left",
    "d": "right",
    "space": "jump",
    "left.shift": "sneak",
    "left.control": "sprint",
    "q": "drop",
    "f": "swapHands",
    "e": "inventory",
    "escape": "ESC",
} | {name.removeprefix("hotbar."): name for name in _HOTBAR}


def mineworld_actions() -> ActionCodec:
    """Codec of every released MineWorld size (vocabulary of 8262).

    The encoder of the released code never tells swapHands, inventory and ESC, though they have ids.
    """
    return ActionCodec(
        slots=(
            ConstantSlot(token=_BEGIN),
            _camera(0),
            _camera(1),
            FirstPressedSlot(buttons=_buttons(*_HOTBAR), none=_NONE),
            _either("forward", "back"),
            _either("left", "right"),
            _either("sprint", "sneak"),
            _either("use", "attack"),
            _either("jump"),
            _either("drop", "pickItem"),
            ConstantSlot(token=_END),
        ),
        ignored=("swapHands", "inventory", "ESC"),
        raw=RawInput(
            keys={f"key.keyboard.{key}": button for key, button in _KEYS.items()},
            mouse_buttons=("attack", "use", "pickItem"),
            camera="camera",
            degrees_per_pixel=360 / 2400,
            whole_degrees=True,
            cancelling=(
                ("forward", "back"),
                ("left", "right"),
                ("jump", "sneak"),
                ("sprint", "sneak"),
                ("attack", "use"),
            ),
        ),
    )


def _buttons(*names: str) -> tuple[Button, ...]:
    return tuple(Button(name=name, token=_TOKENS[name]) for name in names)


def _either(*names: str) -> Slot:
    return OnlyPressedSlot(buttons=_buttons(*names), none=_NONE)


def _camera(component: int) -> Slot:
    return MuLawSlot(
        field="camera",
        component=component,
        limit=90.0,
        mu=11.4887,
        bins=_CAMERA_BINS,
        first=_CAMERA + component * _CAMERA_BINS,
    )
