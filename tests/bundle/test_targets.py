"""What stands at a path is replaced only by its own kind."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from diagd.bundle.targets import bundle_target, check_apart, file_target, folder_target
from diagd.errors import UsageError

MANIFEST = '{"schema_version": 1, "files": {}}'


def fill(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def test_absent_and_empty_places_and_bundles_are_taken(tmp_path: Path) -> None:
    assert bundle_target(tmp_path / "new" / "deep") == tmp_path / "new" / "deep"
    assert bundle_target(fill(tmp_path / "empty")) == tmp_path / "empty"
    bundle = fill(tmp_path / "bundle", manifest__json=MANIFEST, notes__txt="mine")
    (tmp_path / "link").symlink_to(bundle)
    assert bundle_target(tmp_path / "link") == bundle
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "manifest", ["", "{", "[]", '{"name": "an app", "version": "1"}', '{"schema_version": 1}', "[" * 100_000]
)
def test_a_folder_of_the_user_is_no_bundle(manifest: str, tmp_path: Path) -> None:
    folder = fill(tmp_path / "models", manifest__json=manifest, thesis__txt="years")
    held = r"not empty \(it holds manifest\.json, thesis\.txt\) and not a bundle"
    with pytest.raises(UsageError, match=held):
        bundle_target(folder)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_a_pipe_is_no_manifest(tmp_path: Path) -> None:
    """It would be waited for."""
    os.mkfifo(fill(tmp_path / "models") / "manifest.json")
    with pytest.raises(UsageError, match=r"it holds manifest\.json"):
        bundle_target(tmp_path / "models")


def test_files_are_no_place_for_a_bundle(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for path in (tmp_path / "notes.txt", tmp_path / "notes.txt" / "a.diagd"):
        with pytest.raises(UsageError, match="no directory that can be written to"):
            bundle_target(path)


@pytest.mark.parametrize("path", ["", "."])
def test_the_folder_one_works_in_is_not_replaced(path: str) -> None:
    with pytest.raises(UsageError, match=r"--output is empty or '\.'"):
        bundle_target(Path(path))


@pytest.mark.parametrize("name", ["{cwd}", "..", "../..", "../{name}", "x/..", "{link}"])
def test_nor_is_it_by_another_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder, or a bundle, may be replaced: but not under the feet of a shell."""
    work, link = tmp_path / "models" / "work", tmp_path / "link"
    (work / "x").mkdir(parents=True)
    link.symlink_to(work)
    monkeypatch.chdir(work)
    path = Path(name.format(cwd=work, name=work.name, link=link))
    for target in (bundle_target, lambda path: folder_target(path, {}, "a report")):
        with pytest.raises(UsageError, match="folder one works in"):
            target(path)


@pytest.mark.skipif(os.name == "nt", reason="folders one works in stay there")
def test_a_folder_one_works_in_may_be_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    (tmp_path / "work").rmdir()
    assert bundle_target(tmp_path / "a.diagd") == tmp_path / "a.diagd"
    with pytest.raises(UsageError, match="check the path"):
        bundle_target(Path("a.diagd"))
    monkeypatch.chdir(tmp_path)


@pytest.mark.skipif(not Path("/sys/kernel").is_dir(), reason="needs a place nobody can write to")
def test_what_cannot_be_swapped_is_found_before_any_work() -> None:
    """Beside a bundle there must be room for the next one."""
    for path in (Path("/sys/kernel/a.diagd"), Path("/sys/kernel/a/b.diagd")):
        with pytest.raises(UsageError, match="cannot be written to"):
            bundle_target(path)


BOUND = """
cd {0}; mkdir -p kept "my bundle"; mount --bind kept "my bundle" || exit 77
exec {1} -c '
from pathlib import Path
from diagd.bundle.targets import bundle_target
from diagd.errors import UsageError
try:
    bundle_target(Path("my bundle"))
except UsageError as error:
    print(error)
bundle_target(Path("kept"))
'
"""


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare")
def test_a_folder_bound_to_another_name_cannot_be_swapped(tmp_path: Path) -> None:
    """As containers are given them: it is of the same file system, and as good as a mounted disk."""
    script = BOUND.format(tmp_path, sys.executable)
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode in (1, 77) and "Error" not in done.stderr:
        pytest.skip(f"nothing can be mounted here: {done.stderr.strip()[:100]}")
    assert done.returncode == 0, done.stderr
    assert "--output my bundle: it is a mount point" in done.stdout


