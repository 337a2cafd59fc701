"""A cache is only a cache: whatever happens to it, the result is right, and one line says why."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from diagd.bundle import cache
from diagd.bundle.cache import cache_directory, clear, digest, entry, read, usage, write
from diagd.bundle.files import sha256
from diagd.bundle.lock import turn
from diagd.errors import UsageError

CONTENT = b"packed" * 1000


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DIAGD_CACHE", str(tmp_path / "cache"))
    cache._warned.clear()
    cache._swept.clear()
    return tmp_path / "cache"


def make(folder: Path) -> None:
    (folder / "a.bin").write_bytes(CONTENT)
    (folder / "b.bin").write_bytes(b"")


def made() -> Path | None:
    return entry("packed", "key", make, len(CONTENT))


def refuse(_: Path) -> None:
    raise AssertionError("made again")


def test_an_entry_is_made_once(root: Path) -> None:
    path = made()
    assert path == root / "packed" / "key"
    assert entry("packed", "key", refuse) == path
    assert (path / "a.bin").read_bytes() == CONTENT
    assert [file.name for file in (root / "packed").iterdir()] == ["key"]


def instead(path: Path, put: Callable[[Path], object]) -> None:
    """Put something else in the place of a file or folder."""
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    put(path)


HARMS: dict[str, Callable[[Path], object]] = {
    "truncated": lambda path: os.truncate(path / "a.bin", 100),
    "empty": lambda path: os.truncate(path / "a.bin", 0),
    "garbage": lambda path: (path / "a.bin").write_bytes(os.urandom(len(CONTENT))),
    "missing": lambda path: (path / "b.bin").unlink(),
    "foreign file": lambda path: (path / "c.bin").write_bytes(b"?"),
    "no list": lambda path: (path / cache.ENTRY_NAME).unlink(),
    "garbage list": lambda path: (path / cache.ENTRY_NAME).write_bytes(os.urandom(100)),
    "deep list": lambda path: (path / cache.ENTRY_NAME).write_text("[" * 100_000),
    "pipe": lambda path: instead(path / "b.bin", os.mkfifo),
    "piped list": lambda path: instead(path / cache.ENTRY_NAME, os.mkfifo),
    "folder": lambda path: instead(path / "b.bin", Path.mkdir),
    "link": lambda path: instead(path / "b.bin", lambda file: file.symlink_to("/dev/null")),
    "file": lambda path: instead(path, lambda folder: folder.write_text("?")),
}


@pytest.mark.parametrize("harm", HARMS.values(), ids=HARMS)
def test_a_damaged_entry_is_made_anew(
    harm: Callable[[Path], object], caplog: pytest.LogCaptureFixture
) -> None:
    path = made()
    assert path is not None
    harm(path)
    with caplog.at_level(logging.WARNING):
        assert made() == path
    assert (path / "a.bin").read_bytes() == CONTENT
    assert sorted(file.name for file in path.iterdir()) == ["a.bin", "b.bin", cache.ENTRY_NAME]
    assert [record.message for record in caplog.records if "damaged" in record.message]


def test_a_flipped_bit_is_seen_though_size_and_time_are_kept() -> None:
    path = made()
    assert path is not None
    before = (path / "a.bin").stat()
    content = bytearray(CONTENT)
    content[100] ^= 1
    (path / "a.bin").write_bytes(content)
    os.utime(path / "a.bin", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert made() == path
    assert (path / "a.bin").read_bytes() == CONTENT


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only the superuser gives files away")
def test_an_entry_of_another_user_is_not_trusted() -> None:
    path = made()
    assert path is not None
    os.chown(path / "a.bin", 12345, 12345)
    made()
    assert (path / "a.bin").stat().st_uid == 0


@pytest.mark.parametrize("place", ["/dev/null/cache", "/proc/cache", "{tmp}/file"])
def test_where_nothing_can_be_written_one_line_says_so(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("DIAGD_CACHE", place.format(tmp=tmp_path))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert made() is None
            write("notes", "key", b"note")
            assert read("notes", "key") is None
            assert digest(tmp_path / "file") == sha256(tmp_path / "file")
    assert len({record.message for record in caplog.records}) == len(caplog.records) <= 2
    assert "DIAGD_CACHE" in caplog.text
    assert usage().total_bytes == 0
    assert clear().total_bytes == 0


def test_what_cannot_be_made_is_told_and_not_kept(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    def fail(folder: Path) -> None:
        (folder / "a.bin").write_bytes(b"half")
        raise RuntimeError("the disk is full")

    with caplog.at_level(logging.WARNING):
        assert entry("packed", "key", fail) is None
    assert "the disk is full" in caplog.text
    assert not list((root / "packed").iterdir())


def test_what_no_cache_is_to_blame_for_is_raised(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    def fail(folder: Path) -> None:
        raise UsageError("the episode is damaged")

    with pytest.raises(UsageError, match="the episode is damaged"):
        entry("tokens", "key", fail)
    assert not caplog.text
    assert not list((root / "tokens").iterdir())


def test_what_is_too_large_is_not_made(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert entry("packed", "key", refuse, 1 << 60) is None
        monkeypatch.setenv("DIAGD_CACHE_LIMIT", "0.001")
        assert entry("packed", "key", refuse, 2_000_000) is None
    assert "it may hold" in caplog.text


def test_the_least_recently_used_go_first_and_none_in_use(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIAGD_CACHE_LIMIT", str(2.5 * len(CONTENT) / 1e9))
    old = time.time() - 10_000
    for number, key in enumerate(("first", "second")):
        path = entry("packed", key, make, len(CONTENT))
        assert path is not None
        os.utime(path / cache.ENTRY_NAME, (old + number, old + number))
    assert entry("packed", "first", refuse) is not None  # used again
    assert entry("packed", "third", make, len(CONTENT)) is not None
    assert {path.name for path in (root / "packed").iterdir()} == {"first", "third"}


def test_what_was_used_in_times_to_come_is_not_kept_for_ever(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that was ahead, or is behind now."""
    monkeypatch.setenv("DIAGD_CACHE_LIMIT", str(1.5 * len(CONTENT) / 1e9))
    path, ahead = entry("packed", "first", make, len(CONTENT)), time.time() + 10_000
    assert path is not None
    os.utime(path / cache.ENTRY_NAME, (ahead, ahead))
    assert entry("packed", "second", make, len(CONTENT)) is not None
    assert {path.name for path in (root / "packed").iterdir()} == {"second"}


