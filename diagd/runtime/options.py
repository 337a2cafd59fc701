"""What is generated, from what, by which decoder, how and where: as the command line and callers say it."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from diagd.bundle import Bundle, Manifest
from diagd.bundle.manifest import SamplingRules
from diagd.engines.backend import CHOICES, CPU, find
from diagd.engines.engine import Float
from diagd.engines.onnxruntime_session import CpuOptions
from diagd.errors import DiagdError, ScheduleError, UsageError
from diagd.options import File, checked, flag, positional, setting
from diagd.runtime.clip import ClipOptions
from diagd.runtime.decoders import Decoder, DraftDecoder, JacobiDecoder, ScheduledDecoder
from diagd.runtime.decoders.draft import Scorer
from diagd.runtime.group import Group
from diagd.runtime.load import measured, open_group, open_session
from diagd.runtime.pixels import PixelCodec
from diagd.runtime.sampling import SamplingSettings
from diagd.runtime.session import Session
from diagd.runtime.text import read_embeddings
from diagd.schedule import Schedule

DRAFT = "draft"
_LOG = logging.getLogger(__name__)


@checked
class DraftOptions:
    """What drafts, and what is kept of it."""

    drafter: File | None = setting(
        "bundle that drafts, with the same layout and tokens (default: the model)", None
    )
    drafter_precision: str | None = setting("of its step graph (default: its first)", None)
    drafter_decoder: str | None = setting("that it decodes by (default: its own)", None)
    score: str = setting("of drafts: likelihood, onnx:PATH or a package's", "likelihood")

    def open(self, bundle: Bundle, window: int, cpu: CpuOptions, stack: ExitStack) -> Session:
        """The drafter's session beside one over ``bundle``; closed with ``stack``."""
        source = Bundle.open(self.drafter) if self.drafter else bundle
        session = open_session(source, window=window, cpu=cpu, precision=self.drafter_precision)
        return stack.enter_context(session)

    def decoder(
        self, drafter: Session, tau: float, score: Scorer, *, target_first: bool = True
    ) -> DraftDecoder:
        """A decoder with a bar; see ``DraftDecoder``."""
        spelled = self.drafter_decoder
        own = None if spelled is None else parse_decoder(spelled, drafter.manifest)
        return DraftDecoder(drafter, tau, score, decoder=own, target_first=target_first)


def parse_decoder(spelling: str | None, manifest: Manifest, *, compat: bool = False) -> Decoder:
    """The decoder of a spelling: ``jacobi``, perhaps with ``window=24``, or an order of decoding.

    None is the bundle's own, ``diagonal`` its own order. Released caches (``compat``) keep the rows of seeds.

    Raises:
        ScheduleError: it is no spelling.
    """
    match = re.fullmatch(r"jacobi(?:[ ,]+window=([0-9]{1,6}))?", (spelling or manifest.decoder).strip())
    if match:
        return JacobiDecoder(int(match[1]) if match[1] else None)
    order = manifest.schedule
    if spelling is not None and spelling.strip() != "diagonal":
        try:
            order = Schedule.parse(spelling, manifest.layout, order)
        except ScheduleError as error:
            if "=" in spelling:  # of a row lag and what goes with it
                raise
            raise ScheduleError(f"{error}; or a decoder: ntp, diagonal, jacobi, {DRAFT}") from None
    return ScheduledDecoder(replace(order, refeed=False, keep_seeds=True) if compat else order)


TextEncoder = Callable[[str, Path, int], Float]
"""Embeddings float32 [n, width] of words, by an encoder in a folder, at most so many."""


def _count(value: object) -> object:
    if not isinstance(value, str):
        return value
    if match := re.fullmatch(r"([0-9]{1,9})( ?latents?)?", value):
        return int(match[1]), match[2] is not None
    raise ValueError("expected a number of pictures, such as 24, or of latent frames, such as 3latents")


@checked
class SamplingOptions:
    """How tokens are drawn; what is not said is the bundle's."""

    temperature: float | None = setting("0 is greedy (default: the bundle's)", None)
    top_p: float | None = setting("nucleus mass, 1 for all (default: the bundle's)", None)
    top_k: int | None = setting("most probable ids, 0 for all (default: the bundle's)", None)
    seed: int = setting("of the random numbers (default 0)", 0)

    def settings(self, rules: SamplingRules) -> SamplingSettings:
        """With the defaults of a bundle; UsageError where a value is out of range."""
        told = {name: getattr(self, name) for name in ("temperature", "top_k", "top_p")}
        return replace(SamplingSettings.of(rules), **{n: v for n, v in told.items() if v is not None})


