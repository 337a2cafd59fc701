"""What a killed run leaves beside its output, and what the next one does with it."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest

from diagd.bundle.files import (
    atomic_directory,
    atomic_file,
    clear_leftovers,
    host,
    move,
    open_file,
    read_text,
    usual_rights,
    write_text,
)
from diagd.errors import UsageError

Writer = Callable[[Path], AbstractContextManager[Path]]
WRITER = """
import sys, time
from pathlib import Path
from diagd.bundle import files
with getattr(files, sys.argv[1])(Path(sys.argv[2])) as partial:
    (partial / "weights.bin" if partial.is_dir() else partial).write_bytes(b"half")
    print("writing", flush=True)
    time.sleep(60)
"""


def start_writing(kind: str, output: Path) -> subprocess.Popen[str]:
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, kind, str(output)], stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None
    assert writer.stdout.readline() == "writing\n"
    return writer


@pytest.mark.parametrize(
    ("kind", "name"), [("atomic_directory", "world.diagd"), ("atomic_file", "report.json")]
)
def test_leftovers_of_a_killed_run_go_and_those_of_a_live_one_stay(
    kind: str, name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output = tmp_path / name
    (tmp_path / f".{name}.weights.partial").write_bytes(b"to go on with")
    (tmp_path / f".other{name}.1.partial").write_bytes(b"of another output")
    killed, alive = start_writing(kind, output), start_writing(kind, output)
    try:
        killed.kill()
        killed.wait()
        (left,) = tmp_path.glob(f".{name}.{host()}.{killed.pid}.*.partial*")
        (going,) = tmp_path.glob(f".{name}.{host()}.{alive.pid}.*.partial*")
        with caplog.at_level(logging.WARNING), write(kind, output) as partial:
            assert not left.exists()
            assert going.exists()
            if kind == "atomic_file":
                partial.write_bytes(b"whole")
        assert f"removed {left}, left by a run that was killed" in caplog.text
        assert str(going) not in caplog.text
        names = {entry.name for entry in tmp_path.iterdir()}
        assert names == {name, going.name, f".{name}.weights.partial", f".other{name}.1.partial"}
    finally:
        alive.kill()
        alive.wait()


def write(kind: str, output: Path):  # type: ignore[no-untyped-def]
    return {"atomic_file": atomic_file, "atomic_directory": atomic_directory}[kind](output)


def test_what_a_killed_run_had_moved_away_comes_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Killed between its two renames: the old bundle has only its other name."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    output, retired = (
        tmp_path / "world.diagd",
        tmp_path / f".world.diagd.{host()}.{process.pid}.0a1b2c.retired",
    )
    retired.mkdir()
    (retired / "manifest.json").write_text("{}")
    clear_leftovers(output)
    assert (output / "manifest.json").read_text() == "{}"
    assert f"put back {output}" in caplog.text
    retired.mkdir()
    clear_leftovers(output)
    assert [entry.name for entry in tmp_path.iterdir()] == ["world.diagd"]


def test_nothing_of_this_process_is_touched(tmp_path: Path) -> None:
    mine = tmp_path / f".a.bin.{host()}.{os.getpid()}.0a1b2c.partial.bin"
    mine.write_bytes(b"")
    clear_leftovers(tmp_path / "a.bin")
    assert mine.exists()


@pytest.mark.parametrize("kind", ["atomic_directory", "atomic_file"])
def test_partial_results_of_other_machines_and_containers_are_left_alone(kind: str, tmp_path: Path) -> None:
    """Process numbers repeat there: one that is free here may be writing there."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    other = tmp_path / f".out.0123abcd.{process.pid}.0a1b2c.partial"
    other.write_bytes(b"half")
    with write(kind, tmp_path / "out") as partial:
        if kind == "atomic_file":
            partial.write_bytes(b"whole")
    assert other.read_bytes() == b"half"


