"""``diagd generate``: what it writes, and what it says of bad input."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest

import diagd
from diagd.bundle import Bundle
from diagd.cli.main import main
from diagd.engines.onnxruntime_session import CpuOptions
from diagd.runtime.actions import encode, read_actions
from diagd.runtime.pictures import read_frames
from diagd.runtime.pixels import PixelCodec
from diagd.runtime.video import VideoWriter
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
        (["--set", "window=1"], ["window 1 is outside 2..4"]),
        (["--set", "window=-9"], ["window -9 is outside 2..4"]),
        (["--decoder", ""], ["--decoder : the value is empty"]),
        (["--branches", "1" + "0" * 20], ["less than or equal to 10000"]),
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
    refused(capsys, tmp_path, generate(workplace, tmp_path / "out.avi"), ".mp4, .gif, .npy or .npz")
    refused(
        capsys, tmp_path, generate(workplace, tmp_path / "out.npz"), "such episodes have buttons and sticks"
    )
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


def test_graphs_that_are_not_what_a_manifest_says(
    workplace: Workplace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = shutil.copytree(workplace.bundle, tmp_path / "changed.diagd")
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["cache"]["kv_heads"] += 1
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    command = [
        "generate",
        str(bundle),
        "--prompt",
        str(workplace.prompt),
        "--actions",
        str(workplace.actions),
    ]
    output = tmp_path / "made"
    output.mkdir()
    refused(capsys, output, main([*command, "--output", str(output / "a.npy")]), "export it again")


@pytest.fixture(scope="module")
def recording(workplace: Workplace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clip of five frames, and a line for each of seven: the action that led to it."""
    folder = tmp_path_factory.mktemp("recording")
    with VideoWriter(folder / "clip.gif", 10, (36, 48)) as video:
        video.write(np.random.default_rng(1).integers(0, 256, (5, 36, 48, 3), dtype=np.uint8))
    names = ("noop", "left", "up", "right", "down", "left", "left")
    (folder / "clip.jsonl").write_text("".join(f'{{"action": "{name}"}}\n' for name in names))
    return folder


def tokens_of(place: Workplace, output: Path, *options: str) -> np.ndarray:
    assert main(["generate", str(place.bundle), *options, "--output", str(output)]) == 0
    tokens: np.ndarray = np.load(output)
    return tokens


def test_jacobi_and_drafts_that_none_passes_are_next_token_prediction(
    workplace: Workplace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """To the token; the audit says so, and that a diagonal is not."""
    found = {}
    for name, options in {
        "plain": ["--decoder", "next token"],
        "jacobi": ["--decoder", "jacobi"],
        "narrow": ["--decoder", "jacobi,window=5"],
        "draft": ["--decoder", "draft", "--set", "tau=inf", "--set", "drafter_decoder=k=1 chained"],
        "diagonal": ["--decoder", "k=1"],
    }.items():
        output = tmp_path / f"{name}.npy"
        assert generate(workplace, output, *options, "--audit", "--set", "temperature=1") == 0
        shown = " ".join(capsys.readouterr().out.split())
        assert "passes a frame" in shown
        assert ("100.00% of the tokens are next-token prediction's" in shown) == (name != "diagonal")
        found[name] = np.load(output)
    for name in ("jacobi", "narrow", "draft"):
        np.testing.assert_array_equal(found[name], found["plain"])


def test_no_bar_keeps_what_is_drafted(workplace: Workplace, tmp_path: Path) -> None:
    options = ["--decoder", "draft", "--set", "tau=-inf", "--set", "drafter_decoder=k=1"]
    assert generate(workplace, tmp_path / "draft.npy", *options) == 0
    assert generate(workplace, tmp_path / "drafter.npy", "--decoder", "k=1") == 0
    np.testing.assert_array_equal(np.load(tmp_path / "draft.npy"), np.load(tmp_path / "drafter.npy"))


@pytest.mark.parametrize(
    ("options", "start", "prompt", "shift"),
    [
        ((), 0, 1, 0),
        (("--set", "prompt_frames=3"), 0, 3, 0),
        (("--start", "1", "--set", "prompt_frames=2"), 1, 2, 0),
        (("--start", "1", "--set", "prompt_frames=2", "--set", "lines=followed"), 1, 2, 1),
    ],
)
def test_what_was_done_in_the_prompt_is_fed(
    workplace: Workplace,
    recording: Path,
    tmp_path: Path,
    options: tuple[str, ...],
    start: int,
    prompt: int,
    shift: int,
) -> None:
    given = ("--prompt", str(recording / "clip.gif"), "--actions", str(recording / "clip.jsonl"))
    made = tokens_of(workplace, tmp_path / "made.npy", *given, *options)
    bundle = Bundle.open(workplace.bundle)
    assert bundle.manifest.actions is not None
    lines = read_actions(recording / "clip.jsonl", bundle.manifest.actions)
    lines = np.concatenate([np.tile(encode(bundle.manifest.actions, {}), (shift, 1)), lines])
    pictures = read_frames(recording / "clip.gif")[start : start + prompt]
    with diagd.load(workplace.bundle) as session:
        session.start(PixelCodec(bundle, CpuOptions()).encode(pictures), lines[start : start + prompt])
        frames = list(session.frames(actions=lines[start + prompt :]))
    assert len(frames) == len(made) == 7 + shift - start - prompt
    np.testing.assert_array_equal(made, [frame.tokens for frame in frames])


def test_no_ops_in_a_prompt_are_told(workplace: Workplace, recording: Path, tmp_path: Path) -> None:
    words = [
        "generate",
        str(workplace.bundle),
        "--prompt",
        str(recording / "clip.gif"),
        "--set",
        "prompt_frames=2",
    ]
    words += ["--actions", str(workplace.actions), "--output", str(tmp_path / "a.npy")]
    done = subprocess.run([sys.executable, "-m", "diagd", *words], capture_output=True, text=True, check=True)
    assert "between the 2 frames of the prompt: no-ops are fed" in done.stderr


def test_branches_are_runs_of_seeds_in_order(workplace: Workplace, tmp_path: Path) -> None:
    options = ("--prompt", str(workplace.prompt), "--actions", str(workplace.actions))
    output = tmp_path / "walk.npy"
    assert (
        main(["generate", str(workplace.bundle), *options, "--branches", "3", "--output", str(output)]) == 0
    )
    assert {path.name for path in tmp_path.iterdir()} == {"walk-0.npy", "walk-1.npy", "walk-2.npy"}
    for seed in range(3):
        alone = tokens_of(workplace, tmp_path / "alone.npy", *options, "--set", f"seed={seed}")
        np.testing.assert_array_equal(np.load(tmp_path / f"walk-{seed}.npy"), alone)


def test_no_future_takes_the_place_of_a_file_of_another_kind(
    workplace: Workplace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "walk-1.npy").write_text("mine")
    options = ["--prompt", str(workplace.prompt), "--actions", str(workplace.actions), "--branches", "2"]
    assert main(["generate", str(workplace.bundle), *options, "--output", str(tmp_path / "walk.npy")]) == 2
    assert "walk-1.npy: what is there is no such file" in capsys.readouterr().err
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"walk-1.npy": "mine"}


