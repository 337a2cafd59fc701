"""Draft and target: a cheaper decoder proposes a frame, the target keeps it or decodes its own.

How good a proposed frame is, the target's likelihood tells, a network on its picture, or one's own rule.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from diagd.engines.engine import Float, Int
from diagd.engines.onnxruntime_session import CpuOptions, open_cpu_session
from diagd.errors import UsageError, expect, unknown
from diagd.runtime.decoders.decoder import Blocks, Decoder, begun, keep
from diagd.runtime.decoders.jacobi import JacobiDecoder
from diagd.runtime.decoders.scheduled import RasterDecoder, raster_passes
from diagd.runtime.pixels import PixelCodec
from diagd.runtime.sampling import SamplingSettings
from diagd.runtime.step import Result
from diagd.runtime.stream import Ids, Past, Stream
from diagd.schedule import NO_SINK, Block

if TYPE_CHECKING:
    from diagd.runtime.session import Session

GROUP: Final = "diagd.scorers"
"""Entry points: functions of a PixelCodec, or None where the bundle has none, that give a `Scorer`."""

MEASURED: Final = 16
"""Frames of the target that its own likelihood is measured on."""

_WORST: Final = 0.05  # share of the cells of a frame that are looked at: the worst ones
_TYPICAL: Final = 4.0  # deviations above the mean from which on a frame is too likely: dull, or frozen


@dataclass(frozen=True)
class Proposal:
    """A frame that was drafted.

    Attributes:
        tokens: int32 [rows, columns].
        drawn: int32 [cells], what the target draws behind the tokens ahead of each cell.
        logits: float32 [cells, V], the target's.
    """

    tokens: Int
    drawn: Int
    logits: Float


Scorer = Callable[[Proposal], float]
"""Gives a proposal a score, the higher the better."""


class LikelihoodScorer:
    """Log-likelihood of a frame's worst cells under the target, in deviations from that of its own frames.

    It is unfiltered and at temperature 1: a nucleus would leave the tokens of a drafter without any. A frame
    more likely than almost all of the target's own counts as one that is as much less likely: what is frozen
    or dull is likely.

    Args:
        mean, deviation: of ``worst_likelihood`` over frames that the target decoded itself.
    """

    def __init__(self, mean: float, deviation: float) -> None:
        self.mean, self.deviation = mean, max(deviation, 1e-6)

    def __call__(self, proposal: Proposal) -> float:
        """The score."""
        found = worst_likelihood(proposal.tokens, proposal.logits)
        return _TYPICAL - abs((found - self.mean) / self.deviation - _TYPICAL)

    @classmethod
    def recorded(cls, session: Session, sampling: SamplingSettings | None = None) -> LikelihoodScorer | None:
        """As a calibration found it for a session's precision, window and sampling; None: for others only."""
        manifest = session.manifest
        chosen = SamplingSettings.of(manifest.sampling, sampling)
        asked = manifest.precisions[0], session.window, chosen.temperature, chosen.top_k, chosen.top_p
        for own in manifest.likelihoods:
            if (own.precision, own.window, own.temperature, own.top_k, own.top_p) == asked:
                return cls(own.mean, own.deviation)
        return None

    @classmethod
    def measured(
        cls,
        session: Session,
        actions: Sequence[Ids | None] | None,
        frames: int = MEASURED,
        seed: int = 0,
        sampling: SamplingSettings | None = None,
    ) -> LikelihoodScorer:
        """Measure it now; see ``own_likelihoods``."""
        own = own_likelihoods(session, actions, frames, seed, sampling)
        return cls(float(np.mean(own)), float(np.std(own)))


def own_likelihoods(
    session: Session,
    actions: Iterable[Ids | None] | None,
    frames: int = MEASURED,
    seed: int = 0,
    sampling: SamplingSettings | None = None,
) -> list[float]:
    """Of frames that a session of the target decodes behind what it knows; its stream is left as it is.

    ``actions``: of these frames, at most one for each; None for models without.
    """
    stream = session.stream
    given = None if actions is None else list(actions)[:frames]
    try:
        session.stream = stream.branch()
        run = session.frames(JacobiDecoder(), given, count=frames, sampling=sampling, seed=seed)
        made = [frame.tokens for frame in run]
        session.stream = stream.branch()
        seen, width = [], session.engine.max_width
        for step, result in session.steps(RasterDecoder(made, width), given, count=frames, seed=seed):
            seen += list(result.logits.copy()) if (step.sinks != NO_SINK).any() else []
    finally:
        session.stream = stream
    logits = np.array(seen).reshape(len(made), -1, len(seen[0]))
    return [worst_likelihood(tokens, rows) for tokens, rows in zip(made, logits, strict=True)]


