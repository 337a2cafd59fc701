"""Commands and frames of a world, and their order."""

from __future__ import annotations

import time

from diagd.play.controls import Inputs, read_controls
from diagd.play.game import Game
from diagd.play.stage import GameLoop, Stage


class Seated(Stage):
    """Somebody is seated just when the commands that wait have been run."""

    def obey(self) -> None:
        super().obey()
        if not self.is_watched:
            self.post(lambda: self.look(self.game.reset(self.game.prompts[1])))
            self.is_watched = True


def test_who_is_seated_sees_no_frame_of_the_world_before(game: Game) -> None:
    codec, seen = game.bundle.manifest.actions, list[bool]()
    inputs = Inputs(read_controls(game.bundle.path, codec), codec)

    def fail(error: str) -> None:
        raise AssertionError(error)

    stage = Seated(game, inputs, lambda _, shown: seen.append(shown is not None), fail, 60)
    loop = GameLoop([stage])
    loop.start()
    while len(seen) < 2:
        time.sleep(0.01)
    loop.close()
    assert seen[:2] == [False, True]
