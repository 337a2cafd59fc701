"""A world under commands goes on to the token, and its record plays again."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from diagd.errors import DiagdError, QualityError, UsageError
from diagd.play.controls import Taken
from diagd.play.game import Game
from diagd.play.opening import GameOptions, open_game
from diagd.play.record import is_record, read_record, replay
from diagd.runtime.actions import encode


def play(game: Game, *names: str) -> list[np.ndarray]:
    """Tokens of a frame for each action."""
    codec = game.bundle.manifest.actions
    assert codec is not None
    walk: Iterator[str] = iter([*names, *["noop"] * 8])  # chained frames ask ahead

    def act() -> Taken:
        action = {"action": next(walk)}
        return Taken(encode(codec, action), dict(action))

    frames = []
    for _ in names:
        shown = game.advance(act)
        assert shown is not None
        assert shown.pictures.shape == (1, 16, 24, 3)
        frames.append(shown.frame.tokens)
    return frames


def equal(one: list[np.ndarray], other: list[np.ndarray]) -> bool:
    return len(one) == len(other) and all(map(np.array_equal, one, other))


WALK = ("left", "up", "up", "right", "down", "left", "left", "noop", "up", "down")
ORDERS = ("k=1 serial", "k=1 chained", "jacobi", "next token")


def with_order(game: Game, order: str, **settings: object) -> None:
    game.choose(game.settings.model_copy(update={"decoder": order, **settings}))


@pytest.mark.parametrize("order", ["k=1 serial", "jacobi"])
def test_what_is_taken_back_comes_again(game: Game, order: str) -> None:
    with_order(game, order)
    first = play(game, *WALK)
    game.rewind(4)
    assert game.known == 7
    assert equal(play(game, *WALK[-4:]), first[-4:])
    game.rewind(10_000)
    assert game.known == 1
    assert equal(play(game, *WALK), first)


def test_places_can_be_gone_back_to(game: Game) -> None:
    first = play(game, *WALK[:5])
    mark = game.branch()
    one = play(game, *WALK[5:])
    pictures = game.visit(mark)
    assert np.array_equal(pictures, game.view.move(first))
    other = play(game, "right", "right", "right")
    assert not equal(other, one[:3])
    inner = game.branch()
    assert [(m.number, m.parent, m.known) for m in game.marks.values()] == [
        (0, None, 1),
        (1, 0, 6),
        (2, 1, 9),
    ]
    game.visit(mark)
    assert equal(play(game, *WALK[5:]), one)
    game.visit(0)
    assert equal(play(game, *WALK[:5]), first)
    game.visit(inner)
    game.rewind(5)
    assert game.here == 0
    with pytest.raises(UsageError, match="7"):
        game.visit(7)


def test_settings_count_from_the_next_frame_and_wrong_ones_change_nothing(game: Game) -> None:
    first = play(game, *WALK[:4])
    game.rewind(4)
    with_order(game, "k=1 serial", seed=7)
    assert not equal(play(game, *WALK[:4]), first)
    kept = game.settings
    for wrong in ("k=0 serial", "fast", "k=1 d=3", ""):
        with pytest.raises(DiagdError):
            with_order(game, wrong)
    with pytest.raises(UsageError):
        with_order(game, "k=1 serial", temperature=1e-30)
    assert game.settings == kept
    game.rewind(4)
    with_order(game, "k=1 serial", seed=0)
    assert equal(play(game, *WALK[:4]), first)


def test_jacobi_is_next_token_prediction_when_audited(game: Game) -> None:
    with pytest.raises(UsageError, match="play on"):
        game.audit(4)
    with_order(game, "jacobi")
    first = play(game, *WALK)
    assert game.audit(6) == (6, 1.0)
    game.rewind(3)
    assert equal(play(game, *WALK[-3:]), first[-3:])
    with_order(game, "k=1 serial", temperature=2.0)
    play(game, *WALK[:3])
    frames, share = game.audit(6)
    assert frames == 3
    assert 0 < share < 1


@pytest.fixture(scope="module")
def recorded(world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[np.ndarray]]:
    """A record of everything that can be done, and the tokens of its frames."""
    path = tmp_path_factory.mktemp("recorded") / "played.ndjson"
    game = open_game(world, GameOptions(record=path))
    game.reset(game.prompts[1])
    frames = play(game, *WALK)
    for order in ORDERS:
        with_order(game, order, seed=len(frames), temperature=1.3)
        frames += play(game, *WALK[:3])
        game.audit(2)
        with pytest.raises(DiagdError):
            with_order(game, "k=99 serial")
        frames += play(game, "down")
        game.branch()
        frames += play(game, *WALK[3:])
        game.rewind(2)
        frames += play(game, "up")
        game.visit(1)
        frames += play(game, "left")
    game.reset(game.prompts[0])
    frames += play(game, "left")
    game.close()
    return path, frames


def test_a_record_plays_again_to_the_token(world: Path, recorded: tuple[Path, list[np.ndarray]]) -> None:
    path, frames = recorded
    assert is_record(path)
    header, lines = read_record(path)
    game = open_game(world, GameOptions())
    assert header.bundle == game.bundle.digest
    assert equal([shown.frame.tokens for shown in replay(game, lines)], frames)
    game.close()


def test_the_first_frame_that_differs_is_named(
    world: Path, recorded: tuple[Path, list[np.ndarray]], tmp_path: Path
) -> None:
    lines = recorded[0].read_text().splitlines()
    played = [number for number, line in enumerate(lines) if '"frame"' in line]
    changed = json.loads(lines[played[12]])
    lines[played[12]] = json.dumps(changed | {"tokens": "00000000"})
    path = tmp_path / "changed.ndjson"
    path.write_text("\n".join(lines))
    game = open_game(world, GameOptions())
    with pytest.raises(QualityError, match=f"line {played[12] + 1}: frame {changed['frame']} "):
        list(replay(game, read_record(path)[1]))
    game.close()


def test_records_that_are_damaged_or_cut_off(recorded: tuple[Path, list[np.ndarray]], tmp_path: Path) -> None:
    text, path = recorded[0].read_text(), tmp_path / "damaged.ndjson"
    whole = len(read_record(recorded[0])[1])
    path.write_text(text[:-9])
    assert len(read_record(path)[1]) == whole - 1
    other_sampler = text.replace('"race"', '"inverse"', 1)
    other_word = text.replace('"frame"', '"flame"', 1)
    for damaged in ("", "{}", other_sampler, other_word, text[text.index("\n") + 1 :]):
        path.write_text(damaged)
        with pytest.raises(UsageError):
            read_record(path)
    assert not is_record(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError):
        read_record(path)
    with pytest.raises(UsageError):
        read_record(tmp_path / "absent")


def test_a_record_of_another_model_is_refused(world: Path, recorded: tuple[Path, list[np.ndarray]]) -> None:
    lines = read_record(recorded[0])[1]
    game = open_game(world, GameOptions())
    number, start = lines[0]
    for prompt in ([[[1, 2], [3, 4]]], [[[1, 2], [3]]]):
        with pytest.raises(UsageError):
            list(replay(game, [(number, start.model_copy(update={"start": prompt}))]))
    with pytest.raises(UsageError, match="does not follow"):
        list(replay(game, [lines[0], lines[3]]))
    game.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"start": [[[40] * 6] * 4]}, "tokens 40..40; world has visual tokens 0..29"),
        ({"start": []}, "tokens none"),
        ({"actions": []}, "1 frames and 0 actions"),
        ({"actions": [[999]]}, "ids 999..999; the model knows 0.."),
        ({"start": [[[10**12] * 6] * 4]}, "line 2"),
        (None, "line 2: expected a start"),
    ],
)
def test_ids_of_a_record_are_not_believed(
    game: Game,
    recorded: tuple[Path, list[np.ndarray]],
    tmp_path: Path,
    change: dict[str, object] | None,
    message: str,
) -> None:
    header, start, *others = recorded[0].read_text().splitlines()
    begin = [json.dumps(json.loads(start) | change)] if change else []
    (tmp_path / "a.ndjson").write_text("\n".join([header, *begin, *others]) + "\n")
    with pytest.raises(UsageError, match=message):
        list(replay(game, read_record(tmp_path / "a.ndjson")[1]))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no disk that is always full")
def test_a_disk_that_is_full_ends_the_record_and_not_the_game(
    world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    game = open_game(world, GameOptions(record=tmp_path / "played.ndjson"))
    assert game.record._file is not None
    with Path("/dev/full").open("w") as full:
        os.dup2(full.fileno(), game.record._file.fileno())
    game.reset(game.prompts[0])
    assert len(play(game, *WALK)) == len(WALK)
    assert "ends early: No space left" in caplog.text
    game.close()


def test_a_record_that_is_gone_is_said_so(world: Path, tmp_path: Path) -> None:
    game = open_game(world, GameOptions(record=tmp_path / "played.ndjson"))
    (tmp_path / "played.ndjson").unlink()
    with pytest.raises(UsageError, match="record cannot be read"):
        game.record.read()
    game.close()


def test_a_frame_under_a_newer_action_plays_again(world: Path, tmp_path: Path) -> None:
    """What is recorded is the action that it was decoded under."""
    path = tmp_path / "played.ndjson"
    with open_game(world, GameOptions(record=path)) as game:
        codec = game.bundle.manifest.actions
        assert codec is not None
        game.reset(game.prompts[0])
        with_order(game, "jacobi")

        def taken(name: str) -> Taken:
            return Taken(encode(codec, {"action": name}), {"action": name})

        asked = iter([None, taken("down")])
        shown = game.advance(lambda: taken("left"), lambda: next(asked, None))
        assert shown is not None
        assert shown.taken.action == {"action": "down"}
    _, lines = read_record(path)
    with open_game(world, GameOptions()) as again:
        (repeated,) = replay(again, lines)
        np.testing.assert_array_equal(repeated.frame.tokens, shown.frame.tokens)
