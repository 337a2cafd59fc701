"""What keys, sticks and the mouse do in a world: a small table, made for a model or read from a file."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import numpy as np
from pydantic import AfterValidator, Field, ValidationError

from diagd.bundle.actions import ActionCodec, EdgesSlot, MuLawSlot
from diagd.bundle.files import read_text
from diagd.engines.engine import Int
from diagd.errors import UsageError, fault
from diagd.options import Frozen
from diagd.runtime.actions import encode, represented

CONTROLS_NAME: Final = "controls.json"
"""File beside a bundle's manifest that replaces the table made for its model."""

SILENCE_SECONDS: Final = 1.0
"""Keys of a player who says nothing for so long are released."""

Code = Annotated[str, Field(pattern=r"^[A-Za-z0-9+\-]{1,24}$")]
"""``KeyboardEvent.code``, or Mouse0.., Pad0.. (buttons of a standard gamepad), Axis0- and Axis0+ (a stick
pushed as if it were a key)."""

Action = dict[str, bool | str | list[float]]
"""Part of an action as action files hold it: buttons, fields, choices."""

_KNOWN: Final[dict[str, tuple[str, ...]]] = {
    "left": ("ArrowLeft", "KeyA", "Pad14", "Axis0-"),
    "right": ("ArrowRight", "KeyD", "Pad15", "Axis0+"),
    "up": ("ArrowUp", "KeyW", "Pad12", "Axis1-"),
    "down": ("ArrowDown", "KeyS", "Pad13", "Axis1+"),
    "forward": ("ArrowUp", "KeyW", "Pad12", "Axis1-"),
    "back": ("ArrowDown", "KeyS", "Pad13", "Axis1+"),
    "do": ("Space", "Pad0"),
    "jump": ("Space", "Pad0"),
    "attack": ("Mouse0", "Pad7"),
    "use": ("KeyE", "Mouse2", "Pad6"),
    "pickItem": ("Mouse1",),
    "sneak": ("ShiftLeft", "Pad1"),
    "sprint": ("ControlLeft", "Pad10"),
}
_REST: Final = ("noop", "none", "idle", "stay")
_SPARE: Final = (
    *(f"Digit{n}" for n in range(1, 10)),
    *("KeyQ", "KeyE", "KeyR", "KeyF", "KeyZ", "KeyX", "KeyC", "KeyV", "KeyG", "KeyT"),
)
_SPARE_PAD: Final = tuple(f"Pad{n}" for n in range(16))
_PAIRS: Final = (
    (("KeyA", "KeyD"), ("KeyW", "KeyS")),
    (("ArrowLeft", "ArrowRight"), ("ArrowUp", "ArrowDown")),
)
_GLFW: Final = {
    "space": "Space",
    "escape": "Escape",
    "left.shift": "ShiftLeft",
    "left.control": "ControlLeft",
}
_TURN_DEGREES: Final = 8.0


Amount = Annotated[float, Field(ge=-1e6, le=1e6, allow_inf_nan=False)]


def _not_none(scale: float) -> float:
    if abs(scale) < 1e-6:
        raise ValueError("a scale of 0 would turn nothing; leave the mouse out instead")
    return scale


class Stick(Frozen):
    """An axis of a gamepad that moves a component of a field: by ``scale`` where it is pushed fully."""

    axis: int = Field(ge=0, lt=8)
    field: str
    component: int = Field(ge=0, lt=64)
    scale: Amount


class Mouse(Frozen):
    """A field of (vertical, horizontal) that mouse motion turns, by ``scale`` a pixel."""

    field: str
    scale: Annotated[Amount, AfterValidator(_not_none)]


class Controls(Frozen):
    """Parts of an action by key code, and what moves fields."""

    keys: dict[Code, Action] = Field(default_factory=dict)
    sticks: tuple[Stick, ...] = ()
    mouse: Mouse | None = None

    def action(self, codes: Iterable[str], axes: Iterable[float], turn: tuple[float, float]) -> Action:
        """One action of all that is held, a later key over an earlier one; fields add up."""
        action: Action = {}
        for code in codes:
            for name, value in self.keys.get(code, {}).items():
                _merge(action, name, value)
        pushed = list(axes)
        for stick in self.sticks:
            if stick.axis < len(pushed) and pushed[stick.axis]:
                moved = [0.0] * stick.component + [stick.scale * pushed[stick.axis]]
                _merge(action, stick.field, moved)
        if self.mouse and any(turn):
            _merge(action, self.mouse.field, [self.mouse.scale * pixels for pixels in turn])
        return action


def _merge(action: Action, name: str, value: bool | str | list[float]) -> None:
    before = action.get(name)
    if isinstance(value, list) and isinstance(before, list):
        short, long = sorted((before, value), key=len)
        value = [a + b for a, b in zip(long, short + [0.0] * len(long), strict=False)]
    action[name] = value


