"""Clips: frames that are known, the actions between them, and those that follow.

Episodes are those that the release of WHAM takes and writes, ``.npz`` of ``images`` and ``actions``, and
those of a world that was recorded.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from diagd.bundle import Manifest
from diagd.bundle.actions import ActionCodec, EdgesSlot, FirstPressedSlot, OnlyPressedSlot
from diagd.bundle.files import atomic_file
from diagd.engines.engine import Int
from diagd.errors import UsageError
from diagd.options import File, checked, flag, setting
from diagd.runtime.actions import encode, read_actions
from diagd.runtime.arrays import read_arrays, read_ids
from diagd.runtime.pictures import read_images, sized
from diagd.runtime.pixels import PixelCodec, Pixels

EPISODE = ".npz"
RECORDED = ("frames", "actions")
"""Arrays of an episode of a recorded world."""

DREAM = ("raw_context", "dreamt_images", "all_actions")
"""Pictures and actions of an episode that was dreamt, under the names of the release."""

ACTIONS = "actions.jsonl"
"""Of a folder of images: one action a line."""

CLIPS = (".mp4", EPISODE, ".avi", ".mkv", ".mov", ".webm")
"""Files of which a folder is many clips, not the pictures of one."""

MODEL = Path("model")
"""In place of a file of actions: the model decodes them."""

ALL = 1 << 20
"""Frames: more than a clip has."""

_LOG = logging.getLogger(__name__)

Lines = Literal["new", "led", "followed"]


@checked
class ClipOptions:
    """Where a clip is, and which part of it is the prompt."""

    prompt: File = flag("image, video, folder of images, .npz episode or .npy tokens [P, h, w]")
    actions: File | None = flag(
        "one action a line: of the clip where it has the prompt's name, else of the "
        "frames to make; or the word model: it decodes them",
        None,
    )
    start: int | None = flag(
        "first picture of the prompt (default: the model's, first or last ones)", None, ge=0, le=1_000_000_000
    )
    prompt_frames: int | None = setting(
        "pictures of a video that are the prompt (default: the model's)", None, ge=1, le=1_000_000
    )
    lines: Lines | None = setting(
        "line t of --actions: 'new', of a frame to make; 'led', what led to picture t; "
        "'followed', what was done at it (default: the model's where the names are alike, else new)",
        None,
    )
    further: Literal["model"] | None = setting(
        "'model' decodes the actions behind those that are given", None
    )
    resize: bool = setting("resize pictures of another size", False)

    @property
    def acts(self) -> bool:
        """Whether the model decodes actions."""
        return self.actions == MODEL or self.further is not None

    @property
    def lines_file(self) -> Path | None:
        """The file of actions; where the model plays, the one of the prompt's name, if there is one."""
        beside = self.prompt.with_suffix(".jsonl")
        if self.actions != MODEL:
            return self.actions
        return beside if beside != self.prompt and beside.is_file() else None


@dataclasses.dataclass(frozen=True)
class Clip:
    """What a stream starts from, and what comes behind.

    Attributes:
        tokens: int32 [P, rows, columns] of the prompt.
        led: int32 [P, n], actions that led to each frame of the prompt; None for models without actions.
        made: int32 [F, n], actions that lead to the frames behind it; None without.
        acts: the model decodes the actions behind those.
        pictures: uint8 [N, height, width, 3], of the prompt, where it is no tokens.
        truth: uint8 [F, height, width, 3], pictures behind the prompt, where the clip has them at hand.
    """

    tokens: Int
    led: Int | None = None
    made: Int | None = None
    acts: bool = False
    pictures: Pixels | None = None
    truth: Pixels | None = None

    def actions(self, frames: int) -> list[Int | None] | None:
        """Of so many frames behind the prompt; see ``diagd.runtime.stream.Actions``."""
        if self.made is None:
            return None
        return [*self.made[:frames], *[None] * (self.acts * (frames - len(self.made)))]


