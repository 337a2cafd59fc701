"""Frames from a bundle, prompts and actions, to files."""

from __future__ import annotations

import itertools
import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass

from diagd.bundle import Bundle, Manifest
from diagd.bundle.manifest import MediaMark, SamplingRules
from diagd.bundle.targets import check_apart, file_target
from diagd.engines.backend import CHOICES, CPU, find
from diagd.engines.engine import Float, Int
from diagd.engines.onnxruntime_session import CpuOptions
from diagd.errors import UsageError
from diagd.options import FLAG, OPTIONS, POSITIONAL, File
from diagd.progress import Progress
from diagd.runtime.actions import write_actions
from diagd.runtime.audit import audit
from diagd.runtime.clip import Clip, ClipOptions, read_clip
from diagd.runtime.decoders import Decoder
from diagd.runtime.decoders.scoring import MEASURED, open_scorer
from diagd.runtime.episodes import EPISODE, Dream, vector_codec
from diagd.runtime.group import Group
from diagd.runtime.load import open_group
from diagd.runtime.output import OUTPUTS, TOKENS, write_tokens, write_video
from diagd.runtime.pixels import PixelCodec, Pixels
from diagd.runtime.sampling import SamplingSettings
from diagd.runtime.session import Session
from diagd.runtime.strategy import DRAFT, DraftOptions, parse_decoder
from diagd.runtime.text import read_text
from diagd.runtime.video import files_in

LINES = ".jsonl"
"""Of the file of actions beside what the model played."""

TextEncoder = Callable[[str, Path, int], Float]
"""Embeddings float32 [n, width] of words, by an encoder in a folder, at most so many."""

KINDS = (*OUTPUTS, EPISODE)
"""Of files that can be made."""

CLIPS = (".mp4", EPISODE, ".avi", ".mkv", ".mov", ".webm")
"""Files of which a folder is many clips, not the pictures of one."""


def _count(value: object) -> object:
    if not isinstance(value, str):
        return value
    if match := re.fullmatch(r"([0-9]{1,9})( ?latents?)?", value):
        return int(match[1]), match[2] is not None
    raise ValueError("expected a number of pictures, such as 24, or of latent frames, such as 3latents")


@dataclass(frozen=True, config=OPTIONS)
class SamplingOptions:
    """How tokens are drawn; what is not said is the bundle's."""

    temperature: float | None = Field(default=None, description="0 is greedy (default: the bundle's)")
    top_p: float | None = Field(default=None, description="nucleus mass, 1 for all (default: the bundle's)")
    top_k: int | None = Field(
        default=None, description="most probable ids, 0 for all (default: the bundle's)"
    )
    seed: int = Field(default=0, description="of the random numbers (default 0)")

    def settings(self, rules: SamplingRules) -> SamplingSettings:
        """With the defaults of a bundle.

        Raises:
            UsageError: a value is out of range.
        """
        return SamplingSettings(
            rules.temperature if self.temperature is None else self.temperature,
            rules.top_k if self.top_k is None else self.top_k,
            rules.top_p if self.top_p is None else self.top_p,
        )


@dataclass(frozen=True, config=OPTIONS)
class SessionOptions:
    """What decodes, and where."""

    precision: str | None = Field(default=None, description="of the step graph (default: the bundle's first)")
    backend: str | None = Field(
        default=None, description=f"{CHOICES} (default: cpu; of a world that is played, the fastest measured)"
    )
    window: int | None = Field(
        default=None, description="frames that a token may see (default: the model's context)"
    )
    compat: str | None = Field(default=None, description="'mineworld' reproduces the released code's cache")
    roll: int | None = Field(default=None, description="frames by which learned positions slide at once")
    cpu: CpuOptions = CpuOptions()

    def open(self, bundle: Bundle) -> Session:
        """A session over a bundle; see ``diagd.load``."""
        return self.open_group(bundle, 1).sessions[0]

    def open_group(self, bundle: Bundle, sessions: int) -> Group:
        """Sessions in lock step."""
        return open_group(
            *(bundle, sessions, self.window, self.cpu),
            compat=self.compat,
            roll=self.roll,
            precision=self.precision,
            backend=find(self.backend or CPU),
        )

    def pixels(self, bundle: Bundle) -> PixelCodec:
        """The bundle's tokenizer graphs, on the same backend."""
        return PixelCodec(bundle, self.cpu, find(self.backend or CPU))


