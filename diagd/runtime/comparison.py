"""Two models side by side: the same steps over the same tokens, and how far their predictions are apart."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from diagd.engines.engine import Float, Int
from diagd.runtime.decoders import RasterDecoder
from diagd.runtime.sampling import SamplingSettings
from diagd.runtime.session import Seen, Session
from diagd.runtime.step import Result
from diagd.runtime.stream import Ids, Stream
from diagd.schedule import NO_SINK, Step


def lockstep(
    leader: Iterator[Seen], follower: Iterator[Seen], stream: Stream
) -> Iterator[tuple[Step, Int, Result, Result]]:
    """Both runs, step by step, over the leader's tokens: one difference does not spoil what comes after.

    The follower runs the same steps, and its predictions are not kept (``ForcedDecoder``); ``stream`` is its
    own. Gives each step, the positions that it decodes, which have the leader's tokens now, and both results.
    """
    for (step, result), (_, other) in zip(leader, follower, strict=True):
        cells = step.sinks[step.sinks != NO_SINK]
        stream.write(cells, result.tokens)
        yield step, cells, result, other


@dataclass
class Sums:
    """Sums over predictions behind one prompt; blocks are independent, so their spread is known."""

    predictions: int = 0
    agreed: int = 0
    nll: float = 0.0
    divergence: float = 0.0


class Cell(NamedTuple):
    """One prediction: the candidate's token, the reference's, and how far that one was ahead of the other."""

    position: int
    token: int
    expected: int
    margin: float


class Comparison:
    """A candidate's predictions against a reference's, all that is asked of two models.

    Args:
        ranges: int32 [frame_length, 2], ids allowed at each place of a frame; no others count.
        first: position of the first place.

    Attributes:
        cells: every prediction, in decoding order.
        blocks: sums of them.
        widths: predictions, and equal ones, by rows of the step.
    """

    def __init__(self, ranges: Int, first: int = 0) -> None:
        self._ranges, self._first = ranges, first
        self.cells: list[Cell] = []
        self.blocks = [Sums()]
        self.widths: dict[int, Sums] = {}
        self._noise = self._signal = 0.0
        self._difference = self._greatest = 0.0

    def begin(self) -> None:
        """What follows is behind another prompt."""
        if self.blocks[-1].predictions:
            self.blocks.append(Sums())

    def add(
        self, width: int, cells: Int, reference: Float, candidate: Float, tokens: Int | None = None
    ) -> None:
        """Count a step of so many rows that decodes ``cells``, positions [R], by the logits [R, V] of both.

        ``tokens``: ids [R] that the candidate chose; None: its most probable ones.
        """
        self._add_logits(reference, candidate)
        ranges = self._ranges[(cells - self._first) % len(self._ranges)]
        for low, high in np.unique(ranges, axis=0):
            rows = np.flatnonzero((ranges == (low, high)).all(axis=1))
            expected, seen = reference[rows, low:high], candidate[rows, low:high]
            chosen = seen.argmax(1) if tokens is None else tokens[rows] - low
            best = expected.argmax(1)
            margins = expected[np.arange(len(rows)), best] - reference[rows, low + chosen]
            columns = (cells[rows], low + chosen, low + best, margins)
            self.cells += map(Cell, *(column.tolist() for column in columns))
            nll, divergence = likelihood(log_softmax(expected), log_softmax(seen))
            agreed = int((chosen == best).sum())
            for sums in (self.blocks[-1], self.widths.setdefault(width, Sums())):
                sums.predictions += len(rows)
                sums.agreed += agreed
                sums.nll += nll
                sums.divergence += divergence

    def _add_logits(self, reference: Float, candidate: Float) -> None:
        difference = np.abs(candidate - reference)
        self._noise += float(np.square(difference, dtype=np.float64).sum())
        self._signal += float(np.square(reference, dtype=np.float64).sum())
        self._difference = max(self._difference, float(difference.max(initial=0.0)))
        self._greatest = max(self._greatest, float(np.abs(reference).max(initial=0.0)))

    @property
    def error(self) -> float:
        """Euclidean norm of all logits' differences over that of the reference's."""
        return float(np.sqrt(self._noise / self._signal))

    @property
    def worst(self) -> float:
        """Greatest difference of a logit over the reference's greatest logit."""
        return self._difference / self._greatest

    def agreement(self, tie: float = 0.0) -> float:
        """Share of cells with the reference's token, or one at most ``tie`` of the greatest logit behind."""
        bound = tie * self._greatest
        differing = sum(cell.token != cell.expected and cell.margin > bound for cell in self.cells)
        return 1.0 - differing / len(self.cells)

    def figures(self) -> dict[str, float]:
        """Agreement, relative rise of the NLL, both with standard errors, NLL and divergence in nats.

        The NLL is the expected one of tokens that the reference draws, under the reference itself; divergence
        is what it rises by under the candidate. Both are exact sums over the allowed ids: no draw adds noise.
        """
        columns = [(block.predictions, block.agreed, block.nll, block.divergence) for block in self.blocks]
        predictions, agreed, nll, divergence = np.asarray(columns, np.float64).T
        count = max(float(predictions.sum()), 1.0)
        return {
            "agreement": float(agreed.sum()) / count,
            "agreement_error": ratio_error(agreed, predictions),
            "nll": float(divergence.sum()) / max(float(nll.sum()), 1e-30),
            "nll_error": ratio_error(divergence, nll),
            "fp32_nll": float(nll.sum()) / count,
            "divergence": float(divergence.sum()) / count,
            "predictions": float(predictions.sum()),
        }


