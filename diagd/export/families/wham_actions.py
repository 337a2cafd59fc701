"""The 16 action tokens of a WHAM step: 12 buttons and 4 stick components."""

from __future__ import annotations

from typing import Final

from diagd.bundle.actions import ActionCodec, Button, EdgesSlot, OnlyPressedSlot

_BUTTONS: Final = 12
_STICKS: Final = 4
_HALF: Final = (0.05, 0.25, 0.5, 0.75, 0.95, 1.05)
_EDGES: Final = (*(-edge for edge in reversed(_HALF)), *_HALF)


def wham_actions(codes: int = 16384) -> ActionCodec:
    """Codec of a WHAM model whose image tokens are 0 .. codes - 1.

    Buttons are ``button_0`` .. ``button_11`` in the order of the model's action vector; the field ``sticks``
    holds its four stick components in [-1, 1]. The release does not say which control each one is.
    """
    sticks = codes + 2 * _BUTTONS
    bins = len(_EDGES) - 1
    return ActionCodec(
        slots=(
            *(
                OnlyPressedSlot(
                    buttons=(Button(name=f"button_{index}", token=codes + 2 * index + 1),),
                    none=codes + 2 * index,
                )
                for index in range(_BUTTONS)
            ),
            *(
                EdgesSlot(field="sticks", component=index, edges=_EDGES, first=sticks + bins * index)
                for index in range(_STICKS)
            ),
        )
    )