def test_a_new_directory_keeps_what_the_old_one_held_beside(tmp_path: Path) -> None:
    output = tmp_path / "out"
    (output / "sub" / "empty").mkdir(parents=True)
    (output / "sub" / "notes.txt").write_text("mine")
    (output / "old.bin").write_text("replaced")
    (output / "new.bin").write_text("mine too")
    (output / "link").symlink_to("sub/notes.txt")
    with atomic_directory(output, ours=("old.bin",)) as directory:
        (directory / "new.bin").write_text("new")
        (output / "late.txt").write_text("put there meanwhile")
    assert (output / "link").is_symlink()
    assert (output / "link").read_text() == "mine"
    assert (output / "sub" / "empty").is_dir()
    assert (output / "new.bin").read_text() == "new"
    assert (output / "new.bin.kept").read_text() == "mine too"
    assert (output / "late.txt").read_text() == "put there meanwhile"
    assert not (output / "old.bin").exists()
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.parametrize("kind", ["atomic_directory", "atomic_file"])
def test_a_link_stays_one_and_its_target_is_written(kind: str, tmp_path: Path) -> None:
    link, target = tmp_path / "link", tmp_path / "elsewhere" / "target"
    link.symlink_to(target)
    with write(kind, link) as partial:
        (partial / "file" if kind == "atomic_directory" else partial).write_bytes(b"whole")
    assert link.is_symlink()
    assert (target / "file" if kind == "atomic_directory" else target).read_bytes() == b"whole"


def test_a_file_keeps_its_rights(tmp_path: Path) -> None:
    path = tmp_path / "private.npy"
    path.touch(mode=0o600)
    with write("atomic_file", path) as partial:
        partial.write_bytes(b"whole")
    assert (path.stat().st_mode & 0o777, path.read_bytes()) == (0o600, b"whole")