def read_clip(
    options: ClipOptions, manifest: Manifest, pixels: PixelCodec | None, window: int | None = None
) -> Clip:
    """Read a prompt and its actions; where none are known between its frames, no-ops stand, and it is logged.

    ``pixels`` are not needed for tokens; ``window`` None is the model's context.

    Raises:
        UsageError: a file is missing, damaged or too short, or does not fit the model.
    """
    start, clip = _open(options, manifest, pixels, (window or manifest.context.frames) - 1)
    if manifest.actions is None:
        if options.actions is not None or options.acts:
            given = f"--actions {options.actions}" if options.actions else f"--set further={options.further}"
            raise UsageError(f"{given}: {manifest.name} takes no actions; leave them out")
        return clip
    noop = encode(manifest.actions, {})
    file, acts = options.lines_file, options.acts
    lines = clip.made if file is None else read_actions(file, manifest.actions)
    frames = len(clip.tokens)
    led = np.tile(noop, (frames, 1))
    kind = options.lines or _kind(file, options.prompt, manifest, clip)
    if lines is None or kind == "new":
        if frames > 1:
            _LOG.warning("no actions are known between the %d frames of the prompt: no-ops are fed", frames)
        if options.actions == MODEL or (lines is None and acts):
            lines = led[:0]
        return dataclasses.replace(clip, led=led, made=lines, acts=acts)
    shift = int(kind == "followed")  # line t leads to picture t + shift
    behind = start + frames - shift
    if len(lines) < behind:
        raise UsageError(
            f"{file or options.prompt} has {len(lines)} actions; the prompt's {frames} "
            f"frames from {start} on take {behind}: lower prompt_frames or --start, or --set lines=new"
        )
    known = lines[max(0, start - shift) : behind]
    led[frames - len(known) :] = known
    made = lines[behind : behind + shift] if options.actions == MODEL else lines[behind:]
    return dataclasses.replace(clip, led=led, made=made, acts=acts)


def read_recording(
    path: Path, manifest: Manifest, pixels: PixelCodec, frames: int = ALL, *, resize: bool = False
) -> Clip:
    """The first token frames of a recording, as a prompt: with all that was done between them.

    It is a video, with the actions of its name in a .jsonl where the model takes some, or an episode.

    Raises:
        UsageError: a file is damaged, or has no action for a frame.
    """
    lines, shown = path.with_suffix(".jsonl"), pixels.pictures_of(frames)
    rules = manifest.clips.model_copy(update={"frames": shown, "last": False, "single": None})
    where = ClipOptions(prompt=path, actions=lines if lines.is_file() else None, resize=resize)
    return read_clip(where, manifest.model_copy(update={"clips": rules}), pixels, frames + 1)


def _kind(file: Path | None, prompt: Path, manifest: Manifest, clip: Clip) -> Lines:
    """What the lines are where nobody says it: of the clip where they come with it or have its name."""
    own = clip.made is not None and file is None
    alike = file is not None and file.stem == prompt.stem
    if not (own or alike):
        return "new"
    return "followed" if manifest.clips.followed else "led"


def _open(options: ClipOptions, manifest: Manifest, pixels: PixelCodec | None, most: int) -> tuple[int, Clip]:
    """Where a prompt starts in its file, and what the file has of it; all of its actions are ``made``."""
    path, start, count = options.prompt, options.start or 0, options.prompt_frames
    if path.suffix.lower() == ".npy" or pixels is None:
        tokens = read_tokens(path, manifest)[start:][:count]
        _check_length(len(tokens), path, start, count)
        return start, Clip(tokens)
    size, cover = pixels.spec.size, pixels.spec.cover
    wanted = count or min(manifest.clips.frames, pixels.pictures_of(most))
    actions: Int | None = None
    truth: Pixels | None = None
    if path.suffix.lower() == EPISODE:
        images, actions = read_episode(path, manifest.actions, manifest.name)
        seen, truth = (
            sized(part, path, size, resize=options.resize, cover=cover)
            for part in np.split(images[start:], [wanted])
        )
    elif path.is_dir():
        seen = read_images(path, size, start=start, frames=wanted, resize=options.resize, cover=cover)
        lines = path / ACTIONS
        if manifest.actions is not None and lines.exists():
            actions = read_actions(lines, manifest.actions)
    else:
        at = None if options.start is None and manifest.clips.last else start
        seen = pixels.read(path, start=at, frames=wanted, resize=options.resize)
    _check_length(len(seen), path, start, count)
    if len(seen) == 1 and manifest.clips.single:
        _LOG.warning("%s: %s", path, manifest.clips.single)
    surplus = 0 if count else (len(seen) - 1) % pixels.spec.temporal_factor  # of a video that is short
    seen = seen[surplus:] if manifest.clips.last else seen[: len(seen) - surplus]
    return start, Clip(pixels.encode(seen), made=actions, pictures=seen, truth=truth)


def _check_length(found: int, path: Path, start: int, count: int | None) -> None:
    """Refuse (UsageError) a prompt that its file does not have."""
    if not found:
        raise UsageError(f"{path} has no frame {start}; choose an earlier --start")
    if count is not None and found < count:
        raise UsageError(f"{path} has {found} frames, {count} are asked for; lower --set prompt_frames")


def read_prompt(path: Path, pixels: PixelCodec, frames: int, resize: bool) -> Int:
    """Tokens int32 [P, rows, columns] of the last ``frames`` frames of an image or video.

    Raises:
        UsageError: the file cannot be read, is of another size or too short.
    """
    seen = pixels.read(path, frames=frames, resize=resize)
    if len(seen) < frames:
        raise UsageError(f"{path} has {len(seen)} frames, {frames} are asked for; lower prompt_frames")
    return pixels.encode(seen)


