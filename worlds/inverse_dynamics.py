"""Whether a video shows the actions it was made under: read off it by a network of inverse dynamics.

The network is the user's, such as VPT's in ONNX: one input [1, T, H, W, 3] of pictures, uint8 or float of 0
to 1, and the outputs ``buttons`` [1, T, 20], above 0.5 where pressed, in the order of VPT, and ``camera``
[1, T, 2], degrees (pitch, yaw): what was done at each picture, and led to the next one. None is shipped.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from diagd.bundle.actions import ActionCodec, FirstPressedSlot, MuLawSlot, OnlyPressedSlot
from diagd.engines.engine import Int
from diagd.errors import UsageError
from diagd.export.families.mineworld import mineworld_actions
from diagd.runtime.actions import encode, read_actions
from diagd.runtime.decoders.draft import as_floats, open_network
from diagd.runtime.pictures import sized
from worlds.metrics import Estimate
from worlds.options import FolderOptions

BUTTONS: Final = (
    *("attack", "back", "forward", "jump", "left", "right", "sneak", "sprint", "use", "drop", "inventory"),
    *(f"hotbar.{number}" for number in range(1, 10)),
)
"""In the order of VPT."""

GROUPS: Final = (
    ("forward", "back"),
    ("left", "right"),
    ("sneak", "sprint"),
    *(("use",), ("attack",), ("jump",), ("drop",)),
)
"""What is told apart in MineWorld's table: which of these is pressed, or none."""


class ActionReader:
    """Sees by a network what was done in videos.

    Args:
        path: of the network.

    Raises:
        UsageError: it is no such network.
    """

    def __init__(self, path: Path, threads: int = 0) -> None:
        self._session = open_network(path, "network", threads)
        inputs, outputs = self._session.get_inputs(), [one.name for one in self._session.get_outputs()]
        shape = list(inputs[0].shape)
        if len(inputs) != 1 or len(shape) != 5 or not {"buttons", "camera"} <= set(outputs):
            raise UsageError(
                f"{path} takes {[one.shape for one in inputs]} and gives {outputs}; expected one input "
                "[1, T, H, W, 3] and the outputs buttons [1, T, 20] and camera [1, T, 2]"
            )
        self._path, self._name, self._codec = path, inputs[0].name, mineworld_actions()
        self._is_float, self._size = "float" in inputs[0].type, shape[2:4]

    def read(self, pictures: NDArray[np.uint8], actions: Int) -> tuple[Int, Int]:
        """Ids [m, 11] that it sees in a video uint8 [T, H, W, 3], and those that were done there.

        ``actions`` [n, 11] were done at its first n pictures; m is at most n.
        """
        if all(isinstance(side, int) for side in self._size):
            size = (self._size[0], self._size[1])
            pictures = sized(pictures, self._path, size, resize=True, cover=False)
        feed = as_floats(pictures) if self._is_float else pictures
        buttons, camera = self._session.run(["buttons", "camera"], {self._name: feed[None]})
        seen = [_action(*one) for one in zip(buttons[0], camera[0], strict=True)]
        count = min(len(seen) - 1, len(actions))  # what was done at the last picture is not seen
        found = [encode(self._codec, action) for action in seen[:count]]
        return np.array(found, np.int32).reshape(count, -1), actions[:count]


def action_figures(seen: Int, done: Int) -> dict[str, Estimate]:
    """Precision, recall and F1 by group, micro and macro, and of the bins of the camera; ids [n, 11]."""
    codec = mineworld_actions()
    figures: dict[str, Estimate] = {}
    for group in GROUPS:
        figures |= _scores("/".join(group), _pressed(codec, group, seen), _pressed(codec, group, done))
    turned = [n for n, slot in enumerate(codec.slots) if isinstance(slot, MuLawSlot)]
    return figures | _scores("camera", seen[:, turned].ravel(), done[:, turned].ravel())


def done_in(recording: Path, pictures: int, options: FolderOptions) -> Int:
    """Ids [n, 11] of what was done at the first of a recording's pictures that count, from its lines.

    Raises:
        UsageError: they cannot be read, or there are too few.
    """
    skipped = options.skip if options.truth_skip is None else options.truth_skip
    first, file = skipped + (options.lines == "led"), recording.with_suffix(".jsonl")
    found: Int = read_actions(file, mineworld_actions())[first : first + pictures]
    if not len(found):
        raise UsageError(f"{file} has no action behind line {first}; lower --set skip or truth_skip")
    return found


def _action(buttons: NDArray[np.floating], camera: NDArray[np.floating]) -> dict[str, Any]:
    pressed = {name: True for name, value in zip(BUTTONS, buttons, strict=True) if value > 0.5}
    return pressed | {"camera": camera.astype(float).tolist()}


def _pressed(codec: ActionCodec, group: tuple[str, ...], actions: Int) -> NDArray[np.int64]:
    """Which button of a group [n], from 1; 0 is none."""
    classes = np.zeros(len(actions), np.int64)
    for column, slot in enumerate(codec.slots):
        if isinstance(slot, FirstPressedSlot | OnlyPressedSlot):
            for button in slot.buttons:
                if button.name in group:
                    classes[actions[:, column] == button.token] = 1 + group.index(button.name)
    return classes


def _scores(name: str, seen: NDArray[np.integer], done: NDArray[np.integer]) -> dict[str, Estimate]:
    from sklearn.metrics import precision_recall_fscore_support

    figures = {}
    for average in ("micro", "macro"):
        scores = precision_recall_fscore_support(done, seen, average=average, zero_division=0)
        for kind, score in zip(("precision", "recall", "F1"), scores, strict=False):
            figures[f"{name} {average} {kind}"] = Estimate(float(score), float("nan"), len(done))
    return figures
