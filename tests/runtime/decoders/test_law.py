"""The law of Jacobi decoding, counted out on a vocabulary of three ids in exact fractions; wrong rules fail.

The decoder is the shipped one. Around it stands a world whose law is a table of fractions: what a row
predicts depends on every row that it sees, wrong ones included. Noise takes all values of a grid that is fine
enough to hit each id exactly as often as its probability says.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from itertools import pairwise, product

import numpy as np
import pytest

from diagd.runtime.decoders import JacobiDecoder
from diagd.runtime.step import Result, StepTime
from diagd.runtime.stream import Stream
from diagd.schedule import NO_SINK, StreamLayout

IDS, CELLS, GRID = 3, 3, 4
LAYOUT = StreamLayout(1, CELLS)
Law = tuple[Fraction, ...]
Seen = tuple[tuple[int, int], ...]
"""Rows that a query sees: (position, id), by position."""
NO_TIME = StepTime(0.0, 0, 0, 0, 0.0, 0.0, 0.0)


def draw(law: Law, noise: Fraction) -> int:
    """The first id whose cumulated probability exceeds the noise."""
    total = Fraction(0)
    for token, probability in enumerate(law):
        total += probability
        if total > noise:
            return token
    return len(law) - 1


def draw_at_the_edge(law: Law, noise: Fraction) -> int:
    """Wrong: an id of probability 0 is taken where the noise is 0."""
    total = Fraction(0)
    for token, probability in enumerate(law):
        total += probability
        if total >= noise:
            return token
    return len(law) - 1


@cache
def leaking(seed: int, leak: Fraction, seen: Seen) -> Law:
    """A world's law by what a query sees, and where it leaks to every id."""
    bounds = sorted(random.Random(f"{seed} {seen}").choices(range(GRID + 1), k=IDS - 1))
    edges = [0, *bounds, GRID]
    law = tuple(Fraction(high - low, GRID) + leak for low, high in pairwise(edges))
    return tuple(p / sum(law) for p in law)


@dataclass(frozen=True)
class World:
    """Laws by what a query sees, multiples of 1 / GRID, some ids of probability 0; and a rule to draw by."""

    seed: int
    draw: Callable[[Law, Fraction], int] = draw
    leak: Fraction = Fraction(0)
    filtered_again: bool = False
    noise_by_offset: bool = False
    rows_stay: bool = False

    def law(self, seen: Seen) -> Law:
        return leaking(self.seed, Fraction(0), seen)

    def tokens(self, block: object, cache: list[tuple[int, int]], noise: tuple[Fraction, ...]) -> np.ndarray:
        """What the rows of a pass draw."""
        first = LAYOUT.first_cell(1)
        found = []
        step = block.step(0)  # type: ignore[attr-defined]
        sinks = [
            (position, sink) for position, sink in zip(step.positions, step.sinks, strict=True) if sink >= 0
        ]
        for offset, (position, sink) in enumerate(sinks):
            law = leaking(self.seed, self.leak, tuple(sorted(row for row in cache if row[0] <= position)))
            if self.filtered_again and offset:
                kept = [p if p == max(law) else Fraction(0) for p in law]
                law = tuple(p / sum(kept) for p in kept)
            found.append(self.draw(law, noise[offset if self.noise_by_offset else sink - first]))
        return np.array(found, np.int32)


@dataclass(frozen=True)
class Written:
    """Reads what the world has written, as of an engine."""

    stream: Stream

    def read_tokens(self, places: np.ndarray, lane: int = 0) -> np.ndarray:
        assert lane == 0
        made: np.ndarray = self.stream.tokens[places]
        return made


def play(world: World, decoder: JacobiDecoder, noise: tuple[Fraction, ...]) -> tuple[int, ...]:
    """Decode one frame behind a prompt of one; the tokens."""
    stream = Stream(LAYOUT, 2, np.arange(9, dtype=np.int32), 2)
    stream.start(np.array([[[2, 0, 1]]]))
    stream.follow(None, 1)
    decoder.check(stream)
    cache: list[tuple[int, int]] = []
    blocks = decoder.blocks(stream)
    block = next(blocks, None)
    while block is not None:
        if stream.rejected is not None and not world.rows_stay:
            cache = [row for row in cache if row[0] < stream.rejected]
        stream.rejected = None
        ids = stream.tokens[stream.places.of(block.sources)]
        cache += list(zip(block.positions.tolist(), ids.tolist(), strict=True))
        tokens = world.tokens(block, cache, noise)
        places = stream.places.of(block.sinks[block.sinks != NO_SINK])
        stream.tokens[places] = tokens
        try:
            block = blocks.send(Result(Written(stream), places, NO_TIME))  # type: ignore[arg-type]
        except StopIteration:
            block = None
    return tuple(stream.frame(1).reshape(-1).tolist())


