"""``diagd generate``: what it writes, and what it says of bad input."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest

from diagd.cli.main import main
from diagd.runtime.video import VideoWriter, read_frames
from tests.cli.conftest import Workplace


def generate(place: Workplace, output: Path, *options: str) -> int:
    given = ["--prompt", str(place.prompt), "--actions", str(place.actions), *options]
    return main(["generate", str(place.bundle), *given, "--output", str(output)])


def test_a_video_in_a_process_of_its_own(workplace: Workplace, tmp_path: Path) -> None:
    output = tmp_path / "walk.mp4"
    command = [sys.executable, "-m", "diagd", "generate", str(workplace.bundle), "--output", str(output)]
    command += ["--prompt", str(workplace.prompt), "--actions", str(workplace.actions)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "4 frames in" in done.stdout
    assert "80 passes" in done.stdout  # four serial frames of 12 + 8 steps
    with av.open(str(output)) as container:
        assert container.streams.video[0].average_rate == 10
        assert sum(1 for _ in container.decode(video=0)) == 5


@pytest.mark.parametrize(
    ("options", "passes"),
    [
        (["--decoder", "k=1 chained"], 47),
        (["--decoder", "k=2"], 112),
        (["--decoder", "k=1,d=15"], 65),
        (["--decoder", "k=12"], 432),
        (["--decoder", "next token"], 432),
        (["--decoder", "seeds=above no-refeed"], 80),
    ],
)
def test_lags_choose_the_number_of_passes(
    workplace: Workplace, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], passes: int
) -> None:
    output = tmp_path / "tokens.npy"
    assert generate(workplace, output, *options) == 0
    assert f"{passes} passes" in capsys.readouterr().out
    tokens = np.load(output)
    assert tokens.shape == (4, 9, 12)
    assert tokens.dtype == np.int32


def test_seeds_and_token_prompts_are_reproducible(workplace: Workplace, tmp_path: Path) -> None:
    outputs = [tmp_path / name for name in ("a.npy", "b.npy", "c.npy")]
    for output, seed in zip(outputs, ("7", "7", "8"), strict=True):
        assert generate(workplace, output, "--set", f"seed={seed}") == 0
    first, again, other = (np.load(output) for output in outputs)
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    prompt = tmp_path / "prompt.npy"
    np.save(prompt, first[:2])
    assert generate(workplace, tmp_path / "d.npy", "--prompt", str(prompt), "--frames", "2") == 0
    assert np.load(tmp_path / "d.npy").shape == (2, 9, 12)


def test_greedy_video_shows_the_tokens_in_pixels(workplace: Workplace, tmp_path: Path) -> None:
    for name in ("video.gif", "tokens.npy"):
        assert generate(workplace, tmp_path / name, "--set", "temperature=0") == 0
    tokens = np.load(tmp_path / "tokens.npy")
    assert read_frames(tmp_path / "video.gif").shape == (5, 36, 48, 3)
    assert (tokens < 30).all()


def refused(
    capsys: pytest.CaptureFixture[str], folder: Path, code: int, *messages: str, exit_code: int = 2
) -> None:
    error = capsys.readouterr().err
    assert code == exit_code, error
    assert error.startswith("error: ")
    assert "Traceback" not in error
    for message in messages:
        assert message in error
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "messages"),
    [
        (["--decoder", "k=0"], ["row lag k=0", "choose k in 1..12"]),
        (["--decoder", "k=13"], ["row lag k=13"]),
        (["--decoder", "d=3"], ["frame lag d=3", "9 (chained) .. 20 (serial)"]),
        (["--decoder", "soon"], ["order 'soon'", "serial, chained or d=N"]),
        (["--set", "temperature=-1"], ["temperature is -1.0"]),
        (["--set", "top_p=0"], ["top-p is 0.0"]),
        (["--frames", "9"], ["--frames 9", "1..4"]),
        (["--set", "window=9"], ["window 9 is outside 2..4"]),
        (["--set", "widow=3"], ["did you mean 'window'"]),
        (["--set", "window"], ["NAME=VALUE"]),
        (["--set", "window=big"], ["window=big"]),
        (["--set", "compat=mine"], ["unknown compat"]),
    ],
)
def test_bad_options_name_the_fix(
    workplace: Workplace,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    messages: list[str],
) -> None:
    refused(capsys, tmp_path, generate(workplace, tmp_path / "out.mp4", *options), *messages)


def test_outputs_that_cannot_be_written(
    workplace: Workplace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(capsys, tmp_path, generate(workplace, tmp_path / "out.avi"), ".mp4, .gif or .npy")
    refused(capsys, tmp_path, generate(workplace, tmp_path / "none" / "out.mp4"), "does not exist")


def test_bad_files_name_the_fix(
    workplace: Workplace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outputs, inputs = tmp_path / "outputs", tmp_path / "inputs"
    outputs.mkdir()
    inputs.mkdir()
    large, corrupt, long = inputs / "large.gif", inputs / "corrupt.mp4", inputs / "long.npy"
    with VideoWriter(large, 10, (40, 48)) as video:
        video.write(np.zeros((40, 48, 3), np.uint8))
    corrupt.write_bytes(b"\0\0\0\x18ftypmp42" + bytes(500))
    np.save(long, np.zeros((4, 9, 12), np.int64))
    wrong_ids = inputs / "ids.npy"
    np.save(wrong_ids, np.full((1, 9, 12), 30))
    cases: list[tuple[list[str], list[str]]] = [
        (["--prompt", str(large)], ["40", "36", "resize"]),
        (["--prompt", str(corrupt)], ["corrupt.mp4"]),
        (["--prompt", str(inputs / "none.png")], ["none.png"]),
        (["--prompt", str(long)], ["4 frames but the window holds 4"]),
        (["--prompt", str(wrong_ids)], ["30..30", "0..29"]),
        (["--set", "prompt_frames=3"], ["1 frames, 3 are asked for"]),
    ]
    for options, messages in cases:
        refused(capsys, outputs, generate(workplace, outputs / "out.mp4", *options), *messages)
    for line, message in (('{"action": "lefft"}', "left"), ("{", "line 1"), ("", "no action")):
        actions = inputs / "bad.jsonl"
        actions.write_text(line + "\n")
        code = generate(workplace, outputs / "out.mp4", "--actions", str(actions))
        refused(capsys, outputs, code, message)


def test_a_resized_prompt_is_taken(workplace: Workplace, tmp_path: Path) -> None:
    prompt = tmp_path / "large.gif"
    with VideoWriter(prompt, 10, (72, 96)) as video:
        video.write(np.zeros((72, 96, 3), np.uint8))
    options = ["--prompt", str(prompt), "--set", "resize=true"]
    assert generate(workplace, tmp_path / "out.npy", *options) == 0


def test_bundles_that_are_no_bundles(
    workplace: Workplace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "outputs"
    output.mkdir()
    args = ["--prompt", str(workplace.prompt), "--output", str(output / "a.mp4")]
    refused(capsys, output, main(["generate", str(tmp_path / "no.diagd"), *args]), "no bundle at")
    refused(capsys, output, main(["generate", str(workplace.bundle), *args]), "--actions FILE")
