"""Clips: frames that are known, the actions between them, and those that follow."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic.dataclasses import dataclass

from diagd.bundle import Manifest
from diagd.engines.engine import Int
from diagd.errors import UsageError
from diagd.options import OPTIONS, File, flag, setting
from diagd.runtime.actions import encode, read_actions
from diagd.runtime.arrays import read_array
from diagd.runtime.episodes import EPISODE, read_episode
from diagd.runtime.pictures import read_frames, read_images, sized
from diagd.runtime.pixels import PixelCodec, Pixels

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


@dataclass(frozen=True, config=OPTIONS)
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
    source = _open(options, manifest, pixels, (window or manifest.context.frames) - 1)
    start, tokens = source.start, source.tokens
    if manifest.actions is None:
        if options.actions is not None or options.acts:
            given = f"--actions {options.actions}" if options.actions else f"--set further={options.further}"
            raise UsageError(f"{given}: {manifest.name} takes no actions; leave them out")
        return Clip(tokens, pictures=source.pictures, truth=source.truth)
    noop = encode(manifest.actions, {})
    file, acts = options.lines_file, options.acts
    lines = source.actions if file is None else read_actions(file, manifest.actions)
    led = np.tile(noop, (len(tokens), 1))
    kind = options.lines or _kind(file, options.prompt, manifest, source)
    if lines is None or kind == "new":
        if len(tokens) > 1:
            _LOG.warning(
                "no actions are known between the %d frames of the prompt: no-ops are fed", len(tokens)
            )
        if options.actions == MODEL or (lines is None and acts):
            lines = led[:0]
        return Clip(tokens, led, lines, acts, source.pictures, source.truth)
    shift = int(kind == "followed")  # line t leads to picture t + shift
    behind = start + len(tokens) - shift
    if len(lines) < behind:
        raise UsageError(
            f"{file or options.prompt} has {len(lines)} actions; the prompt's {len(tokens)} "
            f"frames from {start} on take {behind}: lower prompt_frames or --start, or --set lines=new"
        )
    known = lines[max(0, start - shift) : behind]
    led[len(tokens) - len(known) :] = known
    made = lines[behind : behind + shift] if options.actions == MODEL else lines[behind:]
    return Clip(tokens, led, made, acts, source.pictures, source.truth)


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


def _kind(file: Path | None, prompt: Path, manifest: Manifest, source: _Source) -> Lines:
    """What the lines are where nobody says it: of the clip where they come with it or have its name."""
    own = source.actions is not None and file is None
    alike = file is not None and file.stem == prompt.stem
    if not (own or alike):
        return "new"
    return "followed" if manifest.clips.followed else "led"


@dataclasses.dataclass(frozen=True)
class _Source:
    """A prompt as it was read: its tokens, where in the clip it starts, and what the clip has beside it."""

    tokens: Int
    start: int = 0
    actions: Int | None = None
    pictures: Pixels | None = None
    truth: Pixels | None = None


def _open(options: ClipOptions, manifest: Manifest, pixels: PixelCodec | None, most: int) -> _Source:
    path, start, count = options.prompt, options.start or 0, options.prompt_frames
    if path.suffix.lower() == ".npy" or pixels is None:
        tokens = read_tokens(path, manifest)[start:]
        return _Source(tokens[:count], start)
    size, cover = (pixels.spec.height, pixels.spec.width), pixels.spec.cover
    wanted = count or min(manifest.clips.frames, pixels.pictures_of(most))
    actions: Int | None = None
    truth: Pixels | None = None
    if path.suffix.lower() == EPISODE:
        episode = read_episode(path, manifest.actions, manifest.name)
        actions, images = episode.actions, episode.frames[start:]
        seen = sized(images[:wanted], path, size, resize=options.resize, cover=cover)
        truth = sized(images[wanted:], path, size, resize=options.resize, cover=cover)
    elif path.is_dir():
        seen = read_images(path, size, start=start, frames=wanted, resize=options.resize, cover=cover)
        lines = path / ACTIONS
        if manifest.actions is not None and lines.exists():
            actions = read_actions(lines, manifest.actions)
    else:
        at = None if options.start is None and manifest.clips.last else start
        seen = read_frames(path, size, start=at, frames=wanted, resize=options.resize, cover=cover)
    if not len(seen):
        raise UsageError(f"{path} has no frame {start}; choose an earlier --start")
    if count is not None and len(seen) < count:
        raise UsageError(f"{path} has {len(seen)} frames, {count} are asked for; lower --set prompt_frames")
    if len(seen) == 1 and manifest.clips.single:
        _LOG.warning("%s: %s", path, manifest.clips.single)
    surplus = 0 if count else (len(seen) - 1) % pixels.spec.temporal_factor  # of a video that is short
    seen = seen[surplus:] if manifest.clips.last else seen[: len(seen) - surplus]
    return _Source(pixels.encode(seen), start, actions, seen, truth)


def read_prompt(path: Path, pixels: PixelCodec, frames: int, resize: bool) -> Int:
    """Tokens int32 [P, rows, columns] of the last ``frames`` frames of an image or video.

    Raises:
        UsageError: the file cannot be read, is of another size or too short.
    """
    size = (pixels.spec.height, pixels.spec.width)
    seen = read_frames(path, size, frames=frames, resize=resize, cover=pixels.spec.cover)
    if len(seen) < frames:
        raise UsageError(f"{path} has {len(seen)} frames, {frames} are asked for; lower prompt_frames")
    return pixels.encode(seen)


def read_tokens(path: Path, manifest: Manifest) -> Int:
    """Tokens int32 [P, rows, columns] from a .npy file.

    Raises:
        UsageError: the file cannot be read, or holds ids that are no visual tokens of the model.
    """
    tokens = read_array(path, "tokens")
    if tokens.dtype.kind not in "iu":
        raise UsageError(f"{path} holds {tokens.dtype}; expected whole numbers, tokens [P, rows, columns]")
    check_tokens(tokens, manifest, str(path))
    return np.ascontiguousarray(tokens, dtype=np.int32)


def check_tokens(tokens: NDArray[np.generic], manifest: Manifest, source: str) -> None:
    """Refuse ids that are no visual tokens of the model, which its tokenizer cannot show.

    Raises:
        UsageError: there is one; the message begins with ``source``.
    """
    high = max(rule.high for rule in manifest.sampling.ranges)
    if not tokens.size or tokens.min() < 0 or tokens.max() >= high:
        span = f"{tokens.min()}..{tokens.max()}" if tokens.size else "none"
        raise UsageError(f"{source} holds tokens {span}; {manifest.name} has visual tokens 0..{high - 1}")
