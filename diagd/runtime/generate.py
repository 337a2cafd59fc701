"""Frames from a bundle, prompts and actions, to files: of one clip, its futures, or of many clips."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from pathlib import Path

import numpy as np

from diagd.bundle import Bundle, Manifest
from diagd.bundle.files import read_text
from diagd.bundle.manifest import MediaMark
from diagd.bundle.targets import check_apart, file_target
from diagd.engines.engine import Int
from diagd.errors import UsageError
from diagd.progress import Progress
from diagd.runtime.actions import write_actions
from diagd.runtime.clip import CLIPS, EPISODE, Clip, ClipOptions, read_clip, vector_codec, write_dream
from diagd.runtime.comparison import audit
from diagd.runtime.decoders import Decoder
from diagd.runtime.decoders.draft import MEASURED, open_scorer
from diagd.runtime.load import check_window
from diagd.runtime.options import DRAFT, GenerateOptions, TextEncoder, TextOptions, parse_decoder
from diagd.runtime.pictures import files_in
from diagd.runtime.pixels import PixelCodec, Pixels
from diagd.runtime.session import Session
from diagd.runtime.step import Timing
from diagd.runtime.video import OUTPUTS, TOKENS, write_tokens, write_video

LINES = ".jsonl"
"""Of the file of actions beside what the model played."""

KINDS = (*OUTPUTS, EPISODE)
"""Of files that can be made."""


@dataclass(frozen=True)
class Job:
    """One prompt and the files of its futures; ``skips`` those that are there."""

    clip: ClipOptions
    condition: TextOptions
    outputs: tuple[Path, ...]
    skips: bool = False

    def check(self, taken: set[Path]) -> None:
        """Refuse (UsageError) to write over what is read, what is no such file, or what another job writes.

        ``taken`` are outputs of the jobs before, to which these are added.
        """
        clip, text = self.clip, self.condition.text
        for output in self.outputs:
            file_target(output, KINDS)
            check_apart(output, {"--prompt": clip.prompt, "--actions": clip.lines_file, "--set text": text})
            if clip.acts and output.suffix.lower() != EPISODE and not (self.skips and output.exists()):
                if (lines := output.with_suffix(LINES)).exists():  # which nobody named
                    raise UsageError(
                        f"the model's actions would go to {lines}, which is there already; give another "
                        "--output, or remove it yourself"
                    )
                file_target(lines, (LINES,))
            if output in taken:
                raise UsageError(f"{clip.prompt} and another clip would both be {output}; rename one of them")
            taken.add(output)


def jobs_of(options: GenerateOptions) -> list[Job]:
    """What is to be made; no output can be refused later."""
    prompt, output = options.clip.prompt, options.output
    if prompt.suffix.lower() == ".jsonl":
        many = _listed(options)
    elif prompt.is_dir() and (found := files_in(prompt, CLIPS)):
        many = [(path.stem, _beside(options.clip, path), options.condition) for path in found]
    else:
        job = Job(options.clip, options.condition, _futures(output, options.branches))
        job.check(set())
        return [job]
    if output.suffix.lower() in KINDS or (output.exists() and not output.is_dir()):
        raise UsageError(f"--output {output}: {len(many)} clips go to a folder; name one")
    is_new = not output.exists()
    output.mkdir(parents=True, exist_ok=True)
    jobs = [
        Job(clip, condition, _futures(output / f"{name}{options.kind}", options.branches), skips=True)
        for name, clip, condition in many
    ]
    taken: set[Path] = set()
    try:
        for job in jobs:
            job.check(taken)
    except UsageError:
        if is_new:
            output.rmdir()
        raise
    return jobs


def _futures(output: Path, branches: int) -> tuple[Path, ...]:
    if branches == 1:
        return (output,)
    return tuple(output.with_name(f"{output.stem}-{n}{output.suffix}") for n in range(branches))


def _beside(clip: ClipOptions, path: Path) -> ClipOptions:
    """One clip of a folder, with the lines that have its name."""
    lines = path.with_suffix(".jsonl")
    return replace(clip, prompt=path, actions=lines if lines.exists() else clip.actions)


def _listed(options: GenerateOptions) -> list[tuple[str, ClipOptions, TextOptions]]:
    """Clips of a file of lines ``{"visual_input": file, "prompt": words, "actions": file}``, by name."""
    listing, found = options.clip.prompt, []
    for number, line in enumerate(read_text(listing, "clips from").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            clip, condition = _entry(line, options)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UsageError(
                f'{listing}, line {number}: expected {{"visual_input": file, "prompt": words, "actions": '
                f"file}}, the last two where the model takes them ({error})"
            ) from error
        found.append((f"{number:04d}-{clip.prompt.stem}", clip, condition))
    if not found:
        raise UsageError(f'{listing} lists no clip; write {{"visual_input": file}} on a line')
    return found


def _entry(line: str, options: GenerateOptions) -> tuple[ClipOptions, TextOptions]:
    entry, folder = json.loads(line), options.clip.prompt.parent
    path, actions, words = folder / entry["visual_input"], entry.get("actions"), entry.get("prompt")
    if not isinstance(words, str | None) or "\0" in f"{path}{actions}":
        raise ValueError("names and words are text")
    clip = _beside(options.clip, path)
    clip = replace(clip, actions=folder / actions) if actions else clip
    return clip, replace(options.condition, words=words) if words else options.condition


@dataclass(frozen=True)
class Made:
    """A file of frames.

    Attributes:
        output: the file.
        frames: token frames in it behind the prompt; 0 where the file was there already.
        seconds: it took.
        decoding: seconds of them for tokens.
        timing: of the passes.
        ahead: the host queued them without waiting.
        psnr: of the pictures to those of the recording, dB, where it has them.
        lines: the file of what the model played, where it did.
        exact: share of tokens that next-token prediction draws with the same seed, where that was asked for,
            and of the worst frame.
    """

    output: Path
    frames: int = 0
    seconds: float = 0.0
    decoding: float = 0.0
    timing: Timing = field(default_factory=Timing)
    ahead: bool = False
    psnr: float | None = None
    lines: Path | None = None
    exact: tuple[float, float] | None = None


def generate(
    options: GenerateOptions, progress: Progress | None = None, encode_text: TextEncoder | None = None
) -> Iterator[Made]:
    """Generate and write files over one session; yields what each took as soon as it is written.

    A file that fails leaves nothing. Of many clips, those whose file is there already are left out.

    Raises:
        DiagdError: an input or option is wrong, or the engine refuses.
    """
    jobs = jobs_of(options)
    bundle = Bundle.open(options.bundle)
    options = replace(options, session=options.session.in_time(bundle))
    with ExitStack() as stack:
        maker = _Maker(options, bundle, progress or Progress(), encode_text, stack)
        for job in jobs:
            yield from maker.make(job)


class _Maker:
    """Makes the files of one job after the other."""

    def __init__(
        self,
        options: GenerateOptions,
        bundle: Bundle,
        progress: Progress,
        encode_text: TextEncoder | None,
        stack: ExitStack,
    ) -> None:
        self.options, self.bundle, self.manifest = options, bundle, bundle.manifest
        self.decoder: Decoder | None = None
        check_window(self.manifest, options.session.window)
        if options.decoder != DRAFT:
            compat = options.session.compat is not None
            self.decoder = parse_decoder(options.decoder, self.manifest, compat=compat)
        self.settings = options.sampling.settings(self.manifest.sampling)
        self.mark = _mark(options, self.manifest)
        self.fps = options.fps or self.manifest.frames_per_second
        self.progress, self._encode_text, self._stack = progress, encode_text, stack

    @cached_property
    def pixels(self) -> PixelCodec:
        """Opened when pictures are read or written."""
        return self.options.session.pixels(self.bundle)

    @cached_property
    def session(self) -> Session:
        """Opened once, behind the first prompt that could be read."""
        return self._stack.enter_context(self.options.session.open(self.bundle))

    def make(self, job: Job) -> Iterator[Made]:
        """Write the files of a job that are not there."""
        there = [path for path in job.outputs if job.skips and path.exists()]
        yield from map(Made, there)
        if len(there) == len(job.outputs):
            return
        for path in job.outputs:
            if path.suffix.lower() == EPISODE:
                vector_codec(path, self.manifest.actions, self.manifest.name)
            if path.suffix.lower() == TOKENS and self.options.beyond == "prompt":
                raise UsageError(f"{path}: beyond=prompt goes on from pictures; give .mp4 or .gif")
        tokens_only = {path.suffix.lower() for path in (job.clip.prompt, *job.outputs)} == {".npy"}
        pixels = None if tokens_only else self.pixels
        clip = read_clip(job.clip, self.manifest, pixels, self.options.session.window)
        count = _frames(self.options, self.manifest, job.clip, clip)
        text = job.condition.embeddings(self.manifest, self._encode_text)
        for n, path in enumerate(job.outputs):
            if path in there:
                continue
            self.session.start(clip.tokens, clip.led, text)
            self.decoder = self.decoder or self._draft(clip)
            yield _Future(self, clip, count, self.options.sampling.seed + n, path).make()

    def _draft(self, clip: Clip) -> Decoder:
        """What drafts, measured on the prompt of the first clip."""
        drafts, session = self.options.drafts, self.session
        pixels = self.pixels if self.manifest.tokenizer else None
        scorer = open_scorer(drafts.score, session, clip.actions(MEASURED), pixels, self.settings)
        drafter = drafts.open(self.bundle, session.window, self.options.session.cpu, self._stack)
        return drafts.decoder(drafter, self.options.tau, scorer)


def _mark(options: GenerateOptions, manifest: Manifest) -> MediaMark | None:
    """What videos are marked with."""
    mark = manifest.mark
    if mark is None or options.stamp:
        return mark
    if mark.required:
        raise UsageError(
            f"--set stamp=false: the licence of {manifest.name} ({manifest.licence}) asks that "
            f"videos carry '{mark.text}'; leave the option out, or write .npy tokens"
        )
    return None


def _frames(options: GenerateOptions, manifest: Manifest, where: ClipOptions, clip: Clip) -> int:
    """How many token frames are made."""
    count, name, known = _asked(options, manifest), manifest.name, len(clip.tokens)
    if manifest.actions is None:
        count = manifest.context.frames - known if count is None else count  # fills the clip of the release
        if count < 1:
            raise UsageError(f"{where.prompt} fills the {known} latent frames of a clip; give --frames")
        return count
    if clip.made is None:
        raise UsageError(f"{name} is driven by actions: give --actions FILE, one JSON object a line")
    if clip.acts:
        if not count:
            raise UsageError(f"{name} plays on for as long as it is told to: give --frames")
        return count
    there = len(clip.made)
    count = there if count is None else count
    if not 1 <= count <= there:
        raise UsageError(
            f"--frames {count}: {where.actions or where.prompt} has actions for 1..{there}; add lines, "
            'or hold the last action with "repeat": N'
        )
    return count


def _asked(options: GenerateOptions, manifest: Manifest) -> int | None:
    """Token frames of ``--frames``."""
    factor = manifest.tokenizer.temporal_factor if manifest.tokenizer else 1
    count, latents = options.frames or (None, True)
    if count is not None and not latents and count % factor:
        raise UsageError(
            f"--frames {count}: a latent frame of {manifest.name} is {factor} pictures; give "
            f"{max(1, round(count / factor)) * factor}, or latent frames, as {count}latents"
        )
    if options.beyond == "prompt" and (factor == 1 or manifest.actions is not None):
        raise UsageError(
            f"beyond=prompt is for models of whole clips; {manifest.name} goes on frame by frame"
        )
    return count if count is None or latents else count // factor


class _Future:
    """A file in the making: so many frames behind a prompt, drawn with a seed."""

    def __init__(self, maker: _Maker, clip: Clip, count: int, seed: int, path: Path) -> None:
        self._maker, self._clip, self._count, self._seed, self._path = maker, clip, count, seed, path
        self._session, self._manifest, self._options = maker.session, maker.manifest, maker.options
        self._kind = path.suffix.lower()
        self._decoding = 0.0
        self._turns, self._actions = list[tuple[Int, int, list[Int]]](), list[Int]()  # prompt, seed, frames

    def make(self) -> Made:
        """Decode and write it."""
        session, before, began = self._session, replace(self._session.timing), time.perf_counter()
        psnr = self._write()
        lines = self._write_lines() if self._clip.acts and self._kind != EPISODE else None
        spent, wall = session.timing.since(before), time.perf_counter() - began
        exact = self._audit() if self._options.audit else None
        return Made(
            *(self._path, self._count, wall, self._decoding, spent, session.engine.ahead, psnr, lines, exact)
        )

    def _write(self) -> float | None:
        """Write the file; gives the PSNR of a video whose recording tells what it should be."""
        maker, clip, manifest = self._maker, self._clip, self._manifest
        title = f"{self._path.name} by {self._options.decoder or manifest.spelling}"
        with maker.progress.count(title, self._count) as self._advance:
            if self._kind == TOKENS:
                write_tokens(self._path, self._decode(self._count, clip.tokens))
                return None
            if self._kind == EPISODE:
                self._write_episode(np.stack(list(self._pictures())))
                return None
            truth, known = None if clip.acts else clip.truth, maker.pixels.pictures_of(len(clip.tokens))
            return write_video(self._path, self._pictures(), maker.fps, maker.mark, truth, known)

    def _decode(self, frames: int, prompt: Int) -> Iterator[Int]:
        """Tokens of so many frames behind a prompt, in a turn with a seed of its own."""
        maker, seed = self._maker, self._seed + len(self._turns) * self._options.branches
        tokens: list[Int] = []
        self._turns.append((prompt, seed, tokens))
        actions = self._clip.actions(frames)
        made = self._session.frames(maker.decoder, actions, count=frames, sampling=maker.settings, seed=seed)
        for frame in made:
            self._advance(1)
            self._decoding += frame.seconds
            tokens.append(frame.tokens)
            self._actions.append(frame.action)
            yield frame.tokens

    def _pictures(self) -> Iterator[Pixels]:
        """Pictures of the prompt and of what is made behind it."""
        pixels, tokens, count = self._maker.pixels, self._clip.tokens, self._count
        if self._options.beyond == "stream":
            yield from pixels.decode(chain(tokens, self._decode(count, tokens)))
            return
        shown, text = 0, self._session.stream.text
        while True:
            piece = min(count, self._manifest.context.frames - len(tokens))
            pictures = np.stack(list(pixels.decode([*tokens, *self._decode(piece, tokens)])))
            yield from pictures[shown:]
            count -= piece
            if not count:
                return
            shown = self._manifest.clips.frames
            tokens = pixels.encode(pictures[-shown:])
            self._session.start(tokens, None, text)

    def _write_lines(self) -> Path:
        """Write the actions of a file beside it, as a recording has them."""
        actions, codec, led = np.stack(self._actions), self._manifest.actions, self._clip.led
        assert led is not None
        assert codec is not None
        recorded = actions if self._kind == TOKENS else np.concatenate([led, actions])
        lines = self._path.with_suffix(LINES)
        write_actions(lines, codec, recorded[int(self._manifest.clips.followed) :])
        return lines

    def _write_episode(self, pictures: Pixels) -> None:
        """Write pictures of prompt and frames with all that was done at them, the last action the model's."""
        clip, maker, count, known = self._clip, self._maker, self._count, len(self._clip.tokens)
        assert clip.led is not None
        assert clip.made is not None
        last = clip.made[count : count + 1]
        if not len(last):
            last = self._session.act(sampling=maker.settings, seed=self._seed)[None]
        context = pictures[:known] if clip.pictures is None else clip.pictures
        truth = context if clip.truth is None else np.concatenate([context, clip.truth[:count]])
        again = np.stack(list(maker.pixels.decode(maker.pixels.encode(truth))))
        done = np.concatenate([clip.led[1:], self._actions, last])
        codec = vector_codec(self._path, self._manifest.actions, self._manifest.name)
        write_dream(self._path, codec, context, pictures[known:], done, again)

    def _audit(self) -> tuple[float, float]:
        """Share of all tokens that are next-token prediction's, and of the worst frame's."""
        session, settings, text = self._session, self._maker.settings, self._session.stream.text
        led, shares = np.stack(self._actions) if self._manifest.actions else None, []
        for prompt, seed, tokens in self._turns:
            session.start(prompt, self._clip.led, text)
            shares.append(audit(session, np.stack(tokens), led, sampling=settings, seed=seed))
        frames = np.concatenate(shares)
        return float(frames.mean()), float(frames.min())