@dataclass(frozen=True, config=OPTIONS)
class TextOptions:
    """What models that attend to text are told."""

    text: File | None = Field(default=None, description="text embeddings, .npy or .safetensors [n, width]")
    words: str | None = Field(default=None, description="text for the encoder t5, in place of embeddings")
    t5: File | None = Field(default=None, description="folder of a T5 encoder")

    def embeddings(self, manifest: Manifest, encode_text: TextEncoder | None) -> Float | None:
        """Float32 [n, width], from a file or from words and an encoder.

        Raises:
            UsageError: the file is none, or words come without an encoder or for a model without text.
        """
        if self.words is None:
            return read_text(self.text) if self.text else None
        if manifest.text is None or self.t5 is None or self.text or encode_text is None:
            raise UsageError("words need a model that attends to text, --set t5=FOLDER, and no --set text")
        return encode_text(self.words, self.t5, manifest.text.length)


@dataclass(frozen=True, config=OPTIONS)
class GenerateOptions:
    """What is generated, from what, and how."""

    bundle: Annotated[File, POSITIONAL] = Field(description="made by diagd-export")
    clip: ClipOptions = Field()
    output: Annotated[File, FLAG] = Field(
        description=".mp4, .gif, .npy for tokens, .npz for an episode, or a folder for many clips"
    )
    frames: Annotated[tuple[int, bool] | None, BeforeValidator(_count), FLAG] = Field(
        default=None,
        description="pictures to make, or latent frames as 3latents (default: one for each action, or "
        "as many as fill a clip of the release)",
    )
    decoder: Annotated[str | None, FLAG] = Field(
        default=None,
        description="ntp, diagonal (the bundle's order), an order such as k=1,chained, jacobi or draft "
        "(default: the bundle's)",
    )
    audit: Annotated[bool, FLAG] = Field(
        default=False, description="say how many tokens are next-token prediction's with the same seed"
    )
    tau: float = Field(
        default=-1.0, allow_inf_nan=True, description="least score of a draft that is kept, or inf or -inf"
    )
    drafts: DraftOptions = DraftOptions()
    branches: Annotated[int, FLAG] = Field(
        default=1, ge=1, description="futures of each prompt, with seeds in order, in files NAME-0, NAME-1"
    )
    kind: Literal[".mp4", ".gif", ".npy", ".npz"] = Field(
        default=".mp4", description="of the files of many clips"
    )
    fps: float | None = Field(default=None, gt=0, description="of the video written (default: the model's)")
    beyond: Literal["stream", "prompt"] = Field(
        default="stream",
        description="what a clip longer than the context goes on from: the sliding window, or its last "
        "pictures, encoded again",
    )
    stamp: bool = Field(
        default=True, description="mark videos as the model's release does; some licences ask for it"
    )
    sampling: SamplingOptions = SamplingOptions()
    session: SessionOptions = SessionOptions()
    condition: TextOptions = TextOptions()


@dataclass(frozen=True)
class Made:
    """A file of frames.

    Attributes:
        output: the file.
        frames: token frames in it behind the prompt; 0 where the file was there already.
        seconds: it took.
        decoding: seconds of them for tokens.
        passes: through the model, and what they took together in the engine and on the host, in seconds.
        ahead: the host queued them without waiting.
        refill_passes: further passes that fed the context again because it slid, and seconds of them.
        psnr: of the pictures to those of the recording, dB, where it has them.
        lines: the file of what the model played, where it did.
        exact: share of tokens that next-token prediction draws with the same seed, where that was asked for,
            and of the worst frame.
    """

    output: Path
    frames: int = 0
    seconds: float = 0.0
    decoding: float = 0.0
    passes: int = 0
    engine: float = 0.0
    host: float = 0.0
    ahead: bool = False
    refill_passes: int = 0
    refill_seconds: float = 0.0
    psnr: float | None = None
    lines: Path | None = None
    exact: tuple[float, float] | None = None


def generate(
    options: GenerateOptions, progress: Progress | None = None, encode_text: TextEncoder | None = None
) -> Iterator[Made]:
    """Generate and write files, over one session; a file that fails leaves nothing.

    Of many clips, those whose file is there already are left out.

    Yields:
        What each file took, as soon as it is written.

    Raises:
        DiagdError: an input or option is wrong, or the engine refuses.
    """
    jobs = _jobs(options)
    bundle = Bundle.open(options.bundle)
    with ExitStack() as stack:
        maker = _Maker(options, bundle, progress or Progress(), encode_text, stack)
        for job in jobs:
            yield from maker.make(job)


