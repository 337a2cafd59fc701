"""The examples in the help of the verbs that report run as they stand."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from diagd.cli.main import main
from diagd.engines.backend import find
from diagd.errors import DiagdError
from tests.cli.conftest import Workplace

VERBS = ("profile", "plan", "inspect", "verify", "doctor")


def examples(verb: str) -> list[str]:
    lines = import_module(f"diagd.cli.{verb}").EXAMPLES.splitlines()
    return [line.strip() for line in lines if line.startswith("  diagd")]


@pytest.fixture(scope="module")
def folder(workplace: Workplace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the examples name, made of one small world."""
    from matplotlib.image import imsave

    folder = tmp_path_factory.mktemp("examples")
    for name in ("crafter-3m", "small-fp32", "mineworld-300m"):
        shutil.copytree(workplace.bundle, folder / f"{name}.diagd")
    source = ("--model", "world", "--checkpoint", str(workplace.world), "--precision", "fp16")
    assert main(["export", *source, "--output", str(folder / "small-fp16.diagd")]) == 0
    for name in ("step.onnx", "weights.bin"):
        shutil.copyfile(workplace.bundle / name, folder / name)
    imsave(folder / "first.png", np.full((36, 48, 3), 90, np.uint8))
    options = ("--frames", "2", "--k", "1", "--output", str(folder / "before"))
    assert main(["profile", str(workplace.bundle), *options]) == 0
    shutil.copytree(folder / "before", folder / "after")
    return folder


def commands() -> Iterator[str]:
    for verb in VERBS:
        found = examples(verb)
        assert found, verb
        yield from found


@pytest.mark.parametrize("command", commands())
def test_an_example_runs(
    command: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("DIAGD_CACHE", str(folder / "cache"))  # which was fastest is not for other tests
    program, *arguments = shlex.split(command)
    words = [*program.split("-")[1:], *arguments]
    code = main(words)
    shown = capsys.readouterr()
    if "tensorrt" in words and not has_gpu():
        assert code == 1
        assert "no CUDA device" in shown.err
        return
    assert code == 0 or (words[0], code) == ("doctor", 1), shown.err
    if "--json" in words:
        json.loads(shown.out)


def has_gpu() -> bool:
    try:
        find("tensorrt").describe()
    except DiagdError:
        return False
    return True
