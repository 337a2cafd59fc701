"""Every verb that writes refuses, before any work, to take away what is not its own."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from diagd.bundle import Bundle, read_manifest
from diagd.cli.main import main
from tests.cli.conftest import Workplace

WRITERS = {
    "export": "export --model world --checkpoint {world} --output {target}",
    "dry run": "export --model world --checkpoint {world} --dry-run --output {target}",
    "align bundle": "align {bundle} --data {folder} --output {target}",
    "align world": "align {world} --data {folder} --output {target}",
    "profile": "profile {bundle} --output {target}",
    "web": "web {bundle} --output {target}",
    "eval": "eval {world} --data {folder} --output {target}",
    "collect": "world collect {target}",
    "import": "world import {target} --videos {folder} --actions noop,left --size 36x48",
    "train": "world train {target} --data {folder}",
}
FILES = {
    "generate": "generate {bundle} --prompt {prompt} --actions {actions} --output {target}",
    "trace": "profile {bundle} --output {folder}/p --trace {target}",
    "align": "align {world} --data {folder} --output {target}",
}
BESIDE = {
    "report": "prefer {bundle} --data {folder} --output {folder}/none.diagd --report {target}",
    "training": "align {bundle} --data {folder} --output {folder}/none.diagd --set resume={target}",
    "trainings": "prefer {bundle} --data {folder} --output {folder}/none.diagd --set resume={folder}/kept",
}
"""Files that a verb writes beside its result."""
SUFFIXES = {
    "generate": ".npy",
    "trace": ".json",
    "align": ".safetensors",
    "report": ".json",
    "training": "",
    "trainings": ".winners",
}
ALIKE = {
    "align": "align {bundle} --data {folder} --output {target} --set resume={target}",
    "prefer": "prefer {bundle} --data {folder} --output {target} --report {target}",
    "play": "play {bundle} --record {target} --video {target} --terminal",
    "profile": "profile {bundle} --output {folder} --trace {folder}/report.json",
}
"""Two results of one name."""


def command(workplace: Workplace, line: str, target: Path | str) -> list[str]:
    return [word.format(**vars(workplace), target=target) for word in line.split()]


@pytest.mark.parametrize("line", WRITERS.values(), ids=WRITERS)
def test_a_folder_of_the_user_stays(
    workplace: Workplace, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "models"
    target.mkdir()
    (target / "thesis.txt").write_text("ten days of work")
    assert main(command(workplace, line, target)) == 2
    assert "thesis.txt" in capsys.readouterr().err
    assert [file.read_text() for file in target.iterdir()] == ["ten days of work"]
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("line", WRITERS.values(), ids=WRITERS)
def test_a_file_of_the_user_stays(
    workplace: Workplace, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "notes"
    target.write_text("ten days of work")
    assert main(command(workplace, line, target)) == 2
    assert "no directory that can be written to" in capsys.readouterr().err
    assert target.read_text() == "ten days of work"


@pytest.mark.parametrize("verb", [*FILES, *BESIDE])
def test_a_file_of_another_kind_stays(
    workplace: Workplace, verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / f"kept{SUFFIXES[verb]}"
    target.write_text("ten days of work")
    place = workplace if verb in FILES else replace(workplace, folder=tmp_path)
    assert main(command(place, (FILES | BESIDE)[verb], target)) == 2
    assert "not replaced" in capsys.readouterr().err
    assert target.read_text() == "ten days of work"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("line", ALIKE.values(), ids=ALIKE)
def test_two_results_need_two_names(
    workplace: Workplace, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place, target = replace(workplace, folder=tmp_path / "folder"), tmp_path / "both"
    target = target.with_suffix({"prefer": ".json", "play": ".mp4"}.get(line.split()[0], ""))
    assert main(command(place, line, target)) == 2
    assert re.search("is what .* writes; give another name", capsys.readouterr().err)
    assert not target.exists()


@pytest.mark.parametrize("line", [*WRITERS.values(), *FILES.values()], ids=[*WRITERS, *FILES])
def test_the_folder_one_works_in_is_refused_with_the_reason(
    workplace: Workplace, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(workplace, line, ".")) == 2
    assert "empty or '.'" in capsys.readouterr().err


@pytest.mark.parametrize("line", [*WRITERS.values(), *FILES.values()], ids=[*WRITERS, *FILES])
def test_an_empty_path_is_refused_by_the_name_of_its_option(
    workplace: Workplace, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(workplace, line, "")) == 2
    assert re.match(r"error: (--\w+|[A-Z]+) : the path is empty", capsys.readouterr().err)


@pytest.mark.parametrize(
    "arguments",
    [["--checkpoint", ""], ["--checkpoint", "{world}", "--set", "tokenizer="]],
    ids=["checkpoint", "tokenizer"],
)
def test_an_empty_variable_is_no_checkpoint(
    workplace: Workplace, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word.format(world=workplace.world) for word in arguments]
    assert main(["export", "--model", "world", *words, "--dry-run"]) == 2
    assert "is empty" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["calibrate", "build"])
def test_a_bundle_is_not_changed_from_inside(
    workplace: Workplace, verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workplace.bundle)
    options = ["--precision", "int8-weight"] if verb == "calibrate" else []
    assert main([verb, ".", *options]) == 2
    assert "the folder one works in" in capsys.readouterr().err
    assert main([verb, str(workplace.world), *options]) == 2
    assert "is no bundle: it has no manifest.json" in capsys.readouterr().err  # not: remove it yourself


def test_what_is_read_is_not_written_over(
    workplace: Workplace, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    weights = tmp_path / "link"
    weights.symlink_to(workplace.world)
    assert main(["align", str(workplace.world), "--data", str(tmp_path), "--output", str(weights)]) == 2
    assert "is what is read" in capsys.readouterr().err


def test_an_export_over_a_bundle_keeps_the_files_of_the_user(workplace: Workplace, tmp_path: Path) -> None:
    bundle, link = tmp_path / "real.diagd", tmp_path / "link.diagd"
    shutil.copytree(workplace.bundle, bundle)
    (bundle / "NOTES.txt").write_text("measured on the train")
    link.symlink_to("real.diagd")
    before = read_manifest(bundle).files
    command = ["export", "--model", "world", "--checkpoint", str(workplace.world), "--form", "portable"]
    assert main([*command, "--output", str(link)]) == 0
    assert link.is_symlink()
    assert (bundle / "NOTES.txt").read_text() == "measured on the train"
    after = Bundle.open(bundle).manifest.files
    assert set(before) - set(after) == {"step.onnx"}
    assert not (bundle / "step.onnx").exists()
    assert {file.name for file in tmp_path.iterdir()} == {"real.diagd", "link.diagd"}


def test_two_calibrations_of_one_bundle_take_turns(workplace: Workplace, tmp_path: Path) -> None:
    bundle, link = tmp_path / "real.diagd", tmp_path / "link.diagd"
    shutil.copytree(workplace.bundle, bundle)
    (bundle / "NOTES.txt").write_text("measured on the train")
    link.symlink_to("real.diagd")
    options = ["--budget", "none", "--data", str(workplace.prompt), "--set", "steps=64"]
    runs = [
        subprocess.Popen(
            [sys.executable, "-m", "diagd", "calibrate", str(path), "--precision", precision, *options],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for path, precision in ((bundle, "int8-weight"), (link, "int4-weight"))
    ]
    said = [run.communicate()[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], said
    assert {graph.precision for graph in Bundle.open(bundle).manifest.graphs} == {
        "fp32",
        "int8-weight",
        "int4-weight",
    }
    assert (bundle / "NOTES.txt").read_text() == "measured on the train"
    assert link.is_symlink()
    assert {file.name for file in tmp_path.iterdir()} == {"real.diagd", "link.diagd"}
