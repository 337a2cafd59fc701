"""Signals that end a process end a verb as Ctrl-C does: nothing half done stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diagd.bundle import read_manifest
from diagd.cli.main import main
from tests.cli.conftest import Workplace
from tests.test_system import BARE

STOPPED = """
import os, signal, sys
from diagd.cli.main import main
from diagd.runtime.session import Session
step = Session._run_block
def stop(self, *block):
    yield from step(self, *block)
    os.kill(os.getpid(), getattr(signal, sys.argv[1]))
Session._run_block = stop
sys.exit(main(sys.argv[2:]))
"""

SHOWN = """
import sys
from diagd.cli.main import main
sys.exit(main(sys.argv[1:]) or main(["inspect", sys.argv[2]]))
"""
"""diagd, which then shows the bundle."""

HURRIED = """
import os, signal, sys
class Finder:
    def find_spec(name, *where):
        if name == sys.argv[1]:
            try:
                os.kill(os.getpid(), signal.SIGINT)
            except KeyboardInterrupt as error:
                if sys.argv[2:]:
                    raise ImportError("initialization failed") from error
                raise
sys.meta_path.insert(0, Finder)
from diagd.cli.main import main
sys.exit(main(["models"]))
"""
"""diagd where Ctrl-C comes when a module is imported; a further word: one of C++, which calls it an error."""


def stop(workplace: Workplace, name: str, output: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    words = ["generate", workplace.bundle, "--prompt", workplace.prompt, "--actions", workplace.actions]
    command = [sys.executable, "-c", STOPPED, name, *map(str, words), "--output", str(output)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
@pytest.mark.parametrize("output", ["a.npy", "a.mp4"])
def test_a_signal_leaves_nothing_behind(workplace: Workplace, name: str, output: str, tmp_path: Path) -> None:
    done = stop(workplace, name, tmp_path / output)
    assert (done.returncode, done.stderr) == (128 + getattr(signal, name), "interrupted\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", ["diagd.cli.verbs", "diagd.cli.models", "diagd.export.families c++"])
def test_a_verb_is_interrupted_from_its_first_moment(words: str) -> None:
    command = [sys.executable, "-c", HURRIED, *words.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (128 + signal.SIGINT, "", "interrupted\n")


def test_a_verb_that_outlives_its_terminal_goes_on(workplace: Workplace, tmp_path: Path) -> None:
    """As nohup starts it."""
    done = stop(
        workplace,
        "SIGHUP",
        tmp_path / "a.npy",
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a.npy").exists()


@pytest.mark.parametrize(
    "surroundings",
    [
        {"TERM": "dumb"},
        {"TERM": "", "COLUMNS": "1"},
        {"COLUMNS": "x", "LINES": "-1"},
        {"NO_COLOR": "1", "FORCE_COLOR": "1"},
        {"TMPDIR": "/nonexistent", "HOME": "relative", "XDG_CACHE_HOME": ""},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"PYTHONIOENCODING": "utf-16"},
        {"LANG": "tlh_QO.UTF-8", "LC_ALL": "nonsense"},
    ],
    ids="-".join,
)
def test_any_surroundings_will_do(workplace: Workplace, surroundings: dict[str, str], tmp_path: Path) -> None:
    words = ["generate", workplace.bundle, "--prompt", workplace.prompt, "--actions", workplace.actions]
    output = tmp_path / os.fsdecode("modèle é.npy".encode())
    command = [sys.executable, "-c", SHOWN, *map(str, words), "--output", str(output)]
    environment = {name: value for name, value in os.environ.items() if name != "DIAGD_CACHE"}
    done = subprocess.run(command, capture_output=True, check=False, env=environment | surroundings)
    assert done.returncode == 0, done.stderr
    assert output.exists()


def test_verbs_have_no_option_that_pydantic_will_refuse() -> None:
    code = """
import importlib, pkgutil, diagd.cli
for module in pkgutil.iter_modules(diagd.cli.__path__, "diagd.cli."):
    importlib.import_module(module.name)
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_figures_do_not_tell_where_their_fonts_are_kept() -> None:
    code = "from diagd.cli.main import main; main(['models']); import matplotlib; matplotlib.get_cachedir()"
    environment = os.environ | {"MPLCONFIGDIR": "/proc/none"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, env=environment)
    assert (done.returncode, done.stderr) == (0, b"")


def test_frames_are_generated_without_the_calls_of_linux(workplace: Workplace, tmp_path: Path) -> None:
    words = ["generate", workplace.bundle, "--prompt", workplace.prompt, "--actions", workplace.actions]
    command = [sys.executable, "-c", BARE, *map(str, words), "--output", str(tmp_path / "a.mp4")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a.mp4").exists()


@pytest.mark.parametrize("option", ["--prompt", "--actions"])
def test_what_is_read_is_not_written_over(
    workplace: Workplace, option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Under any of its names, though it is of the kind that is written."""
    tokens, other = tmp_path / "a.npy", tmp_path / "b.npy"
    layout = read_manifest(workplace.bundle).layout
    np.save(tokens, np.zeros((1, layout.rows, layout.columns), np.int32))
    before = tokens.read_bytes()
    other.symlink_to(tokens)
    given = {"--prompt": workplace.prompt, "--actions": workplace.actions} | {option: tokens}
    words = [str(word) for pair in given.items() for word in pair]
    for output in (tokens, other):
        assert main(["generate", str(workplace.bundle), *words, "--output", str(output)]) == 2
        assert f"is what {option} reads" in capsys.readouterr().err
    assert tokens.read_bytes() == before