@pytest.mark.parametrize("kind", [atomic_file, atomic_directory])
def test_a_full_disk_is_named(kind: Writer, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="report") as caught, kind(tmp_path / "report"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert caught.value.filename == str(tmp_path / "report")


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EIO])
def test_a_disk_that_flushes_nothing_is_written_all_the_same(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(handle: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    with nullcontext() if number == errno.EINVAL else pytest.raises(OSError, match="error"):
        write_text(tmp_path / "a", "text")
    assert (tmp_path / "a").exists() == (number == errno.EINVAL)


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP, errno.EIO])
def test_a_disk_without_rights_is_written_all_the_same(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As network disks, those of Windows and of clouds are mounted."""

    def chmod(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    def no_link(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    file, folder, new = tmp_path / "file", tmp_path / "folder", tmp_path / "new"
    file.write_text("old")
    folder.mkdir()
    (folder / "mine").write_text("kept")
    monkeypatch.setattr(os, "chmod", chmod)
    monkeypatch.setattr(Path, "chmod", chmod)  # Python 3.10 looks for it but once
    monkeypatch.setattr(os, "link", no_link)
    refusal = pytest.raises(OSError, match="error") if number == errno.EIO else nullcontext()
    with refusal:
        write_text(file, "new")
    with refusal, atomic_directory(folder) as partial:
        (partial / "ours").write_text("new")
    with refusal, usual_rights(new):
        pass
    written = number != errno.EIO
    assert file.read_text() == ("new" if written else "old")
    assert sorted(path.name for path in folder.iterdir()) == (["mine", "ours"] if written else ["mine"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "new"]


def test_what_is_read_has_an_end(tmp_path: Path) -> None:
    for device in ("/dev/zero", "/dev/full"):
        with pytest.raises(UsageError, match=f"cannot read text from {device}: .* bytes; split it"):
            read_text(Path(device), "text from")
        with pytest.raises(OSError, match="pipe or device"):
            open_file(Path(device))


def test_a_text_may_come_out_of_a_pipe_and_who_waits_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diagd.bundle.files._PATIENCE_SECONDS", 0.0)
    pipe, told = tmp_path / "pipe", threading.Event()
    os.mkfifo(pipe)
    monkeypatch.setattr("diagd.bundle.files._LOG.warning", lambda *said: told.set())

    def write() -> None:
        told.wait(60)
        pipe.write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n")

    writer = threading.Thread(target=write)
    writer.start()
    assert read_text(pipe, "text from") == "one\ntwo\nthree\n"
    assert told.is_set()
    writer.join()


def test_devices_and_pipes_are_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(UsageError, match="no regular file"), write("atomic_file", pipe):
        pass
    assert pipe.is_fifo()


def test_where_names_cannot_be_exchanged_the_old_directory_moves_away_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diagd.bundle.files._exchange", lambda *_: False)
    output = tmp_path / "out"
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    with atomic_directory(output) as directory:
        (directory / "new.bin").write_text("new")
    assert {file.name for file in output.iterdir()} == {"notes.txt", "new.bin"}
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.parametrize("killed_while", ["copying", "removing"])
def test_a_directory_that_was_being_copied_away_comes_back(killed_while: str, tmp_path: Path) -> None:
    """Where it could not be renamed: whatever is left of it, one of the two is whole."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    output, run = tmp_path / "world.diagd", f".world.diagd.{host()}.{process.pid}"
    kind = "0a1b2c.retired" if killed_while == "removing" else "3d4e5f.partial"
    copy, new = tmp_path / f"{run}.{kind}", tmp_path / f"{run}.0a1b2c.partial"
    for folder in (output, copy, new):
        folder.mkdir()
    whole, cut = (copy, output) if killed_while == "removing" else (output, copy)
    (whole / "manifest.json").write_text("old")
    (whole / "notes.txt").write_text("mine")
    (cut / "notes.txt").write_text("mine")
    (new / "manifest.json").write_text("new")
    clear_leftovers(output)
    assert list(tmp_path.iterdir()) == [output]
    assert {file.name: file.read_text() for file in output.iterdir()} == {
        "manifest.json": "old",
        "notes.txt": "mine",
    }


OVERLAID = """
set -e
cd {0}; mkdir -p lower/world.diagd upper work merged
echo old > lower/world.diagd/old.bin; echo mine > lower/world.diagd/notes.txt
mount -t overlay overlay -o lowerdir=lower,upperdir=upper,workdir=work,userxattr merged || exit 77
exec {1} -c '
from pathlib import Path
from diagd.bundle.files import atomic_directory
with atomic_directory(Path("merged/world.diagd"), ours=("old.bin",)) as partial:
    (partial / "new.bin").write_text("new")
print(sorted(path.name for path in Path("merged/world.diagd").iterdir()), len(list(Path("merged").iterdir())))
'
"""


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare")
def test_a_directory_of_a_container_image_is_replaced(tmp_path: Path) -> None:
    """There a rename crosses devices, as the system says."""
    script = OVERLAID.format(tmp_path, sys.executable)
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode in (1, 77) and "Error" not in done.stderr:
        pytest.skip(f"no overlays here: {done.stderr.strip()[:100]}")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "['new.bin', 'notes.txt'] 1\n"


def test_files_that_are_held_for_a_moment_are_moved_on_windows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, replace = [3], Path.replace

    def refuse(path: Path, target: Path) -> Path:
        held[0] -= 1
        if held[0] >= 0:
            raise PermissionError(13, "held")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", refuse)
    (tmp_path / "new").write_bytes(b"new")
    monkeypatch.setattr("sys.platform", "linux")
    with pytest.raises(PermissionError):
        move(tmp_path / "new", tmp_path / "old")
    monkeypatch.setattr("sys.platform", "win32")
    move(tmp_path / "new", tmp_path / "old")
    assert (tmp_path / "old").read_bytes() == b"new"
    monkeypatch.setattr("diagd.bundle.files._PATIENCE_SECONDS", 0.0)
    held[0] = 1000
    with pytest.raises(PermissionError):
        move(tmp_path / "old", tmp_path / "new")
