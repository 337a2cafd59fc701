"""Counter-based random numbers: a draw depends on the seed and the stream position, and on nothing else.

The same token gets the same number whatever the schedule, the width bucket or the padding of the step that
decodes it, so generations are reproducible across decoders, and the generator has no state to save.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from diagd.errors import UsageError

_MULTIPLIERS: Final = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_STEPS: Final = (0x9E3779B9, 0xBB67AE85)
_ROUNDS: Final = 10
_LOW_WORD: Final = np.uint64(0xFFFFFFFF)
_WORD_BITS: Final = np.uint64(32)

_CHUNK: Final = 1 << 12
"""Neighbouring positions whose numbers are made at once: a round costs the same for a hundred as for one."""


def philox(counter: NDArray[np.uint64], key: tuple[int, int]) -> NDArray[np.uint64]:
    """Philox4x32-10, the block function of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3".

    Args:
        counter: [4, ...] 32-bit words, held in uint64.
        key: two 32-bit words.

    Returns:
        [4, ...] random 32-bit words, held in uint64.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        first = c0 * _MULTIPLIERS[0]
        second = c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (second >> _WORD_BITS) ^ c1 ^ np.uint64(k0),
            second & _LOW_WORD,
            (first >> _WORD_BITS) ^ c3 ^ np.uint64(k1),
            first & _LOW_WORD,
        )
        k0 = (k0 + _KEY_STEPS[0]) & 0xFFFFFFFF
        k1 = (k1 + _KEY_STEPS[1]) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3])


def uniforms(seed: int, positions: NDArray[np.integer[Any]]) -> NDArray[np.float32]:
    """One uniform number for each stream position.

    Args:
        seed: 0 <= seed < 2**64; the Philox key.
        positions: integers of any shape, counted from the start of the stream and never rolled back with
            the window; the Philox counter.

    Returns:
        float32 of the same shape, odd multiples of 2**-24: never 0, never 1.

    Raises:
        UsageError: the seed is out of range.
    """
    if not 0 <= seed < 1 << 64:
        raise UsageError(f"seed is {seed}; expected an integer from 0 to 2**64 - 1; choose another seed")
    words = np.asarray(positions, dtype=np.int64).view(np.uint64)
    zeros = np.zeros_like(words)
    counter = np.stack([words & _LOW_WORD, words >> _WORD_BITS, zeros, zeros])
    word = philox(counter, (seed & 0xFFFFFFFF, seed >> 32))[0]
    # 23 random bits and a half: odd numerators fit a float32 exactly, and the ends cannot be hit.
    odd = (word >> np.uint64(9)) * np.uint64(2) + np.uint64(1)
    draws: NDArray[np.float32] = odd.astype(np.float32) * np.float32(2.0**-24)
    return draws


def draws(seed: int, positions: NDArray[np.integer[Any]]) -> NDArray[np.float32]:
    """``uniforms`` at positions [n] that lie close together, made and kept in chunks."""
    if not len(positions):
        return np.zeros(0, np.float32)
    first, last = int(positions.min()) // _CHUNK, int(positions.max()) // _CHUNK
    if first == last:
        chunks = _chunk(seed, first)
    else:
        chunks = np.concatenate([_chunk(seed, number) for number in range(first, last + 1)])
    found: NDArray[np.float32] = chunks[positions - first * _CHUNK]
    return found


@lru_cache(maxsize=16)
def _chunk(seed: int, number: int) -> NDArray[np.float32]:
    return uniforms(seed, np.arange(number * _CHUNK, (number + 1) * _CHUNK))