def sequence_law(world: World) -> dict[tuple[int, ...], Fraction]:
    """The law of next-token prediction: the product of the conditional ones."""
    prompt = ((0, 2), (1, 0), (2, 1))
    found: dict[tuple[int, ...], Fraction] = {}
    for tokens in product(range(IDS), repeat=CELLS):
        probability = Fraction(1)
        for cell, token in enumerate(tokens):
            behind = tuple((CELLS + at, tokens[at]) for at in range(cell))
            probability *= world.law((*prompt, *behind))[token]
        if probability:
            found[tokens] = probability
    return found


Make = Callable[[int, np.ndarray], JacobiDecoder]


def shipped(window: int, draft: np.ndarray) -> JacobiDecoder:
    return JacobiDecoder(window, draft=lambda _: draft)


def check_law(world: World, make: Make = shipped, windows: tuple[int, ...] = (1, 2, 3)) -> None:
    """Every window and draft gives next-token prediction's tokens at every noise, and so its law."""
    points = [tuple(point) for point in product([Fraction(n, GRID) for n in range(GRID)], repeat=CELLS)]
    law = sequence_law(world)
    plain = {point: play(World(world.seed), shipped(1, np.zeros(CELLS, np.int32)), point) for point in points}
    for window, draft in product(windows, drafts()):
        counts: Counter[tuple[int, ...]] = Counter()
        for point in points:
            tokens = play(world, make(window, draft), point)
            assert tokens == plain[point], f"window {window}, draft {draft}, noise {point}"
            counts[tokens] += 1
        assert {tokens: Fraction(count, len(points)) for tokens, count in counts.items()} == law


def drafts() -> Iterator[np.ndarray]:
    return (np.array(draft, np.int32) for draft in product(range(IDS), repeat=CELLS))


@pytest.mark.parametrize("seed", range(3))
def test_tokens_and_law_are_those_of_next_token_prediction(seed: int) -> None:
    check_law(World(seed))


class OneTooMany(JacobiDecoder):
    """Wrong: keeps what was drawn behind the first wrong guess as well."""

    def _keep(self, guesses: np.ndarray, drawn: np.ndarray) -> int:
        return min(super()._keep(guesses, drawn) + 1, len(guesses))


class OlderRound(JacobiDecoder):
    """Wrong: compares what was drawn with the guesses of the round before, not with what was fed."""

    def _keep(self, guesses: np.ndarray, drawn: np.ndarray) -> int:
        fed = guesses.copy()
        older = getattr(self, "older", {})
        end = CELLS - len(guesses)
        guesses[:] = [older.get(end + n, token) for n, token in enumerate(fed.tolist())]
        kept = super()._keep(guesses, drawn)
        self.older = {end + n: token for n, token in enumerate(fed.tolist())}
        return kept


MUTANTS: dict[str, tuple[World, Make]] = {
    "what is left is filtered again": (World(0, filtered_again=True), shipped),
    "a trifle is added to every probability": (World(0, leak=Fraction(1, 10**10)), shipped),
    "ids of probability 0 at the edge": (World(0, draw=draw_at_the_edge), shipped),
    "noise by place in the window": (World(0, noise_by_offset=True), shipped),
    "rejected rows stay visible": (World(0, rows_stay=True), shipped),
    "a cell behind the first wrong guess": (
        World(0),
        lambda window, draft: OneTooMany(window, draft=lambda _: draft),
    ),
    "guesses of an older round": (World(0), lambda window, draft: OlderRound(window, draft=lambda _: draft)),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_rule_is_found(mutant: str) -> None:
    world, make = MUTANTS[mutant]
    with pytest.raises(AssertionError):
        check_law(world, make)
