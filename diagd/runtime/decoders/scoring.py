"""How good a proposed frame is: by the target's likelihood, a network on its picture, or one's own rule."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from diagd.engines.engine import Float, Int
from diagd.engines.onnxruntime_session import CpuOptions, open_session
from diagd.errors import UsageError, unknown
from diagd.runtime.decoders.jacobi import JacobiDecoder
from diagd.runtime.decoders.scheduled import RasterDecoder
from diagd.runtime.pixels import PixelCodec
from diagd.runtime.sampling import SamplingSettings
from diagd.runtime.stream import Ids
from diagd.schedule import NO_SINK

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


class Scorer(Protocol):
    """Gives a proposal a score, the higher the better."""

    def __call__(self, proposal: Proposal) -> float:
        """The score."""


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
        manifest, chosen = session.manifest, session.settings(sampling)
        asked = manifest.graphs[0].precision, session.window, chosen.temperature, chosen.top_k, chosen.top_p
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
    """Of frames that a session decodes behind what it knows; its stream is left as it is.

    Args:
        session: of the target, with a prompt.
        actions: of these frames; None for models without.
        frames: how many, at most one for each action.
        seed: of their random numbers.
        sampling: default: the manifest's.
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
        return open_session(path, "", CpuOptions(threads, prepack=False))
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

    Args:
        name: of it.
        session: of the target, with a prompt.
        actions: of frames that the target's own likelihood is measured on, where none is recorded.
        pixels: of the target, where it has a tokenizer.
        sampling: of the target; default: the manifest's.

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