def test_clips_of_one_name_are_told_apart_by_the_user(
    workplace: Workplace, recording: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clips = tmp_path / "clips"
    clips.mkdir()
    for suffix in (".mov", ".mp4"):
        shutil.copy(recording / "clip.gif", clips / f"a{suffix}")
    command = ["generate", str(workplace.bundle), "--prompt", str(clips), "--actions", str(workplace.actions)]
    assert main([*command, "--output", str(tmp_path / "made")]) == 2
    assert "a.mp4 and another clip would both be" in capsys.readouterr().err
    assert not (tmp_path / "made").exists()


def test_a_folder_of_clips_is_made_over_one_session(
    workplace: Workplace, recording: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clips, made = tmp_path / "clips", tmp_path / "made"
    clips.mkdir()
    for name in ("a", "b"):
        shutil.copy(recording / "clip.gif", clips / f"{name}.mp4")  # FFmpeg looks at the content
        shutil.copy(recording / "clip.jsonl", clips / f"{name}.jsonl")
    command = ["generate", str(workplace.bundle), "--prompt", str(clips), "--output", str(made)]
    command += ["--set", "kind=.npy"]
    assert main(command) == 0
    assert sorted(path.name for path in made.iterdir()) == ["a.npy", "b.npy"]
    before = (made / "a.npy").stat().st_mtime_ns
    (made / "b.npy").unlink()
    capsys.readouterr()
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert f"there already: {made / 'a.npy'}" in shown
    assert "passes of" in shown
    assert (made / "a.npy").stat().st_mtime_ns == before
    np.testing.assert_array_equal(np.load(made / "a.npy"), np.load(made / "b.npy"))


def test_a_list_of_clips(workplace: Workplace, recording: Path, tmp_path: Path) -> None:
    listing = recording / "list.jsonl"
    listing.write_text(
        '{"visual_input": "clip.gif"}\n\n{"visual_input": "clip.gif", "actions": "clip.jsonl"}\n'
    )
    command = [
        "generate",
        str(workplace.bundle),
        "--prompt",
        str(listing),
        "--output",
        str(tmp_path / "made"),
    ]
    assert main([*command, "--set", "kind=.npy", "--frames", "2"]) == 0
    found = sorted((tmp_path / "made").iterdir())
    assert [path.name for path in found] == ["0001-clip.npy", "0003-clip.npy"]
    np.testing.assert_array_equal(*map(np.load, found))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "lists no clip"),
        ("[]", "line 1: expected"),
        ('{"prompt": "a"}', "line 1: expected"),
        ('{"visual_input": "a.mp4", "actions": 5}', "line 1: expected"),
        ('{"visual_input": "a.mp4", "prompt": 5}', "line 1: expected"),
        ('{"visual_input": "a\\u0000.mp4"}', "line 1: expected"),
    ],
)
def test_lists_that_are_none(
    workplace: Workplace, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, message: str
) -> None:
    listing = tmp_path / "list.jsonl"
    listing.write_text(content)
    command = [
        "generate",
        str(workplace.bundle),
        "--prompt",
        str(listing),
        "--output",
        str(tmp_path / "made"),
    ]
    assert main(command) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "made").exists()


def test_many_clips_go_to_a_folder(
    workplace: Workplace, recording: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    listing = recording / "one.jsonl"
    listing.write_text('{"visual_input": "clip.gif"}\n')
    command = ["generate", str(workplace.bundle), "--prompt", str(listing)]
    assert main([*command, "--output", str(tmp_path / "a.mp4")]) == 2
    assert "1 clips go to a folder" in capsys.readouterr().err