@dataclass(frozen=True)
class _Job:
    """One prompt and the files of its futures; ``skips`` those that are there."""

    clip: ClipOptions
    condition: TextOptions
    outputs: tuple[Path, ...]
    skips: bool = False

    def check(self, taken: set[Path]) -> None:
        """Refuse to write over what is read, what is no such file, or what another job writes.

        Args:
            taken: outputs of the jobs before, to which these are added.

        Raises:
            UsageError: an output is one of them.
        """
        clip, text = self.clip, self.condition.text
        for output in self.outputs:
            file_target(output, KINDS)
            check_apart(output, {"--prompt": clip.prompt, "--actions": clip.lines_file, "--set text": text})
            if clip.acts and output.suffix.lower() != EPISODE and not (self.skips and output.exists()):
                self._check_lines(output)
            if output in taken:
                raise UsageError(f"{clip.prompt} and another clip would both be {output}; rename one of them")
            taken.add(output)

    def _check_lines(self, output: Path) -> None:
        """Refuse to write the actions of an output over a file, which nobody named."""
        lines = output.with_suffix(LINES)
        if lines.exists():
            raise UsageError(
                f"the model's actions would go to {lines}, which is there already; give another --output, or "
                "remove it yourself"
            )
        file_target(lines, (LINES,))


