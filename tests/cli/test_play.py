"""``diagd play``: replay, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from diagd.cli.main import main
from diagd.play.controls import Inputs, default_controls
from diagd.play.opening import GameOptions, open_game
from diagd.play.record import Played, digest, read_record
from diagd.runtime.video import VideoWriter
from tests.cli.conftest import Workplace


@pytest.fixture
def record(workplace: Workplace, tmp_path: Path) -> Path:
    path = tmp_path / "played.ndjson"
    game = open_game(workplace.bundle, GameOptions(prompts=(workplace.prompt,), record=path))
    codec = game.bundle.manifest.actions
    inputs = Inputs(default_controls(codec), codec)
    game.reset(game.prompts[0])
    for _ in range(3):
        inputs.update(["ArrowLeft"])
        game.advance(inputs.take)
    game.close()
    return path


def test_a_record_is_played_again_and_seen(
    workplace: Workplace, record: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    video = tmp_path / "played.gif"
    assert main(["play", str(workplace.bundle), "--replay", str(record), "--video", str(video)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "3 frames, all equal to the record" in said and f"video: {video}" in said
    assert video.stat().st_size > 100


@pytest.mark.parametrize("option", ["--prompt", "--actions"])
def test_generate_reads_records(
    workplace: Workplace, record: Path, tmp_path: Path, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = record if option == "--prompt" else workplace.prompt
    given = [str(workplace.bundle), "--prompt", str(prompt), "--actions", str(record)]
    for name in ("a.npy", "a.gif"):
        assert main(["generate", *given, "--output", str(tmp_path / name)]) == 0
        said = " ".join(capsys.readouterr().out.split())
        assert f"3 frames, all equal to the record to the token: {tmp_path / name}" in said
    tokens = np.load(tmp_path / "a.npy")
    played = [line for _, line in read_record(record)[1] if isinstance(line, Played)]
    assert [digest(frame) for frame in tokens] == [line.tokens for line in played]
    other = tmp_path / "other.ndjson"
    other.write_text(record.read_text().replace('"tokens":"', '"tokens":"x', 1))
    assert main(["generate", *given[:-1], str(other), "--output", str(tmp_path / "b.npy")]) == 1
    assert not (tmp_path / "b.npy").exists()


def test_a_frame_that_differs_is_an_error(
    workplace: Workplace, record: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = record.read_text().splitlines()
    lines[-1] = lines[-1].replace('"tokens":"', '"tokens":"x')
    record.write_text("\n".join(lines))
    assert main(["play", str(workplace.bundle), "--replay", str(record)]) == 1
    assert f"line {len(lines)}: frame 3 is the first that differs" in capsys.readouterr().err


@pytest.mark.parametrize("output", ["a.npy", "a.mp4"])
def test_a_record_of_a_game_that_never_began_has_no_video(
    workplace: Workplace, record: Path, output: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record.write_text(record.read_text().splitlines(keepends=True)[0])
    words = ["--prompt", str(record), "--output", str(tmp_path / output)]
    assert main(["generate", str(workplace.bundle), *words]) == 2
    assert "played.ndjson has no frame: nothing was played" in capsys.readouterr().err
    assert not (tmp_path / output).exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--fps", "0"], "--fps 0"),
        (["--prompt", "nothing.png"], "nothing.png"),
        (["--set", "controls=nothing.json"], "nothing.json"),
        (["--set", "precision=int8"], "no int8 graph"),
        (["--set", "precision=int8"], "--precision int8"),
        (["--set", "precision=fp16"], "export it again with --precision fp16"),
        (["--set", "precision=int9"], "precisions are fp32, fp16, int8"),
        (["--replay", "nothing.ndjson"], "nothing.ndjson"),
        (["--record", "nothing/played.ndjson"], "the directory nothing does not exist; make it first"),
        (["--host", "256.1.1.1"], "cannot listen on 256.1.1.1"),
        (["--host", "long" * 20 + ".org"], "cannot listen on longlong"),
    ],
)
def test_wrong_options_end_in_one_line(
    workplace: Workplace, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["play", str(workplace.bundle), *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("options", [["--host", "256.1.1.1"], ["--terminal"]])
def test_a_game_that_never_began_leaves_no_record(
    workplace: Workplace, options: list[str], tmp_path: Path
) -> None:
    record = tmp_path / "played.ndjson"
    assert main(["play", str(workplace.bundle), "--record", str(record), *options]) == 2
    assert not record.exists()


@pytest.mark.parametrize("name", ["mine.mp4", "mine.gif", "mine.txt"])
def test_a_video_takes_no_other_files_place(
    workplace: Workplace, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (tmp_path / name).write_text("mine")
    assert main(["play", str(workplace.bundle), "--video", str(tmp_path / name)]) == 2
    assert "--video" in capsys.readouterr().err
    assert (tmp_path / name).read_text() == "mine"


def test_a_video_is_not_written_over_the_prompt(
    workplace: Workplace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = tmp_path / "clip.gif"
    with VideoWriter(prompt, 10, (36, 48)) as video:
        video.write(np.zeros((36, 48, 3), np.uint8))
    before = prompt.read_bytes()
    command = ["play", str(workplace.bundle), "--prompt", str(prompt), "--video", str(prompt)]
    assert main(command) == 2
    assert "--prompt" in capsys.readouterr().err
    assert prompt.read_bytes() == before