def test_an_output_is_no_input(tmp_path: Path) -> None:
    prompt, link = tmp_path / "a.npy", tmp_path / "link.npy"
    prompt.write_bytes(b"\x93NUMPY")
    link.symlink_to(prompt)
    check_apart(tmp_path / "b.npy", {"--prompt": prompt, "--actions": None})
    for output in (prompt, link, tmp_path / "x" / ".." / "a.npy"):
        (tmp_path / "x").mkdir(exist_ok=True)
        with pytest.raises(UsageError, match=r"--output .* is what --prompt reads"):
            check_apart(output, {"--prompt": prompt})


def test_roots_and_circles_are_no_places(tmp_path: Path) -> None:
    (tmp_path / "one").symlink_to(tmp_path / "other")
    (tmp_path / "other").symlink_to(tmp_path / "one")
    for path in (Path("/"), Path("/proc"), tmp_path / "one"):
        with pytest.raises(UsageError):
            bundle_target(path)


def test_folders_of_results_are_known_by_their_files(tmp_path: Path) -> None:
    marks = {"report.json": b'"schema_version"'}
    assert folder_target(tmp_path / "new", marks, "a report")
    assert folder_target(fill(tmp_path / "ours", report__json=MANIFEST, notes="mine"), marks, "a report")
    theirs = fill(tmp_path / "theirs", report__json='{"year": 2026}')
    with pytest.raises(UsageError, match="not empty"):
        folder_target(theirs, marks, "a report")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.npy", b"\x93NUMPY\x01"),
        ("a.mp4", b"\0\0\0 ftypisom"),
        ("a.GIF", b"GIF89a"),
        ("a.npy", b""),
        ("new.npy", None),
    ],
)
def test_files_of_the_kind_are_replaced(name: str, content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert file_target(tmp_path / name, (".npy", ".mp4", ".gif")) == tmp_path / name
    assert len(list(tmp_path.iterdir())) == (content is not None)


def test_other_files_are_not(tmp_path: Path) -> None:
    (tmp_path / "a.npy").write_text("a diary")
    with pytest.raises(UsageError, match="not replaced"):
        file_target(tmp_path / "a.npy", (".npy",))
    (tmp_path / "trace.json").write_text('{"settings": 1}')
    with pytest.raises(UsageError, match="not replaced"):
        file_target(tmp_path / "trace.json", (), begins=b'{"traceEvents"')
    with pytest.raises(UsageError, match=r"ending in \.mp4 or \.npy"):
        file_target(tmp_path / "a.txt", (".mp4", ".npy"))
    with pytest.raises(UsageError, match="not replaced"):
        file_target(Path("/dev/null"), (), begins=b"{")


def test_what_nobody_may_write_is_not_replaced(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros(1))
    bundle = fill(tmp_path / "bundle", manifest__json=MANIFEST)
    for path, take in (
        (tmp_path / "a.npy", lambda path: file_target(path, (".npy",))),
        (bundle, bundle_target),
    ):
        assert take(path) == path
        path.chmod(0o555)
        with pytest.raises(UsageError, match="write-protected"):
            take(path)
        path.chmod(0o755)


def test_what_cannot_be_written_is_found_at_once(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be written to"):
        file_target(Path("/proc/a.npy"), (".npy",))
    with pytest.raises(UsageError, match="does not exist"):
        file_target(tmp_path / "none" / "a.npy", (".npy",))
    (tmp_path / "dangling.npy").symlink_to("none/a.npy")
    with pytest.raises(UsageError, match="/none does not exist"):
        file_target(tmp_path / "dangling.npy", (".npy",))
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(UsageError, match="notes is no directory"):
        file_target(tmp_path / "notes" / "a.npy", (".npy",))
    with pytest.raises(UsageError, match="File name too long"):
        bundle_target(tmp_path / ("x" * 250))