def worst_likelihood(tokens: Int, logits: Float, share: float = _WORST) -> float:
    """Mean log-probability, nats, of a frame's least likely share of tokens, by logits [cells, V]."""
    rows = logits - logits.max(axis=1, keepdims=True)
    found = rows[np.arange(len(rows)), tokens.reshape(-1)] - np.log(np.exp(rows).sum(axis=1))
    worst = max(1, round(share * len(found)))
    return float(np.sort(found)[:worst].mean())


def open_network(path: Path, what: str, threads: int = 0) -> Any:
    """A session over an ONNX network of the user's, on the processor; 0 threads: one for each core.

    Raises:
        UsageError: there is none, which is ``what``; or it is no network.
    """
    if not path.is_file():
        raise UsageError(f"no such {what}: {path}; give the path of an ONNX file")
    try:
        return open_cpu_session(path, "", CpuOptions(threads, prepack=False))
    except Exception as error:  # ONNX Runtime raises several types for files that are no graph
        raise UsageError(f"{path} cannot be loaded as an ONNX network: {error}") from error


def as_floats(pictures: NDArray[np.uint8]) -> Float:
    """Pictures in 0..1, as networks take them."""
    return pictures.astype(np.float32) / np.float32(255)


class PictureScorer:
    """An ONNX network on the decoded pictures of a frame; the worst of them counts.

    Args:
        path: of the network: one input uint8, or float of 0 to 1, [N, H, W, 3] or [N, 3, H, W]; its first
            output has a number for each picture, the higher the better.
        pixels: decodes tokens.

    Raises:
        UsageError: it is no such network.
    """

    def __init__(self, path: Path, pixels: PixelCodec) -> None:
        # A score decides: it must not depend on how many cores there are, which an engine uses besides.
        self._session = open_network(path, "scorer", threads=1)
        inputs = self._session.get_inputs()
        shape = list(inputs[0].shape)
        if len(inputs) != 1 or len(shape) != 4 or 3 not in (shape[1], shape[3]):
            raise UsageError(
                f"{path} has inputs {[value.shape for value in inputs]}; expected one of [N, H, W, 3] or "
                "[N, 3, H, W]"
            )
        self._pixels, self._name = pixels, inputs[0].name
        self._channels_first, self._scaled = shape[3] != 3, "float" in inputs[0].type

    def __call__(self, proposal: Proposal) -> float:
        """The score."""
        pictures: NDArray[Any] = np.stack(list(self._pixels.decode([proposal.tokens])))
        if self._scaled:
            pictures = as_floats(pictures)
        if self._channels_first:
            pictures = np.ascontiguousarray(np.moveaxis(pictures, -1, 1))
        (scores, *_) = self._session.run(None, {self._name: pictures})
        return float(np.min(scores))


def open_scorer(
    name: str,
    session: Session,
    actions: Sequence[Ids | None] | None,
    pixels: PixelCodec | None,
    sampling: SamplingSettings | None = None,
) -> Scorer:
    """The scorer of a name: ``likelihood``, ``onnx:PATH``, or one by entry point.

    ``session`` is the target's, with a prompt; ``actions`` are of frames that its own likelihood is measured
    on where none is recorded for ``sampling``; ``pixels`` None: it has no tokenizer.

    Raises:
        UsageError: there is none, or it needs pictures of a model without a tokenizer.
    """
    if name == "likelihood":
        known = LikelihoodScorer.recorded(session, sampling)
        return known or LikelihoodScorer.measured(session, actions, sampling=sampling)
    if name.startswith("onnx:"):
        if pixels is None:
            raise UsageError(f"{session.manifest.name} has no tokenizer, so {name} has no pictures to score")
        return PictureScorer(Path(name.removeprefix("onnx:")), pixels)
    points = {point.name: point for point in entry_points(group=GROUP)}
    if name not in points:
        raise unknown("scorer", name, ("likelihood", "onnx:PATH", *sorted(points)))
    scorer: Scorer = points[name].load()(pixels)
    return scorer


