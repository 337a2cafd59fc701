"""What is handed on carries names and digests, never where, by whom and on which machine it was made."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

import diagd
from diagd.bundle.files import host
from diagd.export.known_graphs import KIND
from diagd.runtime.video import VideoWriter
from diagd.tuning.recordings import Episode
from tests.worlds import ACTIONS, random_world
from worlds.recordings import check_recipe, save_episode, shard_path

USER, MACHINE = "zaphod-the-user", "zaphods-machine"

LINES = """
export --model world --checkpoint trained --output made/world.diagd --form prefix,modern
calibrate made/world.diagd --precision int8-weight --budget none --data prompt.gif --set steps=64
profile made/world.diagd --frames 2 --k 1 --output made/report --trace made/trace.json
generate made/world.diagd --prompt prompt.gif --actions walk.jsonl --output made/walk.mp4
generate made/world.diagd --prompt prompt.gif --actions walk.jsonl --output made/walk.gif
generate made/world.diagd --prompt prompt.gif --actions walk.jsonl --output made/walk.npy
align made/world.diagd --data recorded --output made/aligned.diagd --batch 2 --set steps=2 --set frames=2
align trained --data recorded --output made/aligned --batch 2 --set steps=2 --set frames=2
world import made/imported --videos clips --actions noop,left --size 24x32
world train made/new --data recorded --size 0.3m --steps 1 --batch 2 --set processes=1
eval made/new --data recorded --output made/eval --set rollouts=2 --set windows=2 --set frames=1
"""
"""Every verb that writes; names become paths from the root."""

MAKE = """
import sys
from pathlib import Path
from diagd.bundle.files import host
from diagd.cli.main import main

here = Path(sys.argv[1])
(here / "host").write_text(host())
(here / "made").mkdir()
for line in sys.stdin:
    words = [str(here / word) if (here / word.partition("/")[0]).exists() else word for word in line.split()]
    if words and main(words):
        sys.exit(f"failed: {line}")
"""


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what every verb that writes has made of what lies beside it."""
    folder = tmp_path_factory.mktemp("zaphods-place")
    random_world(folder / "trained", rows=6, columns=8)
    noise = np.random.default_rng(0).integers(0, 256, (3, 24, 32, 3), dtype=np.uint8)
    (folder / "clips").mkdir()
    for path in (folder / "prompt.gif", folder / "clips" / "run.gif"):
        with VideoWriter(path, 10, (24, 32)) as video:
            video.write(noise)
    for path in (folder / "walk.jsonl", folder / "clips" / "run.jsonl"):
        path.write_text('{"action": "left", "repeat": 3}\n')
    check_recipe(folder / "recorded", {"actions": list(ACTIONS)})
    for n in range(2):
        frames = np.random.default_rng(n).integers(0, 256, (8, 24, 32, 3), dtype=np.uint8)
        save_episode(shard_path(folder / "recorded", n), Episode(frames, np.arange(8, dtype=np.uint8) % 5))
    (folder / "cache").mkdir()
    (folder / "cache" / KIND).symlink_to(Path(os.environ["DIAGD_CACHE"], KIND).resolve())  # traced already
    command = [sys.executable, "-c", MAKE, str(folder)]
    named = [
        "unshare",
        "--user",
        "--map-root-user",
        "--uts",
        "sh",
        "-c",
        f'hostname {MACHINE}; exec "$@"',
        "-",
    ]
    if shutil.which("unshare") and subprocess.run([*named, "true"], check=False).returncode == 0:
        command = [*named, *command]
    local = {
        "USER": USER,
        "LOGNAME": USER,
        "HOME": str(folder / "home"),
        "DIAGD_CACHE": str(folder / "cache"),
    }
    environment = os.environ | local
    done = subprocess.run(command, check=False, capture_output=True, text=True, input=LINES, env=environment)
    assert done.returncode == 0, done.stderr
    return folder


def contents(path: Path) -> list[bytes]:
    """Bytes of a file, and of what it holds where it is an archive."""
    found = [path.read_bytes()]
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            found += [name.encode() + archive.read(name) for name in archive.namelist()]
    return found


def test_nothing_tells_where_it_was_made(here: Path) -> None:
    local = [here.name, USER, MACHINE, (here / "host").read_text(), host(), sys.prefix, "site-packages"]
    local += [str(Path(diagd.__file__).parent), *(name for name in (platform.node(),) if len(name) > 5)]
    files = sorted(path for path in (here / "made").rglob("*") if path.is_file())
    assert len(files) > 25
    told = {
        (str(path.relative_to(here)), word)
        for path in files
        for content in contents(path)
        for word in local
        if word.encode() in content
    }
    assert not told


def test_the_name_of_what_it_was_made_of_is_told(here: Path) -> None:
    assert b'"source": "model.safetensors"' in (here / "made" / "world.diagd" / "manifest.json").read_bytes()


def test_nothing_is_told_to_the_makers_of_the_runtime(tmp_path: Path) -> None:
    """ONNX Runtime would keep an id of the machine, and events that it sends."""
    code = "import diagd, onnxruntime; from diagd.play.opening import SHIPPED as b; "
    code += "onnxruntime.InferenceSession(str(b / 'decoder.onnx'))"
    homes = {name: str(tmp_path) for name in ("HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME", "TMPDIR")}
    given = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    subprocess.run([sys.executable, "-c", code], check=True, env=given | homes)
    assert list(tmp_path.rglob("*")) == []
