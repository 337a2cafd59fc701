"""Options of clusters without one."""

from __future__ import annotations

import pytest

from diagd.cli.main import main

WORK = ["eval", "world", "--data", "recordings", "--output", "quality"]


@pytest.mark.parametrize(
    ("command", "given"),
    [
        (["serve", "world"], "gpus=0.5"),
        (["serve", "world"], "engines=2"),
        (["serve", "world"], "cores=4"),
        (WORK, "gpus=1"),
    ],
)
def test_what_would_have_no_effect_is_refused(
    command: list[str], given: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--set", given]) == 2
    assert f"--set {given.partition('=')[0]}= is of a cluster" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["serve", "world"], WORK])
def test_a_share_of_several_gpus_is_refused(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--cluster", "local", "--set", "gpus=1.5"]) == 2
    assert "gpus=1.5 is no share of one and no whole number" in capsys.readouterr().err
