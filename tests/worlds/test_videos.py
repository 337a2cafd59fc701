"""Folders of small real videos against each other, and networks made for what is known of them."""

from __future__ import annotations

import csv
import json
import multiprocessing
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from diagd.cli.main import main
from diagd.cluster import ClusterOptions
from diagd.errors import UsageError
from diagd.runtime.video import VideoWriter
from worlds.inverse_dynamics import BUTTONS
from worlds.metrics import psnr, ssim
from worlds.options import FolderOptions
from worlds.videos import compare_folders, read_video, videos_in

HEIGHT, WIDTH, LENGTH, VIDEOS = 20, 24, 7, 3
RANDOM = np.random.default_rng(0)


def silent(name: str) -> None:
    del name


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Videos as .gif, and their recordings as episodes that begin three pictures before them."""
    made, truth = tmp_path / "made", tmp_path / "truth"
    for folder in (made, truth):
        folder.mkdir()
    for n in range(VIDEOS):
        clip = RANDOM.integers(0, 6, (3 + LENGTH, HEIGHT, WIDTH, 1)).repeat(3, axis=3).astype(np.uint8) * 40
        np.savez(truth / f"clip{n}.npz", images=np.moveaxis(clip, -1, 1), actions=np.zeros((3 + LENGTH, 16)))
        with VideoWriter(made / f"clip{n}.gif", 10, (HEIGHT, WIDTH)) as video:
            video.write(np.roll(clip[3:], 1, axis=2))
    (truth / "other.npz").write_bytes((truth / "clip0.npz").read_bytes())
    return made, truth


def network(path: Path, inputs: dict[str, list[str | int]], axes: list[int]) -> Path:
    """Means of pictures, or of the distance of two."""
    first = "x" if len(inputs) == 1 else "e"
    nodes = [helper.make_node("ReduceMean", [first], ["out"], axes=axes, keepdims=0)]
    if len(inputs) == 2:
        nodes = [helper.make_node("Sub", list(inputs), ["d"]), helper.make_node("Abs", ["d"], ["e"]), *nodes]
    return save(path, nodes, inputs, {"out": 1 if len(inputs) == 2 else 2})


def save(
    path: Path, nodes: list[onnx.NodeProto], inputs: dict[str, list[str | int]], outputs: dict[str, int]
) -> Path:
    given = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()]
    made = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * rank)
        for name, rank in outputs.items()
    ]
    graph = helper.make_graph(nodes, "network", given, made)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), path)
    return path


def test_each_video_is_judged_by_the_recording_of_its_name(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    made, truth = folders
    pair = network(tmp_path / "pair.onnx", {"a": ["n", 3, "h", "w"], "b": ["n", 3, "h", "w"]}, [1, 2, 3])
    figures = compare_folders(made, truth, FolderOptions(truth_skip=3), [pair], silent)
    seen = np.stack([read_video(made / f"clip{n}.gif", None, False) for n in range(VIDEOS)])
    true = np.stack([read_video(truth / f"clip{n}.npz", None, False)[3:] for n in range(VIDEOS)])
    assert figures["psnr"].count == VIDEOS
    assert figures["psnr"].mean == pytest.approx(psnr(seen, true).mean())
    assert figures["ssim"].mean == pytest.approx(ssim(seen, true).mean())
    assert figures["pair"].mean == pytest.approx(np.abs(seen / 255 - true / 255).mean(), rel=1e-4)
    assert compare_folders(made, truth, FolderOptions(videos=1), [], silent)["psnr"].count == 1


def test_sets_of_clips_are_compared_by_their_features(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """A network of clips needs more clips than features; means of a grey clip are one."""
    made, truth = folders
    clips = network(tmp_path / "fvd.onnx", {"x": ["n", 3, "t", "h", "w"]}, [1, 2, 3, 4])
    onnx_model = onnx.load(clips)
    onnx_model.graph.node[0].attribute[1].i = 1  # keeps the axes: [n, 1, 1, 1, 1]
    onnx.save(onnx_model, clips)
    same = compare_folders(truth, truth, FolderOptions(), [clips], silent)
    other = compare_folders(made, truth, FolderOptions(truth_skip=3), [clips], silent)
    assert same["fvd frechet"].mean == pytest.approx(0, abs=1e-9)
    means = [
        np.array(
            [read_video(path, None, False)[-LENGTH:].mean() / 255 for path in sorted(folder.glob("clip*"))]
        )
        for folder in folders
    ]
    spread = [values.std(ddof=1) for values in means]
    expected = (means[0].mean() - means[1].mean()) ** 2 + (spread[0] - spread[1]) ** 2
    assert other["fvd frechet"].mean == pytest.approx(expected, abs=1e-8)


def test_folders_without_a_common_name_are_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    with pytest.raises(UsageError, match=r"no video of .* \(3\) has the name of one of .* \(0\)"):
        compare_folders(folders[0], tmp_path / "none", FolderOptions(), [], silent)
    with pytest.raises(UsageError, match="too short"):
        compare_folders(*folders, FolderOptions(skip=7), [], silent)


def test_any_number_of_workers_finds_the_same(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """To the bit, though one is killed when the first has been judged."""
    pair = network(tmp_path / "pair.onnx", {"a": ["n", 3, "h", "w"], "b": ["n", 3, "h", "w"]}, [1, 2, 3])
    killed: list[str] = []

    def kill(name: str) -> None:
        if not killed:
            multiprocessing.active_children()[0].kill()
        killed.append(name)

    given = *folders, FolderOptions(truth_skip=3), [pair]
    one = compare_folders(*given, silent, ClusterOptions(workers=1), 1)
    assert compare_folders(*given, kill, ClusterOptions(workers=2), 1) == one
    assert sorted(killed) == [f"clip{n}" for n in range(VIDEOS)]


def inverse_network(path: Path) -> Path:
    """Reads buttons off the first row of a picture, and degrees off the second one: (x - 1/2) 40."""
    constants = [
        helper.make_tensor(name, TensorProto.INT64, [len(values)], values)
        for name, values in (
            ("starts", [0, 0]),
            ("ends", [1, 20]),
            ("axes", [2, 3]),
            ("second", [1, 0]),
            ("second_end", [2, 2]),
            ("channel", [4]),
            ("zero", [0]),
            ("one", [1]),
            ("squeezed", [2, 4]),
        )
    ]
    numbers = [helper.make_tensor(n, TensorProto.FLOAT, [], [v]) for n, v in (("half", 0.5), ("forty", 40.0))]
    nodes = [
        *(helper.make_node("Constant", [], [tensor.name], value=tensor) for tensor in [*constants, *numbers]),
        helper.make_node("Slice", ["x", "zero", "one", "channel"], ["grey"]),
        helper.make_node("Slice", ["grey", "starts", "ends", "axes"], ["first"]),
        helper.make_node("Squeeze", ["first", "squeezed"], ["buttons"]),
        helper.make_node("Slice", ["grey", "second", "second_end", "axes"], ["row"]),
        helper.make_node("Squeeze", ["row", "squeezed"], ["level"]),
        helper.make_node("Sub", ["level", "half"], ["centred"]),
        helper.make_node("Mul", ["centred", "forty"], ["camera"]),
    ]
    return save(path, nodes, {"x": [1, "t", HEIGHT, WIDTH, 3]}, {"buttons": 3, "camera": 3})


@pytest.mark.parametrize(("lines", "shift"), [("followed", 0), ("led", 1)])
def test_actions_are_read_off_videos(
    tmp_path: Path, lines: str, shift: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through the command line: seen are the actions of the lines, every other attack apart."""
    from sklearn.metrics import f1_score

    made, truth = tmp_path / "made", tmp_path / "truth"
    for folder in (made, truth):
        folder.mkdir()
    pressed, count = RANDOM.integers(0, 2, (30, len(BUTTONS))), 30
    pressed[:, [0, 8]] = np.array([(1, 0), (0, 1), (0, 0)])[np.arange(30) % 3]  # attack or use
    pressed[:, [3, 7]] = 0  # jump and sprint would release sneak
    camera = RANDOM.integers(0, 2, 30) * 40 - 20
    records = [
        {name: int(value) for name, value in zip(BUTTONS, row, strict=True)} | {"camera": [int(turn), 0]}
        for row, turn in zip(pressed, camera, strict=True)
    ]
    rest: dict[str, object] = {}
    (truth / "a.jsonl").write_text("\n".join(map(json.dumps, [*[rest] * shift, *records])))
    seen = pressed.copy()
    seen[::6, 0] = 0
    pictures = np.zeros((count, HEIGHT, WIDTH, 3), np.uint8)
    pictures[:, 0, :20] = seen[:, :, None] * 255
    pictures[:, 1, 0] = (camera[:, None] / 40 + 0.5) * 255
    pictures[:, 1, 1] = 128
    for folder in (made, truth):
        np.savez(folder / "a.npz", images=np.moveaxis(pictures, -1, 1))
    file, out = inverse_network(tmp_path / "idm.onnx"), tmp_path / "out"
    command = ["eval", str(made), "--data", str(truth), "--output", str(out), "--set", f"dynamics={file}"]
    assert main([*command, "--set", f"lines={lines}"]) == 0
    capsys.readouterr()
    figures = json.loads((out / "eval.json").read_text())["figures"]
    with (out / "eval.csv").open() as table:
        rows = {row["figure"]: row for row in csv.DictReader(table)}
    assert rows.keys() == figures.keys()
    for name in ("forward/back", "left/right", "sneak/sprint", "use", "jump", "drop", "camera"):
        assert figures[f"{name} macro F1"]["mean"] == 1, name
        assert figures[f"{name} macro F1"]["count"] == (58 if name == "camera" else 29)
    for average in ("micro", "macro"):
        expected = f1_score(pressed[:-1, 0], seen[:-1, 0], average=average)
        assert figures[f"attack {average} F1"]["mean"] == pytest.approx(expected)
        assert float(rows[f"attack {average} F1"]["mean"]) == pytest.approx(expected)


def test_what_is_no_video_of_a_folder_is_left_out(tmp_path: Path) -> None:
    for name in ("a.mp4", "B.GIF", "._a.mp4", "notes.txt"):
        (tmp_path / name).touch()
    (tmp_path / "more.mp4").mkdir()
    assert videos_in(tmp_path) == {"B": tmp_path / "B.GIF", "a": tmp_path / "a.mp4"}
