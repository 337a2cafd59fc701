"""Noise of the sampler: one exponential number for each (seed, stream position, id), and for nothing else.

The same cell meets the same numbers whatever the schedule, the pass, the window or the padding that decodes
it, so that decoders are comparable draw by draw, and there is no state to save. ``native/sampling.h`` makes
the same numbers to the bit: sums, products and quotients of float32, rounded one by one.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from diagd.errors import UsageError

Float = NDArray[np.float32]
Words = NDArray[np.uint64]

_MULTIPLIERS: Final = np.array([0xD2511F53, 0xCD9E8D57], np.uint64)
_KEY_STEPS: Final = np.outer(np.arange(10), [0x9E3779B9, 0xBB67AE85]).astype(np.uint64)  # of each round
_LOW_WORD: Final = np.uint64(0xFFFFFFFF)
_WORD_BITS: Final = np.uint64(32)
_TAG: Final = 1  # last word of the counter: what the numbers are for

_CHUNK_BITS: Final = 7
"""Numbers of so many neighbouring positions are made at once: a round costs the same for many as for one."""

KEPT_IDS: Final = 512
"""Numbers of so many ids are made for all of them, and kept."""

_AT_ONCE: Final = 1 << 13  # cells whose words are made together

_ROOT_BITS: Final = 0x3F3504F3  # of the square root of one half
_LN_2: Final = np.float32(0.6931471805599453)


def check_seed(seed: int) -> None:
    """Refuse (UsageError) what is no key."""
    if not 0 <= seed < 1 << 64:
        raise UsageError(f"seed is {seed}; expected an integer from 0 to 2**64 - 1; choose another seed")


def philox(counter: Words, key: int) -> Words:
    """Philox4x32-10, the block function of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3".

    ``counter`` [4, ...] and the result hold 32-bit words in uint64. ``key``: of 64 bits.
    """
    multipliers = _MULTIPLIERS.reshape(2, *(1,) * (counter.ndim - 1))
    words = np.array([key & 0xFFFFFFFF, key >> 32], np.uint64).reshape(multipliers.shape)
    even, odd = counter[0::2].copy(), counter[1::2].copy()  # words 0 and 2, 1 and 3
    product = np.empty_like(even)
    swapped = product[::-1]
    for keys in words + _KEY_STEPS.reshape(-1, *multipliers.shape) & _LOW_WORD:
        np.multiply(even, multipliers, out=product)
        np.right_shift(swapped, _WORD_BITS, out=even)
        even ^= odd
        even ^= keys
        np.bitwise_and(swapped, _LOW_WORD, out=odd)
    return np.stack([even[0], odd[0], even[1], odd[1]])


def noise(seed: int, positions: NDArray[np.integer[Any]], ids: NDArray[np.integer[Any]]) -> Float:
    """Numbers float32 [n], exponentially distributed with mean 1, above 0, of some ids at some positions.

    Args:
        seed: 0 <= seed < 2**64; the Philox key.
        positions: int [n], counted from the start of the stream and never rolled back with the window.
        ids: int [n]; a block of the generator serves four, so that neighbours are made together.
    """
    result = np.empty(len(ids), np.float32)
    for start in range(0, len(ids), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        result[part] = _exponential(_words(seed, positions[part], ids[part]))
    return result


def _words(seed: int, positions: NDArray[np.integer[Any]], ids: NDArray[np.integer[Any]]) -> Words:
    """Random words [n] of ids; those of neighbours in a block of four are made once."""
    block = ids >> 2
    first = np.ones(len(ids), np.bool_)
    first[1:] = (block[1:] != block[:-1]) | (positions[1:] != positions[:-1])
    position, four = positions[first].astype(np.uint64), block[first].astype(np.uint64)
    counter = np.stack([position & _LOW_WORD, position >> _WORD_BITS, four, np.full_like(four, _TAG)])
    words: Words = philox(counter, seed)[ids & 3, first.cumsum() - 1]
    return words


def noise_rows(seed: int, positions: NDArray[np.integer[Any]], ids: int) -> Float:
    """Numbers of all of a few ids at positions [R], float32 [R, ids]; those of neighbours are kept."""
    low = (1 << _CHUNK_BITS) - 1
    return np.stack([_chunk(seed, at >> _CHUNK_BITS, ids)[at & low] for at in positions.tolist()])


@lru_cache(maxsize=64)
def _chunk(seed: int, number: int, ids: int) -> Float:
    places, each = np.divmod(np.arange(ids << _CHUNK_BITS), ids)
    return noise(seed, places + (number << _CHUNK_BITS), each).reshape(-1, ids)


def _exponential(words: Words) -> Float:
    """-ln(1 - v) of v = (word + 1/2) / 2**32.

    Small results win races, so v is what has full precision: float32 uniforms next to 1 would be too coarse.
    With 1 - v = m * 2**e, m around 1, this is -e ln 2 + 2 artanh(s) of s = (1 - m) / (1 + m), a short series.
    """
    v = words.astype(np.float32)
    v *= np.float32(2.0**-32)
    v += np.float32(2.0**-33)
    np.minimum(v, np.float32(1 - 2.0**-24), out=v)
    rest = np.float32(1) - v
    bits = rest.view(np.int32)
    exponent = (bits - np.int32(_ROOT_BITS)) >> 23
    bits -= exponent << 23  # rest becomes m
    z = np.where(exponent == 0, v, np.float32(1) - rest)
    s = z / (np.float32(2) - z)
    square = s * s
    series = square * np.float32(1 / 7)
    for term in (1 / 5, 1 / 3):
        series += np.float32(term)
        series *= square
    series += np.float32(1)
    series *= s + s
    result: Float = series - exponent.astype(np.float32) * _LN_2
    return result
