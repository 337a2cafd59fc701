"""Actions as people and recorders write them, to the known tokens of each frame."""

from __future__ import annotations

import ast
import json
import math
import warnings
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diagd.bundle import actions as codecs
from diagd.bundle.actions import ActionCodec
from diagd.bundle.files import read_text, write_text
from diagd.errors import UsageError, unknown

MAX_REPEAT = 100_000
"""Most frames one line may hold an action for."""

MAX_FRAMES = 10_000_000
"""Most frames of a file: eleven days of a world at ten frames a second."""
MAX_LITERAL = 10_000
"""Longest Python literal; an action is far shorter."""


def encode(codec: ActionCodec, action: Mapping[str, object]) -> NDArray[np.int32]:
    """Tokens int32 [n] of one action, one a slot; UsageError where a name or a value is not the codec's.

    It has pressed buttons as true or 1, fields as lists of numbers, choices by name; {} is no action.
    """
    inputs = {name: _value(codec, name, value) for name, value in action.items()}
    return np.array([_token(slot, inputs) for slot in codec.slots], dtype=np.int32)


def read_actions(path: str | Path, codec: ActionCodec) -> NDArray[np.int32]:
    """Tokens of a file of JSON lines, one action a line.

    ``"repeat": n`` in a line holds its action for n frames. Lines with ``keyboard`` or ``mouse`` are raw
    recordings, converted as the codec says. Lines may be Python literals with
    ``array([...])``, as the released MineWorld clips have them. Empty lines are skipped.

    Returns:
        int32 [frames, n].

    Raises:
        UsageError: the file cannot be read or is empty, or a line is wrong; the message has its number.
    """
    rows: list[NDArray[np.int32]] = []
    total = 0
    for number, line in enumerate(read_text(Path(path), "actions from").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            action = _parse(line)
            frames = _repeat(action.pop("repeat", 1))
            total += frames
            if total > MAX_FRAMES:
                raise UsageError(f"the file holds more than {MAX_FRAMES:,} frames; split it")
            if "keyboard" in action or "mouse" in action:
                action = _from_events(codec, action)
            rows.append(np.tile(encode(codec, action), (frames, 1)))
        except UsageError as error:
            raise UsageError(f"{path}, line {number}: {error}") from None
    if not rows:
        raise UsageError(f"{path} holds no action; write one JSON object a line, {{}} for no action")
    return np.concatenate(rows)


def _parse(line: str) -> dict[str, Any]:
    try:
        record = json.loads(line, parse_constant=_no_constant, object_pairs_hook=_once)
    except RecursionError:
        raise UsageError(f"not an action (nested too deep): {line.strip()[:60]}") from None
    except ValueError as error:
        if not line.lstrip().startswith("{'"):
            raise UsageError(f"not JSON ({error}): {line.strip()[:60]}") from None
        try:  # as the released MineWorld clips have it
            record = parse_literal(line)
        except ValueError as reason:
            raise UsageError(f"not an action ({reason}): {line.strip()[:60]}") from None
    if not isinstance(record, dict):
        raise UsageError(f"expected one JSON object a line, got {line.strip()[:60]}")
    return record


def _no_constant(name: str) -> None:
    raise UsageError(f"expected a finite number, got {name}")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise UsageError(f"'{twice}' is given twice; give it once")
    return record


def _repeat(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_REPEAT:
        raise UsageError(f"'repeat' is {value!r}; expected a whole number of frames from 1 to {MAX_REPEAT}")
    return value


def _from_events(codec: ActionCodec, record: Mapping[str, Any]) -> dict[str, object]:
    """The action of one raw recorded line; see ``RawInput``."""
    raw = codec.raw
    if raw is None:
        named = ", ".join(sorted({*codec.buttons, *codec.fields, *codec.choices}))
        raise UsageError(f"this model takes no raw keyboard and mouse events; use {named}")
    try:
        pressed, camera = _events(raw, record)
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError):
        raise UsageError(
            'raw events are damaged; expected {"keyboard": {"keys": [...]}, "mouse": {"dx": 0, "dy": 0,'
            ' "buttons": []}}'
        ) from None
    for one, other in raw.cancelling:
        if {one, other} <= pressed:
            pressed -= {one, other}
    return {**dict.fromkeys(pressed, True), raw.camera: camera}


def _events(raw: codecs.RawInput, record: Mapping[str, Any]) -> tuple[set[str], list[float]]:
    """Pressed buttons, and (pitch, yaw) in degrees."""
    mouse = {"dx": 0.0, "dy": 0.0, "buttons": [], **record.get("mouse", {})}
    keys = record.get("keyboard", {}).get("keys", [])
    if not isinstance(keys, list) or not isinstance(mouse["buttons"], list):
        raise TypeError("keys and buttons are lists")
    pressed = {raw.keys[key] for key in keys if key in raw.keys}
    pressed |= {name for number, name in enumerate(raw.mouse_buttons) if number in mouse["buttons"]}
    camera = [float(mouse[axis]) * raw.degrees_per_pixel for axis in ("dy", "dx")]
    return pressed, [float(int(degrees)) for degrees in camera] if raw.whole_degrees else camera


def _value(codec: ActionCodec, name: str, value: object) -> object:
    """A checked input: bool for a button, tuple of floats for a field, index for a choice."""
    if name in codec.buttons:
        if value not in (0, 1):
            raise UsageError(f"'{name}' is {value!r}; expected true or false")
        return bool(value)
    if name in codec.fields:
        return _numbers(name, value, codec.fields[name])
    if name in codec.choices:
        names = codec.choices[name]
        if not isinstance(value, str) or value not in names:
            raise unknown(name, str(value), names)
        return names.index(value)
    raise unknown("action", name, {*codec.buttons, *codec.fields, *codec.choices})


def _numbers(name: str, value: object, count: int) -> tuple[float, ...]:
    numbers: list[Any] = list(value) if isinstance(value, list | tuple | np.ndarray) else [value]
    numeric = all(isinstance(one, int | float | np.number) and not isinstance(one, bool) for one in numbers)
    try:
        floats = tuple(float(one) for one in numbers) if numeric else ()
    except OverflowError:
        floats = ()
    if len(floats) != count or not all(map(math.isfinite, floats)):
        raise UsageError(f"'{name}' is {value!r}; expected {count} finite numbers in a list")
    return floats


def _token(slot: codecs.Slot, inputs: Mapping[str, Any]) -> int:
    if isinstance(slot, codecs.ConstantSlot):
        return slot.token
    if isinstance(slot, codecs.ChoiceSlot):
        return slot.first + int(inputs.get(slot.field, 0))
    if isinstance(slot, codecs.MuLawSlot | codecs.EdgesSlot):
        return slot.first + _bin(slot, inputs[slot.field][slot.component] if slot.field in inputs else 0.0)
    pressed = [button.token for button in slot.buttons if inputs.get(button.name, False)]
    found = pressed[:1] if isinstance(slot, codecs.FirstPressedSlot) or len(pressed) == 1 else []
    return found[0] if found else slot.none


def represented(codec: ActionCodec, field: str, ids: NDArray[np.integer[Any]]) -> NDArray[np.float64]:
    """What tokens say of a field: the middles of its bins, float64 [numbers of the field]."""
    numbers = np.zeros(codec.fields[field])
    for slot, token in zip(codec.slots, ids.tolist(), strict=True):
        if isinstance(slot, codecs.MuLawSlot) and slot.field == field:
            level = 2 * (token - slot.first) / (slot.bins - 1) - 1
            share = math.copysign(((1 + slot.mu) ** abs(level) - 1) / slot.mu, level)
            numbers[slot.component] = slot.limit * share
        elif isinstance(slot, codecs.EdgesSlot) and slot.field == field:
            numbers[slot.component] = sum(slot.edges[token - slot.first :][:2]) / 2
    return numbers


def describe(codec: ActionCodec, ids: NDArray[np.integer[Any]]) -> dict[str, Any]:
    """An action as a line of an action file says it: `encode` of it gives the ids again."""
    action: dict[str, Any] = {}
    for slot, token in zip(codec.slots, ids.tolist(), strict=True):
        if isinstance(slot, codecs.ChoiceSlot):
            action[slot.field] = slot.names[token - slot.first]
        elif isinstance(slot, codecs.MuLawSlot | codecs.EdgesSlot):
            action[slot.field] = represented(codec, slot.field, ids).tolist()
        elif not isinstance(slot, codecs.ConstantSlot):
            action |= {button.name: 1 for button in slot.buttons if button.token == token}
    return action


def write_actions(path: Path, codec: ActionCodec, actions: NDArray[np.integer[Any]]) -> None:
    """Write ids [frames, n] as a file that `read_actions` reads."""
    lines = (json.dumps(describe(codec, ids)) + "\n" for ids in actions)
    write_text(path, "".join(lines))


def _bin(slot: codecs.MuLawSlot | codecs.EdgesSlot, number: float) -> int:
    if isinstance(slot, codecs.MuLawSlot):
        share = max(-slot.limit, min(slot.limit, number)) / slot.limit
        level = math.copysign(math.log(1 + slot.mu * abs(share)) / math.log(1 + slot.mu), share)
        return round((slot.limit * level + slot.limit) / (2 * slot.limit / (slot.bins - 1)))
    if not slot.edges[0] <= number < slot.edges[-1]:
        raise UsageError(
            f"component {slot.component} of '{slot.field}' is {number}; expected"
            f" {slot.edges[0]} <= value < {slot.edges[-1]}"
        )
    return bisect_right(slot.edges, number) - 1


def parse_literal(text: str) -> object:
    """The value of a literal made of dicts, lists, numbers, strings and ``array([...])``, which is its list.

    Released MineWorld clips hold their actions so: ``{'forward': 1, 'camera': array([0, 1])}``.

    Raises:
        ValueError: it is anything else.
    """
    if len(text) > MAX_LITERAL:
        raise ValueError(f"it has {len(text)} characters, an action has at most {MAX_LITERAL}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            return _literal_value(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"it is no Python literal ({error})") from error


def _literal_value(node: ast.expr | None) -> object:
    match node:
        case ast.Constant(value=bool() | int() | float() | str() as value):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
            return -number
        case ast.List(elts=parts) | ast.Tuple(elts=parts):
            return [_literal_value(part) for part in parts]
        case ast.Dict(keys=keys, values=values):
            names = [str(_literal_value(key)) for key in keys]
            if twice := [name for name in names if names.count(name) > 1]:
                raise ValueError(f"'{twice[0]}' is given twice")
            return dict(zip(names, map(_literal_value, values), strict=True))
        case ast.Call(ast.Name(id="array"), [ast.List() as numbers], [] | [ast.keyword(arg="dtype")]):
            return _literal_value(numbers)
    raise ValueError(
        f"'{ast.unparse(node) if node else '**'}' is neither a dict, a list, a number nor a string"
    )
