"""One world, exported by the command line, for all tests of verbs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from diagd.cli.main import main
from diagd.runtime.video import VideoWriter
from tests.worlds import random_world

Refused = Callable[[list[str], str], None]


@dataclass
class Workplace:
    """A bundle and what a user would have beside it."""

    folder: Path
    world: Path
    bundle: Path
    prompt: Path
    actions: Path


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    folder = tmp_path_factory.mktemp("workplace")
    world, bundle = random_world(folder / "trained"), folder / "world.diagd"
    assert main(["export", "--model", "world", "--checkpoint", str(world), "--output", str(bundle)]) == 0
    prompt, actions = folder / "prompt.gif", folder / "actions.jsonl"
    with VideoWriter(prompt, 10, (36, 48)) as video:
        video.write(np.random.default_rng(0).integers(0, 256, (36, 48, 3), dtype=np.uint8))
    actions.write_text('{"action": "left", "repeat": 2}\n{"action": "up"}\n{}\n')
    return Workplace(folder, world, bundle, prompt, actions)


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs a command that is to be refused, with a message, before anything is written to ``tmp_path``."""

    def check(command: list[str], message: str) -> None:
        assert main(command) == 2
        assert message in capsys.readouterr().err
        assert list(tmp_path.iterdir()) == []

    return check