def read_controls(bundle: Path, codec: ActionCodec | None, file: Path | None = None) -> Controls:
    """The table of a file, else of the bundle's `CONTROLS_NAME`, else one made for the model.

    Raises:
        UsageError: the file cannot be read, or names an input that the model does not have.
    """
    path = file or bundle / CONTROLS_NAME
    if codec is None or (file is None and not path.is_file()):
        return default_controls(codec)
    try:
        controls = Controls.model_validate_json(read_text(path, "controls from"))
    except ValidationError as error:
        raise UsageError(f"{path}: {fault(error)}; see docs/play.md for the table") from None
    for code in controls.keys:
        try:
            encode(codec, bounded(codec, controls.action([code], (), (0, 0))))
        except UsageError as error:
            raise UsageError(f"{path}: {code}: {error}") from None
    named = [stick.field for stick in controls.sticks] + ([controls.mouse.field] if controls.mouse else [])
    if lost := set(named) - set(codec.fields):
        raise UsageError(f"{path}: the model has no field {sorted(lost)}; it has {sorted(codec.fields)}")
    for stick in controls.sticks:
        if stick.component >= codec.fields[stick.field]:
            has = codec.fields[stick.field]
            raise UsageError(f"{path}: component {stick.component} of '{stick.field}', which has {has}")
    return controls


def default_controls(codec: ActionCodec | None) -> Controls:
    """A table for a model by the names of its inputs; inputs of other names get spare keys in order."""
    if codec is None:
        return Controls()
    keys: dict[str, Action] = {}
    sticks, mouse = _place_fields(codec, keys)
    slots = (slot for slot in codec.slots if slot.kind in ("first_pressed", "only_pressed"))
    buttons = [button.name for slot in slots for button in getattr(slot, "buttons", ())]
    parts: list[tuple[str, Action]] = [(name, {name: True}) for name in buttons]
    for choice, names in codec.choices.items():
        parts += [(name, {choice: name}) for name in names if name not in _REST]
    recorded = _recorded(codec)
    fixed = {code for name, _ in parts for code in recorded.get(name, _KNOWN.get(name, ()))}
    spare, pads = ([c for c in pool if c not in fixed and c not in keys] for pool in (_SPARE, _SPARE_PAD))
    for name, part in parts:
        codes = recorded.get(name, _KNOWN.get(name))
        if codes is None:
            codes = tuple(pool.pop(0) for pool in (spare, pads) if pool)
        keys |= {code: part for code in codes if code not in keys}
    return Controls(keys=keys, sticks=sticks, mouse=mouse)


def _recorded(codec: ActionCodec) -> dict[str, tuple[str, ...]]:
    """Codes by button, of models that say how their recordings name keys."""
    if codec.raw is None:
        return {}
    found: dict[str, tuple[str, ...]] = {
        name: (f"Mouse{(0, 2, 1)[n]}",) for n, name in enumerate(codec.raw.mouse_buttons)
    }
    for key, name in codec.raw.keys.items():
        short = key.removeprefix("key.keyboard.")
        code = _GLFW.get(short, f"Digit{short}" if short.isdigit() else f"Key{short.upper()}")
        found[name] = (code, *(c for c in _KNOWN.get(name, ()) if c.startswith(("Pad", "Axis"))))
    return found


def _place_fields(codec: ActionCodec, keys: dict[str, Action]) -> tuple[tuple[Stick, ...], Mouse | None]:
    """Keys and sticks of each two components of the fields; the camera of recordings is the mouse's too."""
    sticks: list[Stick] = []
    camera = codec.raw.camera if codec.raw else None
    pairs = [(name, first) for name, count in codec.fields.items() for first in range(0, count, 2)]
    places = [1] if camera and len(pairs) == 1 else range(len(_PAIRS))
    for place, (name, first) in zip(places, pairs, strict=False):
        amount = _TURN_DEGREES if name == camera else 1.0
        across = (1, 0) if name == camera else (0, 1)  # a camera's first component is vertical
        for axis, codes in enumerate(_PAIRS[place]):
            component = first + across[axis]
            if component >= codec.fields[name]:
                continue
            sticks.append(Stick(axis=2 * place + axis, field=name, component=component, scale=amount))
            for code, sign in zip(codes, (-1.0, 1.0), strict=True):
                numbers = [0.0] * codec.fields[name]
                numbers[component] = sign * amount
                keys[code] = {name: numbers}
    raw = codec.raw
    return tuple(sticks), Mouse(field=raw.camera, scale=raw.degrees_per_pixel) if raw else None


def bounded(codec: ActionCodec, action: Mapping[str, Any]) -> Action:
    """The action with its fields filled up and inside the edges of the model's bins."""
    result: Action = dict(action)
    for name, count in codec.fields.items():
        if isinstance(numbers := result.get(name), list):
            result[name] = [*numbers, *[0.0] * count][:count]
    for slot in codec.slots:
        if isinstance(slot, EdgesSlot | MuLawSlot) and isinstance(numbers := result.get(slot.field), list):
            low, high = (
                (slot.edges[0], np.nextafter(slot.edges[-1], -np.inf))
                if isinstance(slot, EdgesSlot)
                else (-slot.limit, slot.limit)
            )
            numbers[slot.component] = float(min(max(numbers[slot.component], low), high))
    return result