@checked
class SessionOptions:
    """What decodes, and where."""

    precision: str | None = setting("of the step graph (default: the fastest measured, or the first)", None)
    backend: str | None = setting(f"{CHOICES} (default: the fastest measured, or cpu)", None)
    window: int | None = setting("frames that a token may see (default: the model's context)", None)
    compat: str | None = setting("'mineworld' reproduces the released code's cache", None)
    roll: int | None = setting("frames by which learned positions slide at once", None)
    cpu: CpuOptions = CpuOptions()

    def in_time(self, bundle: Bundle, sessions: int = 1) -> SessionOptions:
        """With the backend and precision that were fastest when this machine was measured, if none are named.

        Tokens may differ between them, so a line says what was taken. Released code is reproduced as asked.
        """
        found = None if self.compat else measured(bundle)
        backend = self.backend or (None if sessions == 1 else CPU)  # others have a fixed number of streams
        best = found and found.fastest(backend, self.precision)
        if best and not _is_here(best.backend):
            best = found and found.fastest(CPU, self.precision)
        if not (found and best):
            return self
        chosen = replace(self, backend=best.backend, precision=best.precision)
        usual = (self.backend or CPU, self.precision or bundle.manifest.precisions[0])
        if (best.backend, best.precision) != usual:
            _LOG.warning(
                "decoding by %s, the fastest on this machine (diagd profile --backends, %s); "
                "--set backend=%s --set precision=%s decodes as if it were not measured",
                *(best, found.date, *usual),
            )
        return chosen

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


def _is_here(backend: str) -> bool:
    """Whether a backend that was measured can still be used."""
    try:
        find(backend).describe()
    except DiagdError:
        return False
    return True


@checked
class TextOptions:
    """What models that attend to text are told."""

    text: File | None = setting("text embeddings, .npy or .safetensors [n, width]", None)
    words: str | None = setting("text for the encoder t5, in place of embeddings", None)
    t5: File | None = setting("folder of a T5 encoder", None)

    def embeddings(self, manifest: Manifest, encode_text: TextEncoder | None) -> Float | None:
        """Float32 [n, width], from a file or from words and an encoder.

        Raises:
            UsageError: the file is none, or words come without an encoder or for a model without text.
        """
        if self.words is None:
            return read_embeddings(self.text) if self.text else None
        if manifest.text is None or self.t5 is None or self.text or encode_text is None:
            raise UsageError("words need a model that attends to text, --set t5=FOLDER, and no --set text")
        return encode_text(self.words, self.t5, manifest.text.length)


@checked
class GenerateOptions:
    """What is generated, from what, and how."""

    clip: ClipOptions = Field()
    bundle: File = positional("made by diagd-export")
    output: File = flag(".mp4, .gif, .npy for tokens, .npz for an episode, or a folder for many clips")
    frames: Annotated[tuple[int, bool] | None, BeforeValidator(_count)] = flag(
        "pictures to make, or latent frames as 3latents (default: one for each action, or "
        "as many as fill a clip of the release)",
        None,
    )
    decoder: str | None = flag(
        "ntp, diagonal (the bundle's order), an order such as k=1,chained, jacobi or draft "
        "(default: the bundle's)",
        None,
    )
    audit: bool = flag("say how many tokens are next-token prediction's with the same seed", False)
    tau: float = setting("least score of a draft that is kept, or inf or -inf", -1.0, allow_inf_nan=True)
    drafts: DraftOptions = DraftOptions()
    branches: int = flag(
        "futures of each prompt, with seeds in order, in files NAME-0, NAME-1", 1, ge=1, le=10_000
    )
    kind: Literal[".mp4", ".gif", ".npy", ".npz"] = setting("of the files of many clips", ".mp4")
    fps: float | None = setting("of the video written (default: the model's)", None, gt=0)
    beyond: Literal["stream", "prompt"] = setting(
        "what a clip longer than the context goes on from: the sliding window, or its last "
        "pictures, encoded again",
        "stream",
    )
    stamp: bool = setting("mark videos as the model's release does; some licences ask for it", True)
    sampling: SamplingOptions = SamplingOptions()
    session: SessionOptions = SessionOptions()
    condition: TextOptions = TextOptions()