@pytest.mark.parametrize("content", [b"", b"short", os.urandom(64)], ids=["empty", "short", "garbage"])
def test_damaged_notes_are_no_notes(root: Path, content: bytes) -> None:
    write("notes", "key", b"note")
    assert read("notes", "key") == b"note"
    (root / "notes" / "key").write_bytes(content)
    assert read("notes", "key") is None
    write("notes", "key", b"note")
    assert read("notes", "key") == b"note"


def test_digests_follow_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "weights.bin"
    file.write_bytes(CONTENT)
    assert digest(file) == sha256(file)
    monkeypatch.setattr("diagd.bundle.cache.files.sha256", lambda _: "taken again")
    assert digest(file) == sha256(file)
    status = file.stat()
    file.write_bytes(CONTENT[::-1])
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert digest(file) == "taken again"


def test_usage_and_clearing(root: Path) -> None:
    made()
    write("notes", "key", b"note")
    (root / "packed" / ".left.partial").write_bytes(b"half")
    assert usage().entries["packed"] == 1
    assert usage().total_bytes > len(CONTENT)
    assert clear().entries == {}
    assert not list((root / "packed").iterdir())


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"DIAGD_CACHE": "/c", "XDG_CACHE_HOME": "/x", "HOME": "/h"}, "/c"),
        ({"DIAGD_CACHE": "~/c", "HOME": "/h"}, "/h/c"),
        ({"DIAGD_CACHE": "", "XDG_CACHE_HOME": "/x", "HOME": "/h"}, "/x/diagd"),
        ({"XDG_CACHE_HOME": "", "HOME": "/h"}, "/h/.cache/diagd"),
        ({"XDG_CACHE_HOME": "relative", "HOME": "/h"}, "/h/.cache/diagd"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/diagd"),
        ({}, None),
        ({"HOME": ""}, None),
        ({"HOME": "relative"}, None),
    ],
)
def test_places(variables: dict[str, str], expected: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(_: int) -> None:
        raise KeyError("uid not found")

    monkeypatch.setattr("pwd.getpwuid", nobody)
    for name in ("DIAGD_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache_directory() == (Path(expected) if expected else None)


STARTER = """
import sys, time
from pathlib import Path
from diagd.bundle.cache import entry
def make(folder):
    (folder / "a.bin").write_bytes(b"part")
    time.sleep(0.05)
    (folder / "a.bin").write_bytes(b"whole" * 100_000)
found = entry("packed", "key", make)
print(found is None or (found / "a.bin").read_bytes() == b"whole" * 100_000)
"""


def test_processes_that_start_together_on_a_cold_cache(root: Path) -> None:
    command = [sys.executable, "-c", STARTER]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(6)]
    assert [run.communicate()[0].strip() for run in runs] == ["True"] * 6
    assert json.loads((root / "packed" / "key" / cache.ENTRY_NAME).read_text()).keys() == {"a.bin"}
    assert [file.name for file in (root / "packed").iterdir()] == ["key"]


def test_an_entry_that_another_process_fills_is_done_without_unsaid(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with turn(root / "packed" / "key"):
        assert entry("packed", "key", make) is None
    assert not caplog.text
    assert entry("packed", "key", make) is not None


def test_an_entry_in_use_is_never_taken_away(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without locks, a rival that found nothing is done after another entry appeared: it drops its own."""

    def rival(folder: Path) -> None:
        (folder / "a.bin").write_bytes(CONTENT)
        (folder / "b.bin").write_bytes(b"")
        if not (root / "packed" / "key").exists():
            assert entry("packed", "key", make) is not None
            inode.append((root / "packed" / "key").stat().st_ino)

    inode: list[int] = []
    monkeypatch.setattr("diagd.bundle.lock._lock", lambda _: True)
    path = entry("packed", "key", rival)
    assert path is not None
    assert path.stat().st_ino == inode[0]