def _jobs(options: GenerateOptions) -> list[_Job]:
    """What is to be made; no output can be refused later."""
    prompt, output = options.clip.prompt, options.output
    if prompt.suffix.lower() == ".jsonl":
        many = _listed(options)
    elif prompt.is_dir() and (found := files_in(prompt, CLIPS)):
        many = [(path.stem, _beside(options.clip, path), options.condition) for path in found]
    else:
        job = _Job(options.clip, options.condition, _futures(output, options.branches))
        job.check(set())
        return [job]
    if output.suffix.lower() in KINDS or (output.exists() and not output.is_dir()):
        raise UsageError(f"--output {output}: {len(many)} clips go to a folder; name one")
    output.mkdir(parents=True, exist_ok=True)
    jobs = [
        _Job(clip, condition, _futures(output / f"{name}{options.kind}", options.branches), skips=True)
        for name, clip, condition in many
    ]
    taken: set[Path] = set()
    for job in jobs:
        job.check(taken)
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
    try:
        lines = listing.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read clips from {listing}: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            path = listing.parent / entry["visual_input"]
            actions, words = entry.get("actions"), entry.get("prompt")
            if not isinstance(words, str | None) or "\0" in f"{path}{actions}":
                raise ValueError("names and words are text")
            clip = _beside(options.clip, path)
            clip = replace(clip, actions=listing.parent / actions) if actions else clip
            condition = replace(options.condition, words=words) if words else options.condition
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UsageError(
                f'{listing}, line {number}: expected {{"visual_input": file, "prompt": words, "actions": '
                f"file}}, the last two where the model takes them ({error})"
            ) from error
        found.append((f"{number:04d}-{path.stem}", clip, condition))
    if not found:
        raise UsageError(f'{listing} lists no clip; write {{"visual_input": file}} on a line')
    return found


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
        if options.decoder != DRAFT:
            compat = options.session.compat is not None
            self.decoder = parse_decoder(options.decoder, self.manifest, compat=compat)
        self.settings = options.sampling.settings(self.manifest.sampling)
        self.mark = self.manifest.mark
        if self.mark and not options.stamp:
            self._refuse_unmarked(self.mark)
            self.mark = None
        self.fps = options.fps or self.manifest.frames_per_second
        self._progress, self._encode_text, self._stack = progress, encode_text, stack

    def _refuse_unmarked(self, mark: MediaMark) -> None:
        if mark.required:
            raise UsageError(
                f"--set stamp=false: the licence of {self.manifest.name} ({self.manifest.licence}) asks that "
                f"videos carry '{mark.text}'; leave the option out, or write .npy tokens"
            )

    @cached_property
    def pixels(self) -> PixelCodec:
        """Opened when pictures are read or written."""
        return self.options.session.pixels(self.bundle)

    @cached_property
    def session(self) -> Session:
        """Opened once, behind the first prompt that could be read."""
        return self._stack.enter_context(self.options.session.open(self.bundle))

    def make(self, job: _Job) -> Iterator[Made]:
        """Write the files of a job that are not there."""
        todo = [(n, path) for n, path in enumerate(job.outputs) if not (job.skips and path.exists())]
        yield from (Made(path) for path in job.outputs if all(path != other for _, other in todo))
        if not todo:
            return
        for path in job.outputs:
            if path.suffix.lower() == EPISODE:
                vector_codec(path, self.manifest.actions, self.manifest.name)
        tokens_only = {path.suffix.lower() for path in (job.clip.prompt, *job.outputs)} == {".npy"}
        clip = read_clip(
            job.clip, self.manifest, None if tokens_only else self.pixels, self.options.session.window
        )
        count = self._frames(job.clip, clip)
        text = job.condition.embeddings(self.manifest, self._encode_text)
        self.session.start(clip.tokens, clip.led, text)
        self._draft(clip)
        for n, path in todo:
            self._return(clip, text)
            yield self._write(clip, count, self.options.sampling.seed + n, path)

    def _draft(self, clip: Clip) -> None:
        """Set up what drafts, measured on the prompt of the first clip."""
        if self.decoder is not None:
            return
        drafts, session = self.options.drafts, self.session
        pixels = self.pixels if self.manifest.tokenizer else None
        scorer = open_scorer(drafts.score, session, clip.actions(MEASURED), pixels)
        drafter = drafts.open(self.bundle, session.window, self.options.session.cpu, self._stack)
        self.decoder = drafts.decoder(drafter, self.options.tau, scorer)

    def _return(self, clip: Clip, text: Float | None) -> None:
        """Go back to the prompt, whose rows are in the cache as long as the window has not slid."""
        stream = self.session.stream
        made = stream.known - len(clip.tokens)
        if self.options.beyond == "stream" and made < len(stream.past):
            stream.rewind(made)
        else:
            self.session.start(clip.tokens, clip.led, text)

    def _frames(self, where: ClipOptions, clip: Clip) -> int:
        """How many token frames are made."""
        asked, name, known = self.options.frames, self.manifest.name, len(clip.tokens)
        spec = self.manifest.tokenizer
        factor = spec.temporal_factor if spec else 1
        if asked is not None and not asked[1] and asked[0] % factor:
            raise UsageError(
                f"--frames {asked[0]}: a latent frame of {name} is {factor} pictures; give "
                f"{max(1, round(asked[0] / factor)) * factor}, or latent frames, as {asked[0]}latents"
            )
        if self.options.beyond == "prompt" and (factor == 1 or self.manifest.actions is not None):
            raise UsageError(f"beyond=prompt is for models of whole clips; {name} goes on frame by frame")
        count = None if asked is None else asked[0] if asked[1] else asked[0] // factor
        if self.manifest.actions is None:
            released = self.manifest.context.frames - known  # fills the clip
            count = released if count is None else count
            if count < 1:
                raise UsageError(f"{where.prompt} fills the {known} latent frames of a clip; give --frames")
            return count
        if clip.made is None:
            raise UsageError(f"{name} is driven by actions: give --actions FILE, one JSON object a line")
        there = len(clip.made)
        if clip.acts:
            if not count:
                raise UsageError(f"{name} plays on for as long as it is told to: give --frames")
            return count
        count = there if count is None else count
        if not 1 <= count <= there:
            raise UsageError(
                f"--frames {count}: {where.actions or where.prompt} has actions for 1..{there}; add lines, "
                'or hold the last action with "repeat": N'
            )
        return count

    def _write(self, clip: Clip, count: int, seed: int, path: Path) -> Made:
        """Decode and write one future."""
        session, before = self.session, replace(self.session.timing)
        began, decoding = time.perf_counter(), 0.0
        spelled = self.options.decoder or self.manifest.decoder
        title = f"{path.name} by {self.manifest.order if spelled == 'order' else spelled}"
        tokens, actions = list[Int](), list[Int]()
        with self._progress.count(title, count) as advance:

            def decoded(frames: int, turn: int) -> Iterator[Int]:
                nonlocal decoding
                turned = seed + turn * self.options.branches
                made = session.frames(
                    self.decoder, clip.actions(frames), count=frames, sampling=self.settings, seed=turned
                )
                for frame in made:
                    advance(1)
                    decoding += frame.seconds
                    tokens.append(frame.tokens)
                    actions.append(frame.action)
                    yield frame.tokens

            psnr = None
            if path.suffix.lower() == TOKENS:
                write_tokens(path, decoded(count, 0))
            elif path.suffix.lower() == EPISODE:
                pictures = np.stack(list(self._pictures(clip, count, decoded)))
                self._write_episode(path, clip, pictures, np.stack(actions), seed)
            else:
                psnr = self._write_video(path, clip, self._pictures(clip, count, decoded))
        lines = self._write_lines(path, clip, np.stack(actions)) if clip.acts else None
        spent, wall = session.timing, time.perf_counter() - began
        return Made(
            path,
            count,
            wall,
            decoding,
            spent.steps - before.steps,
            spent.engine - before.engine,
            spent.host - before.host,
            session.engine.ahead,
            spent.refill_steps - before.refill_steps,
            spent.refill_seconds - before.refill_seconds,
            psnr,
            lines,
            self._audit(clip, np.stack(tokens), np.stack(actions), seed) if self.options.audit else None,
        )

    def _write_video(self, path: Path, clip: Clip, pictures: Iterator[Pixels]) -> float | None:
        """Write the prompt and what was made; gives the PSNR where the recording tells what it should be."""
        truth = None if clip.acts else clip.truth
        known = self.pixels.pictures_of(len(clip.tokens))
        return write_video(path, pictures, self.fps, self.mark, truth, known)

    def _write_lines(self, path: Path, clip: Clip, actions: Int) -> Path | None:
        """Write the actions of a file beside it, as a recording has them; an episode holds its own."""
        if path.suffix.lower() == EPISODE:
            return None
        assert clip.led is not None
        assert self.manifest.actions is not None
        recorded = actions if path.suffix.lower() == TOKENS else np.concatenate([clip.led, actions])
        lines = path.with_suffix(LINES)
        write_actions(lines, self.manifest.actions, recorded[int(self.manifest.clips.followed) :])
        return lines

    def _write_episode(self, path: Path, clip: Clip, pictures: Pixels, actions: Int, seed: int) -> None:
        """Write pictures of prompt and frames with all that was done at them, the last action the model's."""
        count, known = len(actions), len(clip.tokens)
        assert clip.led is not None
        assert clip.made is not None
        last = clip.made[count : count + 1]
        if not len(last):
            last = self.session.act(sampling=self.settings, seed=seed)[None]
        context = pictures[:known] if clip.pictures is None else clip.pictures
        truth = context if clip.truth is None else np.concatenate([context, clip.truth[:count]])
        again = np.stack(list(self.pixels.decode(self.pixels.encode(truth))))
        done = np.concatenate([clip.led[1:], actions, last])
        dream = Dream(context, pictures[known:], done, again)
        dream.write(path, vector_codec(path, self.manifest.actions, self.manifest.name))

    def _audit(self, clip: Clip, frames: Int, actions: Int, seed: int) -> tuple[float, float]:
        """Share of all tokens that are next-token prediction's, and of the worst frame's."""
        self.session.start(clip.tokens, clip.led, self.session.stream.text)
        led = actions if self.manifest.actions else None
        shares = audit(self.session, frames, led, sampling=self.settings, seed=seed)
        return float(shares.mean()), float(shares.min())

    def _pictures(
        self, clip: Clip, count: int, decoded: Callable[[int, int], Iterator[Int]]
    ) -> Iterator[Pixels]:
        """Pictures of the prompt and of what is made behind it."""
        if self.options.beyond == "stream":
            yield from self.pixels.decode(chain(clip.tokens, decoded(count, 0)))
            return
        tokens, shown, text = clip.tokens, 0, self.session.stream.text
        for turn in itertools.count():
            piece = min(count, self.manifest.context.frames - len(tokens))
            pictures = np.stack(list(self.pixels.decode([*tokens, *decoded(piece, turn)])))
            yield from pictures[shown:]
            count -= piece
            if not count:
                return
            shown = self.manifest.clips.frames
            tokens = self.pixels.encode(pictures[-shown:])
            self.session.start(tokens, None, text)