def likelihood(reference: NDArray[np.float64], candidate: NDArray[np.float64]) -> tuple[float, float]:
    """Sums over log-probabilities [R, V]: NLL of the reference, and divergence of the candidate, nats."""
    p = np.exp(reference)
    return -float((p * reference).sum()), float((p * (reference - candidate)).sum())


def log_softmax(logits: Float) -> NDArray[np.float64]:
    """Natural logarithms of probabilities, float64 [R, V]."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


def ratio_error(over: NDArray[np.float64], under: NDArray[np.float64]) -> float:
    """Standard error of sum(over) / sum(under), each [B] by block: the ratio estimator of surveys."""
    total, count = float(under.sum()), len(over)
    if count < 2 or total <= 0:
        return 0.0
    residuals = over - float(over.sum()) / total * under
    return float(np.sqrt(count / (count - 1) * np.square(residuals).sum())) / total


def redrawn(
    session: Session,
    frames: Int,
    actions: Ids | None,
    *,
    rows: int | None = None,
    sampling: SamplingSettings | None = None,
    seed: int = 0,
) -> Int:
    """What next-token prediction draws at each cell of given frames, behind the given tokens ahead of it.

    ``session`` was started at the prompt of the frames, int32 [F, rows, columns] like what is returned; known
    tokens ``actions`` [F, n] lead to each. ``rows``: of the widest pass; default: all the engine takes.
    """
    decoder = RasterDecoder(frames, rows or session.engine.max_width)
    steps = session.steps(decoder, actions, count=len(frames), sampling=sampling, seed=seed)
    drawn = [result.tokens for step, result in steps if (step.sinks != NO_SINK).any()]
    return np.concatenate(drawn).reshape(frames.shape)


def audit(
    session: Session,
    frames: Int,
    actions: Ids | None,
    *,
    sampling: SamplingSettings | None = None,
    seed: int = 0,
) -> NDArray[np.float64]:
    """Share [F] of each frame's cells that are next-token prediction's; see ``redrawn``.

    A frame whose share is 1 is next-token prediction's, behind the frames before it.
    """
    same = redrawn(session, frames, actions, sampling=sampling, seed=seed) == frames
    shares: NDArray[np.float64] = same.mean(axis=(1, 2))
    return shares