class DraftDecoder(Decoder):
    """Speculates frame by frame, with one knob from the drafter alone to the target alone.

    The drafter decodes a frame with the target's seed. The target runs over it in one wide pass, which gives
    its likelihood, the target's K/V rows, and what the target would draw. A frame that scores at least
    ``tau`` is kept; another one is decoded by the target, from what it drew on. The first frame after a
    start, a move of the stream or a context that was fed again is always the target's.

    Args:
        drafter: over another bundle of the same layout and tokens, another precision of it, or the same;
            it follows the target's stream, and is not the session that this decoder is given to.
        tau: least score of a frame that is kept. Infinity is the target alone, exact; minus infinity the
            drafter alone, from the first frame on.
        score: of a proposal; see `open_scorer`.
        decoder: of the drafter; default: its bundle's.
        target_first: the first frame is the target's.

    Attributes:
        kept: for each frame so far, whether it is the drafter's.
        scores: of the frames so far; NaN where none was needed.
    """

    ragged = True

    def __init__(
        self,
        drafter: Session,
        tau: float,
        score: Scorer,
        *,
        decoder: Decoder | None = None,
        target_first: bool = True,
    ) -> None:
        from diagd.runtime.session import Session

        given = {"drafter": drafter, "tau": tau, "score": score}
        expect(DraftDecoder.__init__, given, Session=Session)
        if math.isnan(tau):
            raise UsageError("tau is not a number; give the least score of a frame that is kept, inf or -inf")
        self._drafter, self._tau, self._score = drafter, tau, score
        self._decoder, self._target = decoder, JacobiDecoder()
        self._target_first = target_first and tau > -math.inf
        self._followed: Past | None = None  # the target's last frame, where the drafter stands
        self.kept: list[bool] = []
        self.scores: list[float] = []

    @override
    def check(self, stream: Stream) -> None:
        """Drafter and target are two sessions over streams of one layout."""
        mine, other = (
            f"{one.layout}, {one.vocabulary} ids and a window of {one.window} frames"
            for one in (self._drafter.stream, stream)
        )
        if mine != other:
            raise UsageError(
                f"the drafter has {mine}, the target {other}; draft with the same layout, tokens and window"
            )
        if self._drafter.stream is stream:
            raise UsageError("the drafter is the target's own session; open a second session to draft with")
        self._target.check(stream)

    @override
    def blocks(self, stream: Stream) -> Blocks:
        began = time.perf_counter()
        if not (yield from begun(stream)):
            return
        frame = stream.begun - 1
        start, moved = stream.layout.first_cell(frame), self._follow(stream)
        draft, refills = self._draft(stream, frame), stream.refills
        stream.write(start, draft)
        drawn, logits = yield from self._verify(stream, start)
        first = self._target_first and (moved or stream.refills != refills)
        if kept := self._keeps(first, Proposal(draft.reshape(stream.layout.rows, -1), drawn, logits)):
            exact = bool((draft == drawn).all())
        else:
            exact, decided = True, keep(draft, drawn)
            stream.write(start, draft)
            if decided < len(draft):
                stream.rejected = start + decided - 1
                yield from self._target.decide(stream, start, draft, began, decided)
            self._replace(stream, frame, draft)
        self.kept.append(kept)
        stream.complete(None, exact=exact)
        self._followed = stream.past[-1]

    def _keeps(self, first: bool, proposal: Proposal) -> bool:
        """Whether a proposal is good enough."""
        score = math.nan if first or math.isinf(self._tau) else self._score(proposal)
        self.scores.append(score)
        return not first and (self._tau == -math.inf or score >= self._tau)

    def _follow(self, stream: Stream) -> bool:
        """Have the drafter's stream stand where the target's stands; whether it was moved there."""
        if self._followed is stream.past[-1]:  # not its number: others may have decoded up to there
            return False
        self._drafter.stream.restore(stream.snapshot())
        return True

    def _draft(self, stream: Stream, frame: int) -> Int:
        """The drafter's tokens [cells]."""
        made = self._drafter.step(
            stream.led(frame), self._decoder, sampling=stream.settings, seed=stream.seed
        )
        return made.tokens.reshape(-1)

    def _verify(self, stream: Stream, start: int) -> Generator[Block, Result, tuple[Int, Float]]:
        """Run the target over the draft: what it draws [cells], and, for a score, its logits [cells, V]."""
        drawn, logits, scored = [], [], not math.isinf(self._tau)
        for block in raster_passes(stream.fed, start, stream.layout.cells, stream.max_width):
            result = yield block
            drawn.append(result.tokens)
            if scored:
                logits.append(result.logits.copy())
        return np.concatenate(drawn), np.concatenate(logits) if scored else np.zeros((0, 0), np.float32)

    def _replace(self, stream: Stream, frame: int, tokens: Int) -> None:
        """Have the drafter go on from the target's frame."""
        ids = stream.led(frame)
        drafted = self._drafter.stream  # whose past may be as short as a shallower target's
        drafted.return_to(drafted.known - 1, list(drafted.past)[:-1])
        grid = tokens.reshape(stream.layout.rows, stream.layout.columns)
        forced = RasterDecoder([grid])
        for _ in self._drafter.frames(forced, None if ids is None else [ids], count=1):
            pass
