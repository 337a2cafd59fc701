"""First guesses of a frame, looked up in what was decoded before."""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from diagd.engines.engine import Int
from diagd.runtime.decoders.window import Kinds
from diagd.runtime.stream import Stream

TRUST: Final = 8
"""Levels of trust: 0 where nothing is remembered, else 1 and how often in a row that came true, to 7."""

_PLACES: Final = 1 << 16  # a megabyte; what is remembered last at a place stays there
_LAST: Final = np.uint64(_PLACES - 1)
_CROSS: Final = ((0, 0), (-1, 0), (1, 0), (0, -1), (0, 1))
_SEED, _FACTOR, _SHIFT = 0x9E3779B97F4A7C15, np.uint64(0xBF58476D1CE4E5B9), np.uint64(29)  # of SplitMix64


class Lookup(NamedTuple):
    """What was found of a frame.

    Attributes:
        tokens: int32 [cells], guesses.
        trust: level of each, below ``TRUST``.
        hashes: of the cells' neighbourhoods.
    """

    tokens: Int
    trust: Kinds
    hashes: NDArray[np.uint64]


class LookupDraft:
    """Guesses that a cell becomes what it became when its neighbourhood was last seen under the same action.

    As prompt lookup decoding finds the words behind an n-gram, in space and time: the n-gram is a cell of the
    previous frame, its four neighbours, and the tokens of the action. The rules of a world are local and the
    same everywhere, so most cells are found after some dozen frames. One that is not found stays as it is.
    Streams that share it learn from one another.
    """

    def __init__(self) -> None:
        self._hashes: NDArray[np.uint64] = np.zeros(_PLACES, np.uint64)
        self._tokens: Int = np.zeros(_PLACES, np.int32)
        self._trust: Kinds = np.zeros(_PLACES, np.int64)

    def find(self, stream: Stream) -> Lookup:
        """Guesses of the frame that began last."""
        frame = stream.begun - 1
        before = stream.frame(frame - 1)
        hashes = _hashes(before, stream.led(frame))
        places = hashes & _LAST
        known = self._hashes[places] == hashes
        tokens: Int = np.where(known, self._tokens[places], before.reshape(-1))
        return Lookup(tokens, np.where(known, self._trust[places], 0), hashes)

    def learn(self, found: Lookup, tokens: Int) -> None:
        """Take what a frame became."""
        came_true = (tokens == found.tokens) & (found.trust > 0)
        places = found.hashes & _LAST
        self._hashes[places] = found.hashes
        self._tokens[places] = tokens
        self._trust[places] = np.where(came_true, np.minimum(found.trust + 1, TRUST - 1), 1)


def _hashes(frame: Int, led: Int | None) -> NDArray[np.uint64]:
    """Of each cell's neighbourhood and the action, uint64 [cells]."""
    rows, columns = frame.shape
    around = np.pad(frame.astype(np.uint64) + np.uint64(1), 1)
    hashes = np.full((rows, columns), _SEED, np.uint64)
    for token in () if led is None else led.astype(np.uint64):
        hashes = (hashes ^ token) * _FACTOR
    for down, right in _CROSS:
        hashes ^= around[1 + down : 1 + down + rows, 1 + right : 1 + right + columns]
        hashes *= _FACTOR
        hashes ^= hashes >> _SHIFT
    return hashes.reshape(-1)