@dataclass(frozen=True)
class Taken:
    """An action as a frame takes it.

    ``ids`` int32 [n] are None for models without actions, and where the model plays. ``echo`` is the player's
    stamp of what was pressed or moved since the last frame, None where nothing was, and ``waited`` the
    seconds since that came.
    """

    ids: Int | None
    action: Action
    echo: float | None = None
    waited: float = 0.0


class Inputs:
    """What a player does, between whoever hears of it and the thread that decodes: a slot of size one.

    A key that was pressed counts for one frame at least; mouse motion is summed, and what a model's bins
    leave of it is kept for the next frame.

    Attributes:
        autopilot: the model plays, until the player does something.
    """

    def __init__(
        self, controls: Controls, codec: ActionCodec | None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.controls, self._codec, self._clock = controls, codec, clock
        self._lock = threading.Lock()
        self._held: tuple[str, ...] = ()
        self._axes: tuple[float, ...] = ()
        self._tapped: dict[str, None] = {}
        self._turn = np.zeros(2)
        self._rest = np.zeros(2)
        self._heard = self._arrived = 0.0
        self._echo: float | None = None
        self.autopilot = False
        self._changed = self._spent = False

    def update(
        self,
        keys: Iterable[str],
        turn: tuple[float, float] = (0.0, 0.0),
        axes: Iterable[float] = (),
        stamp: float = 0.0,
    ) -> None:
        """Take all that is held now, mouse pixels (dy, dx) moved since the last call, and the time of it."""
        keys, axes = tuple(dict.fromkeys(keys)), tuple(axes)
        with self._lock:
            self._heard = self._clock()
            if (keys, axes) != (self._held, self._axes) or any(turn):
                if self._echo is None and (keys or any(axes) or any(turn)):  # letting go waits for no frame
                    self._arrived, self._echo = self._heard, stamp
                self._tapped |= dict.fromkeys(key for key in keys if key not in self._held)
                if self._tapped or any(turn) or any(axes):
                    self.autopilot = False
            self._changed = self._changed or keys != self._held
            self._held, self._axes = keys, axes
            self._turn += turn

    def release(self) -> None:
        """Let go of everything."""
        with self._lock:
            self._forget()
            self.autopilot = False

    def _forget(self) -> None:
        self._held, self._axes, self._echo = (), (), None
        self._changed = False
        self._tapped.clear()
        self._turn[:] = self._rest[:] = 0

    def pause(self) -> None:
        """The world stands still: what was tapped and moved is for no frame, what is held may be."""
        with self._lock:
            self._tapped.clear()
            self._turn[:] = self._rest[:] = 0
            self._echo = None

    @property
    def is_active(self) -> bool:
        """Whether something is held, was tapped or moved."""
        with self._lock:
            self._expire()
            return bool(self._held or self._tapped or any(self._turn) or any(self._axes))

    @property
    def has_changed(self) -> bool:
        """Whether a key was pressed or let go since an action was taken."""
        with self._lock:
            return self._changed

    def newer(self) -> Taken | None:
        """Another action for the frame that began last, where keys changed since and it loses nothing by it.

        A tap or a motion that it began with counts for one frame, and this is the one.
        """
        return self.take() if self.has_changed and not self._spent else None

    def take(self) -> Taken:
        """The action of the frame that begins now."""
        with self._lock:
            self._expire()
            self._changed, self._spent = False, bool(self._tapped or any(self._turn))
            codes = (*self._held, *(key for key in self._tapped if key not in self._held))
            self._tapped.clear()
            turn = self._turn + self._rest
            action = self.controls.action(codes, self._axes, (float(turn[0]), float(turn[1])))
            self._turn[:] = self._rest[:] = 0
            echo = self._echo
            waited = 0.0 if echo is None else self._clock() - self._arrived
            self._echo = None
            if self._codec is None or self.autopilot:
                return Taken(None, {}, echo, waited)
            action = bounded(self._codec, action)
            ids = encode(self._codec, action)
            self._keep_rest(action, ids)
            return Taken(ids, action, echo, waited)

    def _keep_rest(self, action: Action, ids: Int) -> None:
        """Mouse motion that the bins did not tell, in pixels."""
        mouse, codec = self.controls.mouse, self._codec
        numbers = action.get(mouse.field) if mouse else None
        if mouse is None or codec is None or not isinstance(numbers, list):
            return
        told = represented(codec, mouse.field, ids)
        self._rest[:] = (np.asarray(numbers[:2]) - told[:2]) / mouse.scale

    def _expire(self) -> None:
        if self._clock() - self._heard > SILENCE_SECONDS:
            self._forget()
