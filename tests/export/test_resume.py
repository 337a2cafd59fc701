"""An interrupted export goes on where it stopped; a failed one leaves nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diagd.export import weights
from diagd.export.checkpoints import Checkpoint, RandomCheckpoint
from diagd.export.weights import ResumableWeights, WeightSource, export_key

NAMES = [f"tensor {n}" for n in range(6)]
SHAPE = (3, 5)


def random_checkpoint(seed: int = 0) -> Checkpoint:
    return RandomCheckpoint(dict.fromkeys(NAMES, SHAPE), seed=seed)


def placements(checkpoint: Checkpoint) -> dict[str, weights.Placement]:
    return weights.plan({name: (SHAPE, np.dtype(np.float32)) for name in checkpoint})


def write(output: Path, checkpoint: Checkpoint, stop_at: str | None, error: BaseException) -> list[str]:
    """Write a weights file as the exporter does; returns the tensors that were read."""
    places, read = placements(checkpoint), []

    def source(name: str) -> WeightSource:
        def chunks() -> Iterator[Any]:
            if name == stop_at:
                raise error
            read.append(name)
            yield checkpoint[name].read()

        return WeightSource(SHAPE, chunks)

    partial = ResumableWeights(output, export_key(checkpoint, places))
    sources = {name: source(name) for name in places}
    weights.write(partial.path, places, sources, done=partial.done, finished=partial.finished)
    with partial.placed_at(output):
        pass
    partial.discard()
    return read


@pytest.fixture(autouse=True)
def _sync_every_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "SYNC_BYTES", 1)


def test_the_same_export_goes_on(tmp_path: Path) -> None:
    checkpoint, output = random_checkpoint(), tmp_path / "weights.bin"
    with pytest.raises(KeyboardInterrupt):
        write(output, checkpoint, NAMES[4], KeyboardInterrupt())
    assert not output.exists()
    assert write(output, checkpoint, None, KeyboardInterrupt()) == NAMES[4:]
    content = output.read_bytes()
    for name, place in placements(checkpoint).items():
        stored = np.frombuffer(content, np.float32, 15, place.offset).reshape(SHAPE)
        np.testing.assert_array_equal(stored, checkpoint[name].read())
    assert list(tmp_path.iterdir()) == [output]


def test_another_export_starts_anew(tmp_path: Path) -> None:
    output = tmp_path / "weights.bin"
    with pytest.raises(KeyboardInterrupt):
        write(output, random_checkpoint(0), NAMES[4], KeyboardInterrupt())
    assert write(output, random_checkpoint(1), None, KeyboardInterrupt()) == NAMES


def test_a_changed_checkpoint_has_another_key(tmp_path: Path) -> None:
    file = tmp_path / "model.pt"
    file.write_bytes(b"one")
    checkpoint = random_checkpoint()
    checkpoint.source = str(file)
    places = placements(checkpoint)
    before = export_key(checkpoint, places)
    assert export_key(checkpoint, places) == before
    os.utime(file, ns=(1, 1))
    assert export_key(checkpoint, places) != before
    half = {name: replace(place, dtype=np.dtype(np.float16)) for name, place in places.items()}
    assert export_key(checkpoint, half) != export_key(checkpoint, places)


KILLED = """
import os, signal, sys
from pathlib import Path
from diagd.export import weights
from diagd.export.checkpoints import RandomCheckpoint
from diagd.export.exporter import GraphOptions, Sources, export
from tests.models import small_family
from tests.oracles.models import small_model
from diagd.schedule import StreamLayout
weights.SYNC_BYTES = 1
family = small_family(small_model(StreamLayout(3, 4, after=2)))
kill_after, read = int(sys.argv[2]), []
finished = weights.ResumableWeights.finished
def count(self, name, size):
    finished(self, name, size)
    read.append(name)
    if len(read) == kill_after:
        os.kill(os.getpid(), signal.SIGKILL)
weights.ResumableWeights.finished = count
sources = Sources(RandomCheckpoint(family.expected, seed=0))
result = export(family, GraphOptions(), sources, Path(sys.argv[1]))
print(len(read))
"""


def test_a_killed_process_is_no_loss(tmp_path: Path) -> None:
    output = tmp_path / "a.diagd"
    command = [sys.executable, "-c", KILLED, str(output)]
    killed = subprocess.run([*command, "5"], capture_output=True, text=True, check=False)
    assert killed.returncode == -9
    assert not output.exists()
    done = subprocess.run([*command, "0"], capture_output=True, text=True, check=True)
    whole = tmp_path / "b.diagd"
    reference = subprocess.run(
        [sys.executable, "-c", KILLED, str(whole), "0"], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) == int(reference.stdout) - 5
    assert (output / "weights.bin").read_bytes() == (whole / "weights.bin").read_bytes()


INTERRUPTED = """
import sys
from pathlib import Path
import diagd.export.exporter as exporter
from diagd.cli.main import main
def interrupt(*_, **__):
    raise KeyboardInterrupt
