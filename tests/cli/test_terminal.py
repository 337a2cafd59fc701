"""What a verb says is shown as it is, wherever it goes, and never decides what the verb does."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.table import Table

from diagd.bundle.manifest import MANIFEST_NAME
from diagd.cli import terminal
from diagd.cli.main import main
from tests.cli.conftest import Workplace

DIAGD = [sys.executable, "-m", "diagd"]


def run(
    *words: str | Path, encoding: str = "utf-8", program: Sequence[str] = DIAGD, **options: Any
) -> subprocess.CompletedProcess[bytes]:
    environment = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONPATH": str(Path(__file__).parents[2])}
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.run([*program, *map(str, words)], check=False, env=environment, **streams)


def generate(workplace: Workplace, output: str) -> list[str | Path]:
    files = ("--prompt", workplace.prompt, "--actions", workplace.actions, "--output", output)
    return ["generate", workplace.bundle, "--frames", "1", *files]


@pytest.mark.parametrize("name", ["walk[final].npy", "a[/b].npy", "[red]x.npy", ":smile:.npy", "{0}.npy"])
def test_brackets_in_paths_are_text(
    workplace: Workplace,
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    if "/" in name:
        (tmp_path / "a[").mkdir()
    assert main([*map(str, generate(workplace, name))]) == 0
    assert name in capsys.readouterr().out


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "ascii", "utf-8"])
def test_any_encoding_will_do(workplace: Workplace, encoding: str, tmp_path: Path) -> None:
    bundle, source = tmp_path / "b.diagd", "/data/" + "long/" * 60 + "modèle…safetensors"
    shutil.copytree(workplace.bundle, bundle)
    manifest = json.loads((bundle / MANIFEST_NAME).read_text())
    manifest["licence"] = source
    (bundle / MANIFEST_NAME).write_text(json.dumps(manifest))
    words = [["inspect", str(bundle)], ["doctor"], ["models"]]
    each = f"[main(verb) for verb in {words}] != [0, 0, 0]"
    code = f"import sys; from diagd.cli.main import main; sys.exit({each})"
    done = run("-c", code, encoding=encoding, program=[sys.executable])
    assert done.returncode == 0, done.stderr
    if encoding == "utf-8":
        assert source in done.stdout.decode()
    if encoding == "latin-1":
        assert source.replace("…", "...") in done.stdout.decode("latin-1")


def test_terminals_do_not_obey_bundles_and_names(
    workplace: Workplace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, said = tmp_path / "b.diagd", "free\x1b[2J\x9b2J\x1b]0;title[red]"
    shutil.copytree(workplace.bundle, bundle)
    manifest = json.loads((bundle / MANIFEST_NAME).read_text())
    (bundle / MANIFEST_NAME).write_text(json.dumps(manifest | {"licence": said}))
    assert main(["inspect", str(bundle)]) == 0
    assert r"free\x1b[2J\x9b2J\x1b]0;title[red]" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / said)]) == 2
    assert r"free\x1b[2J" in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["latin-1", "utf-8"])
def test_an_export_on_a_terminal_of_any_encoding(workplace: Workplace, encoding: str, tmp_path: Path) -> None:
    keeper, terminal = pty.openpty()
    words = ("export", "--model", "world", "--checkpoint", workplace.world, "--output", tmp_path / "a.diagd")
    reader = threading.Thread(target=_read_all, args=(keeper,))
    reader.start()
    done = run(*words, encoding=encoding, stdout=terminal, stderr=terminal)
    os.close(terminal)
    reader.join()
    os.close(keeper)
    assert done.returncode == 0
    assert (tmp_path / "a.diagd" / MANIFEST_NAME).exists()


def _read_all(terminal: int) -> None:
    """Until the other end is closed, which is an error."""
    with contextlib.suppress(OSError):
        while os.read(terminal, 4096):
            pass


def test_a_path_of_undecodable_bytes_is_printed_as_it_is(workplace: Workplace, tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.npy")
    done = run(*generate(workplace, name), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert b"caf\xe9.npy" in done.stdout


def test_nothing_is_cut_or_broken_behind_a_pipe(workplace: Workplace, tmp_path: Path) -> None:
    bundle = tmp_path / ("x" * 200) / "b.diagd"
    shutil.copytree(workplace.bundle, bundle)
    for verb in ("inspect", "doctor"):
        assert str(bundle) in run(verb, bundle).stdout.decode(), verb
    output = tmp_path / ("y" * 150 + ".npy")
    assert str(output) in run(*generate(workplace, str(output))).stdout.decode()


def test_every_table_stands_below_its_title(capsys: pytest.CaptureFixture[str]) -> None:
    first, second = (Table(name, title=f"the {name}") for name in ("first", "second"))
    terminal.console().print(first, second)
    assert re.findall("first|second", capsys.readouterr().out) == ["first", "first", "second", "second"]


@pytest.mark.parametrize("verb", ["inspect", "generate", "help"])
def test_a_reader_that_goes_away_ends_nothing(workplace: Workplace, verb: str, tmp_path: Path) -> None:
    words: dict[str, list[str | Path]] = {
        "inspect": ["inspect", workplace.bundle, "--json"],
        "generate": generate(workplace, str(tmp_path / "a.npy")),
        "help": ["--help"],
    }
    reader, writer = os.pipe()
    os.close(reader)
    done = run(*words[verb], stdout=writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")
    assert verb != "generate" or (tmp_path / "a.npy").exists()


def test_a_full_stdout_is_named(workplace: Workplace, tmp_path: Path) -> None:
    with Path("/dev/full").open("wb") as full:
        done = run(*generate(workplace, str(tmp_path / "a.npy")), stdout=full)
        assert done.returncode == 0
        assert b"stdout: No space left on device" in done.stderr
        assert (tmp_path / "a.npy").exists()
        listed = run("inspect", workplace.bundle, "--json", stdout=full)
        assert listed.returncode == 2
        assert b"stdout: No space left on device" in listed.stderr


@pytest.mark.skipif(not hasattr(fcntl, "F_SETPIPE_SZ"), reason="needs pipes of a page")
def test_a_pipe_that_does_not_block_gets_all(workplace: Workplace) -> None:
    """As event loops make them; one write fills this one."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    command = [*DIAGD, "inspect", str(workplace.bundle), "--json"]
    with subprocess.Popen(command, stdout=writer, stderr=subprocess.PIPE) as process:
        os.close(writer)
        assert process.stderr is not None
        assert select.select([reader], [], [], 300)[0]
        time.sleep(0.2)
        with os.fdopen(reader, "rb") as file:
            shown = file.read()
        assert (process.stderr.read(), process.wait()) == (b"", 0)
    assert len(shown) > 4096
    json.loads(shown)


@pytest.mark.parametrize(
    ("lacks", "code", "said"),
    [
        ("del os.set_blocking", 0, "crafter-3m"),  # as Windows does with Python 3.11
        (
            'def start(*given): raise RuntimeError("can\'t start new thread")\nThread.start = start',
            2,
            "ulimit",
        ),
    ],
)
def test_what_a_system_lacks_is_no_internal_error(
    lacks: str, code: int, said: str, workplace: Workplace
) -> None:
    verb = ["models"] if code == 0 else ["play", str(workplace.bundle)]
    begin = f"import os, sys\nfrom threading import Thread\n{lacks}\n"
    text = f"{begin}from diagd.cli.main import main\nsys.exit(main({verb}))"
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert said in done.stdout + done.stderr


def test_closed_streams_are_no_matter(workplace: Workplace, tmp_path: Path) -> None:
    words = " ".join(map(str, [*DIAGD, *generate(workplace, str(tmp_path / "a.npy"))]))
    assert subprocess.run(f"{words} >&- 2>&-", shell=True, check=False).returncode == 0
    assert (tmp_path / "a.npy").exists()
