"""Guesses that are looked up, against a dictionary and on worlds with rules."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from diagd.runtime.decoders import jacobi
from diagd.runtime.decoders.jacobi import LookupDraft
from diagd.runtime.stream import Stream
from diagd.schedule import StreamLayout

LAYOUT = StreamLayout(4, 5, before=2)


def play(
    draft: LookupDraft, rule: Callable[[np.ndarray, np.ndarray], np.ndarray], frames: int
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Guesses, their kinds and what came, for every frame of a world."""
    random, seen = np.random.default_rng(0), []
    stream = Stream(LAYOUT, 3, np.arange(30, dtype=np.int32), 8)
    stream.start(random.integers(0, 2, (1, 4, 5)), np.zeros((1, 2), np.int32))
    stream.follow(random.integers(0, 2, (frames, 2)).astype(np.int32))
    while stream.begin():
        found = draft.find(stream)
        action = stream.led(stream.begun - 1)
        assert action is not None
        came = rule(stream.frame(stream.known - 1), action).astype(np.int32)
        seen.append((found.tokens, found.kinds, came.reshape(-1)))
        draft.learn(found, came.reshape(-1))
        stream.write(stream.layout.first_cell(stream.known), came.reshape(-1))
        stream.complete(None)
    return seen


def spread(monkeypatch: pytest.MonkeyPatch) -> None:
    """So much place that no two neighbourhoods share one."""
    monkeypatch.setattr(jacobi, "_PLACES", 1 << 22)
    monkeypatch.setattr(jacobi, "_LAST", np.uint64((1 << 22) - 1))


def neighbourhoods(frame: np.ndarray, action: np.ndarray) -> list[tuple[int, ...]]:
    around = np.pad(frame, 1, constant_values=-1)
    return [
        (*around[[y + 1, y, y + 2, y + 1, y + 1], [x + 1, x + 1, x + 1, x, x + 2]].tolist(), *action.tolist())
        for y in range(frame.shape[0])
        for x in range(frame.shape[1])
    ]


def test_guesses_are_what_a_dictionary_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    spread(monkeypatch)
    random = np.random.default_rng(1)
    asked: list[tuple[list[tuple[int, ...]], np.ndarray]] = []

    def rule(frame: np.ndarray, action: np.ndarray) -> np.ndarray:
        asked.append((neighbourhoods(frame, action), frame.reshape(-1)))
        return np.where(random.random(frame.shape) < 0.95, frame, random.integers(0, 2, frame.shape))

    known: dict[tuple[int, ...], int] = {}
    found = set()
    for (tokens, kinds, came), (keys, before) in zip(play(LookupDraft(), rule, 400), asked, strict=True):
        expected = [(known.get(key, int(before[cell])), int(key in known)) for cell, key in enumerate(keys)]
        assert list(zip(tokens.tolist(), kinds.tolist(), strict=True)) == expected
        found |= set(kinds.tolist())
        known |= zip(keys, came.tolist(), strict=True)
    assert found == {0, 1}


def test_rules_of_a_world_are_found_out() -> None:
    def rule(frame: np.ndarray, action: np.ndarray) -> np.ndarray:
        beside = np.zeros_like(frame)
        if action[1]:
            beside[:, 1:] = frame[:, :-1]
        else:
            beside[:-1] = frame[1:]
        made: np.ndarray = (frame % 2) ^ (beside % 2) ^ action[0]
        return made

    seen = play(LookupDraft(), rule, 300)
    assert all((tokens != came).any() for tokens, _, came in seen[1:5])
    assert np.mean([tokens == came for tokens, _, came in seen[200:]]) > 0.99


def test_what_an_action_did_is_not_guessed_of_another() -> None:
    seen = play(LookupDraft(), lambda frame, action: np.full_like(frame, action[0] * 2 + action[1]), 60)
    assert all((tokens == came).all() for tokens, kinds, came in seen if (kinds > 0).all())
    assert any((kinds > 0).all() for _, kinds, _ in seen)