step, *words = sys.argv[1:]
if step == "weights":
    write, count = exporter.ResumableWeights.finished, []
    def finished(self, *tensor):
        write(self, *tensor)
        count.append(tensor)
        if len(count) == 5:
            interrupt()
    exporter.ResumableWeights.finished = finished
elif step == "before":
    exporter.Exporter._write_weights = interrupt
elif step:
    setattr(exporter, step, interrupt)
sys.exit(main(words))
"""


@pytest.mark.parametrize("step", ["before", "weights", "trace_step", "seal"])
def test_what_an_interrupted_export_promises_is_kept(step: str, tmp_path: Path) -> None:
    """At any moment: the message says that weights are kept where they are, and else says nothing."""
    words = ["export", "--model", "crafter-3m", "--output", str(tmp_path / "a.diagd")]
    command = [sys.executable, "-c", INTERRUPTED, step, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 130, done.stderr
    kept = sorted(file.name for file in tmp_path.iterdir())
    assert ("goes on where this one stopped" in done.stdout) == (step != "before")
    assert [name for name in kept if name.endswith(".weights.partial")] or step == "before"
    assert not (tmp_path / "a.diagd").exists()
    if step == "seal":
        command[3] = ""
        assert subprocess.run(command, check=False, stdout=subprocess.DEVNULL).returncode == 0
        assert [file.name for file in tmp_path.iterdir()] == ["a.diagd"]


KILLED_LATER = """
import os, signal, sys
from pathlib import Path
import diagd.export.exporter as exporter
from diagd.bundle import files
from diagd.export.checkpoints import RandomCheckpoint
from tests.models import small_family
from tests.oracles.models import small_model
from diagd.schedule import StreamLayout
family, read = small_family(small_model(StreamLayout(3, 4, after=2))), []
finished = exporter.ResumableWeights.finished
def count(self, name, size):
    finished(self, name, size)
    read.append(name)
exporter.ResumableWeights.finished = count
def kill(*_, **__):
    if sys.argv[2] != "in place" or Path(sys.argv[1]).exists():
        os.kill(os.getpid(), signal.SIGKILL)
where = {"tracing": (exporter, "trace_step"), "sealing": (exporter, "seal"), "swapping": (files, "_swap"),
         "in place": (exporter.ResumableWeights, "discard")}
if len(sys.argv) > 2:
    setattr(*where[sys.argv[2]], kill)
sources = exporter.Sources(RandomCheckpoint(family.expected, seed=0))
exporter.export(family, exporter.GraphOptions(), sources, Path(sys.argv[1]))
print(len(read))
"""


@pytest.mark.parametrize("moment", ["tracing", "swapping", "in place"])
def test_converted_weights_outlive_a_kill_at_any_later_moment(moment: str, tmp_path: Path) -> None:
    output = tmp_path / "a.diagd"
    command = [sys.executable, "-c", KILLED_LATER, str(output)]
    killed = subprocess.run([*command, moment], capture_output=True, text=True, check=False)
    assert killed.returncode == -9, killed.stderr
    assert output.exists() == (moment == "in place")
    before = (output / "weights.bin").read_bytes() if output.exists() else None
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (int(done.stdout) == 0) == (moment != "in place")
    assert before is None or (output / "weights.bin").read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["a.diagd"]


def test_weights_that_were_cut_or_noted_by_another_version_start_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "weights.bin"
    partial = ResumableWeights.path_of(output)

    def interrupted() -> None:
        with pytest.raises(KeyboardInterrupt):
            write(output, random_checkpoint(), NAMES[4], KeyboardInterrupt())

    interrupted()
    os.truncate(partial, partial.stat().st_size - 1)
    assert write(output, random_checkpoint(), None, KeyboardInterrupt()) == NAMES
    for content in (b"", b"\xff\xfe", b"[]\n", b"{}"):
        interrupted()
        journal = partial.with_suffix(".journal")
        journal.write_bytes(journal.read_bytes().splitlines()[0] + b"\n" + content)
        assert write(output, random_checkpoint(), None, KeyboardInterrupt()) == NAMES
    interrupted()
    monkeypatch.setattr(weights, "__version__", "another")
    assert write(output, random_checkpoint(), None, KeyboardInterrupt()) == NAMES
