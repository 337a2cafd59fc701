"""Recorded episodes as the release of WHAM takes and writes them: ``.npz`` of ``images`` and ``actions``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from diagd.bundle.actions import ActionCodec, EdgesSlot, FirstPressedSlot, OnlyPressedSlot
from diagd.bundle.files import atomic_file
from diagd.engines.engine import Int
from diagd.errors import UsageError
from diagd.runtime.arrays import read_arrays

EPISODE = ".npz"
DREAM = ("raw_context", "dreamt_images", "all_actions")
"""Pictures and actions of an episode that was dreamt, under the names of the release."""


@dataclass(frozen=True)
class Episode:
    """Pictures uint8 [T, height, width, 3], and the ids int32 [T, n] of what was done at each."""

    frames: NDArray[np.uint8]
    actions: Int


def read_episode(path: Path, codec: ActionCodec | None, name: str) -> Episode:
    """Read an episode.

    Args:
        path: .npz with ``images`` uint8 [T, 3, height, width] and ``actions`` [T, n], one number a slot of
            the codec: buttons as 0 or 1, sticks as bins or as positions in [-1, 1]. Or what was dreamt, see
            ``Dream``.
        codec: of the model's actions.
        name: of the model, for messages.

    Raises:
        UsageError: the file is none, or its actions are not of this model.
    """
    found = read_arrays(path, ("images", "actions", *DREAM), "episode")
    if all(name in found for name in DREAM):
        context, dreamt, found["actions"] = (found[name] for name in DREAM)
        if context.shape[1:] == dreamt.shape[1:]:
            found["images"] = np.concatenate([context, dreamt])
    if not {"images", "actions"} <= found.keys():
        raise UsageError(f"{path} is no episode: expected images uint8 [T, 3, height, width] and actions")
    images, numbers = found["images"], found["actions"]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] != 3 or not len(images):
        raise UsageError(
            f"{path}: images are {images.dtype} {list(images.shape)}; expected uint8 [T, 3, height, width]"
        )
    codec = vector_codec(path, codec, name)
    if numbers.shape != (len(images), len(codec.slots)) or numbers.dtype.kind not in "iufb":
        raise UsageError(
            f"{path}: actions are {numbers.dtype} {list(numbers.shape)}; expected numbers "
            f"[{len(images)}, {len(codec.slots)}], one row a picture"
        )
    try:
        actions = encode_vectors(codec, numbers)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error
    return Episode(np.ascontiguousarray(images.transpose(0, 2, 3, 1)), actions)


def vector_codec(path: Path, codec: ActionCodec | None, name: str) -> ActionCodec:
    """The codec of a model whose actions are vectors, one number a slot.

    Raises:
        UsageError: they are not, so ``path`` is no episode of it.
    """
    if codec is None or not any(isinstance(slot, EdgesSlot) for slot in codec.slots):
        raise UsageError(f"{path} is an episode of another model; {name} takes no vectors of actions")
    return codec


@dataclass(frozen=True)
class Dream:
    """What is made from an episode, as the release of WHAM writes it.

    Attributes:
        context: uint8 [P, height, width, 3], pictures of the prompt.
        dreamt: uint8 [F, height, width, 3], those that were made.
        actions: int32 [P + F, n], ids of what was done at each.
        reconstructed: uint8 [T, height, width, 3], the pictures of the recording, the prompt's first, through
            the tokenizer and back.
    """

    context: NDArray[np.uint8]
    dreamt: NDArray[np.uint8]
    actions: Int
    reconstructed: NDArray[np.uint8]

    def write(self, path: Path, codec: ActionCodec) -> None:
        """Write it under the names of the release; actions as numbers, sticks as bins."""
        with atomic_file(path) as partial, partial.open("wb") as file:
            np.savez(
                file,
                context_length=len(self.context),
                steps_to_dream=len(self.dreamt),
                raw_context=self.context.transpose(0, 3, 1, 2),
                dreamt_images=self.dreamt.transpose(0, 3, 1, 2),
                all_actions=decode_vectors(codec, self.actions),
                encoded_decoded_ground_truth_images=self.reconstructed.transpose(0, 3, 1, 2),
            )


def decode_vectors(codec: ActionCodec, ids: Int) -> NDArray[np.float32]:
    """Actions float32 [T, n] of ids, one number a slot: buttons as 0 or 1, sticks as bins."""
    columns = [
        ids[:, column] - slot.first if isinstance(slot, EdgesSlot) else ids[:, column] == slot.ids[0]
        for column, slot in enumerate(codec.slots)
    ]
    return np.stack(columns, axis=1).astype(np.float32)


def encode_vectors(codec: ActionCodec, numbers: NDArray[np.generic]) -> Int:
    """Ids int32 [T, n] of actions [T, n], one number a slot.

    Numbers of binned slots are bins where all of them are whole, none is negative and one is above 1; else
    they are the positions themselves: a stick at rest is bin 5, so an episode of bins has some above 1.

    Raises:
        UsageError: a button is neither 0 nor 1, or a stick is out of range.
    """
    values = numbers.astype(np.float64)
    binned = np.array([isinstance(slot, EdgesSlot) for slot in codec.slots])
    sticks, ids = values[:, binned], np.empty(values.shape, np.int32)
    are_bins = bool(
        (sticks == np.floor(sticks)).all() and sticks.min(initial=0) >= 0 and sticks.max(initial=0) > 1
    )
    for column, slot in enumerate(codec.slots):
        given = values[:, column]
        if isinstance(slot, EdgesSlot):
            edges = np.asarray(slot.edges)
            bins = given if are_bins else np.digitize(given, edges) - 1
            wrong = ~((bins >= 0) & (bins < len(edges) - 1))
            ids[:, column] = slot.first + np.where(wrong, 0, bins)
            expected = f"a bin 0..{len(edges) - 2}" if are_bins else "a position from -1 to 1"
        elif isinstance(slot, FirstPressedSlot | OnlyPressedSlot) and len(slot.buttons) == 1:
            wrong = (given != 0) & (given != 1)
            ids[:, column] = np.where(given == 1, slot.buttons[0].token, slot.none)
            expected = "0 or 1"
        else:
            raise UsageError(
                f"slot {column} of the model's actions is no number; give --actions as JSON lines"
            )
        if wrong.any():
            row = int(np.flatnonzero(wrong)[0])
            raise UsageError(f"number {column} of action {row} is {given[row]:g}; expected {expected}")
    return ids
