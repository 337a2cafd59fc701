"""How an action becomes the known tokens of a frame, as data that any runtime can read.

A codec is a list of slots, one token each. An action is a record of named inputs: buttons (pressed or not),
fields (numbers, such as camera degrees or stick positions) and choices (one of several names). What a record
leaves out is at rest.
"""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

RESERVED = ("repeat", "keyboard", "mouse")
"""Keys of an action record that mean the same for every codec."""

TokenId = Annotated[int, Field(ge=0)]


class Record(BaseModel):
    """Data of a manifest."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ConstantSlot(Record):
    """Always the same token."""

    kind: Literal["constant"] = "constant"
    token: TokenId

    @property
    def ids(self) -> tuple[int, ...]:
        """Tokens it may be."""
        return (self.token,)


class ChoiceSlot(Record):
    """Token ``first + i`` for the i-th name; without the input, the first name."""

    kind: Literal["choice"] = "choice"
    field: str
    names: Annotated[tuple[str, ...], Field(min_length=1)]
    first: TokenId

    @property
    def ids(self) -> tuple[int, ...]:
        """Tokens it may be."""
        return tuple(range(self.first, self.first + len(self.names)))


class Button(Record):
    """An input that is pressed or not, and its token."""

    name: str
    token: TokenId


class _ButtonsSlot(Record):
    buttons: Annotated[tuple[Button, ...], Field(min_length=1)]
    none: TokenId

    @property
    def ids(self) -> tuple[int, ...]:
        """Tokens it may be."""
        return (*(button.token for button in self.buttons), self.none)


class FirstPressedSlot(_ButtonsSlot):
    """Token of the first button in the list that is pressed, else ``none``."""

    kind: Literal["first_pressed"] = "first_pressed"


class OnlyPressedSlot(_ButtonsSlot):
    """Token of the one button that is pressed; ``none`` if no button is, or more than one."""

    kind: Literal["only_pressed"] = "only_pressed"


class _NumberSlot(Record):
    field: str
    component: Annotated[int, Field(ge=0)] = 0
    first: TokenId


class MuLawSlot(_NumberSlot):
    """A number in mu-law bins: finer near zero.

    v is clipped to [-limit, limit], x = v / limit, m = sign(x) ln(1 + mu |x|) / ln(1 + mu), and the bin is
    (m + 1) (bins - 1) / 2 rounded half to even.
    """

    kind: Literal["mu_law"] = "mu_law"
    limit: Annotated[float, Field(gt=0)]
    mu: Annotated[float, Field(gt=0)]
    bins: Annotated[int, Field(ge=2)]

    @property
    def ids(self) -> tuple[int, ...]:
        """Tokens it may be."""
        return tuple(range(self.first, self.first + self.bins))


class EdgesSlot(_NumberSlot):
    """A number in explicit bins: bin b holds edges[b] <= v < edges[b + 1]."""

    kind: Literal["edges"] = "edges"
    edges: Annotated[tuple[float, ...], Field(min_length=2)]

    @property
    def ids(self) -> tuple[int, ...]:
        """Tokens it may be."""
        return tuple(range(self.first, self.first + len(self.edges) - 1))

    @model_validator(mode="after")
    def _check_edges(self) -> EdgesSlot:
        if any(low >= high for low, high in pairwise(self.edges)):
            raise ValueError(f"edges must increase, got {self.edges}")
        if not self.edges[0] <= 0 < self.edges[-1]:
            raise ValueError(f"edges must include 0, the value at rest, got {self.edges}")
        return self


Slot = Annotated[
    ConstantSlot | ChoiceSlot | FirstPressedSlot | OnlyPressedSlot | MuLawSlot | EdgesSlot,
    Field(discriminator="kind"),
]


class RawInput(Record):
    """How keyboard and mouse events, as VPT recordings hold them, become an action.

    Attributes:
        keys: button by keyboard key; other keys are ignored.
        mouse_buttons: button by number of the mouse button.
        camera: field of (pitch, yaw) that mouse motion (dy, dx) turns.
        degrees_per_pixel: of mouse motion.
        whole_degrees: degrees are truncated toward zero.
        cancelling: pairs of buttons; both are released if both are pressed, one pair after the other.
    """

    keys: dict[str, str]
    mouse_buttons: tuple[str, ...]
    camera: str
    degrees_per_pixel: float
    whole_degrees: bool
    cancelling: tuple[tuple[str, str], ...]


class ActionCodec(Record):
    """The tokens of one action.

    ``ignored``: buttons that a record may hold and no token tells. ``raw``: how to read keyboard and mouse
    events; None if the model cannot.
    """

    slots: Annotated[tuple[Slot, ...], Field(min_length=1)]
    ignored: tuple[str, ...] = ()
    raw: RawInput | None = None

    @property
    def buttons(self) -> frozenset[str]:
        """Names of all buttons, ignored ones included."""
        pressed = (slot for slot in self.slots if isinstance(slot, _ButtonsSlot))
        return frozenset(button.name for slot in pressed for button in slot.buttons).union(self.ignored)

    @property
    def fields(self) -> dict[str, int]:
        """How many numbers each field holds."""
        sizes: dict[str, int] = {}
        for slot in self.slots:
            if isinstance(slot, _NumberSlot):
                sizes[slot.field] = max(sizes.get(slot.field, 0), slot.component + 1)
        return sizes

    @property
    def choices(self) -> dict[str, tuple[str, ...]]:
        """Names each choice is made from."""
        return {slot.field: slot.names for slot in self.slots if isinstance(slot, ChoiceSlot)}

    @model_validator(mode="after")
    def _check_names(self) -> ActionCodec:
        meanings = Counter([*self.buttons, *self.fields, *self.choices, *RESERVED])
        clashes = sorted(name for name, count in meanings.items() if count > 1)
        if clashes:
            raise ValueError(f"inputs {clashes} have two meanings")
        if (raw := self.raw) is None:
            return self
        pairs = [name for pair in raw.cancelling for name in pair]
        if unknown := {*raw.keys.values(), *raw.mouse_buttons, *pairs} - self.buttons:
            raise ValueError(f"raw input names buttons {sorted(unknown)} that no slot has")
        if self.fields.get(raw.camera) != 2:
            raise ValueError(f"raw input needs a field '{raw.camera}' of two numbers, pitch and yaw")
        return self