def read_tokens(path: Path, manifest: Manifest) -> Int:
    """Tokens int32 [P, rows, columns] from a .npy file; UsageError where it holds none of the model's."""
    tokens, rows, columns = read_ids(path), manifest.layout.rows, manifest.layout.columns
    if tokens.shape[1:] != (rows, columns):
        raise UsageError(f"{path} has shape {list(tokens.shape)}; expected [frames, {rows}, {columns}]")
    check_tokens(tokens, manifest, str(path))
    return np.ascontiguousarray(tokens, dtype=np.int32)


def check_tokens(tokens: NDArray[np.generic], manifest: Manifest, source: str) -> None:
    """Refuse (UsageError, of ``source``) ids that are no visual tokens of the model: it cannot show them."""
    high = max(rule.high for rule in manifest.sampling.ranges)
    if not tokens.size or tokens.min() < 0 or tokens.max() >= high:
        span = f"{tokens.min()}..{tokens.max()}" if tokens.size else "none"
        raise UsageError(f"{source} holds tokens {span}; {manifest.name} has visual tokens 0..{high - 1}")


def read_episode(path: Path, codec: ActionCodec | None, name: str) -> tuple[Pixels, Int]:
    """Pictures uint8 [T, height, width, 3] of an episode, and ids int32 [T, n] of what was done at each.

    ``path``: .npz with ``images`` uint8 [T, 3, height, width] and ``actions`` [T, n], one number a slot of
    the model's ``codec``: buttons as 0 or 1, sticks as bins or as positions in [-1, 1]. Or a dream's, see
    `write_dream`, or a recorded world's: ``frames`` uint8 [T, height, width, 3] and ``actions`` [T], numbers
    of the model's choices.

    Raises:
        UsageError: the file is none, or its actions are not of this model.
    """
    found = read_arrays(path, ("images", *RECORDED, *DREAM), "episode")
    if all(name in found for name in RECORDED):
        return _recorded(path, found["frames"], found["actions"], codec, name)
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
    return np.ascontiguousarray(images.transpose(0, 2, 3, 1)), actions


def _recorded(
    path: Path, frames: NDArray[Any], numbers: NDArray[Any], codec: ActionCodec | None, name: str
) -> tuple[Pixels, Int]:
    if codec is None or codec.buttons or codec.fields or len(codec.choices) != 1:
        raise UsageError(f"{path} is an episode of a recorded world; {name} takes no numbers of choices")
    ((field, choices),) = codec.choices.items()
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or not len(frames):
        raise UsageError(
            f"{path}: frames are {frames.dtype} {list(frames.shape)}; expected uint8 [T, height, width, 3]"
        )
    if numbers.shape != (len(frames),) or not np.isin(numbers, np.arange(len(choices))).all():
        raise UsageError(
            f"{path}: actions are {numbers.dtype} {list(numbers.shape)} {numbers.reshape(-1)[:8].tolist()}; "
            f"expected [{len(frames)}] numbers of {', '.join(choices)}, from 0 on"
        )
    return frames, np.stack([encode(codec, {field: choices[int(number)]}) for number in numbers])


def vector_codec(path: Path, codec: ActionCodec | None, name: str) -> ActionCodec:
    """The codec of a model whose actions are numbers, one a slot; UsageError of ``path`` for others."""
    if codec is None or not any(isinstance(slot, EdgesSlot) for slot in codec.slots):
        raise UsageError(f"{path}: such episodes have buttons and sticks; {name} takes no vectors of actions")
    return codec


def write_dream(
    path: Path, codec: ActionCodec, context: Pixels, dreamt: Pixels, actions: Int, reconstructed: Pixels
) -> None:
    """Write what is made from an episode as the release of WHAM does; actions as numbers, sticks as bins.

    ``context`` uint8 [P, height, width, 3] are pictures of the prompt, ``dreamt`` [F, height, width, 3] those
    that were made, ``actions`` int32 [P + F, n] what was done at each, ``reconstructed`` uint8 [T, height,
    width, 3] the pictures of the recording, the prompt's first, through the tokenizer and back.
    """
    with atomic_file(path) as partial, partial.open("wb") as file:
        np.savez(
            file,
            context_length=len(context),
            steps_to_dream=len(dreamt),
            raw_context=context.transpose(0, 3, 1, 2),
            dreamt_images=dreamt.transpose(0, 3, 1, 2),
            all_actions=decode_vectors(codec, actions),
            encoded_decoded_ground_truth_images=reconstructed.transpose(0, 3, 1, 2),
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
