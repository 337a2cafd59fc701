"""An interrupted export goes on where it stopped; a failed one leaves nothing."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diagd.bundle import files
from diagd.cli.main import main
from diagd.export import exporter, weights
from diagd.export.checkpoints import Checkpoint, RandomCheckpoint
from diagd.export.exporter import Sources
from diagd.export.options import GraphOptions
from diagd.export.weights import ResumableWeights, WeightSource, export_key, source_digest
from diagd.schedule import StreamLayout
from tests.models import small_family
from tests.oracles.models import small_model

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

    sources = {name: source(name) for name in places}
    with ResumableWeights(output, export_key(checkpoint, places)) as partial:
        weights.write(partial.path, places, sources, done=partial.done, finished=partial.finished)
        partial.place(output)
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


def test_a_disk_that_flushes_nothing_is_written_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(handle: int) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "fsync", fsync)
    assert write(tmp_path / "weights.bin", random_checkpoint(), None, KeyboardInterrupt()) == NAMES


def test_what_somebody_put_beside_the_weights_stays(tmp_path: Path) -> None:
    checkpoint, output = random_checkpoint(), tmp_path / "weights.bin"
    note = ResumableWeights.path_of(output).with_name("NOTES.txt")
    note.parent.mkdir()
    note.write_text("mine")
    for error in (KeyboardInterrupt(), OSError()):
        with pytest.raises(type(error)):
            write(output, checkpoint, NAMES[2], error)
        assert note.read_text() == "mine"
    assert write(output, checkpoint, None, KeyboardInterrupt()) == NAMES
    assert sorted(note.parent.iterdir()) == [note]


@pytest.mark.parametrize("what", ["file", "link"])
def test_what_has_the_name_of_the_folder_is_no_obstacle(what: str, tmp_path: Path) -> None:
    """Earlier versions kept weights in a file of that name; what a link leads to stays."""
    output, other = tmp_path / "weights.bin", tmp_path / "other"
    home = ResumableWeights.path_of(output).parent
    other.mkdir()
    (other / "weights.bin").write_text("mine")
    if what == "file":
        home.write_bytes(b"half")
    else:
        home.symlink_to(other)
    assert write(output, random_checkpoint(), None, KeyboardInterrupt()) == NAMES
    assert (other / "weights.bin").read_text() == "mine"
    assert not home.exists()


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


def test_a_changed_shard_has_another_key_and_digest(tmp_path: Path) -> None:
    index, shard = tmp_path / "model.safetensors.index.json", tmp_path / "a.safetensors"
    index.write_text('{"weight_map": {"w": "a.safetensors"}}')
    checkpoint = random_checkpoint()
    checkpoint.source = str(index)
    found = set()
    for content in (b"one", b"two"):
        shard.write_bytes(content)
        os.utime(shard, ns=(1, content[0]))
        found |= {export_key(checkpoint, placements(checkpoint)), source_digest(str(index))}
    assert len(found) == 4


FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([__name__, "onnxscript.optimizer"])  # imported once for all processes
MOMENTS = {
    "tracing": (exporter, "trace_step"),
    "swapping": (files, "_swap"),
    "in place": (ResumableWeights, "discard"),
}


def kill(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def exporting(output: Path, told: Path, killed: int | str) -> None:
    """Export a small model and tell how many tensors were read; killed at such a number, or at a moment."""
    finished, read = ResumableWeights.finished, list[int]()
    weights.SYNC_BYTES = 1

    def count(self: ResumableWeights, end: int) -> None:
        finished(self, end)
        read.append(end)
        if len(read) == killed:
            kill()

    ResumableWeights.finished = count  # type: ignore[method-assign]
    if isinstance(killed, str):
        owner, name = MOMENTS[killed]
        act = getattr(owner, name)

        def kill_in_time(*arguments: object, **named: object) -> object:
            if killed != "in place" or output.exists():
                kill()
            return act(*arguments, **named)

        setattr(owner, name, kill_in_time)
    family = small_family(small_model(StreamLayout(3, 4, after=2)))
    exporter.export(family, GraphOptions(), Sources(RandomCheckpoint(family.expected, seed=0)), output)
    told.write_text(str(len(read)))


def export_in_a_process(output: Path, killed: int | str = 0) -> int:
    """How many tensors an export reads, 0 where it is killed."""
    told = output.parent.with_suffix(".told")
    told.unlink(missing_ok=True)
    output.parent.mkdir(exist_ok=True)
    process = FORKS.Process(target=exporting, args=(output, told, killed))
    process.start()
    process.join()
    assert process.exitcode == (-signal.SIGKILL if killed else 0)
    assert told.exists() == (not killed)
    return 0 if killed else int(told.read_text())


def test_a_killed_process_is_no_loss(tmp_path: Path) -> None:
    output, whole = tmp_path / "a" / "a.diagd", tmp_path / "b" / "b.diagd"
    export_in_a_process(output, killed=5)
    assert not output.exists()
    assert export_in_a_process(output) == export_in_a_process(whole) - 5
    assert (output / "weights.bin").read_bytes() == (whole / "weights.bin").read_bytes()


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


@contextmanager
def interrupted_at(step: str) -> Iterator[None]:
    finished, count = ResumableWeights.finished, list[int]()

    def fifth(self: ResumableWeights, end: int) -> None:
        finished(self, end)
        count.append(end)
        if len(count) == 5:
            interrupt()

    with pytest.MonkeyPatch.context() as patch:
        if step == "weights":
            patch.setattr(ResumableWeights, "finished", fifth)
        elif step == "before":
            patch.setattr(exporter.Exporter, "_write_weights", interrupt)
        else:
            patch.setattr(exporter, step, interrupt)
        yield


@pytest.mark.parametrize("step", ["before", "weights", "trace_step", "seal"])
def test_what_an_interrupted_export_promises_is_kept(
    step: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At any moment: the message says that weights are kept where they are, and else says nothing."""
    words = ["export", "--model", "crafter-3m", "--output", str(tmp_path / "a.diagd")]
    with interrupted_at(step):
        assert main(words) == 130
    kept = sorted(file.name for file in tmp_path.iterdir())
    assert ("goes on where this one stopped" in capsys.readouterr().out) == (step != "before")
    assert [name for name in kept if name.endswith(".weights.partial")] or step == "before"
    assert not (tmp_path / "a.diagd").exists()
    if step == "seal":
        assert main(words) == 0
        assert [file.name for file in tmp_path.iterdir()] == ["a.diagd"]


@pytest.mark.parametrize("moment", MOMENTS)
def test_converted_weights_outlive_a_kill_at_any_later_moment(moment: str, tmp_path: Path) -> None:
    output = tmp_path / "out" / "a.diagd"
    export_in_a_process(output, moment)
    assert output.exists() == (moment == "in place")
    before = (output / "weights.bin").read_bytes() if output.exists() else None
    assert (export_in_a_process(output) == 0) == (moment != "in place")
    assert before is None or (output / "weights.bin").read_bytes() == before
    assert [file.name for file in output.parent.iterdir()] == ["a.diagd"]


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
